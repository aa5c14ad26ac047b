"""Chat messages with roles become dialogues: `python -m miracle_jax.dataset import messages SOURCE OUT`.

A record is {"messages": [{"role": "user", "content": "..."}, ...]}, as of OpenAI's interface, or {"conversations":
[{"from": "human", "value": "..."}, ...]}, as of ShareGPT, and may have a `tag` and a `topic`. Consecutive messages of
one role are joined. What the system is told is left out, and so are an answer before the first question and a question
behind the last answer. Messages of and to tools are refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from miracle_jax import dataset, imports
from miracle_jax.attributes import Schema
from miracle_jax.errors import UserError
from miracle_jax.reading import kind

TURNS = 8
"""Turns of a dialogue. An encoder of 512 tokens seldom sees more."""
ASKS = {"user": True, "human": True, "assistant": False, "gpt": False, "chatgpt": False, "bing": False, "bard": False,
        "system": None, "developer": None}  # fmt: skip
"""Role -> whether it asks; None: is left out."""

Turn = tuple[object, str]
"""(who, text)."""


@dataclass(frozen=True)
class Options(imports.Options):
    """How to read chat messages."""

    tag: tuple[str, ...] = ()
    """What conversations show that have no `tag` of their own, for instance attitude=optimistic. Empty: it is not
    known."""
    turns: int = TURNS
    """Most turns (a question with its answer) of a dialogue; a longer conversation becomes several."""
    held_out: float = 0.0
    """The share of the conversations that is drawn for validation.jsonl, of files that are for training."""
    seed: int = 0
    """Of the draw."""

    def labels(self) -> Schema:
        check(self.turns, self.held_out, self.seed)
        schema = Schema.load(self.schema)
        schema.parse(self.tag)
        return schema


def check(turns: int, held_out: float, seed: int) -> None:
    """Raises UserError for options that cannot be."""
    if turns < 1 or not 0 <= held_out < 0.5 or seed < 0:
        raise UserError("--turns must be at least 1, --held-out at least 0 and below 0.5, --seed at least 0")


def convert(source: str, options: Options, written: imports.Written) -> str:
    """Writes the dialogues of a file or a folder. Returns what they are, for README.md."""
    schema, generator = written.schema, np.random.default_rng(options.seed)
    known = imports.named_tag(",".join(options.tag), schema, [])
    for path, words in imports.files_of(source):
        for where, record in imports.records(path, written):
            wrong: list[str] = []
            turns = joined(_turns(record, wrong), "\n")
            split = imports.split_of(words)
            if split == "train" and generator.random() < options.held_out:
                split = "validation"
            if not wrong:
                opening, last = turns[:1] and not turns[0][0], turns[1:] and turns[-1][0]
                turns = turns[bool(opening) : len(turns) - bool(last)]
                written.notes["answers before the first question left out"] += bool(opening)
                written.notes["questions behind the last answer left out"] += bool(last)
                if len(turns) < 2:
                    written.notes["conversations without a question and its answer left out"] += 1
                    continue
                whole = {
                    "input": [text for asks, text in turns if asks],
                    "output": [text for asks, text in turns if not asks],
                    "personas": record.get("topic", record.get("personas")),
                    "tag": _tag(record.get("tag"), known, schema, wrong),
                }
                dialogue, more = dataset.instance_of(whole, schema, None)
                wrong += more
            if not written.refuse(*(f"{where}: {problem}" for problem in wrong)):
                written.dialogue(split, dialogue, options.turns)
    return f"Source: chat messages, from {source}. Licence: the source's."


def _tag(tag, otherwise, schema: Schema, wrong: list[str]):
    if tag is None:
        return otherwise
    return imports.named_tag(tag, schema, wrong) if isinstance(tag, str) else tag


def joined(turns: Sequence[Turn], between: str) -> list[Turn]:
    """The same, where nobody has two turns in a row."""
    found: list[tuple[object, list[str]]] = []
    for who, text in turns:
        if not found or found[-1][0] != who:
            found.append((who, []))
        found[-1][1].append(text)
    return [(who, between.join(texts)) for who, texts in found]


def _turns(record, wrong: list[str]) -> list[Turn]:
    """(whether it asks, text) of the messages of a record."""
    if not isinstance(record, dict):
        wrong.append(f"this is {kind(record)}; expected a JSON object with messages")
        return []
    messages = record.get("messages", record.get("conversations"))
    if not isinstance(messages, list):
        wrong.append(f"'messages' is {kind(messages)}; expected a list of messages with role and content")
        return []
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            wrong.append(f"message {number} is {kind(message)}; expected an object with role and content")
            continue
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or role not in ASKS:
            wrong.append(f"message {number} is of the role {role!r}; expected {', '.join(ASKS)}")
        elif message.get("tool_calls") or message.get("function_call"):
            wrong.append(f"message {number} calls a tool; expected text alone")
        elif ASKS[role] is not None:
            turns.append((ASKS[role], _text(message.get("content", message.get("value")), number, wrong)))
    return turns


def _text(content, number: int, wrong: list[str]) -> str:
    """The text of a message, which may come in parts."""
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "\n".join(part["text"] for part in content)
    if isinstance(content, list):
        wrong.append(f"message {number} has parts that are no text")
    elif not isinstance(content, str):
        wrong.append(f"the content of message {number} is {kind(content)}; expected text")
    elif not content.strip():
        wrong.append(f"message {number} is empty; expected text")
    else:
        return content.strip()
    return ""
