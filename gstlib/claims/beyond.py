"""Predictions beyond the paper as data, in the form of claims: each was written down, with its rule, before its runs
but those that Figure 1 had at `mini`.

`published` holds the day.  They are no claims of the paper and are kept apart from these.
"""

from collections.abc import Sequence
from functools import partial

import pandas as pd

from gstlib.claims import evaluations as e
from gstlib.claims.rules import NOT_RUN, Finding, Part, adjusted, decide, part
from gstlib.claims.statements import _ABOVE, _BOTH, Claim
from gstlib.claims.verdicts import judge
from gstlib.reading.beyond import mixed
from gstlib.reading.interval import slopes
from gstlib.reading.study import Study
from gstlib.reading.text import RATIO
from gstlib.store import Store

DAY = "2026-11-25"
L, NONE = "L r=40", "none"
ENDS = ("", ", steps/8", ", width/8", ", width/8, steps/8")  # of the map: wide, patient first
WRONG = ("", ", 20% wrong", ", 40% wrong")
STRUCK = tuple(method + WRONG[1] for method in (L, "S r=40", "zeroing 50", "gaussian 1500"))
WAYS = e.CURVES | {"zeroing": ("zeroing 0", "zeroing 5", "zeroing 15", "zeroing 50", "zeroing 1500", "zeroing 50 r=20",
                               "zeroing 50 r=60", "zeroing 50 r=100")}
OTHERS, TOGETHER, BY_L2 = (", decay", ", augmented", ", smoothed", ", SGD"), ", all", "L r=40 l2"
ELSEWHERE = "elsewhere"  # of predictions about another data set than the profile's
IMAGES = tuple(f", {word} images{steps}" for word in ("fewer", "more") for steps in ("", ", steps/8"))


def gain(t: pd.DataFrame, where: str, method: str = L) -> pd.Series:
    """Points of final accuracy that pruning gains over no pruning in the same circumstances."""
    return t["accuracy"][method + where] - t["accuracy"][NONE + where]


def needs_room(t: pd.DataFrame) -> Finding:
    return decide(part("gain at full width with all steps", gain(t, ENDS[0])),
                  part("this gain less that at an eighth of the width", gain(t, ENDS[0]) - gain(t, ENDS[2])))


def needs_time(t: pd.DataFrame) -> Finding:
    return decide(part("loss at full width with an eighth of the steps", -gain(t, ENDS[1])),
                  part("gain with all steps less that with an eighth", gain(t, ENDS[0]) - gain(t, ENDS[1])))


def goes_with_recovery(t: pd.DataFrame) -> Finding:
    cells = (*ENDS, *IMAGES)
    back = pd.concat([t["back"][L + cell] for cell in cells], axis=1)
    gains = pd.concat([gain(t, cell) for cell in cells], axis=1)
    return decide(part("slope of the gain on the share of clusters of events", slopes(back, gains), "points from 0 to 1"))


def fewer_images(t: pd.DataFrame) -> Finding:
    return decide(part("gain with fewer images less gain with more", gain(t, IMAGES[0]) - gain(t, IMAGES[2])))


def unstable_forgets_wrong(t: pd.DataFrame) -> Finding:
    each = t["forgotten"]
    others = (part(label.partition(",")[0], each[label]) for label in STRUCK[1:])
    return decide(part("share of wrong labels forgotten less share of true ones, prune L", each[L + WRONG[1]]),
                  note="the others: " + "; ".join(map(str, others)))


def grows_with_wrong(t: pd.DataFrame) -> Finding:
    gains = pd.concat([gain(t, share) for share in WRONG], axis=1)
    return decide(part("slope of the gain on the share of wrong labels", slopes([[0, 2, 4]], gains), "points for 10% more"),
                  note="; ".join(str(part(name, gains.iloc[:, k])) for k, name in enumerate(("none wrong", "20%", "40%"))))


def fits_fewer_wrong(t: pd.DataFrame) -> Finding:
    fitted = t["wrong_fitted"]
    return decide(part("wrong labels fitted at the end, no pruning less prune L",
                       fitted[NONE + WRONG[1]] - fitted[L + WRONG[1]]))


def trains_better(t: pd.DataFrame) -> Finding:
    logs = t["log_train_loss"]
    true, wrong = (part(f"training loss at the end, no pruning over prune L{name}",
                        logs[NONE + where] - logs[L + where], RATIO)
                   for name, where in ((", true labels", WRONG[0]), ("", WRONG[1])))
    return decide(wrong, note=str(true))


def _by_way(t: pd.DataFrame) -> pd.DataFrame:
    """A row a run of the dose experiment: seed, way, label, x (log10 of mean instability), y (points)."""
    return pd.DataFrame([(seed, way, label, t["log_instability", label][seed], t["accuracy", label][seed])
                         for seed in t.index for way, labels in WAYS.items() for label in labels],
                        columns=["seed", "way", "label", "x", "y"])


def _dose(t: pd.DataFrame, term: str) -> Finding:
    rows, unit = _by_way(t), "points for a tenfold instability"
    means = rows.groupby(["seed", "way"])[["x", "y"]].transform("mean")
    moved = rows[["x", "y"]] - means if term == "within" else means
    wide = [moved[name].to_numpy().reshape(len(t), -1) for name in "xy"]
    found = mixed(rows)[term]
    p = found.p / 2 if found.value > 0 else 1 - found.p / 2
    return decide(part(f"slope {term} ways of pruning, seed by seed", slopes(*wide), unit),
                  Part("the same in the mixed-effects regression", found, p, 1 - p, unit))


def benefit_remains(t: pd.DataFrame) -> Finding:
    gains = [gain(t, other) for other in OTHERS]
    together = part("with all of them together", gain(t, TOGETHER))
    return decide(part("gain beside another regulariser, mean over the four", sum(gains) / len(gains)),
                  note="; ".join(str(part(name[2:], each)) for name, each in zip(OTHERS, gains)) + f"; {together}")


def benefit_shrinks(t: pd.DataFrame) -> Finding:
    beside = sum(gain(t, other) for other in OTHERS) / len(OTHERS)
    return decide(part("gain alone less the mean gain beside another", gain(t, "") - beside),
                  note=str(part("gain alone less that beside all together", gain(t, "") - gain(t, TOGETHER))))


def helps_group_norm(t: pd.DataFrame) -> Finding:
    return decide(part("gain of prune L by l2 in the network with GroupNorm", gain(t, ", GroupNorm", BY_L2)),
                  note=str(part("the same in VGG11", gain(t, "", BY_L2))))


def helps_elsewhere(t: pd.DataFrame) -> Finding:
    return decide(part("gain of prune L", gain(t, "")))


_SLOPED = ("the 95% interval above zero, both over seeds and in a mixed-effects regression with random effects of seed, way "
           "and configuration")
_SLOPES = ("slope of final accuracy on log10 of mean instability over five targets and scores at five rates and zeroing at "
           "four rates and five durations, in points for a tenfold instability: ")
_AT = "gain: final accuracy of prune L at 13% less that of no pruning in the same circumstances; "
_GAIN = "gain: final accuracy of prune L at 13% less that of no pruning at the same place; "


def _each(*places: str) -> tuple[str, ...]:
    return tuple(method + place for place in places for method in (NONE, L))


PREDICTIONS = (
    Claim("W1", "The benefit needs an over-parameterised network: pruning helps the widest network, given time, and helps "
          "it more than one an eighth as wide.", DAY, "beyond-when",
          _GAIN + "at full width, and that less the gain at an eighth of the width, both with all steps", _BOTH, needs_room,
          {"beyond-when": {"accuracy": _each(ENDS[0], ENDS[2])}}),
    Claim("W2", "The benefit needs time to recover: with an eighth of the steps between events, pruning hurts even the "
          "widest network.", DAY, "beyond-when",
          _GAIN + "with an eighth of the steps, its sign turned, and the gain with all steps less it, both at full width",
          _BOTH, needs_time, {"beyond-when": {"accuracy": _each(*ENDS[:2])}}),
    Claim("W3", "The benefit appears where the network is back at full training accuracy when the next event comes.",
          DAY, "beyond-when",
          _GAIN + "its least-squares slope on the share of clusters of events after which training accuracy was back, over "
          "the ends of the maps (full and an eighth of the width, fewer and more images; all steps and an eighth)", _ABOVE,
          goes_with_recovery, {"beyond-when": dict.fromkeys(("accuracy", "back"), _each(*ENDS, *IMAGES))}),
    Claim("W4", "The benefit is the larger, the fewer the training images are for the same network and the same steps.",
          DAY, "beyond-when", _GAIN + "with half of the images less that with twice as many (at full width: a "
          "quarter and a half of the set)", _ABOVE, fewer_images,
          {"beyond-when": {"accuracy": _each(IMAGES[0], IMAGES[2])}}),
    Claim("N1", "Unstable events shake out wrong labels first.", DAY, "beyond-labels",
          "20% of the training labels wrong: falls of training accuracy over all events of prune L at 13%, as a share of "
          "what was fitted before them; wrong labels less true ones", _ABOVE, unstable_forgets_wrong,
          {"beyond-labels": {"forgotten": STRUCK}}),
    Claim("N2", "The more labels are wrong, the larger the benefit of pruning.", DAY, "beyond-labels",
          _AT + "its least-squares slope over 0, 20 and 40% of wrong labels", _ABOVE, grows_with_wrong,
          {"beyond-labels": {"accuracy": _each(*WRONG)}}),
    Claim("N3", "At the end the pruned network still fits fewer wrong labels.", DAY, "beyond-labels",
          "20% wrong: training accuracy on the wrong labels after the last epoch, no pruning less prune L at 13%", _ABOVE,
          fits_fewer_wrong, {"beyond-labels": {"wrong_fitted": _each(WRONG[1])}}),
    Claim("N4", "The rival account (Jin et al. 2022): pruning leads to better training, to a lower loss on the training "
          "images than without it.", DAY, "beyond-labels",
          "20% wrong: log ratio of the training loss at the end, no pruning over prune L at 13%; true labels in the note",
          _ABOVE, trains_better, {"beyond-labels": {"log_train_loss": _each(*WRONG[:2])}}),
    Claim("D1", "Within a way of pruning, at the same total, the dose that is less stable leaves the more accurate network.",
          DAY, "beyond-dose", _SLOPES + "doses less their way's mean", _SLOPED, partial(_dose, term="within"),
          {"beyond-dose": dict.fromkeys(("log_instability", "accuracy"), sum(WAYS.values(), ()))}),
    Claim("D2", "Between ways of pruning, the less stable way leaves the more accurate network.", DAY, "beyond-dose",
          _SLOPES + "the six ways' means", _SLOPED, partial(_dose, term="between"),
          {"beyond-dose": dict.fromkeys(("log_instability", "accuracy"), sum(WAYS.values(), ()))}),
    Claim("R1", "The benefit remains beside other regularisers: weight decay, augmentation, label smoothing, SGD with "
          "momentum.", DAY, "beyond-regularisers", _AT + "mean over the four, each with the one regulariser; each and all "
          "together in the note", _ABOVE, benefit_remains,
          {"beyond-regularisers": {"accuracy": _each(*OTHERS, TOGETHER)}}),
    Claim("R2", "It shrinks beside them, for part of what they do is the same.", DAY, "beyond-regularisers",
          _AT + "alone less the mean over the four", _ABOVE, benefit_shrinks,
          {"beyond-regularisers": {"accuracy": _each("", *OTHERS, TOGETHER)}}),
    Claim("R3", "The benefit is not batch normalisation's: it is there in a network with group normalisation.", DAY,
          "beyond-regularisers", "final accuracy of prune L by l2 at 13% less that of no pruning", _ABOVE, helps_group_norm,
          {"beyond-regularisers": {"accuracy": (NONE, BY_L2, f"{NONE}, GroupNorm", f"{BY_L2}, GroupNorm")}}),
    Claim("R4", "The benefit is there on a data set that the paper did not use.", DAY, ELSEWHERE, _AT[:-2], _ABOVE,
          helps_elsewhere, {"beyond-regularisers": {"accuracy": _each("")}}),
)


def answers(studies: Sequence[Study], store: Store, data: str | None = None, about: str = "") -> pd.DataFrame:
    """A row a prediction, as `judge` gives it, with id, statement, day, statistic, test and Holm's p over these rows.

    `about`: the figure of the predictions; empty: those of `studies`.
    """
    by_name = {study.experiment.name: study for study in studies}
    data = data or studies[0].wanted[0].spec.data.name
    rows = [{"id": claim.id, "statement": claim.statement, "day": claim.published, "statistic": claim.statistic,
             "test": claim.test, **judge(claim, studies[0].profile.name, by_name, store, data)}
            for claim in PREDICTIONS if claim.figure in ([about] if about else by_name)]
    table = pd.DataFrame(rows)
    return table.assign(p_holm=adjusted(table["p"].where(table["verdict"] != NOT_RUN)))
