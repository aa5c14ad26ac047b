"""Toxic dialogues: a judge that learned from labelled comments (appendix A.2), or the package detoxify.

The comments are CSV in the form of the Jigsaw Toxic Comment Classification Challenge: comment_text and six columns of 0
and 1, of which any makes a comment toxic; rows of -1, which are not labelled, are left out. A judge learns from as many
of each class as it can; what it then says is for comments of which as many are toxic as in the file.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from miracle_jax import reading, sheets
from miracle_jax.aspects import FOLDS, MOST_ANSWERS, Learn, reweighted
from miracle_jax.cleaning import Dialogue, Drops, drawn
from miracle_jax.errors import UserError

KINDS = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
DETOXIFY = "detoxify"
FEWEST = 10
"""Comments of each class."""
BATCH = 64

Toxicity = Callable[[Sequence[str]], np.ndarray]
"""From N texts to (N,) probabilities."""


def scorer(source: str, learn: Learn, seed: int) -> tuple[Toxicity, dict]:
    """What scores texts, and what there is to know about it.

    source: a CSV file, or `detoxify`.
    Raises UserError for a file that cannot be read or has too little to learn from.
    """
    if source == DETOXIFY:
        return _detoxify(), {"source": DETOXIFY}
    counts, classes = Counter(), []
    for toxic in (0, 1):
        texts = _texts(source, toxic, counts)
        classes.append(heapq.nsmallest(MOST_ANSWERS, texts, key=lambda text: drawn(seed, text)))
    if min(map(len, classes)) < FEWEST:
        found = " and ".join(f"{len(c)} {name}" for c, name in zip(classes, ("harmless", "toxic"), strict=True))
        raise UserError(f"{source} has {found} comments; a judge needs at least {FEWEST} of both")
    texts, labels = [*classes[0], *classes[1]], np.repeat([0, 1], [len(c) for c in classes])
    fold, right = np.concatenate([np.arange(len(c)) % FOLDS for c in classes]), np.zeros(len(texts))
    try:
        for k in range(FOLDS):
            inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
            learned = learn([texts[i] for i in inside], labels[inside], 2)
            right[outside] = learned([texts[i] for i in outside]).argmax(axis=1) == labels[outside]
        whole = learn(texts, labels, 2)
    except ValueError:
        raise UserError(f"{source}: its comments have no words to learn from") from None
    facts = {
        "source": Path(source).name, "toxic": len(classes[1]), "harmless": len(classes[0]),
        "accuracy": round(float(np.mean([right[labels == c].mean() for c in (0, 1)])), 4),
    }  # fmt: skip
    learned, given = np.array([len(c) for c in classes]), np.array([counts[c] for c in (0, 1)])
    return lambda some: reweighted(whole(some), learned, given)[:, 1], facts


def _texts(path: str, toxic: int, counts: Counter) -> Iterator[str]:
    for text, label in read_comments(path):
        if label == toxic:
            counts[label] += 1
            yield text


def read_comments(path: str | Path) -> Iterator[tuple[str, int]]:
    """(comment, 1 if it is toxic) of a CSV file, one in memory at a time; blank comments are left out. Raises UserError
    with file:line."""
    path = reading.regular(path)
    if (size := path.stat().st_size) > reading.LARGEST:
        raise UserError(f"{path} has {size:,} bytes; files like it are read up to {reading.LARGEST:,}")
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        try:
            for line, row in sheets.rows_of(file, ("comment_text", *KINDS)):
                values = {row[kind] for kind in KINDS}
                if values == {"-1"}:
                    continue
                if not values <= {"0", "1"}:
                    wrong = sorted(values - {"0", "1"})[0]
                    raise UserError(f"{line}: a label is {wrong!r}; expected 0 or 1 in the columns {', '.join(KINDS)}")
                if row["comment_text"]:
                    yield row["comment_text"], int("1" in values)
        except UserError as error:
            raise UserError(f"{path}:{error}") from None


def _detoxify() -> Toxicity:
    try:
        from detoxify import Detoxify
    except ImportError:
        raise UserError(
            "detoxify is not installed; run pip install detoxify, or name a CSV file of labelled comments"
        ) from None
    model = Detoxify("original")

    def score(texts):
        found = [model.predict(list(texts[i : i + BATCH])) for i in range(0, len(texts), BATCH)]
        return np.concatenate([np.max(list(kinds.values()), axis=0) for kinds in found])

    return score


def without_toxic(dialogues: Sequence[Dialogue], score: Toxicity, most: float, drops: Drops) -> list[Dialogue]:
    """Without dialogues of which a turn is likelier than `most` to be toxic."""
    kept = []
    for start in range(0, len(dialogues), 1000):
        some = dialogues[start : start + 1000]
        scores = score([turn for d in some for turn in (*d.questions, *d.answers)])
        ends = np.cumsum([2 * len(d.answers) for d in some])[:-1]
        for dialogue, of_turns in zip(some, np.split(scores, ends), strict=True):
            if (highest := of_turns.max()) > most:
                drops.add(dialogue.id, "toxicity", f"a turn above {most:g}", dialogue.text, f"{highest:.2f}")
            else:
                kept.append(dialogue)
    return kept
