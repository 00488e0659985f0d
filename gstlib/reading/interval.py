"""The one interval, Student's t over seeds, and what the decision rules need beside it (specification, section 5).

Pure functions of arrays: a number a seed in, or a row a seed and a column a configuration.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.optimize import brentq

LEVEL, POWER = 0.05, 0.8
PERMUTATIONS = 9_999
FEWEST = 3  # values; with fewer a t interval is wider than any effect here, and runs are shown themselves


class Estimate(NamedTuple):
    """A mean with its interval, the number of values behind it, and the two-sided p-value against zero."""

    value: float
    low: float
    high: float
    n: int
    p: float

    def __format__(self, form: str) -> str:
        return f"{self.value:{form}}" + (f" [{self.low:{form}}, {self.high:{form}}]" if self.low == self.low else "")


def half_width(sd, n, confidence: float = 1 - LEVEL):
    """Half of the t interval of a mean, from standard deviations and numbers of values (arrays); nan for n < 2."""
    return stats.t.ppf((1 + confidence) / 2, n - 1) * sd / np.sqrt(n)


def t_interval(values: Iterable[float], confidence: float = 1 - LEVEL) -> Estimate:
    """The mean of a number a seed with Student's t interval; fewer than two have no bounds and no p (nan)."""
    values = _cleaned(values)
    if len(values) < 2:
        return Estimate(float(values.mean()) if len(values) else math.nan, *[math.nan] * 2, len(values), math.nan)
    mean, half = float(values.mean()), float(half_width(values.std(ddof=1), len(values), confidence))
    return Estimate(mean, mean - half, mean + half, len(values), 2 * min(p_above(values), p_above(-values), 0.5))


def p_above(values: Iterable[float]) -> float:
    """One-sided p of "the mean lies above zero", by the t test; 1 where every value is zero."""
    values = _cleaned(values)
    mean, error = values.mean(), values.std(ddof=1) / math.sqrt(len(values))
    if error == 0:
        return float(mean <= 0)
    return float(stats.t.sf(mean / error, len(values) - 1))


def _cleaned(values: Iterable[float]) -> np.ndarray:
    """Values as an array, rounded so far that equal runs give equal numbers whatever the order of a sum."""
    return np.asarray(list(values), dtype=float).round(12)


def p_blocks(table: np.ndarray) -> float:
    """p of "the columns' means differ": F test of a (seeds, configurations) table, seeds as blocks, no interaction."""
    table = np.asarray(table, dtype=float)
    seeds, columns = table.shape
    effect = table.mean(0) - table.mean()
    rest = table - table.mean(1, keepdims=True) - effect
    among, within = seeds * (effect**2).sum() / (columns - 1), (rest**2).sum() / ((columns - 1) * (seeds - 1))
    if within == 0:
        return float(among == 0)
    return float(stats.f.sf(among / within, columns - 1, (columns - 1) * (seeds - 1)))


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjustment of p-values: all tests together err in `level` of cases at p < level."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted


def power(shift: float, n: int, level: float = LEVEL) -> float:
    """The chance that n values whose mean lies `shift` standard deviations above zero have their interval above it."""
    return float(stats.nct.sf(stats.t.ppf(1 - level / 2, n - 1), n - 1, shift * math.sqrt(n)))


def smallest_effect(sd: float, n: int, level: float = LEVEL) -> float:
    """The smallest true mean that n values with standard deviation `sd` find with 80% power (noncentral t); nan where all are
    equal, which tells nothing of how they would vary."""
    return sd * _smallest_shift(n, level) if n > 1 and sd else math.nan


@functools.cache
def _smallest_shift(n: int, level: float) -> float:
    """`smallest_effect` in standard deviations."""
    return brentq(lambda shift: power(shift, n, level) - POWER, 1e-6, 100)


def seeds_needed(effect: float, sd: float, level: float = LEVEL) -> float:
    """How many seeds find a true mean of `effect` with 80% power; inf where there is no effect."""
    if effect == 0 or sd == 0:
        return math.inf if effect == 0 else 2
    shift = abs(effect) / sd
    # the normal's answer is a little too small
    n = max(2, math.floor((stats.norm.ppf([1 - level / 2, POWER]).sum() / shift) ** 2))
    while n < 1e6 and power(shift, n, level) < POWER - 1e-6:
        n += 1
    return n


def slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least-squares slope of `y` on `x` within each row: (seeds, configurations) twice in, (seeds,) out.

    0 where `x` does not vary, for there no trend is to be seen.
    """
    x, y = np.broadcast_arrays(np.asarray(x, dtype=float), np.asarray(y, dtype=float))
    x = x - x.mean(1, keepdims=True)
    spread = (x * x).sum(1)
    return (x * y).sum(1) / np.where(spread > 0, spread, np.inf)


def correlation(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Pearson's r with Fisher's z interval and a two-sided permutation p (seeded); nan where it is not defined."""
    x, y = np.asarray(x, dtype=float).round(12), np.asarray(y, dtype=float).round(12)
    n = len(x)
    if n < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Estimate(*[math.nan] * 3, n, math.nan)
    r = float(np.corrcoef(x, y)[0, 1].round(12))
    z = np.arctanh(r * (1 - 1e-12)) + stats.norm.ppf(1 - LEVEL / 2) / math.sqrt(n - 3) * np.array([-1, 1])
    drawn = np.random.default_rng(0).permuted(np.tile(y, (PERMUTATIONS, 1)), axis=1)
    scale = n * x.std() * y.std()
    more = np.abs((drawn - y.mean()) @ (x - x.mean()) / scale) >= abs(r) - 1e-9
    return Estimate(r, *map(float, np.tanh(z)), n, float((1 + more.sum()) / (PERMUTATIONS + 1)))
