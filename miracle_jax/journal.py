"""Journals: one JSON object a line for every job that has ended, as done or as failed.

    {"id": "train/attitude=optimistic/0012/0", "status": "done", "reason": "", "text": "...", ...}

`id` is the job's, `status` is done or failed, `reason` says why it failed, and `text` is what was answered; what else
a record has is up to those who write it. A line that ends without a line break was torn by a crash: it does not count,
and whoever appends takes it away first.
"""

import codecs
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from miracle_jax import reading, storage
from miracle_jax.errors import UserError

DONE, FAILED = "done", "failed"
BLOCK = 2**16
"""Bytes that are searched at a time for the last line break."""


def read_journal(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a journal in the order of its lines, one in memory at a time. Of several records of one id the
    last counts.

    Raises UserError, which begins with file:line, at the first line that is no record: before anything is yielded.
    """
    last = {record["id"]: number for number, record in _records(path)}
    for number, record in _records(path):
        if last.get(record["id"]) == number:
            yield record


def _records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, record) of every line that is whole and not blank."""
    with open(reading.regular(path), "rb") as file:
        number = 0
        while line := file.readline(reading.LONGEST + 2):
            number += 1
            if not line.endswith(b"\n") and len(line) <= reading.LONGEST:
                return
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, _record(line.rstrip(b"\r\n"), f"{path}:{number}")


def _record(line: bytes, where: str) -> dict[str, Any]:
    record = reading.parse_object(line, f"{where} is no record of a journal, mend or delete the line")
    for name in ("id", "status", "reason", "text"):
        if not isinstance(record.get(name), str):
            raise UserError(f"{where}: {name!r} is missing or not a text; mend or delete the line")
    if not record["id"] or record["status"] not in (DONE, FAILED):
        raise UserError(
            f"{where}: id {record['id']!r} has status {record['status']!r}; expected an id, and done or failed; mend "
            "or delete the line"
        )
    return record


class Journal:
    """A journal to append to. Only one process may have it: whoever opens it holds the lock of its folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.exists():
            reading.regular(self.path)
        with self._disk():
            self._file = self.path.open("a+b", buffering=0)
            self._file.truncate(self._whole())

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def append(self, record: dict[str, Any]) -> None:
        """The record is on the disk when this returns. Raises UserError where the disk is full; what is there already
        is intact then."""
        line = json.dumps(record).encode() + b"\n"
        before = self._file.seek(0, os.SEEK_END)
        try:
            with self._disk():
                while line:  # a disk that fills up takes a part of it
                    line = line[self._file.write(line) :]
                os.fsync(self._file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                self._file.truncate(before)  # others may still append
            raise

    def _whole(self) -> int:
        """Bytes up to the last line break: a line that was torn is not counted."""
        end = self._file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - BLOCK)
            self._file.seek(start)
            if found := self._file.read(end - start).rfind(b"\n") + 1:
                return start + found
            end = start
        return 0

    def _disk(self):
        return storage.disk_errors(str(self.path), "what it has is intact")
