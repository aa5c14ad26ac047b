"""A user's mistake is one sentence, not a traceback."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Sequence

from miracle_jax import preemption

SHOWN = 20
"""Problems that a message lists; the others are counted."""

LONGEST_LINE = 4000
"""Characters of a line of a message; of a longer one, which quotes some user's megabyte, the middle is left out."""

WORTH_TELLING = 10.0
"""Seconds of compiling that an entry point speaks of."""


class UserError(Exception):
    """Something the user can put right. The message says what, where, why and what to do."""

    status = 2
    """That a command ends with."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """The text as a terminal may have it: what it quotes from a file steers no terminal, can be encoded, and ends."""

    def cut(line):
        half = LONGEST_LINE // 2
        return line if len(line) <= LONGEST_LINE else f"{line[:half]} [...] {line[-half:]}"

    shown = "\n".join(map(cut, text.split("\n")))
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in shown)


class Problems:
    """What is wrong with an input: SHOWN in words, the others as a number. A file that is wrong in each of a million
    lines takes no memory for it."""

    def __init__(self):
        self.count, self._first = 0, []

    def __bool__(self) -> bool:
        return self.count > 0

    def __iadd__(self, more: "Problems | Sequence[str]") -> "Problems":
        count, first = (more.count, more._first) if isinstance(more, Problems) else (len(more), more)
        self.count += count
        self._first += first[: SHOWN - len(self._first)]
        return self

    def __str__(self) -> str:
        more = [f"... and {self.count - SHOWN} more"] * (self.count > SHOWN)
        return "\n".join([*self._first, *more])


def first_line(error: Exception) -> str:
    """The start of what a library says of an error, to be quoted in a sentence of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def refuse(problems: Problems | Sequence[str], sentence: str) -> None:
    """Raises a UserError that lists the problems under the sentence, if there are any."""
    every = Problems()
    every += problems
    if every:
        raise UserError(f"{sentence}:\n{every}")


@contextlib.contextmanager
def one_sentence():
    """For entry points: prints a UserError as `error: ...` and exits with status 2; Ctrl-C exits with 130, SIGTERM with
    75 (see preemption.py).

    What the package warns of becomes `warning: ...`, without the place in our code that the default formats show.
    In those that compute, what JAX compiles is kept for the next time; if it took long, they end by saying so.
    """
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that is not in UTF-8 has no place for every reply
        sys.stdout.reconfigure(errors="backslashreplace")
    with _plain_log():
        try:
            with preemption.watched(), _compiling() if "jax" in sys.modules else contextlib.nullcontext():
                yield
        except preemption.Preempted as stop:
            _end(preemption.PREEMPTED, "", f"{stop}; run the same command again to go on")
        except UserError as error:
            _end(error.status, "error: ", str(error))
        except (OSError, RuntimeError) as error:
            if _cluster() and (lost := _cluster().lost(error)):
                _end(lost.status, "error: ", str(lost))
            if isinstance(error, RuntimeError):
                raise
            # A full disk, a folder without permission.
            _end(2, "error: ", f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
        except MemoryError:
            _end(2, "error: ", "there is not enough memory for this; give it less at a time")
        except KeyboardInterrupt:
            _end(130, "", "interrupted")


def _end(status: int, kind: str, sentence: str):
    print(kind + sentence, file=sys.stderr)
    if _cluster():
        _cluster().leave(status, sentence)
    raise SystemExit(status) from None


def _cluster():
    """cluster.py, in commands that can have joined one."""
    return sys.modules.get("miracle_jax.cluster")


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
