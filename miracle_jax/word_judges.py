"""Judges of attributes that need no checkpoint: TF-IDF of words and word pairs, and logistic regression (scikit-learn).

They never see a latent. They learn from the training answers of the run that they judge, so that every run can be
judged at once; the judges of `python -m miracle_jax.judge` learn from other data.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from miracle_jax import config, dataset
from miracle_jax.attributes import Schema
from miracle_jax.dataset import Instance
from miracle_jax.errors import UserError, first_line


class WordJudges:
    """One an attribute, with the interface of `judge.Judges`."""

    about = "TF-IDF and logistic regression, learned from the training answers"
    consistency = None
    fingerprint = ""

    def __init__(self, train: Sequence[Instance], validation: Sequence[Instance], schema: Schema):
        """Raises UserError when an attribute has no two aspects to tell apart."""
        self.schema, self._judges, self.accuracy = schema, {}, {}
        for a, name in enumerate(schema.names):
            texts, labels = _answers(train, a)
            if len(set(labels)) < schema.sizes[a]:
                raise UserError(f"the training data lacks aspects of {name}; a judge of it needs all {schema.sizes[a]}")
            try:
                self._judges[name] = learn(texts, labels)
            except ValueError as error:
                raise UserError(f"no judge of {name} can learn from the training data: {first_line(error)}") from None
            unseen = _answers(validation, a)
            self.accuracy[name] = float(self._judges[name].score(*unseen)) if unseen[0] else None

    def attributes(self, replies: Sequence[str]) -> dict[str, np.ndarray]:
        """For every attribute the probability of its aspects, (N, C)."""
        return {name: judge.predict_proba(replies) for name, judge in self._judges.items()}


def learn(texts: Sequence[str], labels: Sequence[int]):
    """A judge of texts, by scikit-learn's interface. Raises ValueError for texts without a word."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    return make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000)).fit(texts, labels)


def _answers(instances: Sequence[Instance], attribute: int) -> tuple[list[str], list[int]]:
    """The target replies of the instances that are labelled for an attribute, and their aspects."""
    labelled = [i for i in instances if i.labels[attribute] >= 0]
    return [i.replies[-1] for i in labelled], [i.labels[attribute] for i in labelled]


def read(
    data: config.Data, schema: Schema, train: Sequence[str], validation: Sequence[str]
) -> tuple[list[Instance], list[Instance]]:
    """The instances that judges learn from and those that they are measured on: of the files that are named, else of
    the run's."""
    if data.frozen and not (train and validation):
        raise UserError(
            f"this run learned from tokens ({data.frozen}), but the judge learns from text; name its files with "
            f"--train {schema.names[0]}=FILE.jsonl ... --validation {schema.names[0]}=FILE.jsonl ..."
        )
    named = dataclasses.replace(data, train=tuple(train) or data.train, validation=tuple(validation) or data.validation)
    train_files, validation_files, _ = dataset.sources(named, schema)
    if not validation_files:
        raise UserError("--train is given but --validation is not; name the files that the judge is measured on")
    on_error = "skip" if data.on_error == "skip" else ""
    return tuple(dataset.read_files(files, schema, on_error) for files in (train_files, validation_files))
