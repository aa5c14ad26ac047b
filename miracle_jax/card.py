"""The data card of a corpus that was collected and cleaned: what it has, where it is from, and what was dropped."""

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from miracle_jax import __version__, overview
from miracle_jax.attributes import Schema
from miracle_jax.cleaning import Dialogue, Drops, aspects_of_topics
from miracle_jax.dataset import SPLITS, Instance
from miracle_jax.errors import printable
from miracle_jax.reading import kind

STAGES = (
    "collection", "parsing", "rules", "duplicates", "language", "round 1", "round 2", "toxicity", "balance"
)  # fmt: skip
MOST_REASONS = 20
"""Reasons of a stage that are counted one by one."""
COLLECTED = ("endpoint", "model", "begun", "seed", "sampling", "per_topic", "licence", "versions")
"""What the card says of the collection; its other settings are in its own folder."""
LIBRARIES = ("scikit-learn", "datasketch", "py3langid")


def stages(total: int, drops: Drops) -> list[dict[str, Any]]:
    """[{"stage", "given", "dropped", "cut", "left", "reasons"}], dialogues each; those cut lost their last turns."""
    found = []
    for stage in STAGES:
        reasons, cut, dropped = Counter(), 0, 0
        for drop in drops:
            if drop.stage == stage:
                whole = not drop.kept_turns
                dropped, cut = dropped + whole, cut + (not whole)
                reasons[drop.reason if whole else f"{drop.reason} (cut)"] += 1
        order = sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))
        shown = dict(order[:MOST_REASONS])
        if more := sum(count for _, count in order[MOST_REASONS:]):
            shown["other reasons"] = more
        left = total - dropped
        found.append(
            {"stage": stage, "given": total, "dropped": dropped, "cut": cut, "left": left, "reasons": shown}
        )  # fmt: skip
        total = left
    return found


def contents(dialogues: Sequence[Dialogue], schema: Schema) -> dict[str, Any]:
    """What the corpus has: the figures of the paper's Table 7, dialogues of every aspect, and the balance of topics."""
    whole = [Instance(d.questions, d.answers, d.topic, d.labels) for d in dialogues]
    by_split = {s: [i for i, d in zip(whole, dialogues, strict=True) if d.split == s] for s in SPLITS}
    table7, aspects, topics = {}, {}, {}
    groups = aspects_of_topics(dialogues)
    for a, attribute in enumerate(schema.attributes):
        table7[attribute.name] = {
            split: dict(zip(("dialogues", "turns", "words"), overview.count_dialogues(some, a), strict=True))
            for split, some in by_split.items()
        }
        counts = {split: Counter(i.labels[a] for i in some) for split, some in by_split.items()}
        aspects[attribute.name] = {
            aspect: {split: count[i] for split, count in counts.items()} for i, aspect in enumerate(attribute.aspects)
        }
        for split in ("train", "validation"):
            of = [found for (s, index, _), found in groups.items() if s == split and index == a]
            every = sum(len(found) == len(attribute.aspects) for found in of)
            topics.setdefault(attribute.name, {})[split] = {"topics": len(of), "of_every_aspect": every}
    return {"table7": table7, "aspects": aspects, "topics": topics}


def versions() -> dict[str, str]:
    found = {"miracle_jax": __version__}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def collected(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a collection's settings say of where the dialogues are from."""
    return {name: _shallow(settings[name], 3) for name in COLLECTED if settings.get(name) not in (None, "")}


def _shallow(value, depth: int):
    """A value of JSON, of which what is nested more deeply is only named: a file may nest it as deep as it wants."""
    if isinstance(value, dict | list) and not depth:
        return kind(value)
    if isinstance(value, dict):
        return {name: _shallow(part, depth - 1) for name, part in value.items()}
    return [_shallow(part, depth - 1) for part in value] if isinstance(value, list) else value


def stage_lines(card: dict[str, Any]) -> list[str]:
    """The yield of every stage, for people."""
    width = max(map(len, STAGES))
    lines = []
    for stage in card["stages"]:
        reasons = "; ".join(f"{reason}: {count:,}" for reason, count in stage["reasons"].items())
        lines.append(f"{stage['stage']:{width}}  {stage['given']:8,} -> {stage['left']:8,}  {reasons}".rstrip())
    return lines


def markdown(card: dict[str, Any]) -> str:
    """The card as README.md."""
    of, stage_rows = card["collection"], []
    for stage in card["stages"]:
        reasons = "; ".join(f"{reason}: {count:,}" for reason, count in stage["reasons"].items())
        stage_rows.append(
            [stage["stage"], f"{stage['given']:,}", f"{stage['dropped']:,}", f"{stage['cut']:,}", f"{stage['left']:,}",
             reasons]
        )  # fmt: skip
    parts = [
        "# Data card",
        "Dialogues that a language model wrote, one aspect of one attribute each in training and validation, all "
        "attributes in the test; collected by `python -m miracle_jax.collect`, cleaned by `python -m "
        "miracle_jax.clean`. card.json has the same figures, and what was dropped is in dropped.jsonl.",
        "## Where it is from",
        _table(["", ""], [[name, _flat(of.get(name, "not stated"))] for name in COLLECTED]),
        "## What it has",
        _table(
            ["attribute", "dialogues", "turns", "avg. words"],
            [
                [name, *(
                    "/".join(f"{splits[s][figure]:{form}}" for s in ("train", "validation"))
                    for figure, form in (("dialogues", ","), ("turns", ","), ("words", ".2f"))
                )]
                for name, splits in card["table7"].items()
            ],
        ) + "\n\nTraining/validation, counted as in the paper's Table 7.",
        _table(
            ["attribute", "aspect", "train", "validation", "test"],
            [
                [name, aspect, *(f"{counts[s]:,}" for s in SPLITS)]
                for name, aspects in card["aspects"].items()
                for aspect, counts in aspects.items()
            ],
        ) + "\n\nDialogues of every aspect; one of the test counts under each of its aspects.",
        _table(
            ["attribute", "train", "validation"],
            [[name, *(_share(splits[s]) for s in ("train", "validation"))] for name, splits in card["topics"].items()],
        ) + "\n\nTopics that every aspect of the attribute has, of all its topics: where that is not all, a topic "
        "tells something of the aspect.",
        "## What was dropped",
        _table(["stage", "given", "dropped", "cut", "left", "reasons"], stage_rows)
        + "\n\nA dialogue is cut before its first turn that breaks a rule, and dropped where too little is left.",
        "## Judges",
        _table(
            ["round", "attribute", "learned from", "accuracy", "mean score", "mean score, test"],
            [
                [str(number), name, f"{fact['learned_from']:,} dialogues",
                 *(_number(fact[key], fact["reason"]) for key in ("accuracy", "mean", "test_mean"))]
                for number, facts in enumerate(card["judges"], 1)
                for name, fact in facts.items()
            ],
        ) + f"\n\nJudges: {card['options']['encoder'] or 'TF-IDF and logistic regression'}, {card['folds']} folds of "
        "topics; no dialogue is scored by a judge that learned from its topic. Accuracy is over dialogues, before "
        "those with a low score are dropped. Test dialogues are scored and not chosen by judges, which would flatter "
        "every system that is tested on them; only rules, duplicates, language, toxicity and people drop them.",
        "## People",
        _table(
            ["file", "dialogues", "marked", "rejected", "marks unused"],
            [[name, *(f"{count:,}" for count in counts.values())] for name, counts in card["reviews"].items()],
        ),
        "## Toxicity",
        _flat(card["toxicity"]) if card["toxicity"] else "No filter was used.",
        "## How it was cleaned",
        _table(["", ""], [[name, _flat(value)] for name, value in (card["options"] | card["versions"]).items()]),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[str(cell).replace("|", r"\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def _flat(value) -> str:
    """A value in one line."""
    parts = (f"{name}: {_flat(part)}" for name, part in value.items()) if isinstance(value, Mapping) else [str(value)]
    return printable(", ".join(parts)).replace("\n", " ")


def _share(topics: Mapping[str, int]) -> str:
    every, number = topics["of_every_aspect"], topics["topics"]
    return f"{every:,} of {number:,}" + (f" ({every / number:.0%})" if number else "")


def _number(value: float | None, reason: str) -> str:
    return f"{value:.3f}" if value is not None else reason or "none"
