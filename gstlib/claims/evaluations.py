"""What each claim computes within each seed: one function a claim, complete seeds in, a `Finding` out.

A function gets a table for each figure that the claim needs: a row a seed, columns (measure, configuration).
Accuracies and gaps are in points, instabilities and magnitudes in log10.
"""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy import stats

from gstlib.claims.rules import MARGIN, Finding, Part, decide, differ, equivalent, every, no_help, part, some, within
from gstlib.experiments.final import CUMULATIVE
from gstlib.reading.interval import LEVEL, POWER, Estimate, correlation, slopes, t_interval
from gstlib.reading.measures import DECILES, FEW_EPOCHS
from gstlib.reading.text import RATIO, number, pooled

# thresholds that the rules need and the paper's words leave open, chosen before any result
MOST = 0.5  # C3: "recovers within a few epochs" is said of more than half of its events
EXPONENTIAL_FIT = 0.95  # C7: R²; normally distributed weights, whose magnitudes are half-normal, reach .926
NEAR_NORMAL = 0.1  # C18: a distance at which no tail's share is off by more than ten points
CHEAP = 100  # C19, per cent: events are epochs apart, so less than one training step an event is next to nothing

_WORSE = "the gap closes by worse training: test accuracy falls"
VGG11 = ("S r=4", "S r=40", "L r=40", "S r=4 l2")
RESNET18 = VGG11[:3]
PERIODS = (4, 20, 40, 60, 100)  # of Figure 4, the smallest rate first; 100 is the text's 30%
TENTHS = {kind: tuple(f"{target} {kind}" for target in DECILES) for kind in ("weight", "filter")}
FIGURE3 = {kind: tuple(f"L {rate} {kind}" for rate in ("r=4", "r=40", "one-shot")) for kind in ("filter", "weight")}
PRUNE_L = "L l2 weights"  # Figure 5's
# of the final version
IN_TRAINING = ("S r=4", "S r=40", "R r=40", "L r=40")  # its Figure 2, VGG11
BY_SGD = {name: (f"{name} S r=30", f"{name} S r=60") for name in ("ResNet18", "ResNet20", "ResNet56")}
RESTORED = f"cumulative {max(CUMULATIVE)}"


def curve(target: str, score: str = "") -> tuple[str, ...]:
    return tuple(f"{target} r={r}{score}" for r in PERIODS)


# the final version's Figure 3 by how far its rates go: the last two leave a layer one event or two
RISING = {target: curve(target) for target in "SRL"}
EXTREME = {target: tuple(f"{target} r={r}" for r in (200, 300)) for target in "SRL"}
# random pruning looks at no score: by either it is the same run, which must not count twice
CURVES = {"S by E[BN]": curve("S"), "L by E[BN]": curve("L"), "R": curve("R"),
          "S by l2": curve("S", " l2"), "L by l2": curve("L", " l2")}
FIGURE4 = tuple(label for labels in CURVES.values() for label in labels)


def mean(table: pd.DataFrame, labels) -> np.ndarray:
    """Each seed's mean over some configurations."""
    return table[list(labels)].mean(axis=1).to_numpy()


def mean_log_slope(t: pd.DataFrame) -> Finding:
    found = part("slope", slopes(t["log_instability"], t["accuracy"]), "points for a tenfold instability")
    r, p, n = pooled(pd.DataFrame({"mean_instability": t["mean_instability"].to_numpy().ravel(),
                                   "final_accuracy": t["accuracy"].to_numpy().ravel()}))
    return decide(found, note=f"described as in the paper: pooled Pearson's r = {r:.2f}, p = {p:.2g}, {n} runs")


def over_configurations(*figures: pd.DataFrame) -> Finding:
    x, y = (pd.concat([t[name].mean() for t in figures]) for name in ("log_instability", "accuracy"))
    found = correlation(x, y)
    z, reach = np.arctanh(found.value) * math.sqrt(found.n - 3), stats.norm.ppf([1 - LEVEL / 2, POWER]).sum()
    one = Part("over configurations", found, float(stats.norm.sf(z)), float(stats.norm.cdf(z)), "Pearson's r",
               smallest=math.tanh(reach / math.sqrt(found.n - 3)))
    return decide(one, note=f"{found.n} configurations, a point each", p=found.p)


def recovers(t: pd.DataFrame) -> Finding:
    large, others = VGG11[2], [label for label in VGG11 if label != VGG11[2]]
    logs, accuracy = t["log_instability"], t["accuracy"]
    return decide(
        *(part(f"instability of {large} over {other}", logs[large] - logs[other], RATIO) for other in others),
        part(f"share recovered within {FEW_EPOCHS} epochs less one half", t["recovered"][large] - MOST, ""),
        part("accuracy less no pruning", accuracy[large] - accuracy["none"]))


def same_number(vgg11: pd.DataFrame, resnet18: pd.DataFrame) -> Finding:
    return decide(*(differ(f"range of the configurations' means, {name}", t["accuracy"].to_numpy())
                    for name, t in (("VGG11", vgg11), ("ResNet18", resnet18))))


def _decile_slopes(t: pd.DataFrame, column: str, kind: str, number_of: int = 11) -> np.ndarray:
    return slopes(np.arange(number_of)[None], t[column][list(TENTHS[kind])].to_numpy()[:, :number_of])


def larger_is_better(t: pd.DataFrame) -> Finding:
    parts, notes, worse = [], [], []
    for kind, name in (("weight", "single weights"), ("filter", "whole neurons")):
        gap, accuracy = _decile_slopes(t, "gap", kind), t_interval(_decile_slopes(t, "accuracy", kind))
        rho = np.mean([stats.spearmanr(range(11), row).statistic for row in t["gap"][list(TENTHS[kind])].to_numpy()])
        parts.append(part(name, gap, "points a decile"))
        worse += [name] * bool(parts[-1].found.low > 0 and accuracy.high < 0)
        notes.append(f"{name}: rho {rho:.2f}, without D10 {t_interval(_decile_slopes(t, 'gap', kind, 10)):.2f}, "
                     f"test accuracy {accuracy:.2f}")
    return decide(*parts, note="; ".join(notes), but=_WORSE + f" ({' and '.join(worse)})" if worse else "")


def matters_more(t: pd.DataFrame) -> Finding:
    def more(column, number_of=11):
        return _decile_slopes(t, column, "weight", number_of) - _decile_slopes(t, column, "filter", number_of)

    gap = part("slope of single weights less slope of whole neurons", more("gap"), "points a decile")
    accuracy = t_interval(more("accuracy"))
    return decide(gap, note=f"without D10 {t_interval(more('gap', 10)):.2f}, test accuracy {accuracy:.2f}",
                  but=_WORSE if gap.found.low > 0 and accuracy.high < 0 else "")


def magnitudes(t: pd.DataFrame) -> Finding:
    weights, neurons = (mean(t["ninth_over_fifth"], TENTHS[kind]) for kind in TENTHS)
    shown = (f"{name} {number(*t_interval(each)[:3], RATIO)}"
             for name, each in (("weights", weights), ("neurons", neurons)))
    return decide(
        part("ninth tenth over the fifth, single weights over whole neurons", weights - neurons, RATIO),
        part(f"fit of an exponential to single weights less {EXPONENTIAL_FIT}",
             mean(t["exponential_fit"], TENTHS["weight"]) - EXPONENTIAL_FIT, "R²"), note=", ".join(shown))


def structured(t: pd.DataFrame) -> Finding:
    accuracy = t["accuracy"]
    each = [part(f.removesuffix(" filter"), accuracy[f] - accuracy[w]) for f, w in zip(*FIGURE3.values())]
    return decide(part("filters less weights, mean over the three rates",
                       mean(accuracy, FIGURE3["filter"]) - mean(accuracy, FIGURE3["weight"])),
                  note="; ".join(map(str, each)))


def larger_steps(t: pd.DataFrame) -> Finding:
    logs, each, notes = t["log_instability"], [], []
    for name, labels in CURVES.items():
        each.append(slopes(np.log2(t["rate"][list(labels)]), logs[list(labels)]))
        rho = logs[list(labels)].T.corrwith(pd.Series(range(5), labels), method="spearman").mean()
        notes.append(f"{name} {number(*t_interval(each[-1])[:3], RATIO)} (rho {rho:.2f})")
    return decide(part("instability at twice the rate, mean over the five targets", np.mean(each, axis=0), RATIO),
                  note=", ".join(notes))


def _leads(t: pd.DataFrame, name: str, last: int, sign: int) -> list[Part]:
    """The rate at place `last` less each smaller one (sign 1), or the other way round (-1)."""
    labels, accuracy = CURVES[name], t["accuracy"]
    return [part(f"{name}, r = {PERIODS[last]} {'less' if sign > 0 else 'behind'} r = {PERIODS[k]}",
                 sign * (accuracy[labels[last]] - accuracy[labels[k]])) for k in range(last)]


def _both_readings(judged: Callable[[int], list[Part]]) -> Finding:
    """By the text, whose 30% is r = 100, the largest rate; in the note by the appendix, which ends at r = 60."""
    return decide(*judged(4), note="with r = 60 as the largest rate: " + "; ".join(map(str, judged(3))))


def best_at_largest(t: pd.DataFrame) -> Finding:
    return _both_readings(lambda last: [every(*_leads(t, name, last, 1)) for name in ("S by E[BN]", "S by l2", "R")])


def not_best_at_largest(t: pd.DataFrame) -> Finding:
    return _both_readings(lambda last: [some(f"{name}, best other rate less r = {PERIODS[last]}",
                                             *_leads(t, name, last, -1)) for name in ("L by E[BN]", "L by l2")])


def _over(t: pd.DataFrame, more: str, less: str) -> np.ndarray:
    return mean(t["log_instability"], CURVES[more]) - mean(t["log_instability"], CURVES[less])


def ordered(t: pd.DataFrame) -> Finding:
    return decide(part("R over S", _over(t, "R", "S by E[BN]"), RATIO),
                  part("L over R", _over(t, "L by E[BN]", "R"), RATIO))


def l2_misleads(t: pd.DataFrame) -> Finding:
    s, r, large = (mean(t["log_instability"], CURVES[name]) for name in ("S by l2", "R", "L by l2"))
    return decide(part("S by l2 over R", s - r, RATIO), *equivalent("S over L by l2", s, large, large - r, RATIO))


def zeroing_is_pruning(t: pd.DataFrame) -> Finding:
    accuracy, logs = t["accuracy"], t["log_instability"]
    zeroed, pruned = accuracy["zeroing 50"], accuracy[PRUNE_L]
    # the instability of no pruning is 0, so the effect is prune L's own, and a quarter of it is a ratio of 3/4 or 5/4
    return decide(
        *equivalent("accuracy of zeroing 50 less prune L", zeroed, pruned, pruned - accuracy["none"]),
        *within("instability of zeroing 50 over prune L", logs["zeroing 50"] - logs[PRUNE_L],
                math.log10(1 - MARGIN), math.log10(1 + MARGIN), RATIO),
        part("pattern over the events", t["pattern"]["zeroing 50"], "Pearson's r"))


def zeroing_once(t: pd.DataFrame) -> Finding:
    accuracy = t["accuracy"]
    gain, effect = accuracy["zeroing 0"] - accuracy["none"], accuracy[PRUNE_L] - accuracy["none"]
    return decide(no_help("a quarter of prune L's gain less the gain of zeroing 0", gain, effect),
                  note=f"gain of zeroing 0 {t_interval(gain):.2f}, of prune L {t_interval(effect):.2f}")


def noise_helps_less(t: pd.DataFrame) -> Finding:
    accuracy = t["accuracy"]
    return decide(part("accuracy of Gaussian 1500 less no pruning", accuracy["gaussian 1500"] - accuracy["none"]),
                  part("accuracy of prune L less Gaussian 1500", accuracy[PRUNE_L] - accuracy["gaussian 1500"]))


def ebn_is_stabler(t: pd.DataFrame) -> Finding:
    logs = t["log_instability"]
    return decide(part("instability by l2 over by E[BN]", logs["S r=4 l2"] - logs["S r=4"], RATIO))


def normality(t: pd.DataFrame) -> Finding:
    before, after, rho = (t[name]["none"] for name in ("ks_before", "ks_after", "ks_rho"))
    return decide(part("distance after less before", after - before, "KS distance"),
                  part(f"{NEAR_NORMAL} less the distance before", NEAR_NORMAL - before, "KS distance"),
                  part("rise toward the output, after", rho, "Spearman's rho"))


def flatter(t: pd.DataFrame) -> Finding:
    logs = t["log_instability"]
    rises = (f"{name} {t_interval(slopes(logs, t[f'rise_{name}'])):.2f}" for name in ("mean", "worst"))
    takeuchi = number(*t_interval(slopes(logs, t["log_takeuchi"]))[:3], RATIO)
    return decide(*(part(f"{name} over that at a tenfold instability", -slopes(logs, t[column]), RATIO)
                    for name, column in (("curvature", "log_curvature"), ("trace of the gradient covariance", "log_trace"))),
                  note="at a tenfold instability the rise of the loss under moves relative to each filter's norm changes by, "
                       f"nats: {', '.join(rises)}; trace over curvature {takeuchi}")


def needs_no_removal(t: pd.DataFrame) -> Finding:
    accuracy = t["accuracy"]
    restored, pruned, none = accuracy[RESTORED], accuracy[PRUNE_L], accuracy["none"]
    return decide(*equivalent("accuracy of zeroed and restored less prune L", restored, pruned, pruned - none),
                  part("accuracy of zeroed and restored less no pruning", restored - none))


def rises_and_falls(t: pd.DataFrame) -> Finding:
    def slope(labels):
        return slopes(t["log_instability"][list(labels)], t["accuracy"][list(labels)])

    def fall(target):
        return mean(t["accuracy"], RISING[target][2:]) - mean(t["accuracy"], EXTREME[target])

    each = [f"{target}: slope {t_interval(slope(RISING[target])):.2f}, fall {t_interval(fall(target)):.2f}"
            for target in RISING]
    return decide(part("slope up to r = 100", slope(sum(RISING.values(), ())), "points for a tenfold instability"),
                  part("accuracy at r = 40 to 100 less at 200 and 300", np.mean([fall(target) for target in RISING], axis=0)),
                  note="; ".join(each))


def less_stable_by_sgd(t: pd.DataFrame) -> Finding:
    logs, accuracy, better, notes = t["log_instability"], t["accuracy"], [], []
    for name, (small, large) in BY_SGD.items():
        less_stable, gain = np.sign(logs[large] - logs[small]), accuracy[large] - accuracy[small]
        better.append(less_stable * gain)
        notes.append(f"{name}: {t_interval(better[-1]):.2f}, instability at r = 60 over r = 30 "
                     f"{number(*t_interval(logs[large] - logs[small])[:3], RATIO)}")
    return decide(part("accuracy of the less stable rate less the other, mean over the networks", np.mean(better, axis=0)),
                  note="; ".join(notes))


def not_before_training(t: pd.DataFrame) -> Finding:
    accuracy = t["accuracy"]
    gain, effect = accuracy["scratch"] - accuracy["none"], accuracy["S r=40"] - accuracy["none"]
    # where pruning in training gives no benefit there is none to be missed, which leaves the claim open
    return decide(no_help("a quarter of the gain in training less the gain before it", gain, effect),
                  part("gain in training", effect)._replace(wrong=1.0),
                  note=f"gain before training {t_interval(gain):.2f}, in training {t_interval(effect):.2f}")


def cheap(costs: pd.Series) -> Finding:
    # one measurement a network and no seeds: there is no p, and the range over networks has no confidence
    found = Estimate(float(costs.median()), float(costs.min()), float(costs.max()), len(costs), math.nan)
    one = Part("one scoring pass, median", found, float(found.high >= CHEAP), float(found.low <= CHEAP),
               "% of a training step", math.nan)
    return decide(one, p=math.nan, note="; ".join(f"{name}: {value:.3g}%" for name, value in costs.items()))
