import json
import re
import shutil
import subprocess
import sys
from unittest import mock

import made_up
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from gstlib import claims, experiments
from gstlib.claims import CLAIMS, CONTRADICTED, INCONCLUSIVE, NOT_RUN, SUPPORTED, Part
from gstlib.errors import InputError
from gstlib.reading import analysis, intervals
from gstlib.reading.intervals import Interval, interval, pooled_pearson
from gstlib.store import Store

BY_ID = {claim.id: claim for claim in CLAIMS}
FALLS = [f"fall_{k}" for k in range(6)]
EXPONENTIAL = 10 * np.diff([1 - (1 - q) * (1 - np.log(max(1 - q, 1e-300))) for q in np.arange(11) / 10])


def difference(a, b):
    return a.mean(1) - b.mean(1)


# --- intervals


@pytest.mark.parametrize(("sizes", "method"), [
    ((12,), "BCa"), ((9, 14), "BCa"), ((4,), "percentile"), ((4, 3), "percentile")])
def test_intervals_are_scipys(sizes, method):
    rng = np.random.default_rng(5)
    groups = [rng.gamma(1.5, size=n) for n in sizes]  # skewed, so that BCa differs from percentiles
    statistic = claims.contrast(*[1, -1][:len(sizes)])
    found = interval(groups, statistic, 0.9)
    theirs = stats.bootstrap(groups, lambda *g, axis: sum(w * x.mean(axis) for w, x in zip((1, -1), g)),
                             n_resamples=20_000, confidence_level=0.9, method=method, vectorized=True, rng=rng)
    low, high = theirs.confidence_interval
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03 * (high - low))
    assert found.value == pytest.approx(groups[0].mean() - (groups[1].mean() if len(groups) > 1 else 0))
    assert found.n == sum(sizes)


def test_bca_is_not_the_percentile_interval_here():
    group = np.random.default_rng(5).gamma(0.7, size=12)
    found = interval([group], claims.contrast(1))
    assert found.high - found.value > 1.2 * (found.value - found.low)


def test_p_value_inverts_the_interval():
    rng = np.random.default_rng(1)
    groups = [rng.normal(0.5, 1, 10), rng.normal(0, 1, 8)]
    p = interval(groups, difference).p
    assert 0.001 < p < 0.5
    edge = interval(groups, difference, 1 - p)
    assert min(abs(edge.low), abs(edge.high)) < 0.01
    # skewed and far from zero: the acceleration must not pull p up to what ten thousand draws cannot show
    assert interval([100 - np.arange(10.0) ** 2], claims.contrast(1)).p == pytest.approx(2 / 10_001)


def test_equal_runs_give_a_point_and_no_verdict():
    found = interval([np.full(5, 0.1), np.full(3, 0.1)], difference)
    assert found[:3] == (0, 0, 0) and claims.side(found) == INCONCLUSIVE
    constant = interval([np.full((4, 2), 0.1)] * 2, pooled_pearson)
    assert np.isnan(constant.low) and claims.side(constant) == INCONCLUSIVE


def test_intervals_are_seeded():
    groups = [np.arange(6.0), np.arange(5.0) ** 2]
    assert interval(groups, difference) == interval(groups, difference)
    assert interval(groups, difference) != interval(groups, difference, seed=1)


def test_runs_are_resampled_within_their_configuration_only():
    found = interval([np.full(6, 3.0), np.arange(6.0), np.full(6, -1.0)], lambda a, b, c: a.mean(1) - c.mean(1))
    assert found[:3] == (4, 4, 4)


def test_holm():
    assert claims.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert claims.holm([0.6, 0.7]) == pytest.approx([1, 1])
    assert claims.holm([0.02]) == pytest.approx([0.02])


@pytest.mark.parametrize(("low", "high", "expected"), [
    (-0.5, 0.5, SUPPORTED), (-0.1, 0.4, SUPPORTED), (-0.51, 0.1, INCONCLUSIVE), (0.0, 0.6, INCONCLUSIVE),
    (0.51, 0.9, CONTRADICTED), (-0.9, -0.51, CONTRADICTED), (-2, 2, INCONCLUSIVE), (np.nan, np.nan, INCONCLUSIVE)])
def test_equivalence_within_a_quarter_of_the_effect(low, high, expected):
    found = Interval(0.0, low, high, 9, 0.5)
    assert claims.equivalence(found, Interval(2.0, 1.0, 3.0, 9, 0.01)) == expected
    assert claims.equivalence(found, Interval(2.0, 0.0, 4.0, 9, 0.06)) == INCONCLUSIVE, "no effect to be near to"


def test_side_of_a_threshold():
    found = Interval(2.0, 1.0, 3.0, 9, 0.01)
    assert claims.side(found) == claims.side(found, 4, above=False) == SUPPORTED
    assert claims.side(found, 4) == claims.side(found, above=False) == CONTRADICTED
    assert claims.side(found, 1.0) == claims.side(found, 3.0) == INCONCLUSIVE, "the edge is on neither side"


def test_an_order_pays_for_its_number_of_differences():
    def part(name, value, p):
        return Part(name, Interval(value, value - 1, value + 1, 6, p), SUPPORTED)

    assert claims.order(part("a", 2, 0.001), part("b", 2, 0.049)).verdict == SUPPORTED
    assert claims.order(part("a", 2, 0.04), part("b", 2, 0.04)).verdict == INCONCLUSIVE, "one of two needs p < .025"
    found = claims.order(part("a", 2, 0.001), part("b", -2, 0.01))
    assert found.verdict == CONTRADICTED and found.part.name == "b"


def test_lead_pays_for_picking_the_best_of_several():
    rng = np.random.default_rng(3)
    base = (rng.permutation(10) - 4.5) / 3
    labels = ["first", "a", "b", "c", "d"]
    runs = pd.concat([pd.DataFrame({"label": label, "accuracy": base + shift})
                      for label, shift in zip(labels, [0, 1.0, -0.1, 0, 0.1])])
    each = interval([base, base + 1.0], difference)
    assert 0.0125 < each.p < 0.05, "alone it would be significant"
    found = claims.lead("", runs, "first", labels[1:])
    assert found.found == each and found.verdict == INCONCLUSIVE
    assert claims.lead("", runs, "first", ["a"]).verdict == CONTRADICTED
    runs.loc[runs["label"] == "first", "accuracy"] += 5
    assert claims.lead("", runs, "first", labels[1:]).verdict == SUPPORTED


def test_rank_correlation_with_ties_is_scipys():
    groups = [np.array([[1.0, 2, 2]]), np.array([[2.0, 5, 4]]), np.array([[3.0, 3, 9]])]
    theirs = stats.spearmanr(np.repeat([0, 1, 2], 3), np.concatenate(groups, axis=1)[0]).statistic
    assert claims.spearman(*groups)[0] == pytest.approx(theirs)


def test_fit_of_an_exponential():
    def fit(quantile):
        means = quantile((np.arange(100_000) + 0.5) / 100_000).reshape(10, -1).mean(1)
        return claims.exponential_fit(*(np.full((1, 3), m) for m in means))[0]

    assert fit(stats.expon(scale=0.02).ppf) == pytest.approx(1, abs=1e-4)
    assert fit(stats.halfnorm.ppf) == pytest.approx(0.926, abs=1e-3)
    assert fit(stats.uniform.ppf) < 0.6


# --- each claim, on made-up runs whose verdict is known


def table(means: dict[str, dict[str, float]], n=5, spread=0.1) -> pd.DataFrame:
    """`n` runs a configuration about each column's mean; the deviations are every configuration's, so that equal means
    are equal exactly."""
    columns = sorted({column for of in means.values() for column in of})
    noise = pd.DataFrame(spread * np.random.default_rng(0).normal(size=(n, len(columns))), columns=columns)
    return pd.DataFrame([{"label": label, "seed": seed, **{c: m + noise.loc[seed, c] for c, m in of.items()}}
                         for seed in range(n) for label, of in means.items()])


def accuracy(n, **of) -> pd.DataFrame:
    return table({label.replace("_", " "): {"accuracy": mean} for label, mean in of.items()}, n)


def correlated(labels, sign, n):
    return table({label: {"instability": 5 * k, "accuracy": 90 + sign * k} for k, label in enumerate(labels)}, n)


def deciles(weights, neurons, n, column="gap", spread=0.1):
    return table({f"D{k} {kind}": {column: means[k]} for kind, means in (("weight", weights), ("filter", neurons))
                  for k in range(11)}, n, spread)


def rates(n, column, **heights):
    """Figure 4: a curve's value at each of the five rates."""
    return table({label: {column: height} for name, curve in claims._CURVES.items()
                  for label, height in zip(curve, heights[re.sub(r"\W+", "_", name).strip("_")])}, n)


def all_rates(n, column, heights):
    return rates(n, column, S_by_E_BN=heights, L_by_E_BN=heights, R=heights, S_by_l2=heights, L_by_l2=heights)


def tables(claim: str, sign: int, n: int = 5) -> list[pd.DataFrame]:
    """Runs that support a claim (sign 1), contradict it (-1), or say nothing (0)."""
    step = np.arange(11) * sign
    match claim:
        case "C1":
            return [correlated(claims._VGG11, sign, n)]
        case "C2":
            return [correlated(claims._RESNET18, sign, n)]
        case "C3":
            means = dict.fromkeys(("none", *claims._VGG11), {"instability": 5.0, "accuracy": 90.0, "recovery": 2.0})
            large = {"instability": 5 + 3 * sign, "accuracy": 90 + sign, "recovery": 5 - 2 * sign}
            return [table(means | {"L r=40": large}, n)]
        case "C4":
            return [correlated(labels, sign, n) for labels in (claims._VGG11, claims._RESNET18)]
        case "C5":
            return [deciles(step, step / 2, n)]
        case "C6":
            return [deciles(step, step * 0, n)]
        case "C7":
            exponential, flat = [*EXPONENTIAL, 3.3], 1 + 0.01 * np.arange(11)
            weights, neurons = {1: (exponential, flat), -1: (flat, exponential), 0: (exponential, exponential)}[sign]
            return [deciles(weights, neurons, n, "magnitude", 0.01)]
        case "C8":
            return [table({f"L {kind} {structure}": {"accuracy": 90 + sign * (structure == "filter")}
                           for kind in ("r=4", "r=40", "one-shot") for structure in ("filter", "weight")}, n)]
        case "C9":
            return [all_rates(n, "instability", 5 + sign * np.arange(5.0))]
        case "C10" | "C13":
            last = sign if claim == "C10" else -sign
            return [all_rates(n, "accuracy", [90, 90, 90, 90, 90 + last])]
        case "C11":
            return [rates(n, "instability", S_by_E_BN=[5 - sign] * 5, R=[5] * 5, L_by_E_BN=[5 + sign] * 5,
                          S_by_l2=[5] * 5, L_by_l2=[5] * 5)]
        case "C12":
            return [rates(n, "instability", S_by_E_BN=[2] * 5, R=[5] * 5, L_by_E_BN=[10] * 5,
                          S_by_l2=[5 + 4 * sign] * 5, L_by_l2=[9.5] * 5)]
        case "C14":
            fall = {1: [9, 1, 5, 2, 8, 3], -1: [1, 9, 5, 8, 2, 7], 0: [5] * 6}[sign]
            pruned = dict(zip(FALLS, [9, 1, 5, 2, 8, 3]))
            noised = {"accuracy": 91 + sign, "instability": 11 + 9 * sign, **dict(zip(FALLS, fall))}
            return [table({"none": {"accuracy": 90, "instability": 0}, "zeroing 50": noised,
                           "L l2 weights": {"accuracy": 92, "instability": 20, **pruned}}, n)]
        case "C15":
            return [accuracy(n, none=90, zeroing_0=90 - sign)]
        case "C16":
            return [accuracy(n, none=90, gaussian_1500=90 + sign, L_l2_weights=92)]
        case "C17":
            return [table({"S r=4": {"instability": 5}, "S r=4 l2": {"instability": 5 + sign}}, n)]
        case "C18":
            # small spread, for distances and correlations are small
            return [table({"none": {"ks_before": 0.06 - 0.02 * sign + 0.1 * (sign < 0), "ks_after": 0.06 + 0.02 * sign,
                                    "ks_rho": 0.5 * sign}}, n, 0.01)]
    raise KeyError(claim)


@pytest.fixture
def few_draws(monkeypatch):
    monkeypatch.setattr(intervals, "DRAWS", 2000)


STORED = [claim.id for claim in CLAIMS if claim.needs]


@pytest.mark.parametrize("sign", [1, -1, 0])
@pytest.mark.parametrize("claim", STORED)
def test_verdict_known_by_construction(claim, sign, few_draws):
    expected = {1: SUPPORTED, -1: CONTRADICTED, 0: INCONCLUSIVE}[sign]
    if claim == "C4" and sign:
        expected = SUPPORTED  # any difference supports it, none contradicts it
    if claim in ("C12", "C14") and sign == 0:
        expected = CONTRADICTED  # half-way between the two is outside a quarter of their distance
    found = BY_ID[claim].evaluate(*tables(claim, sign))
    assert found.verdict == expected, found.note
    assert found.part.verdict == expected and found.part.found.low <= found.part.found.high
    assert "nan" not in found.note


@pytest.mark.parametrize("claim", STORED)
def test_two_runs_are_never_enough(claim, few_draws):
    needs = BY_ID[claim].needs
    enough = {need.figure: made for need, made in zip(needs, tables(claim, 1, n=3))}
    row = claims.judge(BY_ID[claim], "quarter", {}, enough, None)
    assert row["verdict"] == SUPPORTED and row["n"] == 3 * sum(len(need.labels) for need in needs) and row["why"] == ""
    figure, label = needs[-1].figure, needs[-1].labels[-1]
    runs = enough[figure]
    short = runs.drop(index=runs.index[(runs["label"] == label) & (runs["seed"] == 1)])
    row = claims.judge(BY_ID[claim], "quarter", {}, enough | {figure: short}, None)
    assert row["verdict"] == NOT_RUN and np.isnan(row["estimate"])
    assert f"{label} has 2" in row["why"] and f"python -m gstlib run {figure} --profile quarter" in row["why"]


def test_a_column_without_values_counts_as_no_run(few_draws):
    made = tables("C3", 1)[0].assign(recovery=np.nan)
    assert claims.judge(BY_ID["C3"], "paper", {}, {"figure1-vgg11": made}, None)["verdict"] == NOT_RUN


def test_a_profile_of_two_seeds_is_told_to_run_three():
    assert "--seeds 3" in claims.judge(BY_ID["C1"], "smoke", {}, {}, None)["why"]


def test_the_claims_name_experiments_and_configurations_that_exist():
    assert [claim.id for claim in CLAIMS] == [f"C{k}" for k in range(1, 20)]
    profile = experiments.profile("quarter")
    data = experiments.data_spec(profile, "cifar10", "f" * 64)
    for claim in CLAIMS:
        assert all([claim.statement, claim.published, claim.statistic, claim.test])
        assert claim.figure in experiments.EXPERIMENTS or claim.id == "C19"
        for need in claim.needs:
            runs = experiments.experiment(need.figure).runs(profile, data, [0])
            assert set(need.labels) <= {run.label for run in runs}


# --- what is compared, from rows


def study(figure, labels, epochs=(), events=(), runs=()):
    rows = [{"label": label, "seed": 0, "run": label, "final_accuracy": 0.9, "final_train_accuracy": 0.95,
             "mean_instability": np.nan if label == "none" else 0.02, "events": int(label != "none")}
            for label in labels]
    return analysis.Study(experiments.experiment(figure), experiments.profile("paper"), [], [], pd.DataFrame(epochs),
                          pd.DataFrame(events), pd.DataFrame(rows), pd.DataFrame())


def test_run_table_in_points():
    labels = ["none", "L r=4 filter"]
    made = claims.run_table(None, study("figure3", labels, events=[{"run": labels[1], "epoch": 1}]))
    assert made["accuracy"].tolist() == pytest.approx([90, 90]) and made["gap"].tolist() == pytest.approx([-5, -5])
    assert made["instability"].tolist() == pytest.approx([0, 2])


def test_recovery_counts_epochs_until_the_level_before():
    epochs = pd.DataFrame({"epoch": range(12), "test_accuracy": [.5, .6, .3, .59, .6, .6, .7, .5, .6, np.nan, .6, .71]})
    events = pd.DataFrame({"epoch": [1, 1, 6, 11], "layer": ["a", "b", "a", "a"], "t_pre": [.6, .6, .7, .7]})
    assert claims.recovery(epochs, events) == (3 + 5) / 2  # at 4; at 11; the last event has no epoch after it
    assert claims.recovery(epochs.iloc[:9], events.iloc[:3]) == (3 + 2) / 2, "never back: the whole wait"


def test_the_targeted_decile_at_the_last_event_up_to_epoch_35():
    labels = ["D0 weight", "D9 weight", "D10 filter"]
    events = [{"run": label, "epoch": epoch, **{f"decile_{k}": 100 * epoch + k for k in range(10)}}
              for label in labels for epoch in (31, 34, 37)]
    assert claims.run_table(None, study("figure2", labels, events=events))["magnitude"].tolist() == [3400, 3409, 3409]


def test_falls_by_event():
    events = [{"run": "zeroing 50", "epoch": epoch, "layer": layer, "t_pre": 0.5, "t_post": 0.5 - epoch / 10}
              for epoch in (1, 2) for layer in "ab"]
    made = claims.run_table(None, study("figure5", ["none", "zeroing 50"], events=events)).set_index("label")
    assert made.loc["zeroing 50", ["fall_0", "fall_1"]].tolist() == pytest.approx([10, 20])
    assert "fall_2" not in made and made.loc["none", ["fall_0", "fall_1"]].isna().all()


def test_normality_of_the_last_eight_layers():
    histogram = pd.DataFrame([{"epoch": epoch, "layer_index": layer, "ks": ks(layer), "left": left}
                              for epoch, ks in ((-1, lambda i: 0.05), (80, lambda i: i / 100))
                              for layer in range(16) for left in (-5, 0)])
    store = mock.Mock(read=lambda run: mock.Mock(tables={"histogram": histogram}))
    made = claims.run_table(store, study("figureA1", ["none"])).iloc[0]
    assert (made["ks_before"], made["ks_after"], made["ks_rho"]) == pytest.approx((0.05, 0.115, 1))


# --- from a store


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Figure 1 (VGG11), three runs each: at quarter as the paper claims, at mini the other way round."""
    store = Store(tmp_path_factory.mktemp("claims") / "results")
    for name, sign in (("quarter", 1), ("mini", -1)):
        profile = experiments.profile(name)
        data = experiments.data_spec(profile, "cifar10-folder", "f" * 64)
        for run in experiments.figures.figure1_vgg11(profile, data, range(3)):
            fall = {"S r=4": 0.01, "S r=40": 0.05, "L r=40": 0.2, "S r=4 l2": 0.03}.get(run.label, 0.0)
            made_up.write(store, run, 0.6 + sign * fall + 0.002 * run.spec.seed, fall + 0.001 * run.spec.seed, name)
    return store


@pytest.fixture(scope="module")
def evaluated(filled):
    return claims.evaluate(filled).set_index("id")


@pytest.fixture
def copied(filled, tmp_path):
    return Store(shutil.copytree(filled.path, tmp_path / "results"))


def test_an_empty_store_has_a_row_a_claim(tmp_path):
    found = claims.evaluate(Store(tmp_path / "nothing"))
    assert list(found["id"]) == [f"C{k}" for k in range(1, 20)]
    assert set(found["verdict"]) == set(found["small_scale"]) == {NOT_RUN}
    assert found["estimate"].isna().all() and (found["n"] == 0).all()
    assert found["why"].str.contains("python -m gstlib").all()
    assert not (tmp_path / "nothing").exists()


def test_verdicts_of_a_store(evaluated):
    found = evaluated
    assert len(found) == 19 and found.index.is_unique
    expected = {"C1": (SUPPORTED, CONTRADICTED), "C3": (SUPPORTED, CONTRADICTED), "C17": (SUPPORTED, SUPPORTED)}
    for name in found.index:
        assert tuple(found.loc[name, ["verdict", "small_scale"]]) == expected.get(name, (NOT_RUN, NOT_RUN)), name
    row = found.loc["C1"]
    assert row["profile"] == "quarter" and row["n"] == row["small_n"] == 12 and row["why"] == ""
    assert 0.9 < row["low"] <= row["estimate"] <= row["high"] <= 1 and row["small_high"] < -0.9
    assert found.loc["C17", "estimate"] == pytest.approx(2) and found.loc["C17", "unit"] == "points"
    assert "none of its runs is stored" in found.loc["C2", "why"] and "C4" in found.index and found.loc["C4", "n"] == 12


def remove(store, profile):
    for run_id, _, about in list(store.about()):
        if about["profile"] == profile:
            store.file(run_id).unlink()


def test_small_networks_say_nothing_of_the_paper(copied):
    remove(copied, "quarter")
    for found in (claims.evaluate(copied), claims.evaluate(copied, "mini")):
        assert set(found["verdict"]) == {NOT_RUN}
        assert found.set_index("id").loc["C1", "small_scale"] == CONTRADICTED
    row = found.set_index("id").loc["C1"]
    assert row["profile"] == "mini" and row["estimate"] < -0.9 and "mini is no full-width profile" in row["why"]


def test_a_changed_run_changes_its_rows_and_a_lost_one_is_missed(copied, evaluated):
    remove(copied, "mini")
    profile = experiments.profile("quarter")
    data = experiments.data_spec(profile, "cifar10-folder", "f" * 64)
    run = next(r for r in experiments.figures.figure1_vgg11(profile, data, [1]) if r.label == "L r=40")
    made_up.write(copied, run, 0.4, 0.1, "quarter")
    after = claims.evaluate(copied, "quarter").set_index("id")
    assert after.loc["C1", "estimate"] < evaluated.loc["C1", "estimate"]
    assert after.loc["C3", "note"] != evaluated.loc["C3", "note"]
    kept = ["estimate", "low", "high", "n", "verdict", "note"]
    pd.testing.assert_series_equal(after.loc["C17", kept], evaluated.loc["C17", kept])  # the draws are the same ones
    # lost, and more asked for than there are: no verdict where two are left, else a verdict and what is missing from it
    copied.file(run.spec.id).unlink()
    gone = claims.evaluate(copied, seeds=4).set_index("id")
    assert gone.loc["C1", "verdict"] == gone.loc["C3", "verdict"] == NOT_RUN and "L r=40 has 2" in gone.loc["C1", "why"]
    assert gone.loc["C17", "verdict"] == SUPPORTED and "2 of the 8 runs asked for are missing" in gone.loc["C17", "why"]


def test_a_data_set_that_is_not_there_and_an_unknown_profile(filled):
    assert set(claims.evaluate(filled, data="digits")["verdict"]) == {NOT_RUN}
    with pytest.raises(InputError, match="unknown profile"):
        claims.evaluate(filled, "huge")


@pytest.mark.parametrize(("ratios", "expected"), [
    ((0.2, 0.4), SUPPORTED), ((3.0, 2.0), CONTRADICTED), ((0.2, 2.0), INCONCLUSIVE), ((), NOT_RUN)])
def test_cost_of_scoring_comes_from_the_benchmark(tmp_path, ratios, expected):
    costs = [{"model": "m", "cost": "training step", "training_steps": 1.0}]
    costs += [{"model": "m", "cost": "E[BN] of all pruned layers", "training_steps": ratio} for ratio in ratios]
    (tmp_path / "bench.json").write_text(json.dumps({"costs": costs}))
    row = claims.evaluate(Store(tmp_path)).set_index("id").loc["C19"]
    assert row["verdict"] == expected and row["n"] == len(ratios) and row["small_scale"] == NOT_RUN
    if ratios:
        assert (row["low"], row["high"]) == (min(ratios), max(ratios)) and row["unit"] == "training steps"


def test_a_broken_benchmark_is_named(tmp_path):
    (tmp_path / "bench.json").write_text('{"rows": []}')
    with pytest.raises(InputError, match="bench.json is no benchmark"):
        claims.evaluate(Store(tmp_path))


def test_claims_import_neither_torch_nor_training():
    code = "import sys, gstlib.claims; assert not {'torch', 'gstlib.training.train', 'gstlib.models'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
