"""How sure a mean is, and whether two systems differ, on the same instances."""

import numpy as np

RESAMPLES = 10_000
"""Of the bootstrap."""
DRAWN_TOGETHER = 1_000_000
"""Numbers of the bootstrap that are in memory at a time, about."""


def interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """The 95 % bootstrap interval (percentiles) of the mean of values (N,), from resampled instances."""
    generator = np.random.default_rng(seed)
    rows = max(DRAWN_TOGETHER // len(values), 1)
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    means = [values[generator.integers(len(values), size=(size, len(values)))].mean(axis=1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def paired(one: np.ndarray, other: np.ndarray, seed: int) -> dict[str, float | None] | None:
    """one - other, instance by instance: {"difference", "low", "high", "p"}, the mean difference with its 95 %
    bootstrap interval and the p-value of the paired t-test (two-sided; section 3.3).

    one, other: (N,) scores of the same instances, NaN where there is none; what both have counts. p is None where all
    differences are the same, and the whole is None where fewer than two instances count.
    """
    from scipy.stats import ttest_rel  # slow to import

    both = ~(np.isnan(one) | np.isnan(other))
    if both.sum() < 2:
        return None
    one, other = one[both].astype(np.float64), other[both].astype(np.float64)
    difference = one - other
    low, high = interval(difference, seed)
    p = float(ttest_rel(one, other).pvalue) if difference.min() != difference.max() else None
    return {"difference": float(difference.mean()), "low": low, "high": high, "p": p}
