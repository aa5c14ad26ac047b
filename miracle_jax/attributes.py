"""The schema: attributes, their aspects, and personalities: names <-> ids.

A personality gives each attribute an aspect id, or -1 where the attribute is not controlled. Attributes and aspects are
numbered in the order of the schema file. Names are compared without regard to case, spaces, hyphens and underscores.
"""

import difflib
import functools
import itertools
import json
import math
import operator
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from etils import epath

from miracle_jax import reading, storage
from miracle_jax.errors import UserError

BUNDLED = Path(__file__).with_name("attributes.toml")
UNKNOWN = -1
"""Id of an aspect that is not known (in data) or not controlled (in a personality)."""

LONGEST_SCHEMA = 2**20
"""Bytes of a schema file. The parser takes time that grows with the square of some texts' lengths."""
MOST_PERSONALITIES = 10_000
"""Personalities that are listed; ten attributes of ten aspects have ten thousand million."""

Personality = str | Mapping[str, str | int | None] | Sequence[str] | None


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def _near(name: str, names: Iterable[str]) -> str:
    """`; did you mean ...?`, or all the names when none is near."""
    by_key = {_key(n): n for n in names}
    near = [by_key[k] for k in difflib.get_close_matches(_key(name), by_key, n=3)]
    return f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(by_key.values())}"


@dataclass(frozen=True)
class Attribute:
    """One side of a personality and the aspects it can take."""

    name: str
    aspects: tuple[str, ...]


@dataclass(frozen=True)
class Schema:
    """All attributes, in the order of their ids."""

    attributes: tuple[Attribute, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.attributes)

    @property
    def short_names(self) -> tuple[str, ...]:
        """For the heads of tables, as the paper has them: "L.", or the whole name where initials are shared."""
        initials = [name[0].upper() for name in self.names]
        unique = len(set(initials)) == len(initials)
        return tuple(
            f"{i}." if unique else name.replace("_", " ") for i, name in zip(initials, self.names, strict=True)
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of aspects of each attribute."""
        return tuple(len(a.aspects) for a in self.attributes)

    @property
    def unknown(self) -> tuple[int, ...]:
        """The ids where nothing is known."""
        return (UNKNOWN,) * len(self.attributes)

    @functools.cached_property
    def _keys(self) -> list[tuple[str, tuple[str, ...]]]:
        """Of each attribute its name and its aspects', as they are compared; made once for all replies."""
        return [(_key(attribute.name), tuple(map(_key, attribute.aspects))) for attribute in self.attributes]

    def attribute_index(self, name: str) -> int:
        if not isinstance(name, str):
            raise UserError(f"an attribute is named by text, not {name!r}; there are {', '.join(self.names)}")
        wanted = _key(name)
        for i, (key, _) in enumerate(self._keys):
            if key == wanted:
                return i
        raise UserError(f"unknown attribute {name!r}{_near(name, self.names)}")

    def aspect_id(self, attribute: str | int, aspect: str | int) -> int:
        """The id of an aspect that is given by name or id. attribute: name or index."""
        if not isinstance(attribute, int):
            attribute = self.attribute_index(attribute)
        if not 0 <= attribute < len(self.attributes):
            raise UserError(f"there is no attribute {attribute}; there are {len(self.attributes)}, from 0")
        name, aspects = self.attributes[attribute].name, self.attributes[attribute].aspects
        if isinstance(aspect, int) and not isinstance(aspect, bool):
            if 0 <= aspect < len(aspects):
                return aspect
            numbered = ", ".join(f"{i} {a}" for i, a in enumerate(aspects))
            raise UserError(f"{name} has no aspect {aspect}; there are {numbered}")
        if isinstance(aspect, str):
            wanted = _key(aspect)
            for i, key in enumerate(self._keys[attribute][1]):
                if key == wanted:
                    return i
        raise UserError(f"{name} has no aspect {aspect!r}{_near(str(aspect), aspects)}")

    def parse(self, personality: Personality) -> tuple[int, ...]:
        """The aspect id of each attribute, -1 where the personality does not name one.

        personality: "lyrical, optimistic", ["lyrical", "attitude=optimistic"] or {"attitude": "optimistic"}, the last
          also as JSON text; None or anything empty controls nothing. An aspect name that several attributes share has
          to be written `attribute=aspect`.
        Raises UserError for unknown or ambiguous names and for two aspects of one attribute.
        """
        if isinstance(personality, str) and personality.lstrip().startswith("{"):
            personality = reading.parse_object(personality, f"the personality {personality!r} is not a JSON object")
        if isinstance(personality, str):
            personality = [item for item in personality.split(",") if item.strip()]
        if not isinstance(personality, Mapping | Sequence | None):
            raise UserError(f"a personality is text, a list of aspects or a mapping, not {personality!r}")
        if isinstance(personality, Mapping):
            pairs = [(self.attribute_index(a), aspect) for a, aspect in personality.items() if aspect is not None]
        else:
            pairs = [self._find(item) for item in personality or ()]
        ids = [UNKNOWN] * len(self.attributes)
        for index, aspect in pairs:
            aspect = self.aspect_id(index, aspect)
            if ids[index] not in (UNKNOWN, aspect):
                both = " and ".join(self.attributes[index].aspects[i] for i in (ids[index], aspect))
                raise UserError(f"{both} are two aspects of {self.attributes[index].name}; choose one")
            ids[index] = aspect
        return tuple(ids)

    def _find(self, item: str) -> tuple[int, str]:
        """The attribute index and aspect name that `aspect` or `attribute=aspect` means."""
        if not isinstance(item, str):
            example = self.describe([size - 1 for size in self.sizes])
            raise UserError(f"a personality lists aspects by name, not {item!r}; write for instance {example!r}")
        if "=" in item:
            attribute, _, aspect = item.partition("=")
            return self.attribute_index(attribute), aspect.strip()
        wanted = _key(item)
        found = [i for i, (_, aspects) in enumerate(self._keys) if wanted in aspects]
        if not found:
            aspects = [aspect for a in self.attributes for aspect in a.aspects]
            raise UserError(f"unknown aspect {item.strip()!r}{_near(item, aspects)}")
        if len(found) > 1:
            choices = " or ".join(f"{self.attributes[i].name}={item.strip()}" for i in found)
            raise UserError(f"{item.strip()!r} is an aspect of several attributes; write {choices}")
        return found[0], item.strip()

    def describe(self, ids: Sequence[int]) -> str:
        """Names for `ids` such that parse(describe(ids)) == ids; empty when nothing is controlled."""
        try:
            ids = [operator.index(i) for i in ids]
        except TypeError:
            ids = []
        if len(ids) != len(self.attributes):
            raise UserError(f"a personality in ids has one for each of {', '.join(self.names)}")
        shared = Counter(key for _, aspects in self._keys for key in aspects)
        words = []
        for index, (attribute, i) in enumerate(zip(self.attributes, ids, strict=True)):
            if i != UNKNOWN:
                i = self.aspect_id(index, i)
                aspect, key = attribute.aspects[i], self._keys[index][1][i]
                words.append(aspect if shared[key] == 1 else f"{attribute.name}={aspect}")
        return ", ".join(words)

    def tag(self, labels: Sequence[int]) -> dict[str, str]:
        """{attribute: aspect} of what is known, by which a line of data names its aspects."""
        return {a.name: a.aspects[i] for a, i in zip(self.attributes, labels, strict=True) if i != UNKNOWN}

    def personalities(self) -> list[tuple[int, ...]]:
        """Every combination of one aspect per attribute, in the order of ids. Raises UserError for too many."""
        if (number := math.prod(self.sizes)) > MOST_PERSONALITIES:
            raise UserError(
                f"the {len(self.names)} attributes make {number:,} personalities, which are too many to list; name some"
            )
        return list(itertools.product(*(range(size) for size in self.sizes)))

    def to_toml(self) -> str:
        # A JSON string without escaped non-ASCII is a TOML string.
        quote = lambda text: json.dumps(text, ensure_ascii=False)  # noqa: E731
        return "\n".join(
            f"[[attribute]]\nname = {quote(a.name)}\naspects = [{', '.join(map(quote, a.aspects))}]\n"
            for a in self.attributes
        )

    def save(self, path: str | Path) -> None:
        epath.Path(path).write_text(self.to_toml(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path = "") -> "Schema":
        """Reads a schema file; an empty path means the bundled one."""
        if not isinstance(path, str | os.PathLike):
            raise UserError(f"a schema is named by its file, not {path!r}")
        try:
            text = storage.read(path or BUNDLED)
        except UserError as error:
            raise UserError(f"schema {error}") from None
        try:
            return cls.from_toml(text.decode(), str(path))
        except UnicodeDecodeError as error:
            raise UserError(f"schema file {path} is not UTF-8 at byte {error.start}") from None

    @classmethod
    def from_toml(cls, text: str, where: str = "schema") -> "Schema":
        """Raises UserError that names `where` and every problem unless the text is a valid schema."""
        if not isinstance(text, str) or len(text) > LONGEST_SCHEMA:
            raise UserError(f"schema file {where} is not a text of at most {LONGEST_SCHEMA:,} characters")
        try:
            data = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError; integers have their own
            raise UserError(f"schema file {where} is not valid TOML: {error}") from None
        problems = [f"unknown entry {name!r}" for name in data if name != "attribute"]
        tables = data.get("attribute")
        if not isinstance(tables, list) or not tables:
            problems.append("it needs at least one [[attribute]] with name and aspects")
            tables = []
        for number, table in enumerate(tables, 1):
            problems += [f"attribute {number}: {problem}" for problem in _table_problems(table)]
        if not problems:
            problems += _repeated("attribute", [t["name"] for t in tables])
        if problems:
            raise UserError(f"schema file {where}: " + "; ".join(problems))
        return cls(tuple(Attribute(t["name"], tuple(t["aspects"])) for t in tables))


def _table_problems(table) -> list[str]:
    if not isinstance(table, dict):
        return ["expected a table [[attribute]]"]
    unknown = set(table) - {"name", "aspects", "instructions"}  # the last is read by instructions.py
    takes = "it takes name and aspects, and instructions for collecting"
    problems = [f"unknown entry {name!r}; {takes}" for name in sorted(unknown)]
    aspects = table.get("aspects")
    if not isinstance(aspects, list) or len(aspects) < 2:
        problems.append("aspects must be a list of at least two names")
        aspects = []
    for name in [table.get("name"), *aspects]:
        # A personality is written as text in which "," and "=" have a meaning, and printed in one line.
        if not isinstance(name, str) or not name.strip() or not name.isprintable() or set(name) & set(",="):
            problems.append(f"{name!r} cannot be a name; it needs text in one line, without ',' and '='")
    return problems or _repeated("aspect", aspects)


def _repeated(what: str, names: list[str]) -> list[str]:
    seen = set()  # add gives None
    return [f"{what} {name!r} is there twice" for name in names if _key(name) in seen or seen.add(_key(name))]
