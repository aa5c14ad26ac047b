"""CSV for people, who fill it in with a spreadsheet program.

It is in UTF-8 with a byte order mark. A text that a spreadsheet program could take for a formula, and one that itself
begins with an apostrophe, has an apostrophe more in front.
"""

import codecs
import csv
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence

from miracle_jax.errors import UserError

FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
"""What a spreadsheet program takes for the start of a formula, in the wide forms too."""


def content(lines: Iterable[str]) -> bytes:
    """The file that has these lines."""
    return codecs.BOM_UTF8 + "".join(line + "\r\n" for line in lines).encode()


def line(cells: Iterable[str]) -> str:
    """Cells as CSV. The csv module would leave some line breaks without quotes."""
    return ",".join('"' + _guarded(cell).replace('"', '""') + '"' for cell in cells)


def _guarded(text: str) -> str:
    """The text, with an apostrophe in front where it could become a formula or begins with one."""
    return f"'{text}" if text.startswith("'") or text.lstrip().startswith(FORMULA) else text


def text_of(cell: str) -> str:
    """The text that `line` wrote as this cell."""
    return cell.removeprefix("'")


def rows(content: bytes, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, {column: cell}) of every row of a sheet that is not blank, divided by commas, semicolons or tabs, in UTF-8
    or UTF-16. Raises UserError, which begins with the line.

    needed: columns that there must be. What the head says after a colon is no part of a column's name.
    """
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if wide else "utf-8-sig", "replace").replace("\r\n", "\n").replace("\r", "\n")
    return rows_of(io.StringIO(text), needed)


def rows_of(lines: Iterator[str], needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """`rows` of lines of text."""
    line, head = 1, next(lines, "")
    try:
        names, delimiter = _columns(head, needed)
        reader = csv.reader(itertools.chain([head], lines), delimiter=delimiter, strict=True)
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if line > 1 and any(cells):
                yield line, dict(zip(names, cells + [""] * len(names), strict=False))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{line}: {error}; save the sheet as CSV once more") from None


def _columns(head: str, needed: Sequence[str]) -> tuple[list[str], str]:
    """The names of the columns, and what divides them."""
    for delimiter in ",;\t":
        names = [cell.partition(":")[0].strip().lower() for cell in next(csv.reader([head], delimiter=delimiter), [])]
        if all(names.count(name) == 1 for name in needed):
            return names, delimiter
    raise UserError(f"1: expected a sheet as CSV, whose first line names the columns {', '.join(needed)}")
