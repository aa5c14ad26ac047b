"""Hostile versions of valid files, drawn by Hypothesis: what is changed is known to be structure or bytes.

`mutated(draw, name, content)` changes a file by what its name ends in: JSON by its values, keys and text; archives by
their members, members that are arrays by their shape and type; headers by their numbers; everything by its bytes.
"""

import copy
import io
import json
import math
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from hypothesis import strategies as st

MEGABYTE = "x" * 2**20
TEXTS = (
    "", " ", "\t\n", "\0", "a\0b", "\x1b[2J\x07", "\u202egnol\u202c", "\u0645\u0631\u062d\u0628\u0627\u060c \u061f",
    "\ufeffhi", "\ud800", "x\udfff", "e\u0301\u0301\u0301", "\U0001f469\u200d\U0001f467", "<bos>[SEP]",
    "../../../outside", "/etc/passwd", "C:\\con", "=1+1", "lyrical, optimistic", "{}", '{"a":', "-1", "nan", "%s%n{0}",
    "a" * 300, "[[[[[", "__import__('os').system('true')", "gs://x/y", "id",
)  # fmt: skip
NUMBERS = (0, -1, 1, 2, 255, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, 1e-320, math.nan,
           math.inf, -math.inf)  # fmt: skip
VALUES = (*TEXTS, *NUMBERS, None, True, False, [], {}, [[]], [{}], [None], {"": None}, ["x", 1], {"input": []})
DEEP, LONG = "\0deep\0", "\0long\0"
"""Stand for what json.dumps cannot write, or what would be slow to copy about."""
WRITTEN = {json.dumps(DEEP): "[" * 50_000, json.dumps(LONG): json.dumps(MEGABYTE)}
BYTES = (
    b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\n", b"\r\n", b" " * 100, b"{", b"[" * 3000, b'"', b"\\u0000",
    b"\\ud800", b"\x1b[0m", b",", b"\xf0\x9f", b"nan", b"1e999", b"9" * 5000, b"'", b"# ", b"\x80\x04N.",
)  # fmt: skip

Draw = Callable[[st.SearchStrategy], Any]


def mutated(draw: Draw, name: str, content: bytes) -> bytes:
    """The content of the file `name`, changed."""
    suffix = name.rpartition(".")[2]
    by = {"json": json_text, "jsonl": json_lines, "npz": archive, "bin": archive, "safetensors": header}
    if suffix in by and draw(st.integers(0, 3)):
        content = by[suffix](draw, content)
        if draw(st.integers(0, 3)):
            return content
    return some_bytes(draw, content)


def some_bytes(draw: Draw, content: bytes) -> bytes:
    """Bytes flipped, cut, inserted, repeated; numbers of a header made huge; or nothing left."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        end = min(place + draw(st.sampled_from([1, 2, 8, 40, 2**30])), len(content))
        how = draw(st.integers(0, 7))
        if how == 0:
            flipped = draw(st.integers(1, 255))
            one = bytes(byte ^ flipped for byte in content[place : place + 1])
            content = content[:place] + one + content[place + 1 :]
        elif how == 1:
            content = content[:place] + content[end:]
        elif how == 2:
            content = content[:place] + draw(st.sampled_from(BYTES)) + content[place:]
        elif how == 3:
            content = content[:place] + content[place:end] * draw(st.sampled_from([2, 3, 30])) + content[end:]
        elif how == 4:  # where a length or a count may be
            kind, value = draw(st.sampled_from([("<Q", 2**62), ("<Q", 2**64 - 1), ("<I", 2**31), ("<I", 0), ("<H", 9)]))
            place = draw(st.integers(0, max(min(len(content), 200) - 8, 0)))
            written = struct.pack(kind, value)
            content = content[:place] + written + content[place + len(written) :]
        elif how == 5:
            content = draw(st.sampled_from(BYTES)) + content
        elif how == 6:
            content = content[:place]
        elif not draw(st.integers(0, 9)):
            content = draw(st.sampled_from([b"", b" ", b"\n" * 1000, b"\0" * 1000, content + b"\0" * 4096]))
        content = content[: 2**22]
    return content


# ------------------------------------------------------------------------------------------------ JSON


def json_text(draw: Draw, content: bytes) -> bytes:
    """A JSON text with values replaced, keys renamed, removed or doubled."""
    return dumped(draw, changed(draw, json.loads(content)))


def json_lines(draw: Draw, content: bytes) -> bytes:
    """Lines of JSON, some of them changed, doubled, left out, or in another order."""
    valid = content.splitlines()
    lines = list(valid)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(lines) - 1))
        how = draw(st.integers(0, 6))
        if how < 4:
            lines[place] = dumped(draw, changed(draw, json.loads(valid[place % len(valid)])))
        elif how == 4:
            lines.insert(place, lines[place])
        elif how == 5 and len(lines) > 1:
            del lines[place]
        else:
            lines.insert(place, draw(st.sampled_from([*BYTES, b"[]", b"null", b"1", b'"text"', b"{}"])))
    return draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join(lines)


def changed(draw: Draw, value: Any) -> Any:
    """A JSON value with up to three places changed."""
    holder = [value]
    for _ in range(draw(st.integers(1, 3))):
        parent, key = draw(st.sampled_from(list(_places(holder))[:400]))
        how = draw(st.integers(0, 9))
        if how < 6:
            parent[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif how == 6:
            parent[key] = draw(st.sampled_from([DEEP, LONG, [parent[key]], {"": parent[key]}, [parent[key]] * 3]))
        elif isinstance(parent, dict) and how == 7:
            parent[draw(st.sampled_from([*TEXTS, key.upper(), key + "s"]))] = parent.pop(key)
        elif isinstance(parent, dict) and how == 8:
            parent[draw(st.sampled_from(TEXTS))] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif parent is not holder:
            del parent[key]
    return holder[0]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def dumped(draw: Draw, value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=draw(st.booleans()))
    for placeholder, written in WRITTEN.items():
        text = text.replace(placeholder, written)
    if "{" in text and not draw(st.integers(0, 5)):  # a key twice
        key = draw(st.sampled_from(list(value) if isinstance(value, dict) and value else ["input"]))
        text = text.replace("{", "{" + json.dumps(key) + ": 1, ", 1)
    return text.encode("utf-8", "surrogatepass")


# ------------------------------------------------------------------------------------------------ binary files


def header(draw: Draw, content: bytes) -> bytes:
    """A safetensors file whose JSON header is changed, and its length fits or does not."""
    size = struct.unpack("<Q", content[:8])[0]
    text = json_text(draw, content[8 : 8 + size])
    length = len(text) + draw(st.sampled_from([0, 0, 0, 0, 1, -1, 2**40]))
    return struct.pack("<Q", length) + text + content[8 + size :]


def archive(draw: Draw, content: bytes) -> bytes:
    """A zip archive with a member changed, renamed, doubled, added or left out."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = [(info.filename, file.read(info)) for info in file.infolist()]
    place = draw(st.integers(0, len(members) - 1))
    name, data = members[place]
    how = draw(st.integers(0, 5))
    if how == 0:
        del members[place]
    elif how == 1:
        members[place] = (draw(st.sampled_from(["../../../outside.npy", "/etc/passwd", "x", name + "x"])), data)
    elif how == 2:
        members.append((name + "2", data))
    elif how == 3 and name.endswith(".npy"):
        members[place] = (name, array(draw, data))
    else:
        members[place] = (name, some_bytes(draw, data))
    written = io.BytesIO()
    method = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]))
    with zipfile.ZipFile(written, "w", method) as file:
        for name, data in members:
            file.writestr(name, data)
    return written.getvalue()


def array(draw: Draw, content: bytes) -> bytes:
    """An .npy file of another shape, type, order or content."""
    values = np.load(io.BytesIO(content))
    kinds = ["<f4", "<i8", "<i4", "<U3", "S0", "<U0", "V0", "O", "<c16", [("a", "<i4"), ("b", "O")], "M8[s]", "|V8"]
    shapes = [(), (0,), (2**40,), (2**62, 4), (-1,), (3, 0), (1,) * 40, values.shape, (*values.shape, 1)]
    how = draw(st.integers(0, 2))
    if how == 0:
        values = values.ravel()
        if values.size and values.dtype.kind in "iu":
            values = values.copy()
            big = draw(st.sampled_from([-1, -2, 0, 1, 127]))
            values[draw(st.integers(0, values.size - 1))] = np.array(big).astype(values.dtype)
        written = io.BytesIO()
        np.save(written, values.reshape(np.shape(np.load(io.BytesIO(content)))), allow_pickle=False)
        return written.getvalue()
    kind = draw(st.sampled_from(kinds)) if how == 1 else values.dtype.str
    shape = draw(st.sampled_from(shapes)) if how == 2 else values.shape
    text = f"{{'descr': {kind!r}, 'fortran_order': {draw(st.booleans())}, 'shape': {shape!r}, }}".encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + values.tobytes()
