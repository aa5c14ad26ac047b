"""All that is measured on one system's replies to a test set, as the paper words it and as its released code has it.

Shares (0 to 1) except the perplexity. What needs judges or a language model is left out where there is none.
"""

from collections.abc import Callable, Sequence

import numpy as np

from miracle_jax import fluency, metrics
from miracle_jax.fluency import LanguageModel
from miracle_jax.judge import Context, Judges


def score(
    replies: Sequence[str],
    references: Sequence[str],
    contexts: Sequence[Context],
    wanted: np.ndarray,
    judges: Judges | None = None,
    language_model: LanguageModel | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float | None]]:
    """{"paper", "released"}: {"bleu", "rouge", "distinct", "self_bleu"}, with judges also the accuracy of every
    attribute by its name and "nli", with a language model "ppl" (None where no reply has one).

    The paper's accuracy is the share of replies in which the wanted aspect wins, its NLI the share that is more likely
    than not to belong to its context; the released code's are mean probabilities.

    Args:
      wanted: (N, A) aspect ids.
      seed: of what self-BLEU draws.
    """
    paper = {
        "bleu": _mean(metrics.bleu, replies, references),
        "rouge": _mean(metrics.rouge, replies, references),
        "distinct": metrics.distinct(replies)["mean"],
        "self_bleu": float(np.mean(metrics.self_bleu(replies, seed))),
    }
    released = {
        "bleu": _mean(metrics.released_bleu, replies, references),
        "rouge": paper["rouge"],
        "distinct": metrics.released_distinct(replies)["mean"],
        "self_bleu": float(np.mean(metrics.released_self_bleu(replies, seed))),
    }
    if judges:
        for a, (name, probabilities) in enumerate(judges.attributes(replies).items()):
            paper[name] = float(np.mean(probabilities.argmax(axis=1) == wanted[:, a]))
            of_wanted = np.take_along_axis(probabilities, wanted[:, a : a + 1], axis=1)
            released[name] = float(np.mean(of_wanted, dtype=np.float64))
        belongs = judges.consistency(contexts, replies)
        paper["nli"], released["nli"] = float(np.mean(belongs > 0.5)), float(np.mean(belongs, dtype=np.float64))
    if language_model:
        nats = language_model.score(replies)
        paper["ppl"] = _mean_defined(fluency.perplexity, nats)
        released["ppl"] = _mean_defined(fluency.released_perplexity, nats)
    return {"paper": paper, "released": released}


def _mean(metric: Callable[[str, str], float], replies: Sequence[str], references: Sequence[str]) -> float:
    return float(np.mean([metric(*pair) for pair in zip(replies, references, strict=True)]))


def _mean_defined(perplexity: Callable[[float, float], float | None], nats: np.ndarray) -> float | None:
    values = [value for row in nats if (value := perplexity(*row)) is not None]
    return float(np.mean(values)) if values else None
