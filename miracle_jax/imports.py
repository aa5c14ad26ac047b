"""Dialogues of other forms become ours: `python -m miracle_jax.dataset import KIND SOURCE OUT`.

    import released FOLDER OUT                                   the paper's released files
    import messages chat.jsonl OUT --tag attitude=optimistic     chat messages with roles (messages.py)
    import chitchat package:chitchat_dataset/dataset.json OUT    conversations between people (chitchat.py)

SOURCE is a file or a folder of them, JSON or JSONL. OUT is a new folder: train.jsonl, validation.jsonl and test.jsonl,
in which every line names the attributes that it is labelled for; schema.toml, where the attributes are not the paper's;
and a README.md with the source, the counts and the command.
"""

import contextlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from miracle_jax import dataset, reading, storage
from miracle_jax.attributes import Schema
from miracle_jax.command_line import read_pair
from miracle_jax.dataset import Instance
from miracle_jax.errors import Problems, UserError, printable

COMMAND = "python -m miracle_jax.dataset import"
HELD_OUT = {"dev": "validation", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
"""Words in the name of a file that is not for training -> its split."""
RELEASED_NAMES = {"l": "language_style", "languagestyle": "language_style", "a": "attitude",
                  "m": "mental_characteristic", "mindchar": "mental_characteristic"}  # fmt: skip
"""Words in the names of the paper's files (dialogue_l.raw.jsonl) -> the attribute that their tags are of."""


@dataclass(frozen=True)
class Options:
    """How to read a source."""

    schema: str = ""
    """TOML file that names the attributes and their aspects. Empty: the paper's three."""
    on_error: Literal["stop", "skip"] = "stop"
    """A malformed record: stop, and write nothing, or drop the record and count it."""

    def labels(self) -> Schema:
        """The attributes of what is written. Raises UserError for options that cannot be."""
        return Schema.load(self.schema)


class Written:
    """The files in a folder that is being made, and what went into them and what did not."""

    def __init__(self, folder: Path, schema: Schema, source: str, on_error: str):
        self.schema, self._source, self._on_error = schema, source, on_error
        self.counts: dict[str, Counter] = {}
        """split -> aspect ids -> instances."""
        self.dialogues: Counter = Counter()
        """split -> number."""
        self.notes: Counter = Counter()
        """What was left out or changed -> how many of it."""
        self.problems, self.dropped = Problems(), 0
        self._folder, self._files = folder, contextlib.ExitStack()
        self._file: dict[str, Any] = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._files.close()

    def refuse(self, *problems: str) -> bool:
        """Notes what is wrong with a record; returns whether anything is."""
        self.problems += problems
        self.dropped += bool(problems)
        return bool(problems)

    def check(self) -> None:
        """Raises UserError with all problems, unless malformed records are to be dropped."""
        if self.problems and self._on_error == "stop":
            raise UserError(
                f"{dataset.count(self.problems.count, 'problem')} in {dataset.count(self.dropped, 'record')} of "
                f"{self._source}; mend them, or drop the records with --on-error skip:\n{self.problems}"
            )

    def dialogue(self, split: str, whole: Instance, most: int) -> None:
        """An instance for every turn of a dialogue. One of more than `most` turns is taken for several, one after the
        other, since instances repeat the turns before their last."""
        for first in range(0, len(whole.questions), most):
            self.dialogues[split] += 1
            for end in range(first + 1, min(first + most, len(whole.questions)) + 1):
                self.instance(split, whole.questions[first:end], whole.replies[first:end], whole.topic, whole.labels)

    def instance(
        self, split: str, questions: Sequence[str], replies: Sequence[str], topic: str, labels: Sequence[int]
    ) -> None:
        if split not in self._file:
            self.counts[split] = Counter()
            self._file[split] = self._files.enter_context((self._folder / f"{split}.jsonl").open("wb"))
        tag = self.schema.tag(labels) or None
        record = {"input": questions, "output": replies, "personas": topic, "tag": tag}
        self._file[split].write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.counts[split][tuple(labels)] += 1

    def table(self) -> str:
        """The counts in Markdown."""
        splits = [split for split in dataset.SPLITS if split in self.counts]
        rows = [("", *(f"{split}.jsonl" for split in splits)), ("---", *("---:" for _ in splits))]
        if self.dialogues:
            rows.append(("dialogues", *(f"{self.dialogues[split]:,}" for split in splits)))
        rows.append(("instances", *(f"{self.counts[split].total():,}" for split in splits)))
        for labels in sorted({labels for split in splits for labels in self.counts[split]}):
            name = self.schema.describe(labels) or "no label"
            rows.append((f"- {name}", *(f"{self.counts[split][labels]:,}" for split in splits)))
        return "".join(f"| {' | '.join(row)} |\n" for row in rows)

    def noted(self) -> str:
        return "".join(f"- {count:,} {what}\n" for what, count in self.notes.items() if count)


def run(argv: list[str]) -> str:
    """`KIND SOURCE OUT [--flag ...]`. Returns what there is to say of it."""
    from miracle_jax import chitchat, messages  # they import this module

    kinds = {"released": (Options(), released), "messages": (messages.Options(), messages.convert),
             "chitchat": (chitchat.Options(), chitchat.convert)}  # fmt: skip
    if argv and argv[0] in ("-h", "--help"):
        return f"usage: {COMMAND} KIND SOURCE OUT [--flag ...]\n\n{__doc__}\nFlags: {COMMAND} KIND --help"
    if not argv or argv[0] not in kinds:
        given = f"unknown kind {argv[0]!r}" if argv else "import needs a kind"
        raise UserError(f"{given}; there are {', '.join(kinds)}: {COMMAND} KIND SOURCE OUT")
    (default, convert), command = kinds[argv[0]], f"{COMMAND} {argv[0]}"
    otherwise = f"give what to read and the folder to write: {command} SOURCE OUT"
    (source, out), options = read_pair(command, __doc__, "SOURCE OUT", otherwise, default, argv[1:])
    with storage.new_folder(out) as folder:
        with Written(folder, options.labels(), source, options.on_error) as written:
            about = convert(source, options, written)
        written.check()
        if not written.counts:
            raise UserError(f"there is no dialogue in {source}" + f":\n{written.problems}" * bool(written.problems))
        written.notes["malformed records dropped"] = written.dropped
        if own := written.schema != Schema.load():
            written.schema.save(folder / "schema.toml")
        made = f"Made by `{shlex.join(['python', '-m', 'miracle_jax.dataset', 'import', *argv])}`."
        report = f"{written.table()}\n{written.noted()}"
        text = f"# {Path(out).name}\n\n{about}\n\n{made}\n\n{report}"
        (folder / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")
    dropped = f"\n{printable(str(written.problems))}\n" * bool(written.problems)
    return f"wrote {out}\n\n{report}{dropped}\n{next_step(out, written, own)}"


def next_step(out: str, written: Written, own_schema: bool) -> str:
    """The command that trains on what was written."""
    if not {"train", "validation"} <= written.counts.keys():
        return "training needs files for both --data.train and --data.validation"
    flags = ["--data.train", f"{out}/train.jsonl", "--data.validation", f"{out}/validation.jsonl"]
    flags += ["--data.schema", f"{out}/schema.toml"] * own_schema
    command = shlex.join(["python", "-m", "miracle_jax.train", "--config", "configs/tiny.py",
                          "--workdir", f"runs/{Path(out).name}", *flags])  # fmt: skip
    unlabelled = written.schema.unknown in written.counts["train"]
    return f"train on it: {command}" + (
        "\nwhat has no label teaches the encoders and the decoder; name labelled files beside it to teach attributes"
        * unlabelled
    )


# ------------------------------------------------------------------------------------------------ files


def files_of(source: str) -> list[tuple[Path, list[str]]]:
    """The file, or those of a folder, each with the words in its name. Raises UserError where there is none."""
    folder = Path(source).expanduser()
    with contextlib.suppress(ValueError, OSError):  # a NUL, a name that is too long: `regular` says so
        if folder.is_dir():
            found = [path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".jsonl")]
            if not found:
                raise UserError(f"{source} holds no .json or .jsonl file")
            return [(reading.regular(path), _words(path.relative_to(folder))) for path in found]
    return [(reading.regular(folder), _words(Path(folder.name)))]


def _words(path: Path) -> list[str]:
    return re.findall("[a-z]+", str(path).lower())


def split_of(words: Sequence[str]) -> str:
    """The split of a file by the words in its name, and in those of the folders between."""
    return next((HELD_OUT[word] for word in words if word in HELD_OUT), "train")


def records(path: Path, written: Written) -> Iterator[tuple[str, Any]]:
    """(file:line, value) of every line, of every element where the file is an array, or of the one object that it is.
    What cannot be parsed is refused."""
    content = reading.content(path)
    if reading.begins(content) == b"[":
        try:
            yield from ((f"{path}:{line}", value) for line, _, value in reading.entries(content, path))
        except UserError as error:
            written.refuse(str(error))
        return
    for place, (number, line) in enumerate(reading.lines(content)):
        try:
            value = reading.parse(line)
        except UserError as error:
            if not place and (whole := _parsed(content)) is not None:
                yield f"{path}:{number}", whole
                return
            written.refuse(f"{path}:{number}: {error}; expected one JSON object a line, or an array of them, in UTF-8")
            continue
        yield f"{path}:{number}", value


def _parsed(content: bytes) -> Any:
    with contextlib.suppress(UserError):
        return reading.parse(content)


# ------------------------------------------------------------------------------------------------ the paper's files


def released(source: str, options: Options, written: Written) -> str:
    """The paper's files: a line is an instance; its tag is an id, whose attribute the file's name tells, a list, a
    mapping, or the name of an aspect. SOURCE may be attribute=FILE.

    Returns what the source is, for README.md, as every kind does.
    """
    schema = written.schema
    name, source = dataset.source(source, schema)
    for path, words in files_of(source):
        attribute = _attribute_of(words, schema) if name is None else schema.attribute_index(name)
        for where, record in records(path, written):
            if isinstance(record, dict) and "input" not in record and {"text", "labels"} <= record.keys():
                written.notes["texts for the paper's classifiers left out: they are in no dialogue"] += 1
                continue
            tag = record.get("tag") if isinstance(record, dict) else None
            wrong: list[str] = []
            if attribute is None and isinstance(tag, str):
                record = record | {"tag": named_tag(tag, schema, wrong)}
            elif attribute is None and type(tag) is int:
                wrong.append(f"'tag' is {tag}, but the file's name tells no attribute; write attribute=FILE for SOURCE")
            of = None if isinstance(tag, list | dict) else attribute
            instance, more = ((), wrong) if wrong else dataset.instance_of(record, schema, of)
            if not written.refuse(*(f"{where}: {problem}" for problem in more)):
                written.instance(split_of(words), instance.questions, instance.replies, instance.topic, instance.labels)
    return f"Source: the paper's released form, from {source}. Licence: the source's."


def _attribute_of(words: Sequence[str], schema: Schema) -> int | None:
    """The index of the one attribute that the name of a file names."""
    name = " ".join(words)
    found = {RELEASED_NAMES[word] for word in words if word in RELEASED_NAMES} & set(schema.names)
    found |= {known for known in schema.names if " ".join(_words(Path(known))) in name}
    return schema.attribute_index(found.pop()) if len(found) == 1 else None


def named_tag(tag: str, schema: Schema, wrong: list[str]) -> dict[str, str] | None:
    """`tag` as a mapping, where it names aspects without their attributes."""
    try:
        return schema.tag(schema.parse(tag)) or None
    except UserError as error:
        wrong.append(f"'tag': {error}")
        return None
