"""Transcripts -> dialogues that keep to the rules, are there once and are in one language (appendix A.2).

A dialogue is cut before its first turn that breaks a rule, and dropped where too little is left. Dialogues are in the
order test, validation, training, and by id within: of two that are alike the first is kept, so that no training
dialogue resembles one of the test.
"""

import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from miracle_jax import transcripts
from miracle_jax.attributes import UNKNOWN, Schema
from miracle_jax.dataset import NOT_UNICODE, SPLITS, count, is_unicode
from miracle_jax.errors import UserError, printable
from miracle_jax.instructions import Instructions
from miracle_jax.journal import FAILED, read_journal
from miracle_jax.responses import CUT_OFF

ORDER = SPLITS[::-1]
"""Of the splits, in which dialogues are cleaned: test first."""
MOST_TURNS = 20
"""Turns of a dialogue. Each of its beginnings becomes an instance, so that the instances grow with the square."""
WORD_LENGTH = 20
"""Characters of a word, on average over a turn, at most."""
EXAMPLE_WORDS = 6
"""Of a sentence of an example, from which on an answer that has it counts as a copy."""
SHINGLE = 3
"""Words of a shingle."""
PERMUTATIONS = 64
"""Of a MinHash."""
MOST_CANDIDATES = 50
"""Dialogues that one is compared with."""
UNSPACED = ("zh", "ja", "th", "lo", "km", "my")
LONGEST_REASON = 200
MISSING = "{} is not installed; run bash launch/setup.sh corpus (or pip install 'miracle-jax[corpus]')"

# One character and few brackets each, so that the time is linear in the text.
SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’»)\]]{0,3}(?=\s|$)")
PLACEHOLDER = re.compile(r"\[\[|\]\]|\{\{|\}\}|\[[^\[\]]{1,60}\]|<[^<>]{1,40}>")


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A dialogue as it was collected, or its beginning."""

    id: str
    split: str
    labels: tuple[int, ...]
    """An aspect id an attribute, -1 where none was asked for: all but one in training and validation."""
    topic: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]

    @property
    def text(self) -> str:
        """A line a turn."""
        return turns_text(self.questions, self.answers)


def turns_text(questions: Sequence[str], answers: Sequence[str]) -> str:
    return "\n".join(f"A: {q}\nB: {a}" for q, a in zip(questions, answers, strict=True))


class Drop(NamedTuple):
    """What a stage dropped, and why."""

    id: str
    stage: str
    reason: str
    """One of few, to be counted."""
    detail: str
    text: str
    kept_turns: int
    """0: the whole dialogue was dropped."""


class Drops(list):
    """All that was dropped, in the order of the stages."""

    def add(self, id: str, stage: str, reason: str, text: str, detail: str = "", kept_turns: int = 0) -> None:
        self.append(Drop(id, stage, sys.intern(reason), detail, text, kept_turns))


def drawn(seed: int, name: str) -> bytes:
    """By which a draw sorts names: it does not depend on what else there is to draw from."""
    return hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()


# ------------------------------------------------------------------------------------------------ reading, rules


def read(path: str | Path, schema: Schema, rules: "Rules", drops: Drops) -> list[Dialogue]:
    """The dialogues of a collection's journal, by the rules. Raises UserError for records of something else."""
    found, known = [], {}
    for record in read_journal(path):
        split, labels, topic = _facts(record, schema, known, f"{path}: record {record['id']!r}")
        text, name = record["text"], record["id"]
        if record["status"] == FAILED:
            drops.add(name, "collection", printable(record["reason"])[:LONGEST_REASON] or "no reason given", text)
            continue
        try:
            questions, answers = transcripts.parse(text)
        except transcripts.Unparseable as error:
            drops.add(name, "parsing", str(error), text)
            continue
        whole = len(answers) - (record.get("finish") == CUT_OFF)
        kept, reason = rules.turns(questions[:whole], answers[:whole])
        if not reason and whole < len(answers):
            reason = "an answer that was cut off (--max-tokens)"
        if reason:
            cut = turns_text(questions[kept:], answers[kept:])
            kept = kept if kept >= rules.min_turns else 0
            drops.add(name, "rules", reason, cut if kept else turns_text(questions, answers), kept_turns=kept)
        if kept:
            found.append(Dialogue(name, split, labels, topic, questions[:kept], answers[:kept]))
    return sorted(found, key=lambda d: (ORDER.index(d.split), d.id))


def _facts(record: dict[str, Any], schema: Schema, known: dict, where: str) -> tuple[str, tuple[int, ...], str]:
    """(split, labels, topic) of a record."""
    split, tag, topic = (record.get(name) for name in ("split", "tag", "topic"))
    if split not in SPLITS:
        raise UserError(f"{where}: its split is {split!r}; expected {', '.join(SPLITS)}; mend or delete the line")
    if not isinstance(topic, str) or not is_unicode(topic + record["id"]):
        raise UserError(f"{where}: its topic is no text, or it or the id has {NOT_UNICODE}; mend or delete the line")
    if not isinstance(tag, dict) or not all(isinstance(aspect, str) for aspect in tag.values()):
        raise UserError(f"{where}: its tag is no mapping from attribute to aspect; mend or delete the line")
    key = (split, *sorted(tag.items()))
    if key not in known:
        try:
            labels = schema.parse(tag)
        except UserError as error:
            raise UserError(f"{where}: its tag does not fit the schema: {error}") from None
        number = sum(label != UNKNOWN for label in labels)
        if number != 1 if split != "test" else not number:
            wanted = "at least one aspect" if split == "test" else "one aspect of one attribute"
            raise UserError(f"{where}: its tag names {number} aspects; expected {wanted} in the {split} split")
        known[key] = sys.intern(split), labels
    return *known[key], sys.intern(" ".join(topic.split()))


@dataclass(frozen=True)
class Rules:
    """What a turn has to keep to: the paper's two (A.2), and what the instructions ask for (A.1)."""

    min_turns: int
    min_words: int
    max_answer_words: int
    max_question_words: int
    max_sentences: int
    examples: frozenset[str] = frozenset()
    """Sentences of the instructions' examples, as `normal` has them, which small models copy."""

    def turns(self, questions: Sequence[str], answers: Sequence[str]) -> tuple[int, str]:
        """How many turns from the beginning keep to the rules, and what the next one breaks, or the whole dialogue;
        empty: nothing."""
        earlier = set()
        for turn, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            reason = f"more than {MOST_TURNS} turns" if turn == MOST_TURNS else self.broken(question, answer)
            said = normal(answer)
            if not reason and said in earlier:
                reason = "an answer that repeats an earlier one"
            if not reason and any(sentence in said for sentence in self.examples):
                reason = "an answer that copies the example"
            if reason:
                return turn, reason
            earlier.add(said)
        few = len(answers) < self.min_turns
        return len(answers), f"fewer than {count(self.min_turns, 'turn')}" if few else ""

    def broken(self, question: str, answer: str) -> str:
        """The rule that a turn breaks, or nothing."""
        for what, text, most in (("question", question, self.max_question_words),
                                 ("answer", answer, self.max_answer_words)):  # fmt: skip
            if len(text) > WORD_LENGTH * most or len(text.split()) > most:
                return f"{what} of more than {most} words"
            if PLACEHOLDER.search(text) or not any(map(str.isalpha, text)) or text[0] + text[-1] == "()":
                return f"{what} with a placeholder"
            if _sentences(text) > self.max_sentences:
                return f"{what} of more than {self.max_sentences} sentences"
        if len(answer.split()) < self.min_words:
            return f"answer of fewer than {self.min_words} words"
        if "?" in answer or "？" in answer:
            return "answer with a question mark"
        if transcripts.OUT_OF_CHARACTER.search(answer):
            return "answer of a language model about itself"
        return ""


def _sentences(text: str) -> int:
    ends = [found.end() for found in SENTENCE_END.finditer(text)]
    return len(ends) + (not ends or ends[-1] < len(text))


def examples(instructions: Instructions) -> frozenset[str]:
    """The sentences of all examples that are long enough to be nobody else's."""
    answers = [told.answer for of in instructions.descriptions for told in of]
    found = {normal(sentence) for answer in answers for sentence in SENTENCE_END.split(answer)}
    return frozenset(sentence for sentence in found if len(sentence.split()) >= EXAMPLE_WORDS)


def normal(text: str) -> str:
    """A text without regard to case, punctuation and blanks."""
    return " ".join(re.findall(r"\w+", text.casefold()))


# ------------------------------------------------------------------------------------------------ whole dialogues


def without_duplicates(dialogues: Sequence[Dialogue], threshold: float, drops: Drops) -> list[Dialogue]:
    """Without those that are like an earlier one.

    threshold: Jaccard similarity of the answers' shingles, words in threes, from which on dialogues are near
      duplicates. Candidates come from MinHash and locality-sensitive hashing (datasketch), and are then compared
      exactly. 0: exact duplicates only.
    """
    seen, kept = {}, []
    like = _near(dialogues, threshold) if threshold else None
    for number, dialogue in enumerate(dialogues):
        text = normal(dialogue.text)
        first = seen.setdefault(drawn(0, text), number)
        if first != number:
            drops.add(dialogue.id, "duplicates", "exact duplicate", dialogue.text, f"of {dialogues[first].id}")
            continue
        found = like(number) if like else None
        if found:
            drops.add(dialogue.id, "duplicates", "near duplicate", dialogue.text,
                      f"{found[1]:.2f} of {dialogues[found[0]].id}")  # fmt: skip
        else:
            kept.append(dialogue)
    return kept


def _near(dialogues: Sequence[Dialogue], threshold: float) -> Callable[[int], tuple[int, float] | None]:
    """A function from the number of a dialogue to that of an earlier one that is like it, and how like; it remembers
    those that have none."""
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise UserError(MISSING.format("datasketch")) from None
    empty = MinHash(PERMUTATIONS)
    # Candidates are verified, so that one too many costs time only and one too few is a duplicate.
    index = MinHashLSH(threshold, PERMUTATIONS, weights=(0.2, 0.8))

    def find(number):
        own = _shingles(dialogues[number])
        signature = empty.copy()
        signature.update_batch([shingle.encode() for shingle in sorted(own)])
        for other in sorted(index.query(signature))[:MOST_CANDIDATES]:
            others = _shingles(dialogues[other])
            if (likeness := len(own & others) / len(own | others)) >= threshold:
                return other, likeness
        index.insert(number, signature, check_duplication=False)
        return None

    return find


def _shingles(dialogue: Dialogue) -> set[str]:
    words = normal(" ".join(dialogue.answers)).split()
    return {" ".join(words[i : i + SHINGLE]) for i in range(max(len(words) - SHINGLE + 1, 1))}


def language_filter(language: str, drops: Drops) -> Callable[[Sequence[Dialogue]], list[Dialogue]]:
    """What keeps the dialogues that py3langid takes for this language. Raises UserError for one that it does not know,
    or whose words have no blanks between them: all rules count words."""
    if language in UNSPACED:
        raise UserError(f"--language {language}: no rule fits a language without blanks between its words")
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError(MISSING.format("py3langid")) from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    if language not in identifier.labels:
        raise UserError(f"--language {language}: unknown; there are {', '.join(sorted(identifier.labels))}")

    def kept(dialogue: Dialogue) -> bool:
        found, _ = identifier.classify(" ".join(dialogue.questions + dialogue.answers))
        if found != language:
            drops.add(dialogue.id, "language", f"language {found}", dialogue.text)
        return found == language

    return lambda dialogues: list(filter(kept, dialogues))


def balanced(dialogues: Sequence[Dialogue], schema: Schema, seed: int, drops: Drops) -> list[Dialogue]:
    """As many of every aspect of an attribute for every topic, in training and validation each; drawn."""
    groups = aspects_of_topics(dialogues)
    few = {}
    for (split, attribute, topic), aspects in groups.items():
        fewest = min(len(aspects.get(aspect, ())) for aspect in range(schema.sizes[attribute]))
        for some in aspects.values():
            order = sorted(some, key=lambda d: drawn(seed, d.id))
            few |= {d.id: f"{split}, {topic}" for d in order[fewest:]}
    for dialogue in dialogues:
        if dialogue.id in few:
            drops.add(dialogue.id, "balance", "more than of another aspect", dialogue.text, few[dialogue.id])
    return [dialogue for dialogue in dialogues if dialogue.id not in few]


def aspects_of_topics(dialogues: Sequence[Dialogue]) -> dict[tuple[str, int, str], dict[int, list[Dialogue]]]:
    """{(split, attribute, topic): {aspect: its dialogues}} of training and validation."""
    groups = {}
    for dialogue in dialogues:
        if dialogue.split != "test":
            attribute, aspect = single(dialogue)
            group = groups.setdefault((dialogue.split, attribute, dialogue.topic), {})
            group.setdefault(aspect, []).append(dialogue)
    return groups


def single(dialogue: Dialogue) -> tuple[int, int]:
    """(attribute, aspect) of a dialogue of training or validation."""
    return next((a, aspect) for a, aspect in enumerate(dialogue.labels) if aspect != UNKNOWN)
