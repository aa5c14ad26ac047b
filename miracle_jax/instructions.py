"""What a language model is asked for: dialogues that show an aspect, and replies (section 2.4, appendix A.1).

The descriptions of the aspects are in the schema file, so that anybody's attributes are collected as the paper's are:

    [[attribute]]
    name = "attitude"
    aspects = ["pessimistic", "optimistic"]

    [attribute.instructions.pessimistic]
    manner = "gloomily, expecting things to turn out badly"      # They answer ...
    speaker = "someone who has stopped hoping for better"        # They are ...
    dialogue = "downcast and pessimistic"                        # The conversation is ...
    question = "How is the new job going?"                       # an example
    answer = "It holds for now, but they always let the newest go first."

A dialogue of one aspect is for training; one of a whole personality, for tests, joins the descriptions of its aspects,
and has no example.
"""

import dataclasses
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from miracle_jax import attributes, reading, storage
from miracle_jax.attributes import UNKNOWN, Schema
from miracle_jax.errors import refuse

QUESTION_WORDS = 30
ANSWER_WORDS = 60
SENTENCES = 2
TURNS = 4
"""What is asked for: most words of a question and of an answer, most sentences of both, fewest questions with answers
(appendix A.1). What cleans a corpus holds it to the same."""

HARMLESS = "It is harmless, fair and free of insults, prejudice and anything toxic."
LONGEST = 1000
"""Characters of a description."""


@dataclass(frozen=True)
class Description:
    """An aspect in words."""

    manner: str
    """How the answers are given: "They answer ..."."""
    speaker: str
    """Who answers: "They are ..."."""
    dialogue: str
    """Adjectives for the conversation."""
    question: str
    answer: str
    """An example."""


@dataclass(frozen=True)
class Instructions:
    """A schema and a description of each of its aspects."""

    schema: Schema
    text: str
    """The file that they are from."""
    descriptions: tuple[tuple[Description, ...], ...]
    """By attribute and aspect id."""

    @classmethod
    def load(cls, path: str | Path = "") -> "Instructions":
        """Reads a schema file; an empty path means the bundled one. Raises UserError as `Schema.load` does, and with
        everything that is missing from the instructions or wrong with them."""
        schema = Schema.load(path)
        text = storage.read(path or attributes.BUNDLED).decode()
        tables = tomllib.loads(text)["attribute"]
        problems, descriptions = [], []
        for attribute, table in zip(schema.attributes, tables, strict=True):
            if not reading.is_name(f"{attribute.name}.jsonl"):
                problems.append(f"{attribute.name}: files of the corpus are named by it, which this name cannot")
            given = table.get("instructions", {})
            if not isinstance(given, dict):
                problems.append(f"{attribute.name}: instructions are tables [attribute.instructions.ASPECT]")
                continue
            problems += [
                f"{attribute.name}: there are instructions for {name!r}, which is no aspect of it"
                for name in given
                if name not in attribute.aspects
            ]
            for aspect in attribute.aspects:
                where = f"{attribute.name}: {aspect}"
                problems += [f"{where}: {problem}" for problem in _problems(given.get(aspect))]
            descriptions.append(given)
        refuse(problems, f"schema file {path or attributes.BUNDLED} has not all the instructions that collecting needs")
        return cls(
            schema,
            text,
            tuple(
                tuple(Description(**given[aspect]) for aspect in attribute.aspects)
                for attribute, given in zip(schema.attributes, descriptions, strict=True)
            ),
        )

    def _of(self, labels: Sequence[int]) -> list[Description]:
        """The descriptions of the aspects that a personality names."""
        self.schema.describe(labels)  # refuses others than ids
        return [of[i] for of, i in zip(self.descriptions, labels, strict=True) if i != UNKNOWN]

    def dialogue(self, labels: Sequence[int], topic: str) -> str:
        """The prompt for one dialogue.

        labels: an aspect id an attribute; those that are -1 are left to the model.
        """
        wanted = self._of(labels)
        question, answer = ("(a question)", "(the answer)")
        if len(wanted) == 1:
            question, answer = wanted[0].question, wanted[0].answer
        kind = _joined([d.dialogue for d in wanted])
        return f"""Write a conversation between two people, A and B. A asks and B answers.
The whole conversation is {kind}.
B answers {_manners(wanted)}.
B is {_speakers(wanted)}.
They talk about this, which B says of B: "{topic}"

Begin every turn on a new line with the speaker, in this form:

A: {question}
B: {answer}

The conversation keeps to these rules:
- A question has one or two sentences and at most {QUESTION_WORDS} words. It follows the topic or B's last answer.
- An answer has one or two sentences and fewer than {ANSWER_WORDS} words. Every answer is {kind}.
- B never asks anything. The conversation ends when A has no more questions.
- There are at least {TURNS} questions, each with its answer.
- No two turns use the same verb or say the same thing.
- {HARMLESS}

Write the conversation and nothing else."""

    def reply(self, labels: Sequence[int]) -> str:
        """The system message by which a language model answers with a personality (the paper's Table 3).

        labels: as in `dialogue`; where none is named the model is only told the form.
        """
        wanted = self._of(labels)
        about = [f"You answer {_manners(wanted)}.", f"You are {_speakers(wanted)}."] if wanted else []
        return "\n".join(
            [
                "You are in a conversation and answer the last question.",
                *about,
                f"Your answer has one or two sentences and fewer than {ANSWER_WORDS} words. You ask nothing back.",
                HARMLESS,
                "Write the answer and nothing else.",
            ]
        )


def _manners(wanted: Sequence[Description]) -> str:
    return "; ".join(d.manner for d in wanted) or "as people do"


def _speakers(wanted: Sequence[Description]) -> str:
    return "; and ".join(d.speaker for d in wanted) or "anybody"


def _joined(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + ", and " * (len(words) > 1) + words[-1] if words else "natural"


def _problems(given) -> list[str]:
    """What is wrong with the description of an aspect."""
    names = [field.name for field in dataclasses.fields(Description)]
    if not isinstance(given, dict):
        return [f"there are no instructions; add [attribute.instructions.NAME] with {', '.join(names)}"]
    problems = [f"unknown entry {name!r}; it takes {', '.join(names)}" for name in given if name not in names]
    for name in names:
        value = given.get(name)
        if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > LONGEST:
            problems.append(f"{name} is missing, or no text of one line and at most {LONGEST:,} characters")
    if not problems and "?" in given["answer"]:
        problems.append("the example's answer asks a question, which is not allowed in answers")
    return problems
