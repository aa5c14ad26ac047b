"""How strongly dialogues show their aspects: judges in two rounds, and what people said in between (appendix A.2).

Round 1: judges of every attribute learn from a sample, without what people rejected in it, and score the rest. Round 2:
judges learn from all that is left, and score it; people look at what is nearest to the threshold.

The score of a dialogue is by a judge that learned from other topics: the mean, over its answers, of the probability of
its aspect against that of the likeliest other. It is taken as if all aspects had been learned from equally often: how
many dialogues an aspect has, and how many aspects there are, moves no score.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from miracle_jax import judge, word_judges
from miracle_jax.attributes import UNKNOWN, Schema
from miracle_jax.cleaning import Dialogue, Drops, drawn, single
from miracle_jax.reviews import Reviews

MOST_ANSWERS = 20_000
"""Answers of an aspect that a judge learns from."""
FOLDS = judge.FOLDS
FEWEST_DIALOGUES = 10
"""Of an aspect, below which there is nothing to learn from."""

Probabilities = Callable[[Sequence[str]], np.ndarray]
"""From N texts to (N, C)."""
Learn = Callable[[Sequence[str], Sequence[int], int], Probabilities]
"""From texts, their classes and the number of classes C. Raises ValueError where nothing can be learned."""


def learner(encoder: str, seed: int) -> Learn:
    """How judges learn. encoder: the BERT on which they have their heads, as judge.Options has it; empty: TF-IDF."""
    if not encoder:
        return lambda texts, labels, classes: word_judges.learn(texts, labels).predict_proba
    bert = judge.Encoder.of(encoder)

    def learn(texts, labels, classes):
        options = judge.Options(encoder=encoder, seed=seed)
        head = judge.learn(bert, [bert.replies(texts)], np.array(labels), classes, options)
        return lambda texts: head(bert.replies(texts))

    return learn


@dataclass
class Judged:
    """What a round's judges of an attribute said."""

    scores: dict[str, float] = field(default_factory=dict)
    """By dialogue, of its aspect."""
    right: float = 0.0
    """Share of the training and validation dialogues whose own aspect has the highest mean probability, the mean of the
    aspects' shares."""
    learned: int = 0
    """Dialogues that there were to learn from."""
    reason: str = ""
    """Why there are no judges."""


def judged(
    learn_from: Sequence[Dialogue], score: Sequence[Dialogue], attribute: int, classes: int, learn: Learn, seed: int
) -> Judged:
    """Scores by judges of which none learned from the topic that it scores: a fold of the topics each.

    learn_from, score: dialogues with a label for the attribute.
    """
    result = Judged(learned=len(learn_from))
    counts = Counter(d.labels[attribute] for d in learn_from)
    fewest = min(counts[aspect] for aspect in range(classes))
    topics = sorted({d.topic for d in (*learn_from, *score)}, key=lambda topic: drawn(seed, topic))
    fold = {topic: i % FOLDS for i, topic in enumerate(topics)}
    folds = [[d for d in learn_from if fold[d.topic] != k] for k in range(FOLDS)]
    if fewest < FEWEST_DIALOGUES or any(len({d.labels[attribute] for d in some}) < classes for some in folds):
        result.reason = (
            f"an aspect has {fewest} dialogues to learn from; judges need {FEWEST_DIALOGUES}, of several topics"
        )
        return result
    right = [[] for _ in range(classes)]
    for k, inside in enumerate(folds):
        outside = [d for d in score if fold[d.topic] == k]
        if not outside:
            continue
        texts, labels = _answers(inside, attribute, seed)
        try:
            judge_of_fold = learn(texts, labels, classes)
        except ValueError:
            result.reason = "the answers have no words to learn from"
            return result
        probabilities = judge_of_fold([answer for d in outside for answer in d.answers])
        probabilities = reweighted(probabilities, np.bincount(labels, minlength=classes), np.ones(classes))
        ends = np.cumsum([len(d.answers) for d in outside])[:-1]
        for dialogue, of_answers in zip(outside, np.split(probabilities, ends), strict=True):
            mean, aspect = of_answers.mean(axis=0), dialogue.labels[attribute]
            result.scores[dialogue.id] = float(mean[aspect] / (mean[aspect] + np.delete(mean, aspect).max()))
            if dialogue.split != "test":
                right[aspect].append(mean.argmax() == aspect)
    shares = [np.mean(some) for some in right if some]
    result.right = float(np.mean(shares)) if shares else 0.0
    return result


def reweighted(probabilities: np.ndarray, learned: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(N, C) probabilities of a judge that learned from classes in the proportions `learned` (C,), as they would be for
    texts in which the classes have the proportions `wanted` (C,)."""
    weighted = probabilities * (wanted / learned)
    return weighted / weighted.sum(axis=1, keepdims=True)


def _answers(dialogues: Sequence[Dialogue], attribute: int, seed: int) -> tuple[list[str], list[int]]:
    """Answers and their aspects: of the dialogues drawn until an aspect has MOST_ANSWERS."""
    texts, labels, counts = [], [], Counter()
    for dialogue in sorted(dialogues, key=lambda d: drawn(seed, d.id)):
        aspect = dialogue.labels[attribute]
        if counts[aspect] + len(dialogue.answers) <= MOST_ANSWERS:
            counts[aspect] += len(dialogue.answers)
            texts += dialogue.answers
            labels += [aspect] * len(dialogue.answers)
    return texts, labels


@dataclass
class Rounds:
    """Both rounds, on dialogues of all splits. Those of the test are scored, and dropped only where people say so: what
    judges choose would flatter every system that is tested on it."""

    schema: Schema
    learn: Learn
    reviews: tuple[Reviews, Reviews]
    sample: int
    """Dialogues of an aspect that people are asked about, in each round."""
    min_score: float
    seed: int
    drops: Drops
    facts: list[dict[str, dict]] = field(default_factory=list)
    """For each round {attribute: {"learned_from", "accuracy", "mean", "test_mean", "reason"}}."""

    def first(self, dialogues: Sequence[Dialogue]) -> list[Dialogue]:
        """What is left after round 1."""
        shown = [d for some in self._by_aspect(dialogues) for d in sorted(some, key=self._drawn)[: self.sample]]
        self.reviews[0].ask(shown, self.schema)
        dialogues = self._marked(dialogues, 0)
        ids = {d.id for d in shown}
        curated = [d for d in dialogues if d.id in ids]
        rest = [d for d in dialogues if d.split != "test"]
        scores = self._scores(curated, rest)
        return self._strong(dialogues, scores, keep=ids)

    def second(self, dialogues: Sequence[Dialogue]) -> list[Dialogue]:
        """What is left after round 2."""
        learn_from = [d for d in dialogues if d.split != "test" and self.reviews[1].mark(d) is not False]
        scores = self._scores(learn_from, dialogues)
        doubtful = [d for some in self._by_aspect(dialogues) for d in self._nearest(some, scores)]
        doubtful += self._nearest([d for d in dialogues if d.split == "test"], scores)
        self.reviews[1].ask(doubtful, self.schema)
        return self._strong(self._marked(dialogues, 1), scores)

    def _drawn(self, dialogue: Dialogue) -> bytes:
        return drawn(self.seed, dialogue.id)

    def _nearest(self, dialogues: Sequence[Dialogue], scores: dict[str, float]) -> list[Dialogue]:
        """Those nearest to the threshold."""
        known = [d for d in dialogues if d.id in scores]
        return sorted(known, key=lambda d: (abs(scores[d.id] - self.min_score), d.id))[: self.sample]

    def _by_aspect(self, dialogues: Sequence[Dialogue]) -> Iterator[list[Dialogue]]:
        groups = {}
        for dialogue in dialogues:
            if dialogue.split != "test":
                groups.setdefault(single(dialogue), []).append(dialogue)
        return (groups[key] for key in sorted(groups))

    def _scores(self, learn_from: Sequence[Dialogue], score: Sequence[Dialogue]) -> dict[str, float]:
        """By dialogue; of one with several aspects the lowest."""
        scores, facts = {}, {}
        for a, attribute in enumerate(self.schema.attributes):
            some, others = ([d for d in part if d.labels[a] != UNKNOWN] for part in (learn_from, score))
            found = judged(some, others, a, len(attribute.aspects), self.learn, self.seed)
            for name, value in found.scores.items():
                scores[name] = min(value, scores.get(name, value))
            of_test = [found.scores[d.id] for d in others if d.split == "test" and d.id in found.scores]
            own = [found.scores[d.id] for d in others if d.split != "test" and d.id in found.scores]
            facts[attribute.name] = {
                "learned_from": found.learned, "accuracy": _rounded([found.right] if own else []),
                "mean": _rounded(own), "test_mean": _rounded(of_test), "reason": found.reason,
            }  # fmt: skip
        self.facts.append(facts)
        return scores

    def _marked(self, dialogues: Sequence[Dialogue], number: int) -> list[Dialogue]:
        """Without those that people rejected."""
        kept = []
        for dialogue in dialogues:
            if self.reviews[number].mark(dialogue) is False:
                self.drops.add(dialogue.id, f"round {number + 1}", "rejected by people", dialogue.text)
            else:
                kept.append(dialogue)
        return kept

    def _strong(
        self, dialogues: Sequence[Dialogue], scores: dict[str, float], keep: set[str] = frozenset()
    ) -> list[Dialogue]:
        """Without those whose score is too low, unless people want them."""
        stage, kept = f"round {len(self.facts)}", []
        for dialogue in dialogues:
            low = dialogue.split != "test" and dialogue.id not in keep
            low = low and scores.get(dialogue.id, 1.0) < self.min_score
            if low and not any(review.mark(dialogue) for review in self.reviews):
                score = f"{scores[dialogue.id]:.2f}"
                self.drops.add(dialogue.id, stage, f"score below {self.min_score:g}", dialogue.text, score)
            else:
                kept.append(dialogue)
        return kept


def _rounded(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 4) if len(values) else None
