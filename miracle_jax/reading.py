"""Files that others wrote: whatever is in them, the outcome is their content or one sentence, in bounded memory."""

import codecs
import contextlib
import io
import json
import re
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

BLANK = re.compile(rb"[ \t\r\n]*")
DECODER = json.JSONDecoder()


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


def begins(text: bytes) -> bytes:
    """The first byte that is not blank, empty if there is none."""
    text = text[:LONGEST].removeprefix(codecs.BOM_UTF8)
    return text[BLANK.match(text).end() :][:1]


def entries(text: bytes, where: str | Path) -> Iterator[tuple[int, str, Any]]:
    """(line, name, value) of every entry of one JSON array or object, which may be longer than LONGEST: an entry is
    parsed when it is asked for. name: empty in an array.

    where: the file, for messages. Raises UserError with the line, where the text is no such thing.
    """
    text = text.removeprefix(codecs.BOM_UTF8)
    place, line = 0, 1

    def wrong(why):
        return UserError(f"{where}:{line}: invalid JSON: {why}")

    def skip(to):
        """Goes there, and on to the next character that is not blank, which it returns."""
        nonlocal place, line
        blank = BLANK.match(text, to).end()
        line += text.count(b"\n", place, blank)
        place = blank
        return text[place : place + 1]

    def value():
        """The value that begins here, read from as few bytes as hold it."""
        size = 2**10
        while True:
            some, whole = text[place : place + size], place + size >= len(text)
            chars = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(some, whole)
            try:
                found, end = DECODER.raw_decode(chars)
                if end < len(chars) or whole:  # "12" may go on
                    return found, place + len(chars[:end].encode())
            except json.JSONDecodeError as error:
                if whole:
                    raise wrong(error.msg) from None
            except UnicodeEncodeError as error:
                raise wrong(f"byte 0x{ord(chars[error.start]) - 0xDC00:02x} is not UTF-8") from None
            except (RecursionError, ValueError) as error:  # nested too deeply; an integer of thousands of digits
                raise wrong(error) from None
            if size >= LONGEST:
                raise wrong(f"no entry ends within {LONGEST:,} bytes, and at most so many are read")
            size *= 2

    closing = {b"[": b"]", b"{": b"}"}.get(skip(0))
    if closing is None:
        raise wrong("expected an array or an object")
    last = skip(place + 1) == closing
    while not last:
        name, began = "", line
        if closing == b"}":
            name, end = value()
            if not isinstance(name, str) or skip(end) != b":":
                raise wrong("expected a name in quotes, and a colon")
            skip(place + 1)
        found, end = value()
        after = skip(end)
        if after not in (b",", closing):
            raise wrong(f"expected a comma or {closing.decode()}")
        yield began, name, found
        last = after == closing
        if not last:
            skip(place + 1)
    if skip(place + 1):
        raise wrong("there is more after its end")


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
