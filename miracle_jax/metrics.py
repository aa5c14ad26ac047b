"""Coherence and diversity of replies by their words: as the paper words it, and as its released code computes it.

Scores are shares (0 to 1), one a reply, so that systems can be compared reply by reply; the paper prints percents. The
two blocks differ, and their figures must not be compared with each other:

              paper (section 3.2, appendix C.3)                released code
    BLEU      over words, mean of BLEU-1 to 4                  over characters; BLEU-3 has the weights 0.33, 0.33, 0.33
    ROUGE     mean F1 of ROUGE-1, 2, L                         the same
    Distinct  different n-grams over n-grams                   different n-grams over words, split at single blanks
    sBLEU     BLEU-4 of 150 replies, each against the others   of every reply against 150 random others

Words are those of NLTK's Treebank tokenizer, case kept. BLEU is smoothed by NLTK's method 1.
"""

import functools
from collections.abc import Sequence

import numpy as np
from nltk.tokenize import TreebankWordTokenizer
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score.rouge_scorer import RougeScorer

SELF_BLEU = 150
"""Replies that self-BLEU is computed on (paper), or compared with (released code)."""
BLEU_4 = [(1 / 4,) * 4]
EQUAL_WEIGHTS = [(1.0,), (1 / 2,) * 2, (1 / 3,) * 3, *BLEU_4]
RELEASED_WEIGHTS = [(1.0,), (1 / 2,) * 2, (0.33,) * 3, *BLEU_4]
SMOOTHING = SmoothingFunction().method1

_treebank = TreebankWordTokenizer()
_rouge = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


@functools.lru_cache(maxsize=65536)
def words(text: str) -> tuple[str, ...]:
    return tuple(_treebank.tokenize(text))


def bleu(reply: str, reference: str) -> float:
    """Mean of BLEU-1 to 4 over words. 0 for an empty reply."""
    return _bleu([words(reference)], words(reply), EQUAL_WEIGHTS)


def released_bleu(reply: str, reference: str) -> float:
    """What the released code reports as BLEU: the same over characters, blanks among them."""
    return _bleu([tuple(reference)], tuple(reply), RELEASED_WEIGHTS)


def _bleu(references: Sequence[Sequence[str]], hypothesis: Sequence[str], weights) -> float:
    """Mean over the weights. 0 for an empty hypothesis, and where there is no reference."""
    if not hypothesis or not references:
        return 0.0
    return float(np.mean(sentence_bleu(references, hypothesis, weights, SMOOTHING)))


def rouge(reply: str, reference: str) -> float:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, words stemmed. 0 for an empty reply."""
    return float(np.mean([score.fmeasure for score in _rouge.score(reference, reply).values()]))


def distinct(replies: Sequence[str]) -> dict[str, float]:
    """{"sentence", "corpus", "mean"}: Distinct-1, 2 and 3 averaged, within a reply, over all replies together, and the
    mean of both.

    A reply that is too short to have an n-gram says nothing of Distinct-n; 0 where that is true of all.
    """
    split = [words(reply) for reply in replies]
    within, over_all = [], []
    for n in (1, 2, 3):
        grams = [_ngrams(reply, n) for reply in split]
        shares = [len(set(some)) / len(some) for some in grams if some]
        together = [gram for some in grams for gram in some]
        within.append(np.mean(shares) if shares else 0.0)
        over_all.append(len(set(together)) / max(len(together), 1))
    return _levels(within, over_all)


def released_distinct(replies: Sequence[str]) -> dict[str, float]:
    """The same as the released code computes it."""
    split = [reply.split(" ") for reply in replies]
    total = sum(map(len, split))
    within = [np.mean([len(set(_ngrams(reply, n))) / len(reply) for reply in split]) for n in (1, 2, 3)]
    over_all = [len({gram for reply in split for gram in _ngrams(reply, n)}) / total for n in (1, 2, 3)]
    return _levels(within, over_all)


def _ngrams(split: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(split[i:] for i in range(n)), strict=False))


def _levels(within: Sequence[float], over_all: Sequence[float]) -> dict[str, float]:
    sentence, corpus = float(np.mean(within)), float(np.mean(over_all))
    return {"sentence": sentence, "corpus": corpus, "mean": (sentence + corpus) / 2}


def self_bleu(replies: Sequence[str], seed: int) -> np.ndarray:
    """(N,) BLEU-4 of at most 150 replies, drawn with `seed`, each against all others of them; NaN for those that are
    not drawn, 0 for an empty reply.

    The draw depends on the number of replies alone, so that two systems are compared on the same instances.
    """
    rows = np.random.default_rng(seed).permutation(len(replies))[:SELF_BLEU]
    drawn = [words(replies[row]) for row in rows]
    scores = np.full(len(replies), np.nan)
    scores[rows] = [_bleu(drawn[:i] + drawn[i + 1 :], reply, BLEU_4) for i, reply in enumerate(drawn)]
    return scores


def released_self_bleu(replies: Sequence[str], seed: int) -> np.ndarray:
    """BLEU-4 of every reply against 150 of the others, drawn anew for each (all of them where there are fewer)."""
    generator = np.random.default_rng(seed)
    split = [tuple(reply.split(" ")) for reply in replies]
    scores = []
    for i, reply in enumerate(split):
        others = np.delete(np.arange(len(split)), i)
        drawn = generator.permutation(others)[:SELF_BLEU]
        scores.append(_bleu([split[row] for row in drawn], reply, BLEU_4))
    return np.array(scores)
