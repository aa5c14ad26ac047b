"""The command line: flags over the fields of a config, or over the settings of a finished run (tyro)."""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable
from typing import Any

from miracle_jax import storage
from miracle_jax.config import Config, load_file, load_run
from miracle_jax.errors import UserError


def read_config(command: str, doc: str, argv: list[str] | None = None) -> tuple[Config, str, str]:
    """Reads `--config FILE --workdir DIR` and overrides of single fields. Returns (config, FILE, DIR).

    Either may be missing and is empty then; without FILE the flags change the defaults.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default="")
    first.add_argument("--workdir", default="")
    known, rest = first.parse_known_args(sys.argv[1:] if argv is None else argv)
    base = load_file(known.config) if known.config else Config()
    about = "--config FILE: the config that the flags below change.\n--workdir DIR: where the run keeps everything."
    config = parse(base, rest, f"{command} --config FILE", f"{doc}\n{about}")
    config.check()
    return config, known.config, known.workdir


def read_options(command: str, doc: str, words: str, make: Callable[[Config], Any], argv: list[str] | None = None):
    """Reads `WORKDIR [WORD ...] [--flag ...]` of a command on a finished run. Returns (workdir, words, options).

    Args:
      words: what the words after WORKDIR are, for --help; empty: there are none.
      make: from the run's config to the options that the flags change. Their `sample` and `decode` take the place of
        the run's.
    """
    given, argv = split_words(argv)
    if not given and not {"-h", "--help"} & set(argv):
        raise UserError(f"give the folder of a finished run first, for instance {command} runs/tiny")
    workdir, *more = given or [""]
    if more and not words:
        raise UserError(f"{more[0]!r} is not understood: after the folder of the run come flags; --help lists them")
    run = load_run(storage.run_folder(workdir)) if workdir else Config()
    options = parse(make(run), argv, f"{command} WORKDIR {words}".rstrip(), doc)
    dataclasses.replace(run, sample=options.sample, decode=options.decode).check()
    return workdir, more, options


def read_pair(command: str, doc: str, words: str, otherwise: str, default, argv: list[str] | None):
    """Reads `SOURCE TARGET [--flag ...]` of a command that turns one into the other. Returns (words, options).

    words: what they are, for --help. otherwise: the sentence for any other number of words.
    """
    given, flags = split_words(argv)
    options = parse(default, flags, f"{command} {words}", doc)
    if len(given) != 2:
        raise UserError(otherwise)
    return given, options


def split_words(argv: list[str] | None) -> tuple[list[str], list[str]]:
    """The words before the first flag, and the flags."""
    argv = sys.argv[1:] if argv is None else argv
    words = list(itertools.takewhile(lambda word: not word.startswith("--") and word != "-h", argv))
    return words, argv[len(words) :]


def parse(default, argv: list[str], usage: str, doc: str):
    """Flags over the fields of a dataclass."""
    import tyro  # slow to import

    def run(**more):
        # Without flag conversion every field takes a value: --remat True, as --mesh.fsdp 4.
        # Of a union the default's type has the flags.
        off = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
        return tyro.cli(type(default), default=default, args=argv, prog=usage, description=doc, config=off, **more)

    options, unknown = run(return_unknown_args=True)
    if unknown and not unknown[0].startswith("-"):
        raise UserError(f"{unknown[0]!r} belongs to no flag; words without a flag come first: {usage}")
    return run() if unknown else options  # it ends with what tyro says of an unknown flag
