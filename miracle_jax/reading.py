"""Files that others wrote: whatever is in them, the outcome is their content or one sentence, in bounded memory."""

import codecs
import contextlib
import io
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from miracle_jax.errors import UserError

LARGEST = 2**30
"""Bytes of a file that is read as a whole: data, filled sheets. The bundled corpus has 3 MB."""
LONGEST_NAME = 255
"""Bytes of a file's name, on the usual file systems."""
LONGEST = 2**25
"""Bytes of one JSON text. Parsed, a text can take thirty times its size, so this bounds it to a gigabyte; a context of
1 MB has room, also with every character escaped, which takes six bytes (\\u0000)."""


def regular(path: str | Path) -> Path:
    """A local file, which ends. Raises UserError where there is none, or a folder, a pipe or a device."""
    path = Path(path).expanduser()
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL, which no name has
        raise UserError(f"file {path} does not exist") from None
    except OSError as error:
        raise UserError(f"file {path} cannot be read: {error.strerror or error}") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{path} is a folder; expected a file")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is a pipe or a device; write its content to a file, and name that")
    return path


def content(path: str | Path, most: int = LARGEST) -> bytes:
    """The bytes of a local file. Raises UserError as `regular` does, and where it is larger than `most`."""
    path = regular(path)
    try:
        if (size := path.stat().st_size) > most:
            raise UserError(f"{path} has {size / 2**20:,.0f} MiB; files like it are read up to {most / 2**20:,.0f} MiB")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"file {path} cannot be read: {error.strerror or error}") from None


def parse(text: bytes | str, otherwise: str = "invalid JSON") -> Any:
    """The value of a JSON text. Raises UserError that begins with `otherwise` and says what is wrong, and where."""
    try:
        if len(text) > LONGEST:
            raise UserError(f"{otherwise}: it has {len(text):,} bytes; at most {LONGEST:,} are read")
        return json.loads(text.removeprefix(codecs.BOM_UTF8).decode() if isinstance(text, bytes) else text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise UserError(f"{otherwise} at {line}column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        raise UserError(f"{otherwise}: byte {error.start + 1} (0x{wrong:02x}) is not UTF-8") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; an integer of thousands of digits
        raise UserError(f"{otherwise}: {error}") from None


def parse_object(text: bytes | str, otherwise: str = "invalid JSON") -> dict[str, Any]:
    """The same of a text that has to be an object."""
    value = parse(text, otherwise)
    if not isinstance(value, dict):
        raise UserError(f"{otherwise}: it is {kind(value)}; expected an object")
    return value


def json_object(path: str | Path, otherwise: str = "is not valid JSON") -> dict[str, Any]:
    """The object in a local JSON file. Raises UserError as `content` and `parse` do, after the path."""
    return parse_object(content(path, LONGEST), f"{path} {otherwise}")


def lines(text: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, line) of every line that is not blank; a byte order mark does no harm."""
    for number, line in enumerate(io.BytesIO(text.removeprefix(codecs.BOM_UTF8)), 1):
        if line.strip():
            yield number, line.rstrip(b"\r\n")


def metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, their numbers and their split; without those that are not whole, of which a
    run that was killed may leave one."""
    found = []
    for _, line in lines(content(path)):
        with contextlib.suppress(UserError):
            row = parse_object(line)
            row = {n: v for n, v in row.items() if n == "split" or (type(v) in (int, float) and not abs(v) >= 2**63)}
            if type(row.get("step")) is int:
                found.append(row)
    return found


def is_name(name: str) -> bool:
    """Whether a file can have this name, in the folder of the file that gives it."""
    with contextlib.suppress(UnicodeEncodeError):
        fits = 0 < len(name.encode()) <= LONGEST_NAME
        return fits and name not in (".", "..") and not {"/", "\\", "\0"} & set(name)
    return False


def kind(value) -> str:
    """What a JSON value is, in words."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
