"""The corpus of the wheel `chitchat-dataset` becomes dialogues: real people, who rated their conversations.

    pip install --no-deps chitchat-dataset==0.9.0
    python -m miracle_jax.dataset import chitchat package:chitchat_dataset/dataset.json OUT [--rating upbeat --levels 3]

The wheel (BYU Perception, Control & Cognition lab; MIT) holds 7,168 conversations: bursts of messages of one sender, a
prompt, and three ratings from 1 to 10. In 3,150 of them nobody answers; the others have two senders. Either is taken
for the one who asks, so that every turn but the first of a conversation is the reply of an instance. No code of the
wheel runs, and no sender's id is written.

Without --rating no aspect is known: the files adapt encoders and decoder. With it the rating is an attribute.
"""

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from miracle_jax import hub, imports, reading
from miracle_jax.attributes import Attribute, Schema
from miracle_jax.dataset import SPLITS, Instance
from miracle_jax.errors import UserError
from miracle_jax.messages import TURNS, Turn, check, joined
from miracle_jax.reading import kind

INSTALL = "pip install --no-deps chitchat-dataset==0.9.0"
SCALE = range(1, 11)
"""Of ratings."""
UNTOUCHED = 5
"""Where the ratings began. All three are 5 in 1,328 of the 3,705 rated conversations of two people, about as often on
every day, and those are short (9 turns in the median; those rated 10 for `upbeat` 38): nobody moved them."""
LONGEST_TURN = 2000
"""Characters. Some held down a key."""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
STARTS = 16
"""Places from which people for a held-out split are gathered; the gathering that costs the least is taken."""


@dataclass(frozen=True)
class Options(imports.Options):
    """How to read the corpus."""

    schema: Literal[""] = ""
    """The attributes are the rating's, or the paper's."""
    rating: Literal["", "witty", "interesting", "upbeat"] = ""
    """The rating that becomes an attribute. Empty: none, no aspect is known."""
    levels: int = 3
    """Its aspects: ranges of ratings with about as many conversations each."""
    bounds: tuple[int, ...] = ()
    """The highest rating of every level but the last, in place of `levels`."""
    names: tuple[str, ...] = ()
    """Of the levels, the lowest first. Empty: low, middle, high, or level 1, level 2 and so on."""
    turns: int = TURNS
    """Most turns (a question with its answer) of a dialogue; a longer conversation becomes several."""
    held_out: float = 0.05
    """The share of the conversations that validation.jsonl and test.jsonl get, each."""
    seed: int = 0
    """Of the draw of people for them."""

    def labels(self) -> Schema:
        check(self.turns, self.held_out, self.seed)
        if not self.rating:
            return Schema.load()
        bounds, number = self.bounds, len(self.bounds) + 1 if self.bounds else self.levels
        if not 2 <= number <= len(SCALE) or sorted({*bounds} & {*SCALE[:-1]}) != [*bounds]:
            raise UserError(
                f"--levels must be from 2 to {len(SCALE)}, and --bounds ascending ratings from 1 to 9, for instance "
                "--bounds 4 8"
            )
        names = self.names or {2: ("low", "high"), 3: ("low", "middle", "high")}.get(number)
        names = names or tuple(f"level {i + 1}" for i in range(number))
        if len(names) != number:
            raise UserError(f"--names has {len(names)} names for {number} levels")
        return Schema.from_toml(Schema((Attribute(self.rating, names),)).to_toml(), "of --names")


@dataclass(frozen=True)
class Conversation:
    turns: list[Turn]
    """(sender, text), by turns."""
    prompt: str
    rating: int | None

    @property
    def people(self) -> tuple[str, ...]:
        return tuple(sorted({sender for sender, _ in self.turns}))


def convert(source: str, options: Options, written: imports.Written) -> str:
    """Writes the dialogues. source: package:chitchat_dataset/dataset.json, or that file. Returns what they are."""
    path = hub.in_package(source, "SOURCE", INSTALL) if source.startswith(hub.PACKAGE) else Path(source)
    conversations = list(_read(path, options, written))
    written.check()  # levels are of all ratings
    splits = by_people([c.people for c in conversations], options.held_out, options.seed)
    kept = [(c, split) for c, split in zip(conversations, splits, strict=True) if split]
    written.notes["conversations between people of two splits left out"] = len(conversations) - len(kept)
    bounds, about = (), "No aspect is known."
    if options.rating:
        rated = [(c, split) for c, split in kept if c.rating is not None]
        written.notes["conversations that were not rated left out"] = len(kept) - len(rated)
        kept = rated
        bounds = options.bounds or even_bounds([c.rating for c, _ in kept], options.levels)
        ranges = zip((1, *(b + 1 for b in bounds)), (*bounds, SCALE[-1]), strict=True)
        names = written.schema.attributes[0].aspects
        levels = ", ".join(f"{n} {a}-{b}" if a < b else f"{n} {a}" for n, (a, b) in zip(names, ranges, strict=True))
        about = f"{options.rating}, of the conversation as a whole, is an attribute of both people's turns: {levels}."
    for conversation, split in kept:
        labels = (int(np.searchsorted(bounds, conversation.rating)),) if options.rating else written.schema.unknown
        for texts in _parts([text for _, text in conversation.turns], written):
            for first in (0, 1):  # who asks
                questions, replies = texts[first::2], texts[first + 1 :: 2]
                if replies:
                    whole = Instance(tuple(questions[: len(replies)]), tuple(replies), conversation.prompt, labels)
                    written.dialogue(split, whole, options.turns)
    people = [len({person for c, of in kept if of == split for person in c.people}) for split in SPLITS]
    return (
        "Source: chitchat-dataset, conversations between people (BYU Perception, Control & Cognition lab), from "
        f"{source}. Licence: MIT. {about} There are {people[0]:,} people in train, {people[1]:,} in validation and "
        f"{people[2]:,} in test, nobody in two of them. Texts are as they were written, names and offence included."
    )


# ------------------------------------------------------------------------------------------------ reading


def _read(path: Path, options: Options, written: imports.Written) -> Iterator[Conversation]:
    """The conversations between two people; of the others it is noted how many there are."""
    try:
        for line, _, record in reading.entries(reading.content(path), path):
            wrong: list[str] = []
            conversation = _conversation(record, options.rating, wrong)
            if not written.refuse(*(f"{path}:{line}: {problem}" for problem in wrong)):
                people = len(conversation.people)
                if people == 2:
                    yield conversation
                else:
                    written.notes[f"conversations of {'one' if people < 2 else 'three or more'} left out"] += 1
    except UserError as error:
        written.refuse(str(error))


def _conversation(record, rating: str, wrong: list[str]) -> Conversation | None:
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        wrong.append("expected a conversation, an object with messages")
        return None
    turns = []
    for burst in record["messages"]:
        for message in burst if isinstance(burst, list) else [burst]:
            said = message if isinstance(message, dict) else {}
            sender, text = said.get("sender"), said.get("text")
            if not isinstance(sender, str) or not isinstance(text, str):
                wrong.append(f"a message is {kind(message)}; expected bursts of messages with sender and text")
                return None
            if text := cleaned(text):
                turns.append((sender, text))
    prompt = record.get("prompt")
    if not isinstance(prompt, str | None):
        wrong.append(f"'prompt' is {kind(prompt)}; expected text")
        prompt = ""
    return Conversation(joined(turns, " "), cleaned(prompt or ""), _rating(record.get("ratings"), rating, wrong))


def _rating(ratings, name: str, wrong: list[str]) -> int | None:
    """None where there is none, or where nobody moved it."""
    if not name or ratings is None:
        return None
    if not isinstance(ratings, dict):
        wrong.append(f"'ratings' is {kind(ratings)}; expected an object with a number a rating")
        return None
    known = {str(number): number for number in SCALE}  # they are numbers or text
    numbers = {name: known.get(str(value)) for name, value in ratings.items()}
    if unknown := [value for name, value in ratings.items() if value is not None and numbers[name] is None]:
        wrong.append(f"'ratings' has {unknown[0]!r}; expected numbers from 1 to 10")
    return None if set(numbers.values()) == {UNTOUCHED} else numbers.get(name)


def cleaned(text: str) -> str:
    """In one line, without control characters."""
    return " ".join(CONTROL.sub(" ", text).split())


def _parts(texts: Sequence[str], written: imports.Written) -> Iterator[list[str]]:
    """A conversation, parted where a turn is too long."""
    part: list[str] = []
    for text in texts:
        if len(text) <= LONGEST_TURN:
            part.append(text)
            continue
        written.notes[f"turns of over {LONGEST_TURN:,} characters left out"] += 1
        yield part
        part = []
    yield part


# ------------------------------------------------------------------------------------------------ levels and splits


def even_bounds(ratings: Sequence[int], levels: int) -> tuple[int, ...]:
    """The highest rating of every level but the last, such that each level has about as many ratings."""
    values, counts = np.unique(np.array(ratings, int), return_counts=True)
    if len(values) < levels:
        raise UserError(f"there are {len(values)} different ratings, too few for {levels} levels; set --levels lower")
    below, bounds, first = np.cumsum(counts), [], 0
    for level in range(1, levels):
        last = len(values) - levels + level  # behind it each level that is left has a value
        best = first + int(np.argmin(np.abs(below[first:last] - level * below[-1] / levels)))
        bounds.append(int(values[best]))
        first = best + 1
    return tuple(bounds)


def by_people(pairs: Sequence[tuple[str, str]], share: float, seed: int) -> list[str]:
    """The split of every conversation, such that nobody is in two; empty for those between people of two splits.

    Nearly all people are linked with each other by who talked with whom, and a few talked with hundreds. So for each
    of validation and test people are gathered, from a random one on, always the one who had the largest share of their
    conversations with those that are there, until these have `share` of all conversations among themselves.
    """
    generator, place = np.random.default_rng(seed), {}
    for split in ("validation", "test"):
        left = [pair for pair in pairs if not place.keys() & set(pair)]
        if share and left:
            place |= dict.fromkeys(_gathered(left, share * len(pairs), generator), split)
    found = []
    for a, b in pairs:
        a, b = place.get(a, "train"), place.get(b, "train")
        found.append(a if a == b else "")
    return found


def _gathered(pairs: Sequence[tuple[str, str]], enough: float, generator: np.random.Generator) -> set[str]:
    """People who had `enough` conversations among themselves, and few with others."""
    with_whom: dict[str, Counter] = defaultdict(Counter)
    for a, b in pairs:
        with_whom[a][b] += 1
        with_whom[b][a] += 1
    everyone, best = sorted(with_whom), None
    for _ in range(STARTS):
        inside: dict[str, int] = Counter()
        chosen, among, order = set(), 0, generator.permutation(len(everyone)).tolist()
        near: list[tuple[float, str]] = []
        while among < enough and (near or order):
            person = heapq.heappop(near)[1] if near else everyone[order.pop()]
            if person in chosen:  # there again since its share has grown
                continue
            chosen.add(person)
            among += inside[person]
            for other, times in with_whom[person].items():
                inside[other] += times
                if other not in chosen:
                    heapq.heappush(near, (-inside[other] / with_whom[other].total(), other))
        across = sum(times for p in chosen for other, times in with_whom[p].items() if other not in chosen)
        if best is None or across < best[0]:
            best = (across, chosen)
    return best[1]
