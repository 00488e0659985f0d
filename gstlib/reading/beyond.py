"""What the chapters beyond the paper draw and compute: maps of gains, memory of labels, dose and response."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
from scipy import stats

from gstlib.reading.interval import LEVEL, Estimate


def mixed(rows: pd.DataFrame) -> dict[str, Estimate]:
    """Slopes of y on x "within" and "between" ways of pruning, from one linear mixed-effects regression (REML).

    `rows`: a run each, with seed, way, label (the configuration), x and y.  Fixed effects: x less its way's mean, and that
    mean; random effects: seed, way, configuration, which keep runs of one configuration from counting as several.
    Intervals are Student's t with the configurations less ways and one, or the ways less two, as degrees of freedom.
    """
    import statsmodels.formula.api as formulas  # a second to import, which no other page needs

    rows = rows.assign(between=rows.groupby("way")["x"].transform("mean"), everyone=1)
    rows["within"] = rows["x"] - rows["between"]
    model = formulas.mixedlm("y ~ within + between", rows, groups="everyone", re_formula="0",
                             vc_formula={name: f"0 + C({name})" for name in ("seed", "way", "label")})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a variance that is estimated as 0 lies on its bound
        fitted = model.fit(reml=True)
    n, ways = rows["label"].nunique(), rows["way"].nunique()
    found = {}
    for name, free in (("within", n - ways - 1), ("between", ways - 2)):
        value, error = float(fitted.params[name]), float(fitted.bse[name])
        half = error * stats.t.ppf(1 - LEVEL / 2, free)
        found[name] = Estimate(value, value - half, value + half, n if name == "within" else ways,
                               float(2 * stats.t.sf(abs(value / error), free)))
    return found
