import functools

import numpy as np
import pandas as pd
import pytest
from made_up import ABOUT, DATA, SMOKE, effect, stock

from gstlib import experiments
from gstlib.reading import analysis, figures
from gstlib.store import Store

@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stock(tmp_path_factory.mktemp("made-up") / "results",
                 "figure1-vgg11", "figure2", "figure3", "figure4", "figure5", "figureA1")


@pytest.fixture(scope="module")
def study(store):
    return functools.cache(lambda name: analysis.study(store, name, "smoke"))


def legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_gap_by_decile_draws_every_target_where_it_belongs(study):
    whole = study("figure2")
    for structure in ("weight", "filter"):
        ax = figures.gap_by_decile(whole, structure).axes[0]
        assert [tick.get_text() for tick in ax.get_xticklabels()] == [f"D{k}" for k in range(11)]
        means = {round(float(x)): float(y) for line in ax.get_lines() if line.get_marker() == "D"
                 for x, y in zip(line.get_xdata(), line.get_ydata()) if np.isfinite(y)}
        rows = analysis.generalization(whole)
        expected = rows[rows["structure"] == structure].groupby("decile")["gap"].mean()
        assert means == {k: pytest.approx(expected[k]) for k in range(11)}
        assert expected[7] - expected[0] == pytest.approx(0.07)
    weights, neurons = (figures.gap_by_decile(whole, structure).axes[0] for structure in ("weight", "filter"))
    assert weights.get_ylim() == neurons.get_ylim()


def test_gap_by_magnitude_takes_the_last_event_by_epoch_35(study):
    ax = figures.gap_by_magnitude(study("figure2"), "weight").axes[0]
    drawn = {text.get_text(): text.xy for text in ax.texts}
    # epoch 35 is 9 at a quarter of the length, and there is an event at 9
    assert drawn["D3"] == (309.0, pytest.approx(0.1 + 0.5 + 0.03 + 0.001 - 0.9, abs=0.01)) and len(drawn) == 11


def test_magnitude_deciles_against_the_fifth_and_the_exponential(study):
    lines = {line.get_label(): line for line in figures.magnitude_deciles(study("figure2")).axes[0].get_lines()}
    for name in ("single weights", "neurons (l2 norm)"):
        assert lines[name].get_ydata() == pytest.approx((1 + np.arange(10)) / 5)
    drawn = np.sort(np.random.default_rng(0).exponential(size=10**6)).reshape(10, -1).mean(1)
    exponential = analysis.exponential_decile_means()
    assert exponential == pytest.approx(drawn, rel=0.01) and exponential.mean() == pytest.approx(1)
    assert lines["exponential distribution"].get_ydata() == pytest.approx(exponential / exponential[4])


def test_figure3_tells_structured_from_unstructured(study):
    whole = study("figure3")
    figure = figures.accuracy_by_epoch(whole, whole.labels, 80)
    assert legend(figure) == ["no pruning", "prune L, E[BN], 6%", "prune L, E[BN], 13%", "prune L, E[BN], one shot",
                              "prune L, weights, 6%", "prune L, weights, 13%", "prune L, weights, one shot"]
    dashed = {line.get_label() for line in figure.axes[0].get_lines() if line.is_dashed()}
    assert dashed == {name for name in legend(figure) if "weights" in name}


@pytest.mark.parametrize("column", ["mean_instability", "final_accuracy"])
def test_figure4_draws_means_by_rate(study, column):
    whole = study("figure4")
    figure = figures.by_rate(whole, column)
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    runs = analysis.rates(whole)
    names = {("S", "ebn"): "prune S, E[BN]", ("S", "l2"): "prune S, l2", ("R", "ebn"): "prune R",
             ("L", "ebn"): "prune L, E[BN]", ("L", "l2"): "prune L, l2"}
    assert {name for name in lines if name.startswith("prune")} == set(names.values())
    for (target, score), name in names.items():
        part = runs[(runs["target"] == target) & (runs["score"] == score)].groupby("rate")[column].mean()
        assert lines[name].get_xdata() == pytest.approx(part.index) and lines[name].get_ydata() == pytest.approx(part)
        assert lines[name].is_dashed() == (score == "l2")
    assert ("no pruning" in lines) == (column == "final_accuracy")


def test_figure5_draws_a_run_once_and_says_what_its_batches_became(study):
    whole = study("figure5")
    labels = ["none", "L l2 weights", *(f"zeroing {k}" for k in (0, 50, 1105, 1500))]
    assert legend(figures.accuracy_by_epoch(whole, labels)) == [
        "no pruning", "prune L, l2, 13%", "zeroing 0", "zeroing 50 (1 here)", "zeroing 1500 (2 here)"]
    clean = figures.traces(whole, "test_accuracy_clean")
    assert set(clean["accuracy"]) == {0.55} and not (clean["epoch"] % 1).any()


def test_falls_are_drawn_for_both_labels_of_a_shared_run(study):
    traces = figures.traces(study("figure5"))
    counts = traces[traces["epoch"] % 1 > 0].groupby("label").size()
    assert counts["zeroing 50"] == counts["zeroing 1105"] > 0


def test_figure_a2_draws_every_method(study):
    figure = figures.instability_by_epoch(study("figureA2"))
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert "prune S, l2, 6%" in lines and "no pruning" not in lines
    assert lines["prune L, E[BN], 13%"].get_ydata() == pytest.approx(0.2 + 0.1 * 0.9 / 7 + 0.0005)


def test_figure_a1_is_of_the_last_eight_layers(store, study):
    rows = analysis.histograms(store, study("figureA1"))
    figure = figures.activation_histograms(rows)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles[:2] == ["conv 9: KS 0.08 → 0.18", "conv 10: KS 0.09 → 0.19"]
    assert len(figure.axes) == 8
    lines = {line.get_label(): line for line in figures.distance_by_layer(rows).axes[0].get_lines()}
    assert lines["after training"].get_xdata().tolist() == list(range(9, 17))
    assert lines["before training"].get_ydata() == pytest.approx(0.01 * np.arange(8, 16))


def test_one_run_and_its_recoveries(study):
    whole = study("figure1-vgg11")
    run = analysis.restrict(whole, ["L r=40"], 1)
    assert len(run.runs) == 1 and set(run.events["seed"]) == {1} and [r.spec.seed for r in run.wanted] == [1]
    events = analysis.recoveries(run, "L r=40", 1)
    assert len(events) == 7 and events["removed"].max() == 4
    assert (events["recovery"] == 1).all(), "made-up accuracy is back at the next epoch"
    line = {line.get_label(): line for line in figures.single_run(run, "L r=40", 1).axes[0].get_lines()}["test"]
    assert line.get_ydata().min() == pytest.approx(events["t_post"].min())


def test_what_is_missing_is_left_out_and_named(tmp_path):
    store = stock(tmp_path / "results", "figure4", seeds=1, but=("R r=40", "S r=60 l2"))
    study = analysis.study(store, "figure4", "smoke", seeds=1)
    lines = {line.get_label(): line for line in figures.by_rate(study, "final_accuracy").axes[0].get_lines()}
    assert len(lines["prune R"].get_xdata()) == len(lines["prune S, l2"].get_xdata()) == \
        len(lines["prune L, l2"].get_xdata()) - 1
    assert "Missing: 2 of 26 runs (R r=40: seed 0; S r=60 l2: seed 0)" in analysis.caption(study)


@pytest.mark.parametrize("figure", ["figure1-vgg11", "figure5", "figure3", "figure4"])
def test_methods_of_a_figure_have_colours_of_their_own(figure):
    runs = experiments.experiment(figure).runs(experiments.profile("paper"), DATA, [0])
    if figure == "figure4":  # a line there is a target and a score
        labels = ["none", "S", "R", "L", "S l2"]
    else:
        labels = [run.label for run in runs if not run.label.endswith("weight")]
    assert len({figures.method_colour(label) for label in labels}) == len(labels)


def test_differences_and_slopes():
    found = analysis.difference([0.3, 0.4, 0.5], [0.1, 0.2, 0.3])
    assert found.value == pytest.approx(0.2) and found.low < 0.2 < found.high and found.n == 6
    assert np.isnan(analysis.difference([0.3], [0.1, 0.2]).low)
    table = pd.DataFrame({"label": list("aabbcc"), "x": [1, 1, 2, 2, 3, 3], "y": [1.0, 1.2, 2.0, 2.2, 3.0, 3.2]})
    estimate, rho = analysis.slope(table, "x", "y")
    assert estimate.value == pytest.approx(1) and 0.8 < estimate.low <= 1 <= estimate.high < 1.2 and rho > 0.9
    assert np.isnan(analysis.slope(table.head(2), "x", "y")[0].value)


def test_comparison_says_what_was_not_run(study):
    text = analysis.comparison(study("figure5"), [("zeroing 50", "none"), ("zeroing 50", "zeroing 7")])
    assert "| zeroing 50 | none | +" in text and "| zeroing 50 | zeroing 7 | not run | – | 2 and 0 |" in text
