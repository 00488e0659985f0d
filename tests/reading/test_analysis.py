import shlex

import numpy as np
import pandas as pd
import pytest
from made_up import DATA, SMOKE, fill, write
from scipy import stats

from gstlib import experiments
from gstlib.__main__ import parser
from gstlib.campaign import runner
from gstlib.errors import InputError
from gstlib.reading import analysis, figures
from gstlib.store import Store


@pytest.fixture
def store(tmp_path):
    return fill(tmp_path / "results")


def test_instability_counts_an_event_once_whatever_it_hits():
    events = pd.DataFrame({"run": "a", "epoch": [3, 3, 7], "layer": ["x", "y", "x"],
                           "t_pre": [0.8, 0.8, 0.4], "t_post": [0.6, 0.6, 0.5]})
    each = analysis.instability(events)
    assert each["instability"].tolist() == pytest.approx([0.2, 0.1])
    assert each["relative_instability"].tolist() == pytest.approx([0.25, -0.25])


def test_summary_of_a_run():
    epochs = pd.DataFrame({"epoch": [0, 1, 2, 3], "test_accuracy": [0.9, 0.7, np.nan, 0.65], "train_accuracy": 1.0, "parameters": 7})
    events = pd.DataFrame({"epoch": [1], "t_pre": [0.7], "t_post": [0.3]})
    row = analysis.summarise(epochs, events)
    assert row["final_accuracy"] == 0.65
    assert row["best_accuracy"] == 0.65, "0.9 and 0.7 were measured before the last event"
    assert row["mean_instability"] == pytest.approx(0.4) and row["events"] == 1
    assert analysis.summarise(epochs, events.iloc[:0])["best_accuracy"] == 0.9


def test_best_counts_the_accuracy_right_after_the_last_event():
    epochs = pd.DataFrame({"epoch": [0, 1], "test_accuracy": [0.5, 0.4], "train_accuracy": 1.0, "parameters": 7})
    assert analysis.summarise(epochs, pd.DataFrame({"epoch": [1], "t_pre": [0.4], "t_post": [0.45]}))["best_accuracy"] == 0.45


def test_study_finds_every_run_and_all_their_seeds(store):
    study = analysis.study(store, "figure1-vgg11", "smoke")
    assert len(study.runs) == 15 and not study.missing
    assert study.labels == ["none", "S r=4", "S r=40", "L r=40", "S r=4 l2"]
    assert "3 runs per configuration" in analysis.caption(study) and "Missing" not in analysis.caption(study)


def test_missing_runs_are_named(store):
    runs = experiments.figures.figure1_vgg11(SMOKE, DATA, range(3))
    gone = next(r for r in runs if r.label == "L r=40" and r.spec.seed == 1)
    store.file(gone.spec.id).unlink()
    study = analysis.study(store, "figure1-vgg11", "smoke")
    assert [r.spec.id for r in study.missing] == [gone.spec.id]
    assert "Missing: 1 of 15 runs (L r=40: seed 1)" in analysis.caption(study)
    assert "2 to 3 runs per configuration" in analysis.caption(study)
    assert f"Make them with `{study.command}`." in analysis.caption(study)


def test_no_runs_at_all_names_the_command(store):
    with pytest.raises(InputError, match="python -m gstlib run"):
        analysis.study(store, "figure1-vgg11", "paper")
    study = analysis.study(store, "figure3", "smoke")
    with pytest.raises(InputError, match="python -m gstlib run figure3 --profile smoke"):
        analysis.caption(study)


def test_the_command_that_a_study_names_makes_what_it_lacks(tmp_path, digits):
    place = tmp_path / "my results"
    data = experiments.data_spec(SMOKE, "digits", digits.fingerprint)
    write(Store(place), experiments.figures.figure3(SMOKE, data, [2])[0], 0.5, 0.0)
    for asked, seeds in ((None, [0, 1, 2]), ("0,2", [0, 2]), ([3], [3])):
        study = analysis.study(Store(place), "figure3", "smoke", seeds=asked)
        program, *words = shlex.split(study.command)[2:]
        args = parser().parse_args(words)
        assert program == "gstlib" and args.command == "run" and args.results == str(place)
        planned, _ = runner.plan(args.figures, args.profile, args.data, args.seeds)
        assert {run.spec.seed for _, run in planned} == set(seeds)
        assert runner.missing(Store(place), [run for _, run in planned]) == runner.missing(Store(place), study.missing)
    shown = analysis.command(["figure1-vgg11", "figure3"], "mini", "/my images", "r")
    assert shown == "python -m gstlib run figure1-vgg11 figure3 --profile mini --data '/my images' --results r"


def test_results_of_two_data_sets_are_never_mixed(store):
    other = experiments.data_spec(SMOKE, "digits", "e" * 64)
    write(store, experiments.figures.figure1_vgg11(SMOKE, other, [0])[0], 0.5, 0.0)
    with pytest.raises(InputError, match="several data sets"):
        analysis.study(store, "figure1-vgg11", "smoke")


def test_mean_interval():
    values = [0.1, 0.2, 0.4, 0.3, 0.25, 0.15, 0.35, 0.3, 0.2, 0.25]
    estimate = analysis.mean_interval(values)
    assert estimate.value == pytest.approx(0.25) and estimate.n == 10
    half = stats.sem(values) * stats.norm.ppf(0.975)
    assert estimate.low == pytest.approx(0.25 - half, abs=0.015) and estimate.high == pytest.approx(0.25 + half, abs=0.015)
    assert analysis.mean_interval(values) == estimate
    assert analysis.mean_interval([0.5, 0.5, 0.5])[1:3] == (0.5, 0.5)
    assert np.isnan(analysis.mean_interval([0.5]).low) and np.isnan(analysis.mean_interval([]).value)


def test_correlation_against_scipy_and_by_stratified_bootstrap(store):
    study = analysis.study(store, "figure1-vgg11", "smoke")
    found = analysis.correlation(study.runs)
    pruned = study.runs.dropna(subset="mean_instability")
    test = stats.pearsonr(pruned["mean_instability"], pruned["final_accuracy"])
    assert (found.r, found.p, found.n) == (pytest.approx(test.statistic), pytest.approx(test.pvalue), 12)
    assert found.low <= found.r <= found.high and found.low > 0.9
    # one run a configuration: resampling within configurations could only draw the same runs again
    single = pruned.drop_duplicates("label")
    alone = analysis.correlation(single)
    assert np.isfinite(alone.r) and np.isnan(alone.low) and np.isnan(alone.high)
    assert np.isnan(analysis.correlation(single.head(2)).r)


def test_tables_state_runs_and_intervals(store):
    table = analysis.table(analysis.study(store, "figure1-vgg11", "smoke")).set_index("label")
    assert table.loc["L r=40", "mean_instability"] == pytest.approx(20.1)
    assert table.loc["L r=40", "mean_instability_low"] <= 20.1 <= table.loc["L r=40", "mean_instability_high"]
    text = analysis.markdown_table(analysis.study(store, "figure1-vgg11", "smoke"))
    assert text.count("\n") == 6 and "| none | 3 | 0 |" in text


def test_figures_draw_what_is_stored(store, tmp_path):
    study = analysis.study(store, "figure1-vgg11", "smoke")
    left, right = figures.accuracy_by_epoch(study), figures.accuracy_by_instability(study)
    names = [text.get_text() for text in left.axes[0].get_legend().get_texts()]
    assert names == ["no pruning", "prune S, E[BN], 6%", "prune S, E[BN], 13%", "prune L, E[BN], 13%"]
    lines = {line.get_label(): line for line in left.axes[0].get_lines()}
    assert lines["prune L, E[BN], 13%"].get_ydata().min() == pytest.approx(0.5 - 0.201)
    dots = np.concatenate([c.get_offsets() for c in right.axes[0].collections if len(c.get_offsets()) == 3])
    assert dots[:, 0].max() == pytest.approx(0.202) and len(dots) == 12
    assert f"n = {12}" in right.axes[0].get_title(loc="left")
    for name in ("a", "b"):
        figures.save(figures.accuracy_by_instability(study), tmp_path, name, study.runs)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert len(pd.read_csv(tmp_path / "a.csv")) == 15


def test_a_method_has_one_colour():
    labels = ("none", "S r=4", "S r=40", "L r=40", "S r=4 l2", "R r=40")
    colours = {label: figures.method_colour(label) for label in labels}
    assert len(set(colours.values())) == len(colours)


def test_what_bf16_changes_is_told_run_by_run(tmp_path):
    store = Store(tmp_path)
    finals = {"none": (0.5, 0.6, 0.7), "none bf16": (0.502, 0.602, 0.702),  # float32 is smoke's own
              "L r=40": (0.5, 0.6, 0.7), "L r=40 bf16": (0.51, 0.61, 0.71)}
    falls = {"L r=40": (0.1, 0.2, 0.3), "L r=40 bf16": (0.3, 0.4, 0.5)}
    for run in experiments.precision(SMOKE, DATA, range(3)):
        seed = run.spec.seed
        write(store, run, finals[run.label][seed], falls.get(run.label, (0,) * 3)[seed])
    text = analysis.precisions(analysis.study(store, "precision"))
    assert "| none | 3 | accuracy, % | 60.00 [50.00, 70.00] | 60.20 [50.20, 70.20] | 0.20 [0.20, 0.20] |" in text
    assert "| L r=40 | 3 | accuracy, % | 60.00 [50.00, 70.00] | 61.00 [51.00, 71.00] | 1.00 [1.00, 1.00] |" in text
    assert "| L r=40 | 3 | instability | 20.00 [10.00, 30.00] | 40.00 [30.00, 50.00] | 20.00 [20.00, 20.00] |" in text
    assert text.endswith("1 of 2 mean accuracies differ by no more than 0.3 points; 0 of 1 mean instabilities in bf16 lie within "
                         "the interval of those in float32.")


def test_one_precision_alone_compares_nothing(store):
    assert "run precision --profile smoke" in analysis.precisions(analysis.study(store, "precision"))


def test_precisions_of_a_store_with_other_experiments_alone(tmp_path):
    store = Store(tmp_path)
    write(store, experiments.figures.figure2(SMOKE, DATA, [0])[0], 0.5, 0.1)
    assert "run precision --profile smoke" in analysis.precisions(analysis.study(store, "precision"))
