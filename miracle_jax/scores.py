"""All that is measured on one system's replies to a test set, as the paper words it and as its released code has it.

A score is a share (0 to 1), except the perplexity. Most are one a reply, so that systems can be compared instance by
instance; NaN stands where a reply has none. What needs judges or a language model is left out where there is none.

A reply without a word (no character but blanks) speaks with no aspect, fits no context and has no perplexity; what it
scores in BLEU and ROUGE is 0.

Axis letters: N replies, A attributes.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from miracle_jax import fluency, metrics, reading
from miracle_jax.errors import UserError
from miracle_jax.fluency import LanguageModel
from miracle_jax.judge import Context, Judges
from miracle_jax.word_judges import WordJudges

AVERAGE = "personalization"
"""The mean over the attributes."""
CHUNK = 256
"""Texts that a model scores between two lines of a file of scores."""


class Scores(NamedTuple):
    """Both by name: AVERAGE and the attributes', "bleu", "rouge", "nli", "ppl", "distinct", "self_bleu". (N,) each, but
    Distinct, which only all replies together have, is (1,)."""

    paper: dict[str, np.ndarray]
    released: dict[str, np.ndarray]


class Kept:
    """Scores by models, each computed once, in a folder. A run that is killed loses the chunk it was at, and one that
    is not killed comes to the same scores."""

    def __init__(self, folder: Path):
        self._folder = folder

    def of(self, name: str, items: Sequence, compute: Callable[[list], np.ndarray]) -> np.ndarray:
        """(N, ...) compute's row for every item, from the file `name`.jsonl as far as that has it.

        items: texts, or what else has a form in JSON. compute: from a list of different items to a row for each.
        """
        path = self._folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        keys = [hashlib.sha256(json.dumps(item).encode()).hexdigest()[:24] for item in items]
        known = {}
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            if not line.endswith(b"\n"):
                break
            known |= reading.parse_object(line, f"{path} is damaged; delete it, and its scores are computed again")
            whole += len(line)
        new = {key: item for key, item in zip(keys, items, strict=True) if key not in known}
        if not new:
            return _array([known[key] for key in keys], path)
        with path.open("ab") as file:
            file.truncate(whole)  # a chunk that was cut short
            for start in range(0, len(new), CHUNK):
                some = list(new)[start : start + CHUNK]
                rows = np.asarray(compute([new[key] for key in some]), np.float32).tolist()
                chunk = dict(zip(some, rows, strict=True))
                file.write(json.dumps(chunk).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                known |= chunk
        return _array([known[key] for key in keys], path)


def _array(rows: list, path: Path) -> np.ndarray:
    try:
        return np.array(rows, np.float32)
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"{path} is damaged; delete it, and its scores are computed again") from None


def score(
    replies: Sequence[str],
    references: Sequence[str],
    contexts: Sequence[Context],
    wanted: np.ndarray,
    judges: Judges | WordJudges | None = None,
    language_model: LanguageModel | None = None,
    seed: int = 0,
    kept: Kept | None = None,
) -> Scores:
    """The paper's accuracy is the share of replies in which the wanted aspect wins, its NLI the share that is more
    likely than not to belong to its context; the released code's are mean probabilities.

    Args:
      wanted: (N, A) aspect ids, -1 where no aspect of an attribute is wanted.
      seed: of what self-BLEU draws.
      kept: scores by models that need not be computed again; without it all are.
    """
    paper, released = {}, {}
    said = _said(replies)
    if judges:
        paper, released = _personalization(judges, replies, wanted, kept)
    likeness = _kept(kept, "likeness", list(zip(replies, references, strict=True)), _likeness)
    paper["bleu"], released["bleu"], paper["rouge"] = likeness.astype(float).T
    released["rouge"] = paper["rouge"]
    if judges and judges.consistency:
        exchanges = [(*context, reply) for context, reply in zip(contexts, replies, strict=True)]
        belongs = _kept(
            kept, f"consistency-{judges.fingerprint}", exchanges,
            lambda some: judges.consistency([(i[0], i[1]) for i in some], [i[2] for i in some]),
        )  # fmt: skip
        paper["nli"], released["nli"] = (said & (belongs > 0.5)).astype(float), belongs.astype(float)
    if language_model:
        nats = _kept(kept, f"nats-{language_model.fingerprint}", replies, language_model.score) * said[:, None]
        paper["ppl"] = _defined(fluency.perplexity, nats)
        released["ppl"] = _defined(fluency.released_perplexity, nats)
    paper["distinct"] = np.array([metrics.distinct(replies)["mean"]])
    released["distinct"] = np.array([metrics.released_distinct(replies)["mean"]])
    paper["self_bleu"] = metrics.self_bleu(replies, seed)
    whole = _kept(
        kept, "released-self-bleu", [(seed, *replies)], lambda _: metrics.released_self_bleu(replies, seed)[None]
    )
    released["self_bleu"] = whole[0].astype(float)
    return Scores(paper, released)


def accuracy(
    judges: Judges | WordJudges, replies: Sequence[str], wanted: np.ndarray, kept: Kept | None = None
) -> np.ndarray:
    """(N, A) 1 where the wanted aspect wins, 0 where another does or nothing is said, NaN where none is wanted."""
    paper, _ = _personalization(judges, replies, wanted, kept)
    return np.stack([paper[name] for name in judges.schema.names], axis=1)


def mean(values: np.ndarray) -> float | None:
    """Over what is defined; None where nothing is."""
    return None if np.isnan(values).all() else float(np.nanmean(values))


def _personalization(judges, replies, wanted, kept) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Of every attribute, and their mean: whether the wanted aspect wins, and its probability."""
    paper, released = {AVERAGE: None}, {AVERAGE: None}
    kept = kept if judges.fingerprint else None  # what has no name cannot be found again
    sizes = np.cumsum(judges.schema.sizes)[:-1]
    columns = _kept(
        kept, f"aspects-{judges.fingerprint}", replies,
        lambda some: np.concatenate(list(judges.attributes(some).values()), axis=1),
    )  # fmt: skip
    for a, (name, probabilities) in enumerate(zip(judges.schema.names, np.split(columns, sizes, axis=1), strict=True)):
        known = wanted[:, a] >= 0
        aspect = np.where(known, wanted[:, a], 0)
        paper[name] = np.where(known, _said(replies) & (probabilities.argmax(axis=1) == aspect), np.nan)
        released[name] = np.where(known, np.take_along_axis(probabilities, aspect[:, None], axis=1)[:, 0], np.nan)
    for block in (paper, released):
        columns = np.stack([block[name] for name in judges.schema.names])
        counts = (~np.isnan(columns)).sum(axis=0)
        block[AVERAGE] = np.where(counts, np.nansum(columns, axis=0) / np.maximum(counts, 1), np.nan)
    return paper, released


def _said(replies: Sequence[str]) -> np.ndarray:
    """(N,) whether a reply has a word."""
    return np.array([bool(reply.strip()) for reply in replies])


def _likeness(pairs: list[tuple[str, str]]) -> np.ndarray:
    """(N, 3) BLEU, the released code's BLEU and ROUGE of (reply, reference)."""
    return np.array(
        [[metric(*pair) for metric in (metrics.bleu, metrics.released_bleu, metrics.rouge)] for pair in pairs]
    )


def _kept(kept: Kept | None, name: str, items: Sequence, compute: Callable[[list], np.ndarray]) -> np.ndarray:
    return kept.of(name, items, compute) if kept else np.asarray(compute(list(items)), np.float32)


def _defined(perplexity: Callable[[float, float], float | None], nats: np.ndarray) -> np.ndarray:
    values = [perplexity(*row) for row in nats]
    return np.array([np.nan if value is None else value for value in values])
