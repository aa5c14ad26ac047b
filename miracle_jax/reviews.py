"""Review files: the human pass over the most telling dialogues, between the rounds of judges (appendix A.2).

A review file is CSV with the columns id, attribute, aspect, text and keep; people write y or n into the last. Marks
belong to an id with a text, and are never lost: a file that is written anew has all that the old one had.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from miracle_jax import reading, sheets
from miracle_jax.attributes import Schema
from miracle_jax.cleaning import Dialogue, single
from miracle_jax.errors import Problems, UserError, refuse

COLUMNS = ("id", "attribute", "aspect", "text", "keep")
MARKS = {"": None, "y": True, "yes": True, "n": False, "no": False}
PERSONALITY = "personality"
"""What stands for the attribute of a dialogue that has several aspects."""

Row = tuple[str, ...]
"""Cells of COLUMNS."""


def _key(row: Sequence[str]) -> tuple[str, str]:
    """By which a dialogue is known again, whatever a spreadsheet program made of its line breaks, and of letters that
    its encoding lacks."""
    return row[0], "".join(re.findall("[a-z0-9]+", row[3].lower()))


class Reviews:
    """The marks of a review file, and what is written into it next."""

    def __init__(self, path: str | Path):
        """A file that does not exist has no marks. Raises UserError with all problems of a file."""
        self.path, self.rows = Path(path), []
        self._marked: dict[tuple[str, str], Row] = {}
        self._used: set[tuple[str, str]] = set()
        self._before = self._bytes()
        if self._before is not None:
            self._read(self._before)

    def _bytes(self) -> bytes | None:
        return reading.content(self.path) if self.path.exists() else None

    def _read(self, content: bytes) -> None:
        problems, lines = Problems(), {}
        try:
            for line, row in sheets.rows(content, COLUMNS):
                *texts, mark = (sheets.text_of(row[name]) for name in COLUMNS)
                key = _key(texts)
                if mark.lower() not in MARKS:
                    problems += [f"{self.path}:{line}: keep is {mark!r}; expected y, n or nothing"]
                elif key in lines:
                    problems += [f"{self.path}:{line}: this dialogue is at line {lines[key]} already"]
                lines[key] = line
                if mark:
                    self._marked[key] = (*texts, mark)
        except UserError as error:
            problems += [f"{self.path}:{error}"]
        refuse(problems, "a review file cannot be read; mend it, or move it away to begin a new one")

    def mark(self, dialogue: Dialogue) -> bool | None:
        """Whether people want to keep a dialogue; None where they have not said."""
        if not self._marked:
            return None
        key = _key((dialogue.id, "", "", dialogue.text))
        if key not in self._marked:
            return None
        self._used.add(key)
        return MARKS[self._marked[key][-1].lower()]

    def ask(self, dialogues: Iterable[Dialogue], schema: Schema) -> None:
        """Puts these dialogues, and all that have marks, into the file that `content` gives."""
        asked = {}
        for dialogue in dialogues:
            if dialogue.split == "test":
                attribute, aspect = PERSONALITY, schema.describe(dialogue.labels)
            else:
                index, label = single(dialogue)
                attribute, aspect = schema.names[index], schema.attributes[index].aspects[label]
            row = (dialogue.id, attribute, aspect, dialogue.text, "")
            asked[_key(row)] = row
        marked = {key: (*asked.get(key, row)[:-1], row[-1]) for key, row in self._marked.items()}
        self.rows = list((asked | marked).values())

    def check(self) -> None:
        """Raises UserError where somebody has written into the file since it was read."""
        if self._bytes() != self._before:
            raise UserError(f"{self.path} has changed while dialogues were cleaned; give the same command again")

    def content(self) -> bytes:
        return sheets.content([sheets.line(COLUMNS), *map(sheets.line, self.rows)])

    def counts(self) -> dict[str, int]:
        """{"dialogues", "marked", "rejected", "unused"}. unused: marks of dialogues that did not come this far, or have
        another text now."""
        marks = [MARKS[row[-1].lower()] for row in self.rows]
        marked = sum(mark is not None for mark in marks)
        return {
            "dialogues": len(marks), "marked": marked, "rejected": marks.count(False),
            "unused": len(self._marked.keys() - self._used),
        }  # fmt: skip
