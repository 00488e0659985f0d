"""Measures beyond the paper against counts by hand, and the regression against one written out."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

from gstlib import experiments
from gstlib.reading import beyond, measures

AT = {"circumstances": "these"}


def epochs(label, target, accuracy, **more):
    return pd.DataFrame(AT | {"label": label, "seed": 0, "run": label, "target": target, "epoch": range(len(accuracy)),
                              "train_accuracy": accuracy} | more)


def test_back_is_the_share_of_clusters_made_good_when_the_next_comes():
    whole = epochs("none", "none", [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
    #                                  struck at 1, 2 (one cluster), at 4 and at 6 or never
    pruned = epochs("L", "L", [0.5, 0.6, 0.7, 0.7, 0.895, 0.9, 0.98])
    struck = pd.DataFrame({"label": "L", "seed": 0, "run": "L", "epoch": [1, 2, 4]})
    found = measures.back(pd.concat([whole, pruned]), struck).set_index("label")["back"]
    assert found["none"] == 1 and found["L"] == 0.5  # .895 is within a point of .9, .98 is not of 1
    found = measures.back(pd.concat([whole.assign(circumstances="others"), pruned]), struck).set_index("label")["back"]
    assert np.isnan(found["L"]), "other circumstances are no comparison"


def test_forgotten_is_a_share_of_what_was_fitted():
    key = {"label": "L", "seed": 0, "run": "a"}
    names = ("train_true_pre", "train_true_post", "train_wrong_pre", "train_wrong_post")
    events = pd.DataFrame([key | dict(zip(names, values)) for values in ((1.0, 0.9, 0.5, 0.4), (1.0, 0.7, 0.3, 0.0))])
    (row,) = measures.forgotten(events).to_dict("records")
    assert (row["forgotten_true"], row["forgotten_wrong"], row["forgotten"]) == pytest.approx((0.2, 0.5, 0.3))
    assert measures.forgotten(events[["label"]]).empty


def made(within, between, sizes=(4, 5, 5), seeds=4):
    rng, rows = np.random.default_rng(1), []
    at_seed = rng.normal(0, 0.6, seeds)
    for way, doses in enumerate(sizes):
        for dose in range(doses):
            own, extra = rng.normal(0, 0.3), rng.normal(0, 0.05, seeds)
            for seed in range(seeds):
                x = way + 0.3 * (dose - (doses - 1) / 2)
                rows.append((seed, f"way {way}", f"{way}-{dose}", x + extra[seed],
                             within * (x - way) + between * way + own + at_seed[seed] + rng.normal(0, 0.2)))
    return pd.DataFrame(rows, columns=["seed", "way", "label", "x", "y"])


def by_reml(rows):
    """Both slopes and their standard errors by restricted likelihood, written out with matrices."""
    between = rows.groupby("way")["x"].transform("mean")
    x = np.column_stack([np.ones(len(rows)), rows["x"] - between, between])
    y = rows["y"].to_numpy()
    parts = [np.equal.outer(rows[name].to_numpy(), rows[name].to_numpy()).astype(float) for name in ("seed", "way", "label")]

    def fit(logs):
        v = np.exp(logs[0]) * np.eye(len(y)) + sum(np.exp(log) * part for log, part in zip(logs[1:], parts))
        w = np.linalg.inv(v)
        information = x.T @ w @ x
        beta = np.linalg.solve(information, x.T @ w @ y)
        rest = y - x @ beta
        return np.linalg.slogdet(v)[1] + np.linalg.slogdet(information)[1] + rest @ w @ rest, beta, information

    best = minimize(lambda logs: fit(logs)[0], [-3, -1, -3, -2], method="Nelder-Mead",
                    options={"maxiter": 2000, "xatol": 1e-5, "fatol": 1e-8})
    _, beta, information = fit(best.x)
    return beta[1:], np.sqrt(np.diag(np.linalg.inv(information)))[1:]


def test_the_regression_is_that_of_restricted_likelihood():
    rows = made(within=1.0, between=-2.0)
    found = beyond.mixed(rows)
    slopes, errors = by_reml(rows)
    for each, slope, error, free in zip((found["within"], found["between"]), slopes, errors, (14 - 3 - 1, 3 - 2)):
        assert each.value == pytest.approx(slope, rel=2e-2)
        assert each.high - each.value == pytest.approx(error * {10: 2.2281, 1: 12.706}[free], rel=5e-2)
    assert found["within"].low > 0 > found["between"].value
    assert (found["within"].n, found["between"].n) == (14, 3)


def test_a_relation_between_ways_alone_is_none_within_them():
    found = beyond.mixed(made(within=0.0, between=3.0, sizes=(5,) * 6))
    assert found["between"].low > 0 and found["within"].low < 0 < found["within"].high


def test_too_few_runs_for_a_regression_are_one_sentence():
    assert beyond.dose_table(made(1, 1)[:1]).startswith("*Too few runs")
    # four configurations of three ways leave no freedom within
    rows = made(1.0, 1.0, sizes=(2, 1, 1))
    within, between = beyond.dose_table(rows).splitlines()[-2:]
    assert "too few to tell" in within and "] points" in between and "nan" not in within + between


@pytest.mark.parametrize("profile", experiments.PROFILES)
def test_a_place_s_steps_are_those_between_two_events(profile):
    size = experiments.profile(profile)
    data = experiments.data_spec(size, size.data, "f" * 64)
    runs = {run.label: run.spec for run in experiments.experiment("beyond-when").runs(size, data, [0])}

    def steps(label):
        spec = runs[label]
        return spec.pruning.retrain * (spec.data.train_size or 50_000) / spec.optimiser.batch_size

    assert steps("L r=40") == pytest.approx(8 * steps("L r=40, steps/8"), rel=0.07)
    for place in (", width/8", ", fewer images", ", more images"):
        assert steps("L r=40" + place) == pytest.approx(steps("L r=40"), rel=1e-9)
        assert steps(f"L r=40{place}, steps/8") == pytest.approx(steps("L r=40, steps/8"), rel=1e-9)
