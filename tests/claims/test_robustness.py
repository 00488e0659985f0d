import made_up
import pytest

from gstlib import experiments
from gstlib.claims import CONTRADICTED, INCONCLUSIVE, SUPPORTED
from gstlib.claims.robustness import robustness, summary
from gstlib.store import Store

PROFILE = experiments.profile("quarter")
DATA = experiments.data_spec(PROFILE, "cifar10-folder", "f" * 64)


def store(path, seeds=4, odd=None):
    """Figure 1: final accuracy rises with falls, best accuracy the other way; in seed `odd` nothing is as in the others."""
    store = Store(path)
    for number, run in enumerate(experiments.figures.figure1_vgg11(PROFILE, DATA, range(seeds))):
        fall = made_up.FALLS.get(run.label, 0.0)
        sign = -2 if run.spec.seed == odd else 1
        made_up.write(store, run, 0.6 + sign * fall + made_up.noise(number) / 2, fall + 0.001 * run.spec.seed, "quarter",
                      lift=0.3 - fall + made_up.noise(number) / 2)
    return store


def test_another_accuracy_may_decide_otherwise_and_is_told(tmp_path):
    rows = robustness(store(tmp_path), "quarter")
    c1 = rows[rows["id"] == "C1"].set_index("way")
    assert c1.loc["as decided", "verdict"] == c1.loc["relative instability", "verdict"] == SUPPORTED
    assert c1.loc["best accuracy", "verdict"] == CONTRADICTED
    assert c1["n"].tolist() == [4, 4, 4, 3, 3, 3, 3]
    assert c1.loc["relative instability", "estimate"] == pytest.approx(c1.loc["as decided", "estimate"], rel=0.05)
    c17 = rows[rows["id"] == "C17"].set_index("way")
    assert c17.loc["best accuracy", "estimate"] == c17.loc["as decided", "estimate"]  # it is about falls
    short = summary(rows).set_index("id")
    assert short.loc["C1"].tolist() == [SUPPORTED, CONTRADICTED, SUPPORTED, "supported 4 of 4"]


def test_a_verdict_that_one_seed_carries_is_seen(tmp_path):
    c1 = robustness(store(tmp_path, 5, odd=2), "quarter").query("id == 'C1'").set_index("way")["verdict"]
    assert c1["as decided"] == INCONCLUSIVE and c1["without seed 2"] == SUPPORTED and c1["without seed 1"] == INCONCLUSIVE


def test_a_claim_that_counts_configurations_is_judged_without_each_seed_too(tmp_path):
    store = Store(tmp_path)
    for name in ("figure4", "figure5"):
        for number, run in enumerate(experiments.experiment(name).runs(PROFILE, DATA, range(4))):
            if name == "figure4" or run.label == "L l2 weights":
                fall = made_up.effect(run.spec) + 0.01 + made_up.noise(number)
                made_up.write(store, run, 0.6 + fall, fall, "quarter")
    rows = robustness(store, "quarter").query("id == 'C1g'")
    assert rows["n"].nunique() == 1 and rows["way"].str.startswith("without seed").sum() == 4
    assert summary(rows)["without one seed"].item() == "supported 4 of 4"


def test_of_three_seeds_none_is_left_out_and_without_runs_there_is_no_row(tmp_path):
    rows = robustness(store(tmp_path, 3), "quarter")
    assert not rows["way"].str.contains("seed").any() and set(summary(rows)["without one seed"]) == {"needs 4 seeds"}
    assert robustness(Store(tmp_path), "mini").empty and robustness(Store(tmp_path / "nothing"), "quarter").empty
