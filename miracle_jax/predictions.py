"""Replies of any system to a test set: JSONL as `python -m miracle_jax.generate --data ... --out` writes it.

A line has `id`, `input` (M questions), `output` (M - 1 replies, or M, of which the last is not read), `personality`
(the wanted aspects by name) and `reply`; what else it has is not read.
"""

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from miracle_jax import dataset, storage
from miracle_jax.errors import SHOWN, UserError, first_line, refuse


@dataclass(frozen=True)
class Prediction:
    """A line of a file of replies."""

    where: str
    """file:line."""
    id: str
    context: str
    personality: str
    reply: str


def read_systems(named: Sequence[str]) -> dict[str, dict[str, Prediction]]:
    """`name=FILE.jsonl` each -> {name: {id: prediction}}. Raises UserError with all problems of all files."""
    if not named:
        raise UserError("name the replies of every system with --predictions NAME=FILE.jsonl ...")
    systems, problems = {}, []
    for argument in named:
        name, _, path = argument.partition("=")
        if not name.strip() or not path or not dataset.is_unicode(name):
            raise UserError(f"--predictions {argument!r} is not of the form NAME=FILE.jsonl")
        if name in systems:
            raise UserError(f"--predictions names {name!r} twice; give every system a name of its own")
        systems[name], wrong = _predictions(path)
        problems += wrong
    refuse(problems, "the files of --predictions are not as generate --data ... --out writes them; mend them")
    first, *others = systems.items()
    problems = [difference for other in others for difference in _differences(*first, *other)]
    refuse(problems, "the systems do not answer the same; give all the same contexts and personalities")
    return systems


def _predictions(path: str) -> tuple[dict[str, Prediction], list[str]]:
    """The replies in a file by id, and what is wrong with the file."""
    found, problems = {}, []
    for number, line in enumerate(storage.read(path).removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            prediction = _prediction(where, line)
        except UserError as error:
            problems.append(f"{where}: {error}")
            continue
        first = found.setdefault(prediction.id, prediction)
        if first is not prediction:
            known = f"id {first.id!r} is at {first.where} already"
            problems.append(f"{where}: {known}; expected one reply an id, so not --personality all")
    if not found and not problems:
        problems = [f"{path}:1: there is no reply; expected one JSON object a line"]
    return found, problems


def _prediction(where: str, line: bytes) -> Prediction:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"invalid JSON: {first_line(error)}; expected one JSON object a line, in UTF-8") from None
    if not isinstance(record, dict):
        raise UserError("this is no object; expected a JSON object with id, input, output, personality and reply")
    for name in ("id", "personality", "reply"):
        if not isinstance(record.get(name), str):
            raise UserError(f"{name!r} is missing or not a text")
    for name in ("id", "personality"):
        if not record[name].strip():
            raise UserError(f"{name!r} is empty; expected a text")
    for name in ("input", "output"):
        turns = record.get(name)
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise UserError(f"{name!r} is missing or not a list of texts")
    asked, replied = len(record["input"]), len(record["output"])
    if not asked or asked - replied not in (0, 1):
        raise UserError(f"'input' has {asked} turns and 'output' {replied}; expected as many, or one reply fewer")
    texts = (record["id"], _context(record), record["personality"], record["reply"])
    if not dataset.is_unicode("".join(texts)):
        raise UserError(f"a text has {dataset.NOT_UNICODE}")
    return Prediction(where, *texts)


def _context(record: dict) -> str:
    """The turns up to the last question, a line each; what comes after it is a reference."""
    asked = [f"A: {question}" for question in record["input"]]
    replied = [f"B: {reply}" for reply in record["output"][: len(asked) - 1]]
    return "\n".join([turn for pair in zip(asked, replied, strict=False) for turn in pair] + asked[-1:])


def _differences(
    name: str, system: Mapping[str, Prediction], other_name: str, other: Mapping[str, Prediction]
) -> Iterator[str]:
    """What two systems do not answer alike."""
    for more, fewer, ids in (
        (name, other_name, [i for i in system if i not in other]),
        (other_name, name, [i for i in other if i not in system]),
    ):
        if ids:
            named = ", ".join(map(repr, ids[:SHOWN])) + ", ..." * (len(ids) > SHOWN)
            yield f"{fewer} does not answer {len(ids)} of the ids of {more}: {named}"
    for instance in (i for i in system if i in other):
        one, two = system[instance], other[instance]
        for what in ("context", "personality"):
            if getattr(one, what) != getattr(two, what):
                yield f"{two.where}: id {instance!r} has another {what} than at {one.where}"
