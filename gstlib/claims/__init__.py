"""The paper's claims C1 to C19 as data, each with a decision rule fixed before any result, and their verdicts.

A verdict is *supported* when the 95% bootstrap interval lies wholly on the
claimed side, *contradicted* when wholly on the other, else *inconclusive*;
*not run* with fewer than three runs in any configuration compared.  Where a
claim has several parts, all must be supported, and one contradicted part
contradicts it.  Verdicts on the paper come from full-width networks alone.

Reads stored runs only; imports neither torch nor training.
"""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from gstlib import experiments
from gstlib.errors import InputError
from gstlib.reading import analysis
from gstlib.reading.analysis import Study
from gstlib.reading.intervals import Interval, interval, pearson, pooled_pearson
from gstlib.spec import DATASETS
from gstlib.store import Store

FULL_WIDTH = ("paper", "quarter")  # the profiles that speak about the paper, the one nearest to it first
SMALL = "mini"
FEWEST = 3  # runs in every configuration compared
SUPPORTED, CONTRADICTED, INCONCLUSIVE, NOT_RUN = "supported", "contradicted", "inconclusive", "not run"

# thresholds that the rules need and the paper's words leave open, chosen before any result
FEW_EPOCHS = 5  # C3: "a few epochs", epochs of training whatever the profile
EXPONENTIAL_FIT = 0.95  # C7: R^2; normally distributed weights, whose magnitudes are half-normal, reach .926
NEAR_NORMAL = 0.1  # C18: a distance at which no tail's share is off by more than ten points
LAST_LAYERS = 8  # C18: the layers of Figure A1


class Part(NamedTuple):
    """One estimate that a claim rests on, with the verdict on it alone."""

    name: str
    found: Interval
    verdict: str
    unit: str = "points"
    confidence: float = 0.95


class Finding(NamedTuple):
    """What the runs say of a claim: the verdict, the part that decided it, and all parts in words."""

    verdict: str
    part: Part
    note: str


class Need(NamedTuple):
    """Runs that a claim compares: these configurations of a figure, with these columns of `run_table`."""

    figure: str
    labels: tuple[str, ...]
    columns: tuple[str, ...] = ("accuracy",)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper. `evaluate` takes a `run_table` for each of `needs` and gives a `Finding`.

    `published` is the paper's number or place, `figure` the experiment that
    bears on it, `statistic` what is estimated and `test` the rule, in words.
    """

    id: str
    statement: str
    published: str
    figure: str
    statistic: str
    test: str
    needs: tuple[Need, ...]
    evaluate: Callable[..., Finding]


# --- rules -----------------------------------------------------------------------------------------------------------

def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjustment of p-values: all tests together err in `level` of cases at p < level."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted


def side(found: Interval, threshold: float = 0.0, above: bool = True) -> str:
    """The verdict on "the statistic lies above `threshold`" (or below): where is the whole interval?"""
    over, under = found.low > threshold, found.high < threshold
    if not over and not under:
        return INCONCLUSIVE
    return SUPPORTED if over == above else CONTRADICTED


def equivalence(found: Interval, effect: Interval) -> str:
    """The verdict on "no difference worth naming": the 90% interval `found` within a quarter of `effect`.

    The edges count as within; contradicted when it lies wholly outside.  Without an effect above zero
    (its 95% interval) there is nothing to be near to: inconclusive.
    """
    margin = effect.value / 4
    if not effect.low > 0:
        return INCONCLUSIVE
    if -margin <= found.low and found.high <= margin:
        return SUPPORTED
    return CONTRADICTED if found.low > margin or found.high < -margin else INCONCLUSIVE


# --- statistics over groups of draws ---------------------------------------------------------------------------------

def contrast(*weights: float) -> Callable[..., np.ndarray]:
    """The weighted sum of the groups' means, as a statistic for `interval`."""
    return lambda *groups: sum(w * g.mean(1) for w, g in zip(weights, groups, strict=True))


def spearman(*groups: np.ndarray) -> np.ndarray:
    """Spearman's rho between the groups' order and their runs' values, for each draw."""
    place = stats.rankdata(np.repeat(np.arange(len(groups)), [g.shape[1] for g in groups]))
    return pearson(place[None], stats.rankdata(np.concatenate(groups, axis=1), axis=1))


def exponential_fit(*deciles: np.ndarray) -> np.ndarray:
    """R^2 of ten deciles' means against those of an exponential distribution, of which the scale alone is fitted."""
    left = 1 - np.arange(10) / 10
    # the quantile function -log(1 - u), integrated over each tenth
    ideal = 10 * np.diff([*(left * np.log(left) - left), 0.0])
    means = np.stack([g.mean(1) for g in deciles], axis=1)
    fitted = (means @ ideal / (ideal @ ideal))[:, None] * ideal
    return 1 - ((means - fitted) ** 2).sum(1) / ((means - means.mean(1, keepdims=True)) ** 2).sum(1)


def _profiles(*groups: np.ndarray) -> np.ndarray:
    """Pearson's r, over the columns, of two groups' mean rows."""
    return pearson(*(g.mean(1) for g in groups))



# --- parts of claims -------------------------------------------------------------------------------------------------

def _values(runs: pd.DataFrame, labels: Sequence[str], columns="accuracy") -> list[np.ndarray]:
    return [runs.loc[runs["label"] == label, columns].to_numpy(dtype=float) for label in labels]


def _difference(name: str, runs: pd.DataFrame, plus: Sequence[str], minus: Sequence[str], column: str = "accuracy",
                confidence: float = 0.95) -> Part:
    """The mean over configurations `plus` less that over `minus`, claimed to be positive."""
    weights = [1 / len(plus)] * len(plus) + [-1 / len(minus)] * len(minus)
    found = interval(_values(runs, [*plus, *minus], column), contrast(*weights), confidence)
    return Part(name, found, side(found), confidence=confidence)


def lead(name: str, runs: pd.DataFrame, first: str, others: Sequence[str], column: str = "accuracy") -> Part:
    """Is `first` the highest of the configurations? The estimate is its lead on the best of the others.

    Supported when it leads each of them.  Contradicted when one of them leads
    by Holm's adjusted p < .05: the best of several others is partly picked
    for its luck, which the adjustment pays for.
    """
    each = [interval(_values(runs, [first, other], column), contrast(1, -1)) for other in others]
    leads = [found.value for found in each]
    beaten = any(found.value < 0 and p < 0.05 for found, p in zip(each, holm([found.p for found in each])))
    verdict = SUPPORTED if all(found.low > 0 for found in each) else CONTRADICTED if beaten else INCONCLUSIVE
    return Part(name, each[int(np.argmin(leads))], verdict)


def together(*parts: Part, note: str = "") -> Finding:
    """All parts must hold. Decided by the first part that fails, or by the first if none does."""
    verdict = next(v for v in (CONTRADICTED, INCONCLUSIVE, SUPPORTED) if any(part.verdict == v for part in parts))
    words = [_words(part) for part in parts] + [note] * bool(note)
    return Finding(verdict, next(part for part in parts if part.verdict == verdict), "; ".join(words))


def _words(part: Part) -> str:
    found = part.found
    return f"{part.name}: {found.value:.2f} [{found.low:.2f}, {found.high:.2f}] {part.unit}, {part.verdict}"


# --- the claims' evaluations -----------------------------------------------------------------------------------------

_VGG11 = ("S r=4", "S r=40", "L r=40", "S r=4 l2")
_RESNET18 = _VGG11[:3]
_RATES = (4, 20, 40, 60, 100)  # retrain periods of Figure 4, the smallest rate first; 100 is the text's 30%
_DECILES = {kind: tuple(f"D{k} {kind}" for k in range(11)) for kind in ("weight", "filter")}
_FIGURE2 = (*_DECILES["weight"], *_DECILES["filter"])
_FIGURE3 = tuple(f"L {rate} {structure}" for structure in ("filter", "weight") for rate in ("r=4", "r=40", "one-shot"))
_UNITS = {"weight": "single weights", "filter": "whole neurons"}


def _curve(target: str, score: str = "") -> tuple[str, ...]:
    return tuple(f"{target} r={r}{score}" for r in _RATES)


# random pruning looks at no score: by either it is the same run, which must not count twice
_CURVES = {"S by E[BN]": _curve("S"), "L by E[BN]": _curve("L"), "R": _curve("R"),
           "S by l2": _curve("S", " l2"), "L by l2": _curve("L", " l2")}
_FIGURE4 = tuple(label for curve in _CURVES.values() for label in curve)


def _correlates(runs: pd.DataFrame) -> Finding:
    groups = _values(runs, list(runs["label"].unique()), ["instability", "accuracy"])
    found = interval(groups, pooled_pearson)
    points = np.concatenate(groups)
    p = f"{stats.pearsonr(points[:, 0], points[:, 1]).pvalue:.2g}" if np.isfinite(found.value) else "undefined"
    return together(Part("correlation", found, side(found), "Pearson's r"), note=f"Pearson's p = {p}")


def _recovers(runs: pd.DataFrame) -> Finding:
    wait = interval(_values(runs, ["L r=40"], "recovery"), contrast(1))
    return together(
        lead("instability of L at 13% less that of the next", runs, "L r=40", ("S r=4", "S r=40", "S r=4 l2"),
             "instability"),
        Part("time until back at the level before the event", wait, side(wait, FEW_EPOCHS, above=False), "epochs"),
        _difference("accuracy of L at 13% less no pruning", runs, ["L r=40"], ["none"]))


def _same_number(vgg11: pd.DataFrame, resnet18: pd.DataFrame) -> Finding:
    parts, tests = [], []
    for name, runs, labels in (("VGG11", vgg11, _VGG11), ("ResNet18", resnet18, _RESNET18)):
        groups = sorted(_values(runs, labels), key=np.mean)
        p = stats.kruskal(*groups).pvalue if np.ptp(np.concatenate(groups)) > 0 else 1.0
        found = interval([groups[-1], groups[0]], contrast(1, -1))
        verdict = SUPPORTED if p < 0.05 else INCONCLUSIVE
        parts.append(Part(f"most less least accurate configuration, {name}", found, verdict))
        tests.append(f"Kruskal-Wallis p = {p:.2g} in {name}")
    return together(*parts, note=", ".join(tests))


def _trend_by_decile(runs: pd.DataFrame) -> Finding:
    found = {kind: interval(_values(runs, _DECILES[kind], "gap"), spearman) for kind in _DECILES}
    return together(*(Part(_UNITS[kind], f, side(f), "Spearman's rho") for kind, f in found.items()))


def _slopes(runs: pd.DataFrame) -> Finding:
    place = np.arange(11) - 5.0
    weights = place / (place**2).sum()
    slopes = {kind: interval(_values(runs, _DECILES[kind], "gap"), contrast(*weights)) for kind in _DECILES}
    found = interval(_values(runs, _FIGURE2, "gap"), contrast(*weights, *-weights))
    return together(
        Part("slope of single weights less slope of whole neurons", found, side(found), "points a decile"),
        note=", ".join(f"{_UNITS[kind]} {s.value:.2f} [{s.low:.2f}, {s.high:.2f}]" for kind, s in slopes.items()))


def _deciles(runs: pd.DataFrame) -> Finding:
    ends = [*_values(runs, ["D9 weight", "D5 weight", "D9 filter", "D5 filter"], "magnitude")]
    ratios = interval(ends, lambda w9, w5, n9, n5: w9.mean(1) / w5.mean(1) - n9.mean(1) / n5.mean(1))
    fit = interval(_values(runs, _DECILES["weight"][:10], "magnitude"), exponential_fit)
    weights, neurons = (high.mean() / middle.mean() for high, middle in (ends[:2], ends[2:]))
    return together(
        Part("ratio D9 to D5 of single weights less that of whole neurons", ratios, side(ratios), "ratio"),
        Part("fit of an exponential to single weights", fit, side(fit, EXPONENTIAL_FIT), "R²"),
        note=f"ratio {weights:.2f} for single weights, {neurons:.2f} for whole neurons")


def _structured(runs: pd.DataFrame) -> Finding:
    filters, weights = _FIGURE3[:3], _FIGURE3[3:]
    each = [_difference(f.removesuffix(" filter"), runs, [f], [w]) for f, w in zip(filters, weights)]
    return together(_difference("filters less weights, mean over the three rates", runs, filters, weights),
                    note="; ".join(map(_words, each)))


def _trend_by_rate(runs: pd.DataFrame) -> Finding:
    size = len(_RATES)

    def mean_rho(*groups):
        return sum(spearman(*groups[start:start + size]) for start in range(0, len(groups), size)) / len(_CURVES)

    found = interval(_values(runs, _FIGURE4, "instability"), mean_rho)
    each = {name: interval(_values(runs, curve, "instability"), spearman) for name, curve in _CURVES.items()}
    return together(Part("mean over the five targets", found, side(found), "Spearman's rho"),
                    note=", ".join(f"{name} {f.value:.2f} [{f.low:.2f}, {f.high:.2f}]" for name, f in each.items()))


def _largest_rate(runs: pd.DataFrame, names: Sequence[str], judged: Callable[[Part], Part]) -> Finding:
    # the appendix ends at r = 60, the text at 30%, which is r = 100: both readings
    printed, other = ([judged(lead(name, runs, _CURVES[name][last], _CURVES[name][:last])) for name in names]
                      for last in (4, 3))
    return together(*printed, note="with r = 60 as the largest rate: " + "; ".join(map(_words, other)))


def _best_at_largest(runs: pd.DataFrame) -> Finding:
    return _largest_rate(runs, ("S by E[BN]", "S by l2", "R"), lambda part: part)


def _not_best_at_largest(runs: pd.DataFrame) -> Finding:
    return _largest_rate(runs, ("L by E[BN]", "L by l2"), _opposite)


def _opposite(part: Part) -> Part:
    """The same estimate for the contrary claim, its sign turned so that the claimed side stays the positive one."""
    f = part.found
    verdict = {SUPPORTED: CONTRADICTED, CONTRADICTED: SUPPORTED}.get(part.verdict, INCONCLUSIVE)
    return part._replace(found=Interval(-f.value, -f.high, -f.low, f.n, f.p), verdict=verdict)


def order(*neighbours: Part) -> Finding:
    """An order: each neighbouring difference on the claimed side by Holm's adjusted p < .05; the least sure shown."""
    adjusted = holm([part.found.p for part in neighbours])
    judged = []
    for i in np.argsort(-adjusted, kind="stable"):
        side_taken = SUPPORTED if neighbours[i].found.value > 0 else CONTRADICTED
        judged.append(neighbours[i]._replace(verdict=side_taken if adjusted[i] < 0.05 else INCONCLUSIVE))
    return together(*judged, note="adjusted p = " + ", ".join(f"{p:.2g}" for p in sorted(adjusted, reverse=True)))


def _ordered(runs: pd.DataFrame) -> Finding:
    return order(*(_difference(f"{more} less {less}", runs, _curve(more), _curve(less), "instability")
                   for more, less in (("R", "S"), ("L", "R"))))


def _l2_misleads(runs: pd.DataFrame) -> Finding:
    small, large = _curve("S", " l2"), _curve("L", " l2")
    effect = _difference("L less S by E[BN]", runs, _curve("L"), _curve("S"), "instability")
    near = _difference("S less L by l2, 90%", runs, small, large, "instability", 0.9)
    return together(_difference("S by l2 less R", runs, small, _curve("R"), "instability"),
                    near._replace(verdict=equivalence(near.found, effect.found)), note=_words(effect))


def _zeroing_is_pruning(runs: pd.DataFrame) -> Finding:
    pair = ["zeroing 50", "L l2 weights"]
    parts, effects = [], []
    for column in ("accuracy", "instability"):
        effect = _difference(f"{column} of prune L less no pruning", runs, pair[1:], ["none"], column)
        near = _difference(f"{column} of zeroing 50 less prune L, 90%", runs, pair[:1], pair[1:], column, 0.9)
        parts.append(near._replace(verdict=equivalence(near.found, effect.found)))
        effects.append(_words(effect))
    pattern = interval(_values(runs, pair, [c for c in runs if c.startswith("fall_")]), _profiles)
    parts.append(Part("pattern over the events", pattern, side(pattern), "Pearson's r"))
    return together(*parts, note="; ".join(effects))


def _zeroing_once(runs: pd.DataFrame) -> Finding:
    part = _difference("accuracy of no pruning less zeroing 0", runs, ["none"], ["zeroing 0"])
    return together(_opposite(part)._replace(name="accuracy of zeroing 0 less no pruning", verdict=part.verdict))


def _noise_helps_less(runs: pd.DataFrame) -> Finding:
    return together(_difference("accuracy of Gaussian 1500 less no pruning", runs, ["gaussian 1500"], ["none"]),
                    _difference("accuracy of prune L less Gaussian 1500", runs, ["L l2 weights"], ["gaussian 1500"]))


def _ebn_is_stabler(runs: pd.DataFrame) -> Finding:
    return together(_difference("instability by l2 less by E[BN]", runs, ["S r=4 l2"], ["S r=4"], "instability"))


def _normality(runs: pd.DataFrame) -> Finding:
    before, after, rho = _values(runs, ["none"] * 3, ["ks_before", "ks_after", "ks_rho"])[0].T
    small = interval([before], contrast(1))
    more, rising = interval([after - before], contrast(1)), interval([rho], contrast(1))
    return together(Part("distance after less before", more, side(more), "KS distance"),
                    Part("distance before", small, side(small, NEAR_NORMAL, above=False), "KS distance"),
                    Part("rise toward the output, after", rising, side(rising), "Spearman's rho"))


def _cheap(costs: pd.Series) -> Finding:
    # one measurement a network: the spread shown is that over the networks
    found = Interval(float(costs.median()), float(costs.min()), float(costs.max()), len(costs), math.nan)
    return together(Part("one scoring pass", found, side(found, 1, above=False), "training steps"))


# --- the claims ------------------------------------------------------------------------------------------------------

_ABOVE = "the 95% interval above zero"
_CORRELATION = "Pearson's r of mean instability and final accuracy over the pruned runs"

CLAIMS = (
    Claim(
        "C1", "In VGG11, the less stable a way of pruning, the more accurate the pruned network.",
        "r = .84, p = 1.3e-11", "figure1-vgg11", _CORRELATION, _ABOVE,
        (Need("figure1-vgg11", _VGG11, ("instability", "accuracy")),), _correlates),
    Claim(
        "C2", "In ResNet18, the less stable a way of pruning, the more accurate the pruned network.",
        "r = .65, p = 5.2e-5", "figure1-resnet18", _CORRELATION, _ABOVE,
        (Need("figure1-resnet18", _RESNET18, ("instability", "accuracy")),), _correlates),
    Claim(
        "C3", "Removing the largest filters of VGG11, 13% at a time, is by far the least stable, and the network "
        "recovers within a few epochs to a higher accuracy than without pruning.",
        "Figure 1 left", "figure1-vgg11",
        "mean instability of L at 13% less that of the next; epochs until test accuracy is back at its level before "
        "the event (the whole wait where it never is); final accuracy less that of no pruning",
        f"all three 95% intervals: above zero for each other method; below {FEW_EPOCHS} epochs; above zero",
        (Need("figure1-vgg11", ("none", *_VGG11), ("instability", "accuracy", "recovery")),), _recovers),
    Claim(
        "C4", "Ways of pruning that remove the same number of parameters differ in final accuracy.",
        "Figure 1", "figure1-vgg11",
        "final accuracy of the most less that of the least accurate pruned configuration, VGG11 and ResNet18",
        "Kruskal-Wallis p < .05 in both networks, else inconclusive: finding no difference contradicts nothing",
        (Need("figure1-vgg11", _VGG11), Need("figure1-resnet18", _RESNET18)), _same_number),
    Claim(
        "C5", "The larger the weights or neurons that are removed, the better the generalization gap.",
        "Figure 2", "figure2",
        "Spearman's rho of the target (D0 to D10) and the gap (test less train accuracy) after the last epoch, 54",
        _ABOVE + ", for single weights and for whole neurons",
        (Need("figure2", _FIGURE2, ("gap",)),), _trend_by_decile),
    Claim(
        "C6", "The size of what is removed matters much more for single weights than for whole neurons.",
        "Figure 2", "figure2",
        "least-squares slope of the configurations' mean gaps over D0 to D10, single weights less whole neurons",
        _ABOVE, (Need("figure2", _FIGURE2, ("gap",)),), _slopes),
    Claim(
        "C7", "Neurons' norms differ little beyond the middle, while single weights' deciles are about exponential.",
        "text of section 4.2", "figure2",
        "mean magnitude of the targeted decile at the last event up to epoch 35: ratio of D9's to D5's, single weights "
        "less whole neurons; R² of single weights' ten deciles against an exponential's, its scale fitted",
        f"both 95% intervals: above zero; above {EXPONENTIAL_FIT}",
        (Need("figure2", _FIGURE2, ("magnitude",)),), _deciles),
    Claim(
        "C8", "Removing whole filters leaves a more accurate ResNet18 than removing as many single weights.",
        "Figure 3", "figure3",
        "final accuracy, filters less weights at the same rate, mean over r = 4, r = 40 and one shot",
        _ABOVE, (Need("figure3", _FIGURE3),), _structured),
    Claim(
        "C9", "At the same total, removing more at a time is less stable.",
        "Figure 4 left", "figure4",
        "Spearman's rho of rate and mean instability within a target, mean over S and L by each score, and R",
        _ABOVE, (Need("figure4", _FIGURE4, ("instability",)),), _trend_by_rate),
    Claim(
        "C10", "Removing small or random filters works best at the largest rate.",
        "Figure 4 right (30%)", "figure4",
        "final accuracy at r = 100 (30%) less the best of the other rates, for S by E[BN], S by l2 and R",
        "for each target above each other rate (95% intervals); contradicted when another leads, adjusted by Holm",
        (Need("figure4", _CURVES["S by E[BN]"] + _CURVES["S by l2"] + _CURVES["R"]),), _best_at_largest),
    Claim(
        "C11", "By E[BN], removing small filters is more stable than random ones, and random ones than large ones.",
        "Figure 4 left", "figure4", "mean instability, R less S and L less R, mean over the five rates",
        "both differences above zero, p-values from inverted bootstrap intervals adjusted by Holm",
        (Need("figure4", _CURVES["S by E[BN]"] + _CURVES["R"] + _CURVES["L by E[BN]"], ("instability",)),), _ordered),
    Claim(
        "C12", "By l2, removing small filters is less stable than random ones and nearly as unstable as large ones.",
        "Figure 4 left", "figure4", "mean instability by l2, S less R and S less L, mean over the five rates",
        "the first above zero (95% interval); the second's 90% interval within a quarter of L less S by E[BN]",
        (Need("figure4", _FIGURE4, ("instability",)),), _l2_misleads),
    Claim(
        "C13", "Removing large filters does not work best at the largest rate.",
        "Figure 4 right (30%)", "figure4",
        "final accuracy of the best of the other rates less r = 100 (30%), for L by E[BN] and by l2",
        "for each score another rate leads, adjusted by Holm; contradicted when r = 100 leads each other rate",
        (Need("figure4", _CURVES["L by E[BN]"] + _CURVES["L by l2"]),), _not_best_at_largest),
    Claim(
        "C14", "Holding filters at zero for 50 batches gives the accuracy and instability that removing them gives.",
        "Figure 5 left", "figure5",
        "final accuracy and mean instability, zeroing 50 less prune L; Pearson's r of their mean falls over the events",
        "90% intervals within a quarter of prune L less no pruning; r above zero (95% interval)",
        (Need("figure5", ("none", "L l2 weights", "zeroing 50"), ("accuracy", "instability")),), _zeroing_is_pruning),
    Claim(
        "C15", "Setting filters to zero once, free to grow back, does not help.",
        "Figure 5 left", "figure5", "final accuracy, zeroing 0 less no pruning",
        "the 95% interval below zero; contradicted above it", (Need("figure5", ("none", "zeroing 0")),), _zeroing_once),
    Claim(
        "C16", "Gaussian noise for 1500 batches helps, but less than pruning.",
        "Figure 5 right", "figure5", "final accuracy, Gaussian 1500 less no pruning and prune L less Gaussian 1500",
        "both: " + _ABOVE, (Need("figure5", ("none", "L l2 weights", "gaussian 1500")),), _noise_helps_less),
    Claim(
        "C17", "Removing small filters is more stable by E[BN] than by l2.",
        "Figure A2", "figureA2", "mean instability of S at r = 4, by l2 less by E[BN]",
        _ABOVE, (Need("figure1-vgg11", ("S r=4", "S r=4 l2"), ("instability",)),), _ebn_is_stabler),
    Claim(
        "C18", "Normalised activations are near normal before training and less so after, least near the output.",
        "Figure A1", "figureA1",
        "Kolmogorov-Smirnov distance to the standard normal, mean over VGG19's last eight convolutions, before "
        "training and after; Spearman's rho of the distance after training and depth",
        f"all three 95% intervals: after less before above zero; before below {NEAR_NORMAL}; rho above zero",
        (Need("figureA1", ("none",), ("ks_before", "ks_after", "ks_rho")),), _normality),
    Claim(
        "C19", "Computing E[BN] costs next to nothing.",
        "section 3.1.1", "bench",
        "time of one scoring pass of all pruned layers in training steps, median and range over the networks measured",
        "below one training step in every network; contradicted when above in every one", (), _cheap),
)


# --- from the store to the table -------------------------------------------------------------------------------------

_ESTIMATE = ("estimate", "low", "high", "confidence", "n", "unit")


def run_table(store: Store, study: Study) -> pd.DataFrame:
    """One row a stored run of a figure, with what the claims compare.

    label, seed, run; accuracy (final top-1 test accuracy, %), gap (test less
    train accuracy at the end, points), instability (mean over events, points;
    0 without events), fall_0 … (instability of each event); in Figure 1
    recovery (epochs, see `recovery`); in Figure 2 magnitude (the targeted
    decile's mean score at the last event up to epoch 35 of the paper's); in
    Figure A1 ks_before, ks_after and ks_rho (`normality`).
    """
    runs = study.runs
    if runs.empty:
        return pd.DataFrame(columns=["label", "seed", "run"])
    table = runs[["label", "seed", "run"]].assign(
        accuracy=100 * runs["final_accuracy"], gap=100 * (runs["final_accuracy"] - runs["final_train_accuracy"]),
        instability=100 * runs["mean_instability"].where(runs["events"] > 0, 0.0))
    if study.events.empty and study.experiment.name != "figureA1":
        return table
    if study.experiment.name == "figure1-vgg11":
        epochs, events = dict(list(study.epochs.groupby("run"))), dict(list(study.events.groupby("run")))
        table["recovery"] = [recovery(epochs[run], events[run]) if run in events else 0.0 for run in table["run"]]
    elif study.experiment.name == "figure2":
        until = math.floor(35 / study.profile.divisor_conv4 + 0.5)
        last = study.events[study.events["epoch"] <= until].sort_values("epoch").groupby("run").last()
        # D10 aims at D9's decile from above
        table["magnitude"] = [last.get(f"decile_{min(int(label.split()[0][1:]), 9)}", {}).get(run, math.nan)
                              for label, run in zip(table["label"], table["run"])]
    elif study.experiment.name == "figure5":
        each = analysis.instability(study.events)
        each["event"] = each.groupby("run").cumcount()
        falls = 100 * each.pivot(index="run", columns="event", values="instability")
        table = table.join(falls.add_prefix("fall_"), on="run")
    elif study.experiment.name == "figureA1":
        distances = [normality(store.read(run).tables["histogram"]) for run in table["run"]]
        table = pd.concat([table, pd.DataFrame(distances, index=table.index)], axis=1)
    return table


def recovery(epochs: pd.DataFrame, events: pd.DataFrame) -> float:
    """Mean number of epochs after an event until the test accuracy is back at what it was before (t_pre).

    An event whose accuracy never comes back before the next event, or the
    end, counts the whole wait, which is less than it would have needed.
    """
    tested = epochs.dropna(subset="test_accuracy")
    epoch, accuracy = tested["epoch"].to_numpy(), tested["test_accuracy"].to_numpy()
    struck = events.drop_duplicates("epoch").sort_values("epoch")
    begins = struck["epoch"].to_numpy()
    waits = []
    for begin, end, level in zip(begins, [*begins[1:], epoch.max()], struck["t_pre"]):
        if end > begin:
            back = epoch[(epoch > begin) & (epoch <= end) & (accuracy >= level)]
            waits.append((back.min() if len(back) else end) - begin)
    return float(np.mean(waits)) if waits else math.nan


def normality(histogram: pd.DataFrame) -> dict[str, float]:
    """Mean distance (ks) to the standard normal over the last eight layers before and after training, and
    Spearman's rho of the latter with depth."""
    each = histogram.drop_duplicates(["epoch", "layer_index"]).sort_values("layer_index")
    each = each[each["layer_index"] > each["layer_index"].max() - LAST_LAYERS]
    before, after = each[each["epoch"] < 0], each[each["epoch"] == each["epoch"].max()]
    constant = after["ks"].nunique() < 2
    return {"ks_before": before["ks"].mean(), "ks_after": after["ks"].mean(),
            "ks_rho": 0.0 if constant else float(stats.spearmanr(after["layer_index"], after["ks"]).statistic)}


def _costs(store: Store) -> pd.Series:
    """Scoring passes in training steps, one a network, from `bench.json` beside the runs; empty without it."""
    place = store.path / "bench.json"
    if not place.exists():
        return pd.Series(dtype=float)
    try:
        passes = [row for row in json.loads(place.read_text())["costs"] if row["cost"].startswith("E[BN]")]
        return pd.Series([row["training_steps"] for row in passes], dtype=float)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{place} is no benchmark ({error!r}); "
                         f"make it with: python -m gstlib bench --output {place}") from error


def evaluate(store: Store, profile: str | None = None, data: str | None = None, seeds=None) -> pd.DataFrame:
    """A row a claim, C1 to C19, with its verdict (section 5 of the paper's specification).

    With `profile` None the row is that of the full-width profile nearest to
    the paper that has a verdict; a profile that is not full-width leaves
    `verdict` at "not run".  `data` and `seeds` as in `analysis.study`.

    Columns: id, statement, published, profile, estimate, low, high,
    confidence (of the interval), n (runs), unit, verdict, small_scale (the
    verdict at `mini`, or at the reduced profile asked for), small_estimate,
    small_low, small_high, small_confidence, small_n, small_unit, why (what is
    missing and the command that makes it), note (all parts of the estimate), figure, statistic, test.
    Raises `InputError` for an unknown profile, damaged runs and mixed data.
    """
    if profile is not None:
        experiments.profile(profile)
    reduced = profile if profile not in (None, *FULL_WIDTH) else SMALL
    full = FULL_WIDTH if profile is None else [profile] if profile in FULL_WIDTH else []
    # figures share runs: each file is read and verified once
    heads, store = list(store.about()), copy.copy(store)
    store.about, store.read = lambda: iter(heads), functools.cache(store.read)
    held: dict[str, set[str]] = {}
    for _, spec, about in heads:
        held.setdefault(about["profile"], set()).add(spec.data.name)
    found = {name: _at(store, name, _named(held.get(name, set()), name, data), seeds, data) for name in (*full, reduced)}
    rows = []
    for claim in CLAIMS:
        small = found[reduced][claim.id]
        judged = next((name for name in full if found[name][claim.id]["verdict"] != NOT_RUN), None)
        # without any verdict: where most runs are, else the cheapest to make
        name = judged or max(reversed(full), key=lambda name: found[name][claim.id]["n"], default=reduced)
        row = found[name][claim.id]
        if not full:
            why = [row["why"]] * bool(row["why"]) + [f"{reduced} is no full-width profile"]
            row = row | {"verdict": NOT_RUN, "why": "; ".join(why)}
        rows.append({
            "id": claim.id, "statement": claim.statement, "published": claim.published, "profile": name,
            **{column: row[column] for column in (*_ESTIMATE, "verdict")},
            "small_scale": small["verdict"], **{f"small_{c}": small[c] for c in _ESTIMATE},
            "why": row["why"], "note": row["note"], "figure": claim.figure,
            "statistic": claim.statistic, "test": claim.test,
        })
    return pd.DataFrame(rows)


def _named(names: set[str], profile: str, data: str | None) -> str | None:
    """The data set to read among those that a profile's runs were trained on; None when there is none."""
    if data is not None:
        return data if names & ({data} if data in DATASETS else {"cifar10", "cifar10-folder"}) else None
    own = experiments.profile(profile).data
    return own if own in names else min(names, default=None)


def _at(store: Store, profile: str, data: str | None, seeds, asked: str | None) -> dict[str, dict]:
    """Every claim's estimate and verdict at one profile, by the claim's id; `data` None where nothing is stored.

    `asked` is the data set that the reader named, if any, for the command that makes what is missing.
    """
    figures = dict.fromkeys(need.figure for claim in CLAIMS for need in claim.needs)
    studies = {figure: analysis.study(store, figure, profile, data, seeds) for figure in figures} if data else {}
    tables = {figure: run_table(store, study) for figure, study in studies.items()}
    return {claim.id: judge(claim, profile, studies, tables, store, asked or data) for claim in CLAIMS}


def judge(claim: Claim, profile: str, studies: dict, tables: dict, store: Store | None,
          data: str | None = None) -> dict:
    """A claim's estimate, interval, number of runs and verdict at one profile, and what is missing.

    `store` and `data` are named in the command that makes it.
    """
    row = {"estimate": math.nan, "low": math.nan, "high": math.nan, "confidence": 0.95, "n": 0, "unit": "",
           "verdict": NOT_RUN, "why": "", "note": ""}
    given, few, missing, commands = [], [], 0, {}
    for need in claim.needs:
        runs = tables.get(need.figure, pd.DataFrame({"label": []}))
        runs = runs[runs["label"].isin(need.labels)].reindex(columns=dict.fromkeys([*runs, *need.columns]))
        runs = runs.dropna(subset=list(need.columns))
        stored = runs["label"].value_counts()
        short = [f"{label} has {stored.get(label, 0)}" for label in need.labels if stored.get(label, 0) < FEWEST]
        gone = sum(run.label in need.labels for run in studies[need.figure].missing) if need.figure in studies else 0
        if short or gone:
            seeds = FEWEST if experiments.profile(profile).seeds < FEWEST else None
            commands[analysis.command(need.figure, profile, data, store and store.path, seeds)] = None
        given, few, missing, row["n"] = [*given, runs], few + short, missing + gone, row["n"] + len(runs)
    if not claim.needs:
        given = [_costs(store) if profile in FULL_WIDTH else pd.Series(dtype=float)]
        row["n"] = len(given[0])
        if not row["n"]:
            few = ["no full-width network has been measured"]
            commands["python -m gstlib bench --output RESULTS/bench.json"] = None
    if few and claim.needs and not row["n"]:
        row["why"] = "none of its runs is stored"
    elif few:
        more = f" and {len(few) - 3} more are short" * (len(few) > 3)
        row["why"] = f"{FEWEST} runs are needed in each configuration: " * bool(claim.needs) + ", ".join(few[:3]) + more
    elif missing:
        row["why"] = f"{missing} of the {missing + row['n']} runs asked for are missing"
    if commands:
        row["why"] += f"; make them with: {' && '.join(commands)}"
    if few:
        return row
    verdict, part, note = claim.evaluate(*given)
    return row | {"estimate": part.found.value, "low": part.found.low, "high": part.found.high, "unit": part.unit,
                  "confidence": part.confidence, "verdict": verdict, "note": note}
