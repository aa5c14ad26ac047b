"""Collected transcripts -> a corpus in the released format, and its data card (section 2.4, appendix A.2).

    python -m miracle_jax.clean DIR --out OUT

DIR is what `python -m miracle_jax.collect` wrote. What is dropped, and why, is in OUT/dropped.jsonl. The command asks
nothing: people write y or n into the column `keep` of OUT/review-1.csv and OUT/review-2.csv, and the same command,
given again, takes that into account.

The stages, in order: what failed in collection; what is no dialogue; the rules for turns; duplicates, exact and near;
language; two rounds of judges that score how strongly aspects show; toxicity and balance where asked for.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miracle_jax import cleaning, dataset, reading, storage
from miracle_jax.attributes import UNKNOWN, Schema
from miracle_jax.cleaning import Dialogue, Drops, Rules, single
from miracle_jax.command_line import parse, split_words
from miracle_jax.errors import UserError, one_sentence
from miracle_jax.instructions import ANSWER_WORDS, QUESTION_WORDS, SENTENCES, Instructions
from miracle_jax.reviews import Reviews

COMMAND = "python -m miracle_jax.clean DIR --out OUT"
CARD = "card.json"
MADE_BY = "miracle_jax.clean"
REVIEWS = ("review-1.csv", "review-2.csv")
THRESHOLDS = (0.3, 0.95)
"""Between which near duplicates can be found with so few permutations."""


@dataclass(frozen=True)
class Options:
    """What is kept of a collection."""

    out: str = ""
    """Folder of the corpus: a new one, or one that this command wrote."""
    min_turns: int = 2
    """Questions with answers that a dialogue has at least. The instructions ask for four."""
    min_words: int = 5
    """Of an answer."""
    max_answer_words: int = ANSWER_WORDS
    max_question_words: int = QUESTION_WORDS
    max_sentences: int = SENTENCES + 1
    """Of a question and of an answer. The instructions ask for two; abbreviations count as ends."""
    near_duplicates: float = 0.7
    """Share of two dialogues' shingles from which on they are near duplicates, 0.3 to 0.95; 0: exact ones only."""
    language: str = "en"
    """ISO 639-1 code of a language with blanks between its words. Empty: any."""
    review: int = 100
    """Dialogues of an aspect in a review file. Judges of round 1 learn from the first file's."""
    min_score: float = 0.5
    """Probability of its aspect against the likeliest other, below which a dialogue is dropped. 0: none is."""
    encoder: str = ""
    """BERT checkpoint on which judges have their heads: a hub name, a folder, or package:NAME/PATH. Empty: TF-IDF."""
    toxicity: str = ""
    """CSV file of labelled comments in Jigsaw's form, or detoxify. Empty: no filter."""
    max_toxicity: float = 0.5
    """Probability that a turn is toxic, above which its dialogue is dropped."""
    balance: bool = False
    """Keep as many dialogues of every aspect of an attribute for every topic."""
    seed: int = 0
    """Of all that is drawn."""

    def check(self) -> None:
        """Raises UserError."""
        if not self.out or storage.is_remote(self.out):
            raise UserError(f"name the local folder of the corpus with --out: {COMMAND}")
        low, high = THRESHOLDS
        if self.near_duplicates and not low <= self.near_duplicates <= high:
            raise UserError(f"--near-duplicates {self.near_duplicates:g}: expected {low:g} to {high:g}, or 0")
        if not 0 <= self.min_score <= 1 or not 0 <= self.max_toxicity <= 1:
            raise UserError("--min-score and --max-toxicity are probabilities: from 0 to 1")
        whole = (self.min_turns, self.min_words, self.max_answer_words, self.max_question_words, self.max_sentences)
        if min(whole) < 1 or self.review < 0 or self.seed < 0:
            raise UserError(
                "--min-turns, --min-words, --max-answer-words, --max-question-words and --max-sentences are at least "
                "1, --review and --seed at least 0"
            )
        if self.min_turns > cleaning.MOST_TURNS:
            raise UserError(f"--min-turns {self.min_turns}: dialogues are cut to {cleaning.MOST_TURNS} turns")

    def rules(self, examples: frozenset[str] = frozenset()) -> Rules:
        """examples: as Rules has them."""
        given = dataclasses.asdict(self) | {"examples": examples}
        return Rules(**{field.name: given[field.name] for field in dataclasses.fields(Rules)})


def clean(folder: str | Path, options: Options) -> tuple[dict[str, Any], Schema]:
    """Writes the corpus. Returns its card, as card.json has it, and its schema.

    Raises UserError for a folder that is no collection, for review files that cannot be read, and for an OUT with files
    that this command did not write; what is there stays as it is then.
    """
    options.check()
    folder, out = Path(folder).expanduser(), Path(options.out).expanduser()
    settings = reading.json_object(folder / "collection.json", "does not describe a collection")
    schema = Schema.load(folder / "schema.toml")
    files = _names(schema)
    with storage.locked(out, "--out"):
        ours = _ours(out, files)
        reviews = [Reviews(out / name) for name in REVIEWS]
        rules = options.rules(_examples(folder / "schema.toml"))
        dialogues, drops, card = _stages(folder / "transcripts.jsonl", schema, rules, reviews, options)
        card = _card(settings, options, dialogues, schema, card, files)
        for left in out.glob(".clean-*"):  # by one that was killed
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=out, prefix=".clean-") as part:
            _write(Path(part), dialogues, drops, schema, reviews, card)
            for review in reviews:
                review.check()
            for name in sorted(ours - set(files)):
                (out / name).unlink()
            for name in files:
                (out / name).parent.mkdir(exist_ok=True)
                os.replace(Path(part) / name, out / name)
    return card, schema


def _examples(schema: Path) -> frozenset[str]:
    try:
        return cleaning.examples(Instructions.load(schema))
    except UserError:  # a schema without instructions: the dialogues are from elsewhere
        return frozenset()


def _stages(
    journal: Path, schema: Schema, rules: Rules, reviews: list[Reviews], options: Options
) -> tuple[list[Dialogue], Drops, dict[str, Any]]:
    """(what is left, what was dropped, what the card says of it)."""
    from miracle_jax import aspects, card, toxicity  # they import JAX

    drops = Drops()
    # First what flags name, which can be wrong.
    in_language = cleaning.language_filter(options.language, drops) if options.language else list
    learn = aspects.learner(options.encoder, options.seed)
    score, toxic = toxicity.scorer(options.toxicity, learn, options.seed) if options.toxicity else (None, {})
    dialogues = cleaning.read(journal, schema, rules, drops)
    total = len(dialogues) + sum(not drop.kept_turns for drop in drops)
    if not total:
        raise UserError(f"{journal} has no dialogues; collect some with python -m miracle_jax.collect")
    dialogues = cleaning.without_duplicates(dialogues, options.near_duplicates, drops)
    dialogues = in_language(dialogues)
    rounds = aspects.Rounds(schema, learn, tuple(reviews), options.review, options.min_score, options.seed, drops)
    dialogues = rounds.second(rounds.first(dialogues))
    if score:
        dialogues = toxicity.without_toxic(dialogues, score, options.max_toxicity, drops)
    if options.balance:
        dialogues = cleaning.balanced(dialogues, schema, options.seed, drops)
    facts = {"stages": card.stages(total, drops), "judges": rounds.facts, "folds": aspects.FOLDS, "toxicity": toxic}
    facts["reviews"] = {review.path.name: review.counts() for review in reviews}
    return dialogues, drops, facts


def _card(
    settings: dict[str, Any], options: Options, dialogues: list[Dialogue], schema: Schema, facts: dict, files: list[str]
) -> dict[str, Any]:
    from miracle_jax import card

    given = dataclasses.asdict(options)
    del given["out"]  # the same corpus in another folder has the same card
    given["toxicity"] = Path(given["toxicity"]).name
    made = {"made_by": MADE_BY, "files": files, "collection": card.collected(settings), "options": given}
    return made | card.contents(dialogues, schema) | facts | {"versions": card.versions()}


# ------------------------------------------------------------------------------------------------ the folder


def _names(schema: Schema) -> list[str]:
    """The files of a corpus, the card first: it says which the others are."""
    for name in schema.names:
        if not reading.is_name(f"{name}.jsonl"):
            raise UserError(f"attribute {name!r} cannot name a file; rename it in the schema file")
    splits = [f"{split}/{name}.jsonl" for split in ("train", "validation") for name in schema.names]
    return [CARD, *splits, "test/personality.jsonl", "schema.toml", "dropped.jsonl", *REVIEWS, "README.md"]


def _ours(out: Path, files: list[str]) -> set[str]:
    """The files of the folder that this command wrote. Raises UserError where there are others, hidden ones aside."""
    found = {path.relative_to(out) for path in out.rglob("*") if not path.is_dir()}
    found = {path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)}
    listed: Any = []
    if CARD in found:
        card = reading.json_object(out / CARD)
        listed = card.get("files") if card.get("made_by") == MADE_BY else []
    ours = {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()
    if foreign := sorted(found - ours):
        raise UserError(
            f"{out} has files that this command did not write ({', '.join(foreign[:5])}); name a new folder with --out"
        )
    return found


def _write(
    part: Path, dialogues: list[Dialogue], drops: Drops, schema: Schema, reviews: list[Reviews], card: dict[str, Any]
) -> None:
    from miracle_jax.card import markdown

    def lines(name: str, records: Iterable[dict], ascii: bool = False) -> None:
        path = part / name
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(record, ensure_ascii=ascii) + "\n" for record in records)

    for split in ("train", "validation"):
        for a, name in enumerate(schema.names):
            some = (d for d in dialogues if d.split == split and d.labels[a] != UNKNOWN)
            lines(f"{split}/{name}.jsonl", (r for d in some for r in _instances(d, single(d)[1])))
    test = (d for d in dialogues if d.split == "test")
    lines("test/personality.jsonl",
          (r for d in test for r in _instances(d, [None if i == UNKNOWN else i for i in d.labels])))  # fmt: skip
    order = sorted(drops, key=lambda drop: drop.id)  # of one dialogue in the order of the stages
    # What was dropped may be no text: half of a surrogate pair.
    lines("dropped.jsonl", ({k: v for k, v in drop._asdict().items() if v != ""} for drop in order), ascii=True)
    schema.save(part / "schema.toml")
    for review in reviews:
        (part / review.path.name).write_bytes(review.content())
    (part / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
    (part / "README.md").write_text(markdown(card), encoding="utf-8")


def _instances(dialogue: Dialogue, tag: int | list[int | None]) -> Iterator[dict]:
    """A record for every turn, with the turns before it."""
    for turns in range(1, len(dialogue.answers) + 1):
        yield {
            "input": dialogue.questions[:turns], "output": dialogue.answers[:turns], "personas": dialogue.topic,
            "tag": tag,
        }  # fmt: skip


def _told(card: dict[str, Any], schema: Schema, out: str) -> str:
    """What the command says at its end."""
    from miracle_jax.card import stage_lines

    lines = stage_lines(card)
    for number, facts in enumerate(card["judges"], 1):
        lines += [f"round {number}, {name}: no judges: {f['reason']}" for name, f in facts.items() if f["reason"]]
    for name, counts in card["reviews"].items():
        ask = counts["dialogues"] and not counts["marked"]
        todo = "; write y or n into its column keep, and give the same command again" if ask else ""
        unused = f", of which {counts['unused']:,} belong to no dialogue that came this far" * (counts["unused"] > 0)
        number = dataset.count(counts["dialogues"], "dialogue")
        lines.append(f"{name}: {number}, {counts['marked']:,} marked{unused}{todo}")

    def flags(split):
        there = [name for name in schema.names if card["table7"][name][split]["dialogues"]]
        return [f"--data.{split}", *(f"{name}={out}/{split}/{name}.jsonl" for name in there)] if there else []

    lines.append(f"wrote {out}; its data card is {out}/README.md")
    if train := flags("train"):
        command = ["python -m miracle_jax.dataset", *train, *flags("validation"), f"--data.schema {out}/schema.toml"]
        lines.append("look at it: " + " ".join(command))
    else:
        lines.append("no training dialogue is left: see what dropped.jsonl says, and collect more")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    with one_sentence():
        words, flags = split_words(argv)
        options = parse(Options(), flags, COMMAND, __doc__)
        if len(words) != 1:
            raise UserError(f"give the folder of one collection: {COMMAND}")
        print(_told(*clean(words[0], options), options.out))


if __name__ == "__main__":
    main()
