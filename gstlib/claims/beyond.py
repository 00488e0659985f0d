"""Predictions beyond the paper as data, in the form of claims: each was written down, with its rule, before its runs.

`published` holds the day.  They are no claims of the paper and are kept apart from these.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from gstlib.claims.rules import NOT_RUN, Finding, adjusted, decide, part
from gstlib.claims.statements import Claim
from gstlib.claims.verdicts import judge
from gstlib.reading.interval import slopes
from gstlib.reading.study import Study
from gstlib.store import Store

L, NONE = "L r=40", "none"
ENDS = ("", ", steps/8", ", width/8", ", width/8, steps/8")  # of the map: wide, patient first
IMAGES = tuple(f", {word} images{steps}" for word in ("fewer", "more") for steps in ("", ", steps/8"))


def gain(t: pd.DataFrame, where: str, method: str = L, none: str = NONE) -> pd.Series:
    """Points of final accuracy that pruning gains over no pruning in the same circumstances."""
    return t["accuracy"][method + where] - t["accuracy"][none + where]


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


_BOTH = "each part's 95% interval above zero"
_ABOVE = "the 95% interval above zero"
_GAIN = "gain: final accuracy of prune L at 13% less that of no pruning at the same place; "


def _each(*places: str) -> tuple[str, ...]:
    return tuple(method + place for place in places for method in (NONE, L))


PREDICTIONS = (
    Claim("W1", "The benefit needs an over-parameterised network: pruning helps the widest network, given time, and helps "
          "it more than one an eighth as wide.", "2026-11-25", "beyond-when",
          _GAIN + "at full width, and that less the gain at an eighth of the width, both with all steps", _BOTH, needs_room,
          {"beyond-when": {"accuracy": _each(ENDS[0], ENDS[2])}}),
    Claim("W2", "The benefit needs time to recover: with an eighth of the steps between events, pruning hurts even the "
          "widest network.", "2026-11-25", "beyond-when",
          _GAIN + "with an eighth of the steps, its sign turned, and the gain with all steps less it, both at full width",
          _BOTH, needs_time, {"beyond-when": {"accuracy": _each(*ENDS[:2])}}),
    Claim("W3", "The benefit appears where the network is back at full training accuracy when the next event comes.",
          "2026-11-25", "beyond-when",
          _GAIN + "its least-squares slope on the share of clusters of events after which training accuracy was back, over "
          "the ends of the maps (full and an eighth of the width, fewer and more images; all steps and an eighth)", _ABOVE,
          goes_with_recovery, {"beyond-when": dict.fromkeys(("accuracy", "back"), _each(*ENDS, *IMAGES))}),
    Claim("W4", "The benefit is the larger, the fewer the training images are for the same network and the same steps.",
          "2026-11-25", "beyond-when", _GAIN + "with half of the images less that with twice as many (at full width: a "
          "quarter and a half of the set)", _ABOVE, fewer_images,
          {"beyond-when": {"accuracy": _each(IMAGES[0], IMAGES[2])}}),
)


def answers(studies: Sequence[Study], store: Store, data: str | None = None) -> pd.DataFrame:
    """A row a prediction about `studies`, as `judge` gives it, with id, statement, day, statistic, test and Holm's p."""
    by_name = {study.experiment.name: study for study in studies}
    rows = [{"id": claim.id, "statement": claim.statement, "day": claim.published, "statistic": claim.statistic,
             "test": claim.test, **judge(claim, studies[0].profile.name, by_name, store, data)}
            for claim in PREDICTIONS if claim.figure in by_name]
    table = pd.DataFrame(rows)
    return table.assign(p_holm=adjusted(table["p"].where(table["verdict"] != NOT_RUN)))
