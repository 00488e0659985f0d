"""Each claim on made-up seeds whose verdict is known by construction, and the whole table from a store."""

import json
import math
import shutil
import subprocess
import sys

import made_up
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from gstlib import claims, experiments
from gstlib.claims import CLAIMS, CONTRADICTED, INCONCLUSIVE, NOT_RUN, SUPPORTED, verdicts
from gstlib.claims import evaluations as e
from gstlib.errors import InputError
from gstlib.reading.interval import holm
from gstlib.reading.study import study
from gstlib.store import Store

BY_ID = {claim.id: claim for claim in CLAIMS}
IDS = [claim.id for claim in CLAIMS]


# --- each claim, on made-up seeds


def table(needs, n=5, spread=0.1, **values) -> pd.DataFrame:
    """`n` seeds of what a claim needs: `values` gives each measure's mean by configuration, each run deviates."""
    rng = np.random.default_rng(0)
    columns = {(column, label): values[column](label) + spread * rng.normal(size=n)
               for column, labels in needs.items() for label in labels}
    return pd.DataFrame(columns, index=range(n)).rename_axis("seed")


def by(means, other=0.0):
    return lambda label: means.get(label, other)


def rising(labels, sign):
    return by({label: sign * k for k, label in enumerate(labels)})


def decile(label):
    """Figure 2's target as a number, and whether it takes single weights."""
    return float(label.split()[0][1:]), label.endswith("weight")


def made(claim: str, sign: int, n: int = 5) -> list[pd.DataFrame]:
    """Seeds that support a claim (sign 1), contradict it (-1), or say nothing (0)."""
    needs = list(BY_ID[claim].needs.values())

    def tables(spread=0.1, **values):
        return [table(need, n, spread, **values) for need in needs]

    figure4 = {label: k for labels in e.CURVES.values() for k, label in enumerate(labels)}
    match claim:
        case "C1" | "C2":
            labels = e.VGG11 if claim == "C1" else e.RESNET18
            return tables(0.02, log_instability=rising(labels, 1), mean_instability=rising(labels, 1),
                          accuracy=rising(labels, sign))
        case "C1g":
            order = {label: k for k, label in enumerate((*e.FIGURE4, e.PRUNE_L))}
            scatter = np.random.default_rng(0).permutation(len(order))
            return tables(log_instability=lambda label: order[label],
                          accuracy=lambda label: sign * order[label] if sign else scatter[order[label]])
        case "C3":
            return tables(log_instability=by({e.VGG11[2]: sign}), recovered=by({}, 0.5 + 0.3 * sign),
                          accuracy=by({e.VGG11[2]: sign}))
        case "C4":
            return tables(accuracy=lambda label: sign * {**dict.fromkeys(e.VGG11, 0), "S r=40": 1, "L r=40": 2}[label])
        case "C5":
            return tables(gap=lambda label: sign * decile(label)[0], accuracy=by({}))
        case "C6":
            return tables(gap=lambda label: sign * decile(label)[0] * decile(label)[1], accuracy=by({}))
        case "C7":
            # a spread among weights as among neurons says nothing of the ratio
            return tables(0.01, ninth_over_fifth=lambda label: 0.5 * sign * decile(label)[1],
                          exponential_fit=by({}, 0.95 + 0.03 * sign))
        case "C8":
            return tables(accuracy=lambda label: sign * label.endswith("filter"))
        case "C9":
            return tables(0.02, log_instability=lambda label: sign * figure4[label],
                          rate=lambda label: 2.0 ** figure4[label])
        case "C10" | "C13":
            last = sign if claim == "C10" else -sign
            return tables(accuracy=lambda label: last * (figure4[label] == 4))
        case "C11":
            return tables(log_instability=lambda label: sign * "SRL".index(label[0]))
        case "C12":
            return tables(0.01, log_instability=lambda label: {"S": (1 + sign) / 2, "R": 0, "L": 1}[label[0]])
        case "C14":
            return tables(0.01, accuracy=by({e.PRUNE_L: 2, "zeroing 50": 1 + sign}),
                          log_instability=by({"zeroing 50": 0.5 * (sign - 1)}),
                          pattern=by({}, 0.5 * sign))
        case "C15":
            return tables(accuracy=by({e.PRUNE_L: 2 * abs(sign), "zeroing 0": -sign}))
        case "C16":
            return tables(accuracy=by({e.PRUNE_L: 2, "gaussian 1500": sign}))
        case "C17":
            return tables(log_instability=by({"S r=4 l2": sign}))
        case "C18":
            return [table(need, n, 0.005, ks_before=by({}, 0.1 - 0.05 * sign), ks_after=by({}, 0.1 + 0.02 * sign),
                          ks_rho=by({}, 0.5 * sign)) for need in needs]
        case "C20":
            flat = rising(e.IN_TRAINING, -sign)
            return tables(0.02, log_instability=rising(e.IN_TRAINING, 1), log_curvature=flat, log_trace=flat,
                          log_takeuchi=by({}), rise_mean=flat, rise_worst=flat)
        case "C21":
            return tables(0.01, accuracy=by({e.PRUNE_L: 2, e.RESTORED: 2 if sign == 1 else 0.5 * sign + 0.5}))
        case "C22":
            rates = (4, 20, 40, 60, 100, 200, 300)
            place = lambda label: rates.index(int(label.partition("r=")[2]))  # noqa: E731
            return tables(0.02 if sign else 0.5, log_instability=place,
                          accuracy=lambda label: sign * (place(label) if place(label) < 5 else 0))
        case "C23":
            # in one of the networks the smaller rate is the less stable one
            unstable = {name: ("r=60" if name != "ResNet56" else "r=30") for name in e.BY_SGD}
            return tables(log_instability=lambda label: 5 * label.endswith(unstable[label.split()[0]]),
                          accuracy=lambda label: sign * label.endswith(unstable[label.split()[0]]))
        case "C24":
            return tables(accuracy=by({"S r=40": 2 * abs(sign), "scratch": -sign}))
    raise KeyError(claim)


STORED = [claim.id for claim in CLAIMS if claim.needs]


@pytest.mark.parametrize("sign", [1, -1, 0])
@pytest.mark.parametrize("claim", STORED)
def test_verdict_known_by_construction(claim, sign):
    expected = {1: SUPPORTED, -1: CONTRADICTED, 0: INCONCLUSIVE}[sign]
    if claim == "C4" and sign:
        expected = SUPPORTED  # any difference supports it, none contradicts it
    if claim in ("C12", "C14", "C21") and sign == 0:
        expected = CONTRADICTED  # half-way between the two is outside a quarter of their distance
    found = BY_ID[claim].evaluate(*made(claim, sign))
    assert found.verdict == found.part.verdict == expected, found.note
    assert (found.p < 0.05) == (expected != INCONCLUSIVE)
    part = found.part
    assert not part.found.low >= part.found.high
    # signed so that the claim says "above zero"; C15 and C24 are contradicted by a test of their own
    if claim not in ("C4", "C15", "C24") and expected != INCONCLUSIVE:
        assert (part.found.low > 0) == (expected == SUPPORTED) and (part.found.high < 0) == (expected == CONTRADICTED)
    assert "nan" not in found.note


@pytest.mark.parametrize("claim", ["C10", "C13"])
def test_both_readings_of_the_largest_rate_are_told(claim):
    note = BY_ID[claim].evaluate(*made(claim, 1)).note
    assert "r = 100" in note and "with r = 60 as the largest rate" in note


def test_the_slope_of_a_claim_is_computed_within_seeds():
    (seeds,) = made("C1", 1)
    shifted = seeds.copy()
    # seeds differ by far more than configurations do: pooled, nothing would be left of it
    shifted["accuracy"] = seeds["accuracy"].add([0, 40, -80, 60, -30], axis=0)
    one, other = (BY_ID["C1"].evaluate(t) for t in (seeds, shifted))
    assert other.part.found == pytest.approx(one.part.found) and other.verdict == SUPPORTED
    assert "pooled Pearson's r = 0.0" in other.note or "pooled Pearson's r = -0.0" in other.note
    expected = [stats.linregress(seeds["log_instability"].loc[s], seeds["accuracy"].loc[s]).slope for s in seeds.index]
    assert one.part.found.value == pytest.approx(np.mean(expected))


def test_c20_is_the_turned_slope_of_curvature_and_of_trace_within_each_seed():
    (seeds,) = made("C20", 1)
    seeds["log_trace"] = 2 * seeds["log_trace"]
    found = BY_ID["C20"].evaluate(seeds)
    curvature, trace = (-np.mean([stats.linregress(seeds["log_instability"].loc[s], seeds[name].loc[s]).slope
                                  for s in seeds.index]) for name in ("log_curvature", "log_trace"))
    assert found.part.found.value in (pytest.approx(curvature), pytest.approx(trace)) and trace > 1.9 * curvature
    assert f"curvature over that at a tenfold instability: {10**curvature:.2f}" in found.note
    assert f": {10**trace:.0f} [" in found.note and 10**trace > 100  # as rough as such a ratio is
    seeds["log_trace"] = -seeds["log_trace"]
    assert BY_ID["C20"].evaluate(seeds).verdict == CONTRADICTED, "flat by one measure and sharp by the other is not flat"


def test_c5_and_c6_are_told_without_d10_and_with_the_accuracy_beside():
    (seeds,) = made("C5", 1)
    for kind in ("weight", "filter"):
        seeds["gap", f"D10 {kind}"] += 500
    # the gap of weights closes while the accuracy falls
    for k in range(11):
        seeds["accuracy", f"D{k} weight"] -= 2 * k
    found = BY_ID["C5"].evaluate(seeds)
    assert "single weights: rho 1.00, without D10 1.0" in found.note and "test accuracy -2.0" in found.note
    assert found.but == "the gap closes by worse training: test accuracy falls (single weights)"
    (other,) = made("C6", 1)
    assert "without D10" in BY_ID["C6"].evaluate(other).note and not BY_ID["C6"].evaluate(other).but
    for k in range(11):
        other["accuracy", f"D{k} weight"] -= 2 * k
    assert BY_ID["C6"].evaluate(other).but == "the gap closes by worse training: test accuracy falls"


def test_a_noise_that_helps_a_little_contradicts_c15_though_it_is_a_quarter_of_nothing():
    needs = BY_ID["C15"].needs["figure5"]
    found = BY_ID["C15"].evaluate(table(needs, accuracy=by({e.PRUNE_L: 40, "zeroing 0": 1})))
    assert found.verdict == CONTRADICTED and found.part.found.low > 0


def test_c1_in_general_has_a_point_a_configuration():
    found = BY_ID["C1g"].evaluate(*made("C1g", 1))
    assert found.part.found.n == 26 == len(set(e.FIGURE4)) + 1 and found.p == pytest.approx(1e-4)
    assert set(e.VGG11) <= set(e.FIGURE4), "Figure 1's ways of pruning are among them"


def test_the_points_of_c1_in_general_are_means_over_the_same_seeds(monkeypatch, tmp_path):
    figure4, figure5 = made("C1g", 1)
    more = pd.concat([figure5, figure5.tail(1).rename(index=lambda seed: seed + 1) - 50])  # unlike the others, and no other has it
    monkeypatch.setattr(verdicts, "by_seed", lambda study, needs: study)
    one, other = (verdicts.judge(BY_ID["C1g"], "quarter", {"figure4": figure4, "figure5": part}, Store(tmp_path))
                  for part in (figure5, more))
    assert one["estimate"] == other["estimate"] and one["runs"] == other["runs"] == 26 * 5


def test_the_claims_name_experiments_configurations_and_measures_that_exist():
    assert IDS == ["C1", "C1g", *(f"C{k}" for k in range(2, 25))]
    profile = experiments.profile("quarter")
    data = experiments.data_spec(profile, "cifar10", "f" * 64)
    for claim in CLAIMS:
        assert all([claim.statement, claim.published, claim.statistic, claim.test])
        assert claim.figure in experiments.EXPERIMENTS or claim.id == "C19"
        for figure, needs in claim.needs.items():
            runs = {run.label for run in experiments.experiment(figure).runs(profile, data, [0])}
            assert {label for labels in needs.values() for label in labels} <= runs


def test_every_measure_comes_from_a_store(tmp_path):
    names = dict.fromkeys(figure for claim in CLAIMS for figure in claim.needs)
    store = made_up.stock(tmp_path, *names)
    for claim in CLAIMS:
        for figure, needs in claim.needs.items():
            # a made-up run's falls are all alike and have no pattern
            needs = {column: labels for column, labels in needs.items() if column != "pattern"}
            seeds = verdicts.by_seed(study(store, figure), needs)
            assert seeds.shape == (3, sum(map(len, needs.values()))) and seeds.notna().all(axis=None), claim.id
    seen = verdicts.by_seed(study(store, "figure1-vgg11"), {"accuracy": ("none",), "log_instability": ("L r=40",)})
    runs = study(store, "figure1-vgg11").runs.set_index(["label", "seed"])
    assert seen["accuracy", "none"].tolist() == pytest.approx((100 * runs["final_accuracy"]["none"]).tolist())
    expected = np.log10(runs["mean_instability"]["L r=40"])
    assert seen["log_instability", "L r=40"].tolist() == pytest.approx(expected.tolist())


# --- from a store


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Figure 1 (VGG11), four seeds each: at quarter as the paper claims, at mini the other way round."""
    store = Store(tmp_path_factory.mktemp("claims") / "results")
    for name, sign in (("quarter", 1), ("mini", -1)):
        profile = experiments.profile(name)
        data = experiments.data_spec(profile, "cifar10-folder", "f" * 64)
        first = profile.first_seed
        for number, run in enumerate(experiments.figures.figure1_vgg11(profile, data, range(first, first + 4))):
            fall = made_up.FALLS.get(run.label, 0.0)
            made_up.write(store, run, 0.6 + sign * fall + made_up.noise(number) / 2,
                          fall + 0.001 * (run.spec.seed - first), name)
    return store


@pytest.fixture(scope="module")
def evaluated(filled):
    return claims.evaluate(filled, seeds=4).set_index("id")


@pytest.fixture
def copied(filled, tmp_path):
    return Store(shutil.copytree(filled.path, tmp_path / "results"))


def test_an_empty_store_has_a_row_a_claim(tmp_path):
    found = claims.evaluate(Store(tmp_path / "nothing"))
    assert list(found["id"]) == IDS
    assert set(found["verdict"]) == set(found["small_scale"]) == {NOT_RUN}
    assert found[["estimate", "p", "p_holm", "smallest_effect"]].isna().all(axis=None) and (found["n"] == 0).all()
    assert found["why"].str.contains("python -m gstlib").all()
    assert not (tmp_path / "nothing").exists()


def test_verdicts_of_a_store(evaluated):
    found = evaluated
    expected = {"C1": (SUPPORTED, CONTRADICTED), "C3": (SUPPORTED, CONTRADICTED), "C17": (SUPPORTED, SUPPORTED)}
    for name in found.index:
        assert tuple(found.loc[name, ["verdict", "small_scale"]]) == expected.get(name, (NOT_RUN, NOT_RUN)), name
    row = found.loc["C1"]
    assert row["profile"] == "quarter" and row["n"] == row["small_n"] == 4 and row["runs"] == 16 and row["why"] == ""
    assert 0 < row["low"] < row["estimate"] < row["high"] and row["small_high"] < 0
    assert found.loc["C17", "unit"] == "log10 ratio" and found.loc["C17", "estimate"] > 0
    assert "none of its runs is stored" in found.loc["C2", "why"] and "figure1-resnet18" in found.loc["C4", "why"]


def test_all_claims_together_pay_for_their_number(evaluated):
    run = evaluated[evaluated["verdict"] != NOT_RUN]
    assert run["p_holm"].tolist() == pytest.approx(holm(run["p"]).tolist()) and len(run) == 3
    assert evaluated.loc["C2", "p_holm"] != evaluated.loc["C2", "p_holm"]
    small = evaluated[evaluated["small_scale"] != NOT_RUN]
    assert small["small_p_holm"].tolist() == pytest.approx(holm(small["small_p"]).tolist())


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
    assert row["profile"] == "mini" and row["estimate"] < 0 and "mini is no full-width profile" in row["why"]
    assert math.isnan(row["p_holm"]) and row["small_p_holm"] > 0


def test_a_changed_run_changes_its_rows_alone_and_a_seed_that_lacks_it_is_left_out(copied, evaluated):
    remove(copied, "mini")
    profile = experiments.profile("quarter")
    data = experiments.data_spec(profile, "cifar10-folder", "f" * 64)
    run = next(r for r in experiments.figures.figure1_vgg11(profile, data, [1]) if r.label == "L r=40")
    made_up.write(copied, run, 0.4, 0.1, "quarter")
    after = claims.evaluate(copied, "quarter", seeds=4).set_index("id")
    assert after.loc["C1", "estimate"] < evaluated.loc["C1", "estimate"]
    assert after.loc["C3", "note"] != evaluated.loc["C3", "note"]
    kept = ["estimate", "low", "high", "n", "p", "verdict", "note"]
    pd.testing.assert_series_equal(after.loc["C17", kept], evaluated.loc["C17", kept])
    copied.file(run.spec.id).unlink()
    gone = claims.evaluate(copied, seeds=4).set_index("id")
    assert gone.loc["C1", "n"] == 3 and gone.loc["C1", "verdict"] == SUPPORTED and gone.loc["C17", "n"] == 4
    command = "python -m gstlib run figure1-vgg11"
    assert gone.loc["C1", "why"].startswith(f"left out: seed 1 lacks L r=40; make them with: {command}")
    none = next(r for r in experiments.figures.figure1_vgg11(profile, data, [3]) if r.label == "S r=4")
    copied.file(none.spec.id).unlink()
    gone = claims.evaluate(copied, seeds=4).set_index("id")
    assert gone.loc["C1", "verdict"] == NOT_RUN and gone.loc["C1", "n"] == 2 and math.isnan(gone.loc["C1", "estimate"])
    assert "3 complete seeds are needed, there are 2: seed 1 lacks L r=40, seed 3 lacks S r=4" in gone.loc["C1", "why"]
    assert gone.loc["C17", "n"] == 3, "C17 does not need L r=40"


def test_a_profile_of_two_seeds_is_told_to_run_three(tmp_path):
    store = made_up.stock(tmp_path, "figure1-vgg11", seeds=2)
    row = claims.evaluate(store, "smoke").set_index("id").loc["C1"]
    assert row["small_scale"] == NOT_RUN and row["small_n"] == 2
    assert "3 complete seeds are needed, there are 2" in row["why"] and "--seeds 3" in row["why"]


def test_a_refused_layer_leaves_its_seed_out(tmp_path):
    store = made_up.stock(tmp_path, "figureA1", seeds=4)
    spec = experiments.figures.figure_a1(made_up.SMOKE, made_up.DATA, [2])[0].spec
    rows = made_up.rows(spec, 0.6, 0.0)
    for row in rows["histogram"]:
        row["sd"] = 0.6
    store.file(spec.id).unlink()
    store.write(spec, made_up.ABOUT, rows)
    row = claims.evaluate(store, "smoke").set_index("id").loc["C18"]
    assert row["small_n"] == 3 and "left out: seed 2 lacks none" in row["why"] and row["small_scale"] == SUPPORTED


def test_a_data_set_that_is_not_there_and_an_unknown_profile(filled):
    assert set(claims.evaluate(filled, data="digits")["verdict"]) == {NOT_RUN}
    with pytest.raises(InputError, match="unknown profile"):
        claims.evaluate(filled, "huge")


@pytest.mark.parametrize(("ratios", "expected"), [
    ((0.2, 0.4), SUPPORTED), ((3.0, 2.0), CONTRADICTED), ((0.2, 2.0), INCONCLUSIVE), ((), NOT_RUN)])
def test_cost_of_scoring_comes_from_the_benchmark(tmp_path, ratios, expected):
    costs = [{"model": "m", "cost": "training step", "training_steps": 1.0}]
    costs += [{"model": f"m{k}", "cost": "E[BN] of all pruned layers", "training_steps": ratio} for k, ratio in enumerate(ratios)]
    (tmp_path / "bench.json").write_text(json.dumps({"costs": costs}))
    row = claims.evaluate(Store(tmp_path)).set_index("id").loc["C19"]
    assert row["verdict"] == expected and row["n"] == len(ratios) and row["small_scale"] == NOT_RUN
    assert math.isnan(row["p"]) and math.isnan(row["p_holm"])
    if ratios:
        assert (row["low"], row["high"]) == (100 * min(ratios), 100 * max(ratios))
        assert row["unit"] == "% of a training step"


def test_a_network_counts_by_the_machine_where_scoring_is_dearest(tmp_path):
    for name, ratio in (("bench", 0.1), ("bench-gpu", 1.1)):
        costs = [{"model": "m", "cost": "E[BN] of all pruned layers", "training_steps": ratio},
                 {"model": name, "cost": "E[BN] of all pruned layers", "training_steps": 0.2}]
        (tmp_path / f"{name}.json").write_text(json.dumps({"costs": costs}))
    row = claims.evaluate(Store(tmp_path)).set_index("id").loc["C19"]
    assert row["verdict"] == INCONCLUSIVE and row["n"] == 3
    assert (row["low"], row["high"]) == (pytest.approx(20), pytest.approx(110))


def test_a_broken_benchmark_is_named(tmp_path):
    (tmp_path / "bench.json").write_text('{"rows": []}')
    with pytest.raises(InputError, match="bench.json is no benchmark"):
        claims.evaluate(Store(tmp_path))


def test_claims_import_neither_torch_nor_training():
    code = "import sys, gstlib.claims; assert not {'torch', 'gstlib.training', 'gstlib.models'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
