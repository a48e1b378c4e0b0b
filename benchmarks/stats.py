"""Statistics over seeds, after Agarwal et al. 2021, arXiv:2108.13264, with SciPy's bootstrap.

Scores are lists of arrays, one array [seeds] per environment; environments are the strata of the
bootstrap: seeds are resampled within each. Everything is seeded, so a report is reproducible.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import bootstrap, trim_mean

RESAMPLES = 5000
LEVEL = 0.95

Strata = Sequence[np.ndarray]


def iqm(scores: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean: the mean of what is left without the lowest and highest quarter (each
    rounded down to whole scores)."""
    return trim_mean(scores, 0.25, axis=axis)


def interval(strata: Strata, statistic: Callable, seed: int, resamples: int):
    """Percentile bootstrap interval of statistic(*strata, axis=...), over the seeds, axis 0."""
    if min(len(x) for x in strata) < 2:  # a single seed leaves nothing to resample
        return statistic(*strata, axis=0), statistic(*strata, axis=0)
    result = bootstrap(
        strata, statistic, n_resamples=resamples, axis=0, confidence_level=LEVEL,
        method="percentile", rng=np.random.default_rng(seed), vectorized=True,
    )
    return result.confidence_interval


def aggregate_iqm(*strata: np.ndarray, axis: int) -> np.ndarray:
    """IQM of the scores of all strata together."""
    return iqm(np.concatenate(strata, axis), axis)


def iqm_interval(strata: Strata, seed: int = 0, resamples: int = RESAMPLES) -> tuple:
    """IQM over all runs, and its stratified bootstrap interval: (estimate, low, high)."""
    low, high = interval(strata, aggregate_iqm, seed, resamples)
    return float(aggregate_iqm(*strata, axis=0)), float(low), float(high)


def mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean over seeds and its bootstrap interval: (estimate, low, high)."""
    low, high = interval([values], np.mean, seed, RESAMPLES)
    return float(values.mean()), float(low), float(high)


def curve_iqm(curves: np.ndarray, seed: int = 0, resamples: int = 2000):
    """IQM over seeds of curves [seeds, points], and its interval at each point, [points] each."""
    return iqm(curves, axis=0), *interval([curves], iqm, seed, resamples)


def probability_of_improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """P(X > Y) + P(X = Y) / 2 over all pairs of runs: [..., n], [..., m] -> [...]."""
    x, y = x[..., :, None], y[..., None, :]
    return ((x > y) + 0.5 * (x == y)).mean((-2, -1))


def difference_of_iqm(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return iqm(x) - iqm(y)


def paired_interval(pair_statistic: Callable, xs: Strata, ys: Strata, seed: int = 0,
                    resamples: int = RESAMPLES) -> tuple[float, float, float]:
    """Mean over environments of pair_statistic(x, y), with its stratified bootstrap interval."""

    def statistic(*sides: np.ndarray, axis: int) -> np.ndarray:
        sides = tuple(np.moveaxis(side, axis, -1) for side in sides)
        pairs = zip(sides[: len(xs)], sides[len(xs) :])
        return np.mean([pair_statistic(x, y) for x, y in pairs], axis=0)

    low, high = interval([*xs, *ys], statistic, seed, resamples)
    return float(statistic(*xs, *ys, axis=0)), float(low), float(high)


def performance_profile(strata: Strata, thresholds: np.ndarray, seed: int = 0,
                        resamples: int = 2000):
    """Share of runs above each threshold and its interval, [thresholds] each; environments weigh
    the same, however many seeds they have."""

    def share(*above: np.ndarray, axis: int) -> np.ndarray:
        return np.mean([x.mean(axis) for x in above], axis=0)

    above = [(x[:, None] > thresholds).astype(float) for x in strata]
    return share(*above, axis=0), *interval(above, share, seed, resamples)


def coverage_note(seeds: int) -> str:
    """What an interval from this many seeds is worth; empty from 10 on."""
    if seeds >= 10:
        return ""
    return (
        f"With {seeds} seeds a 95 % bootstrap interval covers less than 95 % (at 5 about 85-90 %), "
        "so no difference is called better or worse from fewer than 10."
    )
