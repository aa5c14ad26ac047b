"""Transcripts that a language model wrote -> turns (paper, appendix A.1: one person asks, the other answers).

A turn begins with a speaker's name and a colon, whatever is around them: numbers, markdown, brackets. The speakers are
A and B, as our instructions ask for, another usual pair (PersonA and PersonB, User and Assistant, Q and A), or the two
names that most lines begin with, of which the first asks.
"""

import re
from collections import Counter
from collections.abc import Iterator

from miracle_jax import dataset

PAIRS = (
    ("persona", "personb"), ("person1", "person2"), ("speakera", "speakerb"), ("speaker1", "speaker2"),
    ("user", "assistant"), ("user", "bot"), ("user", "ai"), ("human", "assistant"), ("human", "bot"), ("human", "ai"),
    ("interviewer", "interviewee"), ("question", "answer"), ("q", "a"), ("a", "b"),
)  # fmt: skip
"""Names of (who asks, who answers), as `_key` gives them."""
NO_NAMES = set(
    "topic seedtopic theme note notes title scene setting context turn round exchange dialogue dialog conversation "
    "transcript example format requirements disclaimer summary end theend".split()
)
"""What stands before a colon and speaks no turn."""

# Every repetition before a name has a limit, and a line is matched at its start only: the time is linear in the text.
_AROUND = r"[\s>#*_`~•–—-]{0,16}"
_NUMBER = r"(?:(?:turn|round|exchange)?[ #]{0,2}\d{1,4}[\s.):：*–-]{0,6})?[*_]{0,3}"
_NAME = r"[^\W\d_](?:[\w '.-]{0,28}[\w.])?"
_ASIDE = r"(?:\s?\([^()]{0,60}\))?"
HEAD = re.compile(
    rf"{_AROUND}{_NUMBER}(?:"
    rf"[\[(<{{]{{0,2}}\s?(?P<name>{_NAME})[\s*_]{{0,4}}[\])>}}]{{0,2}}{_ASIDE}[\s*_]{{0,4}}[:：][\s*_\])]{{0,6}}"
    rf"|\[(?P<tag>{_NAME})\](?!\])[\s*_]{{0,6}})",
    re.IGNORECASE,
)
"""`PersonA:`, `**[Person A]:**`, `2. PersonB (calm):`, and `[PersonB]` without a colon."""
INLINE = re.compile(
    r"(?<=\s)(?=[\[*]{0,3}(?i:person)[ _]?[abAB12][\]*]{0,3}\s?[:：])"
    r"|(?<=[.!?…\"”')]\s)(?=[\[*]{0,3}[AB][\]*]{0,3}[:：]\s)"
)
"""Where a turn begins within a line."""
NO_TEXT = re.compile(
    r"[-*_=~#\s]*|`{3}.{0,20}|\([^()]*\)|\[[^\[\]]*\]|#{1,6}\s.*|(?:turn|round|exchange)?\s?\d{1,4}[.):]?", re.I
)
"""What a line may be that says nothing: a rule, a fence, a stage direction, a heading, a number."""
BULLET = re.compile(r"[-•>]\s+")
EMPHASIS = re.compile(r"`+|__+|(?<!\d)\*+(?=\S)|(?<=\S)\*+(?!\d)|(?<!\w)_(?=\w)|(?<=\w)_(?!\w)")
QUOTES = {'"': '"', "“": "”", "„": "“", "«": "»", "‘": "’", "'": "'"}
REFUSAL = re.compile(
    r"(?:i'm|i am|i) (?:\w{1,20} )?(?:sorry|afraid|apologi[sz]e)\b.{0,60}?\b(?:but|can't|cannot|can not|unable|won't)\b"
    r"|(?:sorry|my apologies|apologies|unfortunately),? (?:but )?(?:i|as an?)\b"
    r"|i (?:can't|cannot|can not|won't|will not|am unable|am not able|do not feel comfortable|don't feel comfortable)\b"
    r"|i'm (?:unable|not able)\b",
    re.IGNORECASE,
)
OUT_OF_CHARACTER = re.compile(r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b", re.IGNORECASE)


class Unparseable(ValueError):
    """A text that is no dialogue of two speakers. The message says why, in a few words."""


def parse(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(questions, answers) of a transcript, as many of each: a last question without an answer is left out, and so is
    what comes before the first turn, and after a blank line behind the last.

    Raises Unparseable.
    """
    if not dataset.is_unicode(text):
        raise Unparseable("half of a surrogate pair")
    if not text.replace("\n", " ").isprintable():
        text = "".join(c if c.isprintable() or c.isspace() else " " for c in text)
    start = text[:300].replace("’", "'").lstrip(" \n\t\"'*#>“")
    if not text.strip():
        raise Unparseable("nothing but blanks")
    if REFUSAL.match(start) or OUT_OF_CHARACTER.match(start):
        raise Unparseable("a refusal")
    lines = [line for part in text.splitlines() for line in INLINE.sub("\n", part).split("\n")]
    speakers = _speakers(lines)
    return _pairs(_turns(lines, speakers), speakers)


def _key(name: str) -> str:
    """A name without regard to case, blanks and punctuation; Q1 and Q2 are the same."""
    key = re.sub(r"[\W_]+", "", name).lower()
    numbered = re.fullmatch(r"(q|a|question|answer|turn|round|exchange)\d+", key)
    return numbered[1] if numbered else key


KNOWN = {name for pair in PAIRS for name in pair if len(name) > 1}


def _head(line: str, start: int = 0) -> tuple[str, int]:
    """The name with which a line begins at `start`, and where what is said begins; no name: ("", start)."""
    found = HEAD.match(line, start)
    if found and len((found["name"] or found["tag"]).split()) <= 3:
        return _key(found["name"] or found["tag"]), found.end()
    if not start and len(line) < 40 and _key(line) in KNOWN:  # a heading
        return _key(line), len(line)
    return "", start


def _speakers(lines: list[str]) -> tuple[str, str]:
    """(who asks, who answers)."""
    names, with_colon = [], Counter()
    for line in lines:
        name, end = _head(line)
        if name and name not in NO_NAMES:
            names.append(name)
            with_colon[name] += ":" in line[:end] or "：" in line[:end]
    often = [name for name, _ in Counter(names).most_common(2)]
    if len(often) < 2:
        raise Unparseable("fewer than two speakers")
    pair = next((pair for pair in PAIRS if set(pair) <= set(names)), tuple(sorted(often, key=names.index)))
    # Once, a word before a colon is part of what somebody says; a letter is a speaker.
    others = [name for name, number in with_colon.items() if name not in pair and number > (len(name) > 1)]
    if others or pair not in PAIRS and len(with_colon) > 2 and len(names) == len(set(names)):
        raise Unparseable("more than two speakers")
    return pair


def _turns(lines: list[str], speakers: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """(name, what is said), turn by turn; the same name may come several times in a row."""
    name, said, after = "", [], None
    for line in lines:
        head, start = _head(line)
        if head in speakers:
            while (again := _head(line, start))[0] == head and again[1] > start:  # a tag twice
                start = again[1]
            if name:
                yield name, _plain([*said, *(after or ())])
            name, said, after = head, [line[start:]], None
        elif head in NO_NAMES:
            if name:
                yield name, _plain([*said, *(after or ())])
            name, said, after = "", [], None
        elif not line.strip() or NO_TEXT.fullmatch(line.strip()):
            if any(map(str.strip, said)):
                after = after or []  # another paragraph, if a turn follows; else something about the dialogue
        else:
            (said if after is None else after).append(BULLET.sub("", line.lstrip(), count=1))
    if name:
        yield name, _plain(said)


def _plain(lines: list[str]) -> str:
    """What is said, in one line, without markdown and without quotation marks around it."""
    text = " ".join(EMPHASIS.sub("", " ".join(lines)).split())
    if len(text) > 1 and text[-1] == QUOTES.get(text[0]) and not {text[0], text[-1]} & set(text[1:-1]):
        text = text[1:-1].strip()
    return text


def _pairs(turns: Iterator[tuple[str, str]], speakers: tuple[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    asker, _ = speakers
    said: list[tuple[str, list[str]]] = []
    for name, text in turns:
        # An answer may begin again with its name; a second question is one too many, unless the first was an empty tag.
        if said and said[-1][0] == name and (name != asker or not text or not any(said[-1][1])):
            said[-1][1].append(text)
        else:
            said.append((name, [text]))
    if said[0][0] != asker:
        raise Unparseable("an answer before the first question")
    pairs = []
    for number, (name, texts) in enumerate(said):
        text = " ".join(filter(None, texts))
        last = number == len(said) - 1
        if not text and not last:
            raise Unparseable("an empty turn")
        if name == asker and number and said[number - 1][0] == asker:
            raise Unparseable("a question without an answer")
        if name == asker:
            question = text
        elif text:
            pairs.append((question, text))
    if not pairs:
        raise Unparseable("no answer")
    questions, answers = zip(*pairs, strict=True)
    return questions, answers
