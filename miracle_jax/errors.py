"""A user's mistake is one sentence, not a traceback."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Sequence

SHOWN = 20
"""Problems that a message lists; the others are counted."""

WORTH_TELLING = 10.0
"""Seconds of compiling that an entry point speaks of."""


class UserError(Exception):
    """Something the user can put right. The message says what, where, why and what to do."""


def first_line(error: Exception) -> str:
    """The start of what a library says of an error, to be quoted in a sentence of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def refuse(problems: Sequence[str], sentence: str) -> None:
    """Raises a UserError that lists the problems under the sentence, if there are any."""
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] * (len(problems) > SHOWN)
        raise UserError("\n".join([f"{sentence}:", *problems[:SHOWN], *more]))


@contextlib.contextmanager
def one_sentence():
    """For entry points: prints a UserError as `error: ...` and exits with status 2; Ctrl-C exits with 130.

    What the package warns of becomes `warning: ...`, without the place in our code that the default formats show.
    In those that compute, what JAX compiles is kept for the next time; if it took long, they end by saying so.
    """
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    with _plain_log():
        try:
            with _compiling() if "jax" in sys.modules else contextlib.nullcontext():
                yield
        except UserError as error:
            _end(2, "error: ", str(error))
        except OSError as error:  # a full disk, a folder without permission
            _end(2, "error: ", f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
        except KeyboardInterrupt:
            _end(130, "", "interrupted")


def _end(status: int, kind: str, sentence: str):
    print(kind + sentence, file=sys.stderr)
    if "jax" in sys.modules:
        from miracle_jax import cluster

        cluster.leave(status, sentence)
    raise SystemExit(status) from None


@contextlib.contextmanager
def _compiling():
    from miracle_jax import compiled

    compiled.keep()
    before = len(compiled.PROGRAMS)
    yield
    seconds, text = compiled.summary(compiled.PROGRAMS[before:])
    if seconds >= WORTH_TELLING:
        print(text, file=sys.stderr)


@contextlib.contextmanager
def _plain_log():
    """The package's log on stderr, past the handlers that other packages put on the root logger."""
    log, handler = logging.getLogger("miracle_jax"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    log.addHandler(handler)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = True
