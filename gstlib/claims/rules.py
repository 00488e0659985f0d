"""The decision rules of the specification, section 5: one number a seed, signed so that the claim says "above zero".

A part holds where its 95% t interval lies above zero and fails where it lies
below; `right` and `wrong` are the one-sided p-values of these two.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gstlib.reading.interval import LEVEL, Estimate, holm, p_above, p_blocks, seeds_needed, smallest_effect, t_interval
from gstlib.reading.text import number

VERDICTS = SUPPORTED, CONTRADICTED, INCONCLUSIVE, NOT_RUN = "supported", "contradicted", "inconclusive", "not run"
MARGIN = 1 / 4  # of the effect, within which two configurations count as equivalent (rule 5)


class Part(NamedTuple):
    """One estimate that a claim rests on; `smallest` effect found at 80% power, `needed` seeds for the one seen."""

    name: str
    found: Estimate
    right: float
    wrong: float
    unit: str = "points"
    confidence: float = 0.95
    smallest: float = math.nan
    needed: float = math.nan

    @property
    def verdict(self) -> str:
        """Contradicted comes first, for a part may have a test of its own for it (C15)."""
        side = LEVEL / 2
        return CONTRADICTED if self.wrong < side else SUPPORTED if self.right < side else INCONCLUSIVE

    def __str__(self) -> str:
        return f"{self.name}: {number(*self.found[:3], self.unit, self.confidence)}, {self.verdict}"


class Finding(NamedTuple):
    """What the runs say of a claim: the verdict, its p, the part that decided it, all parts in words, and a reservation
    that must stand wherever the verdict does."""

    verdict: str
    p: float
    part: Part
    note: str
    but: str = ""


def part(name: str, each, unit: str = "points", confidence: float = 0.95) -> Part:
    """A number a seed, by Student's t (rule 1). `confidence` .9: each half of an equivalence (rule 5), whose p counts by
    half, so that both are judged at one level."""
    each = np.asarray(each, dtype=float)
    found, level = t_interval(each, confidence), 1 - confidence
    sd = each.round(12).std(ddof=1)
    return Part(name, found, p_above(each) * LEVEL / level, p_above(-each), unit, confidence,
                smallest_effect(sd, found.n, level), seeds_needed(found.value, sd, level))


def every(*parts: Part) -> Part:
    """All must hold (rule 4): each by its own interval; one on the wrong side, by Holm over the parts, contradicts.

    Shown is the part that decides: the one on the wrong side, else the least sure.
    """
    right, wrong = max(p.right for p in parts), float(holm([p.wrong for p in parts]).min())
    decides = min(parts, key=lambda p: p.wrong) if wrong < LEVEL / 2 else max(parts, key=lambda p: p.right)
    return decides._replace(right=right, wrong=wrong)


def some(name: str, *parts: Part) -> Part:
    """One must hold (rule 4, "not best"), by Holm over the parts; all on the wrong side contradict."""
    right, wrong = float(holm([p.right for p in parts]).min()), max(p.wrong for p in parts)
    return min(parts, key=lambda p: p.right)._replace(name=name, right=right, wrong=wrong)


def equivalent(name: str, a, b, effect, unit: str = "points") -> tuple[Part, Part, Part]:
    """Rule 5: `a` less `b` within a quarter of `effect` on either side, by 90% intervals, and the effect supported."""
    return (*within(name, a - b, -MARGIN * effect, MARGIN * effect, unit), part(f"effect that {name} is held against",
                                                                               effect, unit))


def within(name: str, difference, low, high, unit: str = "points") -> tuple[Part, Part]:
    """`difference` above `low` and below `high`, each by its 90% interval, named with the difference itself."""
    shown = number(*t_interval(difference, 0.9)[:3], unit)
    return tuple(part(f"{name}, {shown}: how far {side} {number(float(np.mean(end)), math.nan, math.nan, unit)}", each, unit, 0.9)
                 for side, end, each in (("above", low, difference - low), ("below", high, high - difference)))


def no_help(name: str, gain, effect) -> Part:
    """Rule 5, "does not help": `gain` below a quarter of `effect`; contradicted where the gain is above zero."""
    return part(name, MARGIN * effect - gain)._replace(wrong=p_above(gain))


def differ(name: str, table: np.ndarray) -> Part:
    """C4: do the columns' means differ? F test, seeds as blocks; the range is a description and has no interval.

    Finding no difference contradicts nothing.
    """
    means, p = np.asarray(table).mean(0), p_blocks(table)
    return Part(name, Estimate(float(np.ptp(means)), math.nan, math.nan, len(table), p), p / 2, 1.0)


def decide(*parts: Part, note: str = "", p: float | None = None, but: str = "") -> Finding:
    """The verdict where all parts must hold; `p` is given where it is not that of the parts' tests (C1 in general)."""
    whole = every(*parts)
    if p is None:
        p = min(1.0, 2 * min(whole.right, whole.wrong))
    return Finding(whole.verdict, p, whole, "; ".join([*map(str, parts)] + [note] * bool(note)), but)


def adjusted(p: Sequence[float]) -> np.ndarray:
    """Holm's p over all claims that were run (rule 7); nan, for claims without a test, is passed over."""
    p = np.asarray(p, dtype=float)
    given, result = np.isfinite(p), np.full(len(p), np.nan)
    result[given] = holm(p[given])
    return result
