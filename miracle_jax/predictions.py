"""Replies of any system to a test set, one JSON object a line.

    {"id": "17", "reply": "By the river, as ever.", "personality": "lyrical, optimistic, emotional"}

`id` is that of the instance in the test set, or its number there, from 0, where it has none. `personality` is what the
reply was asked to show; where it is empty or missing, the reply is the system's answer whatever is wanted. A line may
also have `input` (M questions) and `output` (M - 1 replies, or M, of which the last is not read): then they must be
those of the instance. What else it has is not read. `python -m miracle_jax.generate --data ... --out` writes such
lines.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from miracle_jax import dataset, reading, storage
from miracle_jax.attributes import Schema
from miracle_jax.errors import SHOWN, Problems, UserError, refuse

LONGEST_REPLY = 20_000
"""Characters of a reply. ROUGE compares every word with every word of the reference."""


@dataclass(frozen=True)
class Prediction:
    """A line of a file of replies."""

    where: str
    """file:line."""
    id: str
    context: str
    """The turns up to the last question, a line each; empty where the line has none."""
    personality: str
    reply: str


def named_files(named: Sequence[str]) -> dict[str, str]:
    """`name=FILE.jsonl` each -> {name: file}."""
    files = {}
    for argument in named:
        name, _, path = argument.partition("=")
        if not name.strip() or not path or not dataset.is_unicode(name):
            raise UserError(f"--predictions {argument!r} is not of the form NAME=FILE.jsonl")
        if name in files:
            raise UserError(f"--predictions names {name!r} twice; give every system a name of its own")
        files[name] = path
    return files


def read_answers(path: str, tasks: Sequence[dict], ids: Sequence[str], schema: Schema) -> list[str]:
    """The reply to every task, without blanks at its ends, from a file that may have more.

    Args:
      tasks: as `generate.task_of` gives them.
      ids: of all instances of the test set, also those that are no task.
    Raises UserError with the ids that are missing or unknown, and what else does not agree.
    """

    def check(prediction):
        return replace(prediction, personality=schema.describe(schema.parse(prediction.personality)))

    found, problems = _read(path, ("id", "reply"), check, lambda p: (p.id, p.personality))
    refuse(problems, f"{path} is no file of replies; mend it")
    known = set(ids)
    problems = []
    unknown = [i for i in dict.fromkeys(prediction.id for prediction in found.values()) if i not in known]
    if unknown:
        problems.append(f"the test set has no instance {_listed(unknown)}")
    replies, missing = [], []
    for task in tasks:
        prediction = found.get((task["id"], task["personality"])) or found.get((task["id"], ""))
        replies.append(prediction.reply.strip() if prediction else "")
        if prediction is None:
            missing.append(f"{task['id']} ({task['personality']})")
        elif prediction.context and prediction.context != _context(task):
            problems.append(f"{prediction.where}: id {task['id']!r} has another context than in the test set")
    if missing:
        problems.append(f"there is no reply to {_listed(missing)}")
    refuse(problems, f"{path} does not answer this test set")
    return replies


def read_systems(named: Sequence[str]) -> dict[str, dict[str, Prediction]]:
    """`name=FILE.jsonl` each -> {name: {id: prediction}}, where every line has its context and personality. Raises
    UserError with all problems of all files."""
    if not named:
        raise UserError("name the replies of every system with --predictions NAME=FILE.jsonl ...")
    systems, problems = {}, Problems()
    for name, path in named_files(named).items():
        systems[name], wrong = _read(path, ("id", "input", "output", "personality", "reply"), _said, lambda p: p.id)
        problems += wrong
    refuse(problems, "the files of --predictions are not as generate --data ... --out writes them; mend them")
    first, *others = systems.items()
    problems = [difference for other in others for difference in _differences(*first, *other)]
    refuse(problems, "the systems do not answer the same; give all the same contexts and personalities")
    return systems


def _said(prediction: Prediction) -> Prediction:
    if not prediction.personality.strip():
        raise UserError("'personality' is empty; expected a text")
    return prediction


def _read(
    path: str, needed: Sequence[str], check: Callable[[Prediction], Prediction], key: Callable[[Prediction], object]
) -> tuple[dict, Problems]:
    """The lines of a file by their key, and what is wrong with the file."""
    found, problems = {}, Problems()
    for number, line in reading.lines(storage.read(path)):
        where = f"{path}:{number}"
        try:
            prediction = check(_prediction(where, line, needed))
        except UserError as error:
            problems += [f"{where}: {error}"]
            continue
        first = found.setdefault(key(prediction), prediction)
        if first is not prediction:
            known = f"id {first.id!r} is at {first.where} already"
            if isinstance(key(prediction), tuple):
                problems += [f"{where}: {known}, with the same personality; expected one reply for each"]
            else:
                problems += [f"{where}: {known}; expected one reply an id, so not --personality all"]
    if not found and not problems:
        problems += [f"{path}:1: there is no reply; expected one JSON object a line"]
    return found, problems


def _prediction(where: str, line: bytes, needed: Sequence[str]) -> Prediction:
    try:
        record = reading.parse(line)
    except UserError as error:
        raise UserError(f"{error}; expected one JSON object a line, in UTF-8") from None
    if not isinstance(record, dict):
        raise UserError(f"this is no object; expected a JSON object with {', '.join(needed[:-1])} and {needed[-1]}")
    if "personality" not in needed:  # a file that others wrote
        if type(record.get("id")) is int:
            record["id"] = str(record["id"])
        if record.get("personality") is None:
            record["personality"] = ""
    for name in ("id", "personality", "reply"):
        if not isinstance(record.get(name), str):
            raise UserError(f"{name!r} is missing or not a text")
    if not record["id"].strip():
        raise UserError("'id' is empty; expected a text")
    context = ""
    if "input" in needed or "input" in record:
        for name in ("input", "output"):
            turns = record.get(name)
            if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
                raise UserError(f"{name!r} is missing or not a list of texts")
        asked, replied = len(record["input"]), len(record["output"])
        if not asked or asked - replied not in (0, 1):
            raise UserError(f"'input' has {asked} turns and 'output' {replied}; expected as many, or one reply fewer")
        context = _context(record)
    if len(record["reply"]) > LONGEST_REPLY:
        raise UserError(
            f"'reply' has {len(record['reply']):,} characters; at most {LONGEST_REPLY:,} can be scored; cut it"
        )
    texts = (record["id"], context, record["personality"], record["reply"])
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
            yield f"{fewer} does not answer {len(ids)} of the ids of {more}: {_listed(list(map(repr, ids)))}"
    for instance in (i for i in system if i in other):
        one, two = system[instance], other[instance]
        for what in ("context", "personality"):
            if getattr(one, what) != getattr(two, what):
                yield f"{two.where}: id {instance!r} has another {what} than at {one.where}"


def _listed(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SHOWN]) + f" and {len(ids) - SHOWN} more" * (len(ids) > SHOWN)
