"""Would the verdicts be others, had something else been measured, or one seed been lost?"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd

from gstlib.claims.rules import NOT_RUN
from gstlib.claims.statements import CLAIMS
from gstlib.claims.verdicts import ReadOnce, judge, studies_at
from gstlib.reading import measures
from gstlib.reading.interval import FEWEST
from gstlib.reading.study import Study
from gstlib.store import Store

DECIDED, ONE_LESS = "as decided", "without seed"


def best_accuracy(study: Study) -> Study:
    """The same with each run's best accuracy at or after its last event in the final one's place."""
    return replace(study, runs=study.runs.assign(final_accuracy=study.runs["best_accuracy"]))


def relative_instability(study: Study) -> Study:
    """The same with falls as shares of t_pre, the final version's form, in the place of points."""
    if study.events.empty:
        return study
    relative = measures.instability(study.events).groupby("run")["relative_instability"].agg(lambda falls: falls.abs().mean())
    mean = study.runs["run"].map(relative)
    # of falls that were all 0 the logarithm stays what it was: that of less than can be seen
    log = np.log10(mean.where(mean > 0)).fillna(study.runs["log_instability"])
    return replace(study, runs=study.runs.assign(mean_instability=mean, log_instability=log))


def robustness(store: Store, profile: str, data: str | None = None, seeds=None) -> pd.DataFrame:
    """Each verdict at `profile` again, by other measures and without each seed in turn.

    A row a claim that was run and a way to judge it: id, way ("as decided", "best accuracy", "relative instability",
    "without seed 3"), verdict, estimate, low, high, unit, n.  A seed is left out where the claim has it and enough stay.
    `data` and `seeds` as in `claims.evaluate`.
    """
    store = ReadOnce(store.path)
    studies, data = studies_at(store, profile, seeds, data)
    ways: dict[str, Callable[[Study], Study]] = {
        DECIDED: lambda study: study, "best accuracy": best_accuracy, "relative instability": relative_instability}
    asked = sorted({run.spec.seed for study in studies.values() for run in study.wanted})
    ways |= {f"{ONE_LESS} {seed}": lambda study, left=[*{*asked} - {seed}]: study.restrict(study.labels, left) for seed in asked}
    rows, whole = [], {}
    for way, change in ways.items():
        changed = {figure: change(study) if len(study.runs) else study for figure, study in studies.items()}
        for claim in (claim for claim in CLAIMS if claim.needs):  # the others rest on no seed
            row = judge(claim, profile, changed, store, data)
            runs_of_all = whole.setdefault(claim.id, row["runs"])  # the first way leaves out none; n may count configurations
            if row["verdict"] != NOT_RUN and (not way.startswith(ONE_LESS) or row["runs"] < runs_of_all):
                rows.append({"id": claim.id, "way": way} | {
                    name: row[name] for name in ("verdict", "estimate", "low", "high", "unit", "n")})
    return pd.DataFrame(rows, columns=["id", "way", "verdict", "estimate", "low", "high", "unit", "n"])


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """`robustness` as a row a claim: a verdict by each measure, and how many times it was what without a seed."""
    less = rows["way"].str.startswith(ONE_LESS)
    wide = rows[~less].pivot(index="id", columns="way", values="verdict")
    wide = wide.reindex(index=rows["id"].unique(), columns=[way for way in rows["way"].unique() if way in wide])
    counted = rows[less].groupby("id")["verdict"].agg(
        lambda verdicts: ", ".join(f"{verdict} {n} of {len(verdicts)}" for verdict, n in verdicts.value_counts().items()))
    return wide.assign(**{"without one seed": counted.reindex(wide.index).fillna(f"needs {FEWEST + 1} seeds")}).reset_index()
