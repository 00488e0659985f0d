"""Bootstrap intervals over runs, the one kind that figures and claims share.

Works on arrays alone; a group is a configuration's runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

DRAWS = 10_000
BCA_RUNS = 5  # with fewer in a configuration the jackknife's acceleration is noise, and percentiles are taken


class Interval(NamedTuple):
    """A statistic with its bootstrap interval, the number of runs, and the two-sided p-value against zero."""

    value: float
    low: float
    high: float
    n: int
    p: float


def interval(groups: Sequence[np.ndarray], statistic: Callable[..., np.ndarray], confidence: float = 0.95,
             seed: int = 0) -> Interval:
    """Bootstrap interval of `statistic(*groups)`, runs resampled within their group (configuration).

    A group has a run a row: (runs,) or (runs, columns).  `statistic` works on
    many draws at once: (draws, runs[, columns]) arrays in, (draws,) out.  BCa
    from five runs in every group on, percentile below: the bias correction
    from the draws, the acceleration from leaving out one run at a time in
    each group (Efron and Tibshirani 1993, section 14.3, in its form for
    several samples).  `p` inverts the interval: the smallest 1 - confidence
    at which it excludes zero.  Seeded: the same runs give the same interval.
    """
    groups = [np.asarray(group, dtype=float) for group in groups]
    n = sum(map(len, groups))
    rng = np.random.default_rng(seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        # in chunks, for ten thousand draws of three hundred runs do not fit everywhere;
        # rounded, for equal runs must give equal draws whatever the order of a sum
        drawn = np.concatenate([statistic(*(g[rng.integers(len(g), size=(size, len(g)))] for g in groups))
                                for size in np.diff([*range(0, DRAWS, 1000), DRAWS])]).round(12)
        value = float(statistic(*(g[None] for g in groups))[0].round(12))
        drawn = drawn[np.isfinite(drawn)]
        if not np.isfinite(value) or not len(drawn):
            return Interval(value, math.nan, math.nan, n, math.nan)
        bias = acceleration = 0.0
        if min(map(len, groups)) >= BCA_RUNS and np.ptp(drawn) > 0:
            bias, acceleration = _quantile_of(drawn, value), _acceleration(groups, statistic)
    z = bias + stats.norm.ppf([(1 - confidence) / 2, (1 + confidence) / 2])
    low, high = np.quantile(drawn, stats.norm.cdf(bias + z / (1 - acceleration * z)))
    zero = _quantile_of(drawn, 0.0) - bias
    tail = stats.norm.cdf(zero / (1 + acceleration * zero) - bias)
    beyond = drawn.min() > 0 or drawn.max() < 0  # then the draws know only that p is smaller than they can tell
    p = 2 / (len(drawn) + 1) if beyond else 2 * min(tail, 1 - tail)
    return Interval(value, float(low), float(high), n, float(p))


def _quantile_of(drawn: np.ndarray, value: float) -> float:
    """The standard normal quantile at the share of draws below `value`, ties counted half, never infinite."""
    share = ((drawn < value).mean() + (drawn <= value).mean()) / 2
    return float(stats.norm.ppf(np.clip(share, 1 / (len(drawn) + 1), len(drawn) / (len(drawn) + 1))))


def _acceleration(groups, statistic) -> float:
    squares = cubes = 0.0
    for j, group in enumerate(groups):
        n = len(group)
        others = np.array([[i for i in range(n) if i != left_out] for left_out in range(n)])
        values = statistic(*(g[others] if i == j else np.broadcast_to(g, (n, *g.shape)) for i, g in enumerate(groups)))
        influence = (n - 1) / n * (values.mean() - values)
        squares, cubes = squares + (influence**2).sum(), cubes + (influence**3).sum()
    acceleration = cubes / (6 * squares**1.5) if squares > 0 else 0.0
    return float(acceleration) if np.isfinite(acceleration) else 0.0


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation along the second axis: (draws, points) twice in, (draws,) out."""
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


def pooled_pearson(*groups: np.ndarray) -> np.ndarray:
    """Pearson's correlation of two columns over the runs of all `groups`, (draws, runs, 2) each: (draws,) out."""
    points = np.concatenate(groups, axis=1)
    return pearson(points[..., 0], points[..., 1])
