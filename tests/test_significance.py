"""Intervals and paired tests against closed forms and SciPy."""

import numpy as np
import pytest
import scipy.stats

from miracle_jax import significance
from miracle_jax.significance import interval, paired

VALUES = np.random.default_rng(1).normal(3.0, 2.0, 400)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    half = 1.96 * VALUES.std() / len(VALUES) ** 0.5
    assert interval(VALUES, 0) == pytest.approx((VALUES.mean() - half, VALUES.mean() + half), abs=0.02)
    assert interval(VALUES, 0) == interval(VALUES, 0) != interval(VALUES, 1)
    found = scipy.stats.bootstrap((VALUES,), np.mean, method="percentile", rng=5).confidence_interval
    assert interval(VALUES, 0) == pytest.approx(found, abs=0.02)


def test_what_is_in_memory_at_a_time_changes_no_resample(monkeypatch):
    whole = interval(VALUES, 3)
    monkeypatch.setattr(significance, "DRAWN_TOGETHER", 7 * len(VALUES))
    assert interval(VALUES, 3) == pytest.approx(whole, abs=1e-12)


def test_systems_are_compared_on_the_instances_that_both_have():
    other = VALUES + np.random.default_rng(2).normal(0.3, 1.0, 400)
    one, two = VALUES.copy(), other.copy()
    one[5], two[[5, 9]] = np.nan, np.nan
    keep = np.delete(np.arange(400), [5, 9])
    found = paired(one, two, 0)
    assert found["difference"] == pytest.approx((VALUES - other)[keep].mean())
    assert found["p"] == pytest.approx(scipy.stats.ttest_rel(VALUES[keep], other[keep]).pvalue)
    assert (found["low"], found["high"]) == interval((VALUES - other)[keep], 0)
    assert found["low"] < found["difference"] < found["high"] < 0


def test_what_cannot_be_tested_has_no_p():
    assert paired(VALUES, VALUES, 0) == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": None}
    assert paired(VALUES[:1], VALUES[:1], 0) is None
    assert paired(VALUES, np.full(400, np.nan), 0) is None
