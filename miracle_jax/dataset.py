"""Dialogues as instances: where the files are, reading and validating them.

    python -m miracle_jax.dataset --config configs/tiny.py [--data.train attitude=a.jsonl ...]
    python -m miracle_jax.dataset freeze OUT.npz --config configs/tiny.py [--data.train attitude=a.jsonl ...]
    python -m miracle_jax.dataset import KIND SOURCE OUT [--flag ...]

The first shows what is in a dataset and what the model will see of it; the second writes it as token arrays, with which
training needs neither TFDS nor Grain; the third makes files of this form of files of another (imports.py).
"""

import dataclasses
import difflib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from miracle_jax import config, hub, reading, storage
from miracle_jax.attributes import Schema
from miracle_jax.errors import Problems, UserError, one_sentence
from miracle_jax.reading import kind

BUNDLED = Path(__file__).with_name("corpus")
SPLITS = ("train", "validation", "test")

Source = tuple[str | None, str]
"""(attribute, path). Attribute None: each instance names its attributes in `tag`."""


@dataclass(frozen=True)
class Instance:
    """A context and the reply to its last question."""

    questions: tuple[str, ...]
    """M of them."""
    replies: tuple[str, ...]
    """M, of which the last is the target; M - 1 in a context that is still to be answered."""
    topic: str
    labels: tuple[int, ...]
    """An aspect id per attribute of the schema; -1 where unknown."""
    id: str = ""


def sources(data: config.Data, schema: Schema | None = None) -> tuple[list[Source], list[Source], Schema]:
    """Training files, validation files and schema that a config names. No validation files is an empty list.

    schema: a run's, in place of what data.schema says.
    Raises UserError for an attribute outside the schema and for files that do not exist.
    """
    schema = schema or Schema.load(data.schema)
    train = [source(item, schema) for item in data.train]
    validation = [source(item, schema) for item in data.validation]
    if not train:
        if schema != Schema.load():
            named = f"data.schema {data.schema}" if data.schema else "the run's schema"
            raise UserError(
                f"{named} differs from the schema of the bundled corpus; name your own files, for instance "
                f"--data.train {schema.names[0]}=FILE.jsonl"
            )
        train = bundled("train")
        validation = validation or bundled("validation")
    missing = [path for _, path in train + validation if not storage.is_remote(path) and not Path(path).is_file()]
    if missing:
        raise UserError(f"no such data file: {', '.join(missing)}")
    return train, validation, schema


def bundled(split: str) -> list[Source]:
    """The files of the bundled corpus. split: "train", "validation" or "test"."""
    if split == "test":
        return [(None, str(BUNDLED / "test" / "personality.jsonl"))]
    return [(name, str(BUNDLED / split / f"{name}.jsonl")) for name in Schema.load().names]


def source(item: str, schema: Schema) -> Source:
    """`attribute=path`, or a path alone."""
    name, path = _split(item)
    if name is not None:
        name = schema.names[schema.attribute_index(name)]
    return name, path if storage.is_remote(path) else str(Path(path).expanduser())


def _split(item: str) -> Source:
    name, equals, path = item.partition("=")
    if not equals or "/" in name:  # an equals sign further on belongs to the path
        return None, item
    return name, path


def labelled_source(item: str, schema: Schema) -> list[Source]:
    """`test`, the bundled test set, or a file as `source` reads it. Raises UserError where `test` has other labels."""
    if item != "test":
        return [source(item, schema)]
    if schema != Schema.load():
        raise UserError(
            f"the bundled test set is labelled for {', '.join(Schema.load().names)}, this run for "
            f"{', '.join(schema.names)}; name a file of your own with --data"
        )
    return bundled("test")


def absolute(data: config.Data) -> config.Data:
    """The same files by absolute paths, by which a run finds them from any folder."""

    def path(text):
        return text if not text or storage.is_remote(text) else str(Path(text).expanduser().absolute())

    def item(text):
        name, file = _split(text)
        return path(file) if name is None else f"{name}={path(file)}"

    return dataclasses.replace(
        data, train=tuple(map(item, data.train)), validation=tuple(map(item, data.validation)),
        schema=path(data.schema), frozen=path(data.frozen),
        encoder_tokenizer=hub.absolute(data.encoder_tokenizer), decoder_tokenizer=hub.absolute(data.decoder_tokenizer),
    )  # fmt: skip


def read_files(
    files: Sequence[Source], schema: Schema, on_error: str = "", reference_required: bool = True
) -> list[Instance]:
    """The instances of all files, in order.

    Args:
      files: with an attribute, every line's `tag` is an aspect id or name of it. Without, `tag` is a list in schema
        order (null: unknown), a mapping from attribute to aspect, or null: a dialogue of which no aspect is known,
        from which everything but the attributes is learned.
      on_error: the value of data.on_error. "stop" raises UserError with all problems of all files; "skip" drops
        malformed lines and logs how many. Empty: as "stop", where there is no such flag to name.
      reference_required: False admits contexts to answer: one reply fewer than questions, and no `tag`.
    """
    contents = [(attribute, path, storage.read(path)) for attribute, path in files]
    return read_bytes(contents, schema, on_error, reference_required)[0]


def read_bytes(
    files: Sequence[tuple[str | None, str | Path, bytes]],
    schema: Schema,
    on_error: str = "",
    reference_required: bool = True,
) -> tuple[list[Instance], int]:
    """`read_files` of (attribute, path, content). Returns the instances and the number of lines dropped."""
    instances, problems, dropped = [], Problems(), 0
    for attribute, path, content in files:
        index = None if attribute is None else schema.attribute_index(attribute)
        for number, line in reading.lines(content):
            instance, wrong = _parse(line, schema, index, reference_required)
            problems += [f"{path}:{number}: {problem}" for problem in wrong]
            dropped += bool(wrong)
            if not wrong:
                instances.append(instance)
    names = ", ".join(str(path) for _, path, _ in files)
    if problems:
        if on_error != "skip":
            found = f"{count(problems.count, 'problem')} in {count(dropped, 'line')} of the data"
            remedy = "mend them, or drop the lines with --data.on-error skip" if on_error else "mend them"
            raise UserError(f"{found}; {remedy}:\n{problems}")
        logging.getLogger("miracle_jax").warning("%s dropped:\n%s", count(dropped, "malformed line"), problems)
    if not instances:
        raise UserError(f"no instances in {names}; expected one JSON object a line")
    return instances, dropped


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _parse(
    line: bytes, schema: Schema, attribute: int | None, reference_required: bool
) -> tuple[Instance | None, list[str]]:
    """The instance that a line holds, or what is wrong with the line."""
    try:
        record = reading.parse(line)
    except UserError as error:
        return None, [f"{error}; expected one JSON object a line, in UTF-8"]
    return instance_of(record, schema, attribute, reference_required)


def instance_of(
    record, schema: Schema, attribute: int | None, reference_required: bool = True
) -> tuple[Instance | None, list[str]]:
    """The instance that a JSON value is, or what is wrong with it. attribute: the index of the one that `tag` is of;
    None: `tag` names its attributes."""
    if not isinstance(record, dict):
        return None, [f"this is {kind(record)}; expected a JSON object with input, output and tag"]

    problems = []
    required = ("input", "output", "tag") if reference_required else ("input", "output")
    for key in required:
        if key not in record:
            near = difflib.get_close_matches(key, record, n=1)
            hint = f", but there is {near[0]!r}" if near else ""
            problems.append(f"key {key!r} is missing{hint}; expected {', '.join(required)}")
    questions = _turns(record, "input", problems)
    replies = _turns(record, "output", problems)
    topic = _text(record, "personas", problems)
    name = _text(record, "id", problems)
    labels = labels_of(record["tag"], schema, attribute, problems) if "tag" in record else schema.unknown
    if questions == ():
        problems.append("'input' is empty; expected at least one question")
    elif questions and replies is not None:
        answered = len(replies) == len(questions)
        if not answered and (reference_required or len(replies) != len(questions) - 1):
            expected = "as many" if reference_required else "as many, or one reply fewer"
            problems.append(f"'input' has {len(questions)} turns and 'output' {len(replies)}; expected {expected}")
    return (None if problems else Instance(questions, replies, topic, labels, name)), problems


def _turns(record: dict, key: str, problems: list[str]) -> tuple[str, ...] | None:
    """The texts under `key`; None where there are none to judge."""
    turns = record.get(key, [])
    if not isinstance(turns, list):
        problems.append(f"{key!r} is {kind(turns)}; expected a list of texts")
        return None
    for i, turn in enumerate(turns, 1):
        if not isinstance(turn, str):
            problems.append(f"turn {i} of {key!r} is {kind(turn)}; expected text")
        elif not turn.strip():
            problems.append(f"turn {i} of {key!r} is empty; expected text")
        elif not is_unicode(turn):
            problems.append(f"turn {i} of {key!r} has {NOT_UNICODE}")
    return tuple(turns) if key in record else None


def _text(record: dict, key: str, problems: list[str]) -> str:
    """An optional text; a list of texts is joined, a number becomes text."""
    value = record.get(key)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = " ".join(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str | None):
        problems.append(f"{key!r} is {kind(value)}; expected text")
        return ""
    if not is_unicode(value or ""):
        problems.append(f"{key!r} has {NOT_UNICODE}")
    return value or ""


NOT_UNICODE = "half of a surrogate pair (\\ud800 to \\udfff); expected whole characters"


def is_unicode(text: str) -> bool:
    """False for text with a lone surrogate: JSON's \\ud800, or bytes of a terminal that are not UTF-8."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def labels_of(tag, schema: Schema, attribute: int | None, problems: list[str]) -> tuple[int, ...]:
    """The aspect id of every attribute, -1 where `tag` does not tell."""
    if attribute is not None:
        if isinstance(tag, list | dict):
            known = schema.attributes[attribute]
            problems.append(
                f"'tag' is {kind(tag)}; expected an aspect of {known.name} ({', '.join(known.aspects)}); a file whose "
                "lines carry several attributes is named without attribute="
            )
            return ()
        tag = {schema.names[attribute]: tag}
    elif tag is None:
        return schema.unknown
    elif isinstance(tag, list):
        if len(tag) != len(schema.names):
            problems.append(
                f"'tag' has {len(tag)} entries; expected {len(schema.names)}, one each for {', '.join(schema.names)}"
            )
            return ()
        tag = {name: aspect for name, aspect in zip(schema.names, tag, strict=True) if aspect is not None}
    elif not isinstance(tag, dict):
        problems.append(
            f"'tag' is {kind(tag)}; expected a list in the order {', '.join(schema.names)} or a mapping from "
            "attribute to aspect, or null where none is known (a file with one attribute is named attribute=path)"
        )
        return ()
    labels = list(schema.unknown)
    for name, aspect in tag.items():
        try:
            index = schema.attribute_index(name)
            labels[index] = schema.aspect_id(index, aspect)
        except UserError as error:
            problems.append(f"'tag': {error}")
    if not tag:
        problems.append("'tag' names no aspect; expected at least one, or null where none is known")
    return tuple(labels)


def main(argv: list[str] | None = None) -> None:
    from miracle_jax import examples, imports, overview, pipeline  # they import this module
    from miracle_jax.command_line import read_config

    argv = sys.argv[1:] if argv is None else argv
    with one_sentence():
        command, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("show", argv)
        if command == "import":
            print(imports.run(rest))
            return
        if command not in ("show", "freeze"):
            raise UserError(f"unknown command {command!r}; there are show, freeze OUT.npz and import KIND SOURCE OUT")
        out = ""
        if command == "freeze" and not {"-h", "--help"} & set(rest):
            if not rest or rest[0].startswith("-"):
                raise UserError("freeze needs a file to write first: python -m miracle_jax.dataset freeze OUT.npz ...")
            out, *rest = rest
        settings, _, _ = read_config("python -m miracle_jax.dataset", __doc__, rest)
        if settings.data.frozen:
            raise UserError(f"data.frozen {settings.data.frozen} holds tokens, not dialogues; leave it out here")
        if command == "freeze":
            corpus = pipeline.prepare(settings)
            examples.save_frozen(out, corpus)
            sizes = f"{len(corpus.train):,} training and {len(corpus.validation):,} validation instances"
            print(f"wrote {out}: {sizes}, {Path(out).stat().st_size / 1e6:.1f} MB; use it with --data.frozen {out}")
        else:
            print(overview.describe(settings))


if __name__ == "__main__":
    main()
