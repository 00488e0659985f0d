import functools
from dataclasses import replace
from itertools import pairwise

import matplotlib.backends.backend_agg
import numpy as np
import pandas as pd
import pytest
from made_up import DATA, fill, stock, write
from scipy import stats

from gstlib import experiments
from gstlib.reading import figures, measures, text
from gstlib.reading.study import study as study_of
from gstlib.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stock(tmp_path_factory.mktemp("made-up") / "results",
                 "figure1-vgg11", "figure2", "figure3", "figure4", "figure5", "figureA1")


@pytest.fixture(scope="module")
def study(store):
    return functools.cache(lambda name: study_of(store, name, "smoke"))


@pytest.fixture(scope="module")
def deciles(study):
    made = study("figure2")
    return measures.by_decile(made.runs, made.events, made.epochs)


def legend(figure):
    return [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]


def drawn(figure):
    """Lines and error bars of a figure by their label."""
    ax = figure.axes[0]
    return {line.get_label(): line for line in ax.get_lines()} | {c.get_label(): c.lines[0] for c in ax.containers}


# --- the one interval


def points(seeds):
    rng = np.random.default_rng(0)
    return pd.DataFrame([{"seed": seed, "x": x, "y": rng.normal()} for seed in range(seeds) for x in range(4)])


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_bands_and_bars_are_t_intervals_at_each_point(confidence):
    made = points(5)
    expected = np.array([stats.ttest_1samp(y, 0).confidence_interval(confidence) for _, y in made.groupby("x")["y"]])
    ax = figures.axes()
    figures.line(ax, made, "x", "y", "k", "band", confidence)
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    for x in range(4):
        ends = corners[corners[:, 0] == x][:, 1]
        assert (ends.min(), ends.max()) == pytest.approx(tuple(expected[x]))
    ax = figures.axes()
    figures.line(ax, made, "x", "y", "k", "bars", confidence, bars=True)
    segments = ax.containers[0].lines[2][0].get_segments()
    assert [tuple(s[:, 1]) for s in segments] == [pytest.approx(tuple(e)) for e in expected]


def test_few_runs_are_drawn_themselves_without_a_band():
    made, ax = points(2), figures.axes()
    figures.line(ax, made, "x", "y", "k", "few")
    assert len(ax.get_lines()) == 2 and not ax.collections
    assert [line.get_label() for line in ax.get_lines()][0] == "few"
    assert ax.get_lines()[1].get_ydata().tolist() == made[made["seed"] == 1]["y"].tolist()


def test_layers_struck_after_one_epoch_are_no_further_seeds():
    made, (once, twice) = points(4), (figures.axes(), figures.axes())
    figures.line(once, made, "x", "y", "k", "")
    figures.line(twice, pd.concat([made.assign(y=made["y"] + 1), made.assign(y=made["y"] - 1)]), "x", "y", "k", "")
    a, b = (ax.collections[0].get_paths()[0].vertices for ax in (once, twice))
    assert a == pytest.approx(b)


# --- each figure


def test_figures_draw_what_is_stored(tmp_path):
    made = study_of(fill(tmp_path / "results"), "figure1-vgg11")
    left, right = figures.accuracy_by_epoch(made), figures.accuracy_by_instability(made)
    assert legend(left) == ["no pruning", "prune S, E[BN], 4%", "prune S, E[BN], 13%", "prune L, E[BN], 13%"]
    assert drawn(left)["prune L, E[BN], 13%"].get_ydata().min() == pytest.approx(0.5 - 0.201)
    dots = np.concatenate([c.get_offsets() for c in right.axes[0].collections if len(c.get_offsets()) == 3])
    assert dots[:, 0].max() == pytest.approx(0.202) and len(dots) == 12
    r, p, n = text.pooled(made.runs)
    assert right.axes[0].get_title(loc="left") == f"pooled r = {r:.2f}, p = {p:.2g}, n = 12"
    for name in ("a", "b"):
        figures.save(figures.accuracy_by_instability(made), tmp_path, name, made.runs)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert len(pd.read_csv(tmp_path / "a.csv")) == 15


def test_gap_by_decile_draws_every_target_where_it_belongs(deciles):
    for structure in ("weight", "filter"):
        ax = figures.gap_by_decile(deciles, structure).axes[0]
        assert [tick.get_text() for tick in ax.get_xticklabels()] == [f"D{k}" for k in range(11)]
        means = {int(c.lines[0].get_xdata()[0]): c.lines[0].get_ydata()[0] for c in ax.containers}
        expected = deciles[deciles["structure"] == structure].groupby("decile")["gap"].mean()
        assert means == {k: pytest.approx(expected[k]) for k in range(11)}
        assert expected[7] - expected[0] == pytest.approx(0.07, abs=0.006)
    weights, neurons = (figures.gap_by_decile(deciles, structure).axes[0] for structure in ("weight", "filter"))
    assert weights.get_ylim() == neurons.get_ylim()


def test_the_trend_of_the_gap_is_drawn_with_and_without_the_largest(deciles):
    high = deciles.assign(gap=deciles["gap"] + 0.5 * (deciles["target"] == "D10"))
    whole, without = (line for line in figures.gap_by_decile(high, "weight").axes[0].get_lines() if "D10" in line.get_label())
    part = high[high["structure"] == "weight"]
    for line, rows in ((whole, part), (without, part[part["decile"] < 10])):
        slope = text.seed_slopes(rows.assign(points=100 * rows["gap"]), "decile", "points")
        x, y = line.get_data()
        assert 100 * np.diff(y) / np.diff(x) == pytest.approx(slope.value)
        assert f": {slope.value:.2f} [" in line.get_label()
    assert whole.get_xdata()[-1] == 10 and without.get_xdata()[-1] == 9 and np.diff(whole.get_ydata()) > 0.2


def test_the_last_quarter_is_enlarged_about_what_the_epochs_end_at(study):
    made = study("figure1-vgg11")
    above, below = figures.accuracy_by_epoch(made).axes
    last = made.epochs["epoch"].max()
    assert above.get_xlim() == (0, last) and below.get_xlim() == (last - last // 4, last)
    late = made.epochs[made.epochs["epoch"] >= last - last // 4].groupby(["label", "epoch"])["test_accuracy"].mean()
    low, high = below.get_ylim()
    assert low < late.min() and late.max() < high < low + np.ptp(above.get_ylim())


def test_the_scale_of_the_gap_holds_every_interval_whole(deciles):
    rows = deciles.assign(gap=deciles["gap"] + 0.1 * (deciles["seed"] == 0))
    ends = [end for _, each in rows.groupby(["structure", "target"])["gap"] for end in figures.t_interval(each)[1:3]]
    for figure in (figures.gap_by_decile(rows, "weight"), figures.gap_by_magnitude(rows, "filter")):
        low, high = figure.axes[0].get_ylim()
        assert low < min(ends) and max(ends) < high


def test_gap_by_magnitude_takes_the_last_event_by_epoch_35(deciles):
    ax = figures.gap_by_magnitude(deciles, "weight").axes[0]
    named = {name: bars[0].get_xydata()[0] for bars, name in zip(*ax.get_legend_handles_labels())}
    # epoch 35 is 9 at a quarter of the length, and there is an event at 9
    assert tuple(named["D3"]) == (309.0, pytest.approx(0.6 + 0.03 - 0.9, abs=0.02)) and len(named) == 11


def test_magnitude_deciles_against_the_fifth_and_the_exponential(study):
    made = study("figure2")
    lines = drawn(figures.magnitude_deciles(measures.decile_magnitudes(made.events, made.epochs)))
    for name in ("single weights", "neurons (l2 norm)"):
        assert lines[name].get_ydata() == pytest.approx((1 + np.arange(10)) / 5)
    exponential = measures.exponential_deciles()
    assert lines["exponential distribution"].get_ydata() == pytest.approx(exponential / exponential[4])


def test_the_last_quarter_holds_every_run_that_is_drawn_and_leaves_room_though_not_every_epoch_is_tested(study):
    made = study("figure1-vgg11").restrict(["none", "L r=40"], (0, 1))
    last = made.epochs["epoch"].max()
    epochs = made.epochs.assign(test_accuracy=(0.5 + 0.1 * made.epochs["seed"]).where(made.epochs["epoch"] != last - 1))
    low, high = figures.accuracy_by_epoch(replace(made, epochs=epochs), made.labels).axes[1].get_ylim()
    assert (low, high) == pytest.approx((0.5 - 0.025, 0.6 + 0.025)), "a quarter of what the runs' ends span on either side"


def test_figure3_tells_structured_from_unstructured(study):
    whole = study("figure3")
    figure = figures.accuracy_by_epoch(whole, whole.labels, 0.8)
    assert legend(figure) == ["no pruning", "prune L, E[BN], 4%", "prune L, E[BN], 13%", "prune L, E[BN], one shot",
                              "prune L, weights, 4%", "prune L, weights, 13%", "prune L, weights, one shot"]
    dashed = {line.get_label() for line in figure.axes[0].get_lines() if line.is_dashed()}
    assert dashed == {name for name in legend(figure) if "weights" in name}


@pytest.mark.parametrize("column", ["mean_instability", "final_accuracy"])
def test_figure4_draws_means_by_rate(study, column):
    runs, figure = study("figure4").runs, figures.by_rate(study("figure4"), column)
    lines = drawn(figure)
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
        "no pruning", "prune L, l2, 13%", "zeroing 0", "zeroing 50 (18 here)"]
    mini = experiments.profile("mini")
    data = experiments.data_spec(mini, "cifar10-folder", "f" * 64)
    wanted = experiments.figures.figure5(mini, data, [10])
    there = figures.Study(experiments.experiment("figure5"), mini, wanted, [], *[pd.DataFrame()] * 8)
    assert figures.legend_name(there, "zeroing 1500") == "zeroing 1500 (480 here)"
    assert figures.legend_name(there, "transient 50") == "transient 50"
    clean = figures.traces(whole, "test_accuracy_clean")
    assert set(clean["accuracy"]) == {0.55} and not (clean["epoch"] % 1).any()


def test_falls_are_drawn_for_both_labels_of_a_shared_run_and_each_strike_after_the_other(study):
    traces = figures.traces(study("figure5"))
    falls = traces[traces["epoch"] % 1 > 0]
    counts = falls.groupby("label").size()
    assert counts["zeroing 50"] == counts["zeroing 1105"] > 0
    assert not falls.duplicated(["label", "seed", "epoch"]).any()


def test_figure_a2_draws_every_method(study):
    lines = drawn(figures.instability_by_epoch(study("figureA2")))
    assert "prune S, l2, 4%" in lines and "no pruning" not in lines
    assert lines["prune L, E[BN], 13%"].get_ydata() == pytest.approx(0.2 + 0.1 * 0.9 / 7 + 0.001)


def test_figure_a2_has_the_difference_between_the_scores_beside_it(study):
    made = study("figureA2")
    below = figures.instability_by_epoch(made).axes[1]
    each = measures.instability(made.events).groupby(["label", "epoch"])["instability"].mean()
    assert below.get_lines()[0].get_ydata() == pytest.approx((each["S r=4 l2"] - each["S r=4"]).to_numpy())
    mean = measures.instability(made.events).groupby(["label", "seed"])["instability"].mean()
    expected = 100 * (mean["S r=4 l2"] - mean["S r=4"]).mean()
    assert f"l2 less E[BN]: {expected:.2f} [" in below.get_title(loc="left")
    without = made.restrict(["S r=4", "L r=40"])
    assert figures.instability_by_epoch(without).axes[1].get_title(loc="left").endswith("l2 less E[BN]")


def test_figure_a1_is_of_the_last_eight_layers(study):
    rows = measures.last_layers(study("figureA1").histograms)
    figure = figures.activation_histograms(rows)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles[:2] == ["conv 9: KS 0.04 → 0.14", "conv 10: KS 0.04 → 0.15"] and len(figure.axes) == 8
    lines = drawn(figures.distance_by_layer(measures.normality(rows)))
    assert lines["after training"].get_xdata().tolist() == list(range(9, 17))
    assert lines["before training"].get_ydata() == pytest.approx(0.005 * np.arange(8, 16))


def test_one_run(study):
    run = study("figure1-vgg11").restrict(["L r=40"], 1)
    line = drawn(figures.single_run(run, "L r=40", 1))["test"]
    assert line.get_ydata().min() == pytest.approx(run.events["t_post"].min())


def test_stability_is_joined_in_the_order_of_the_periods_with_the_first_and_last_named(tmp_path):
    made = study_of(stock(tmp_path / "results", "final-figure3"), "final-figure3", "smoke")
    ax = figures.accuracy_by_stability(made).axes[0]
    joined = [line for line in ax.get_lines() if line.get_alpha() == 0.5]
    assert [len(line.get_xdata()) for line in joined] == [
        len({made.spec(label).id for label in made.labels if label.startswith(target)}) for target in "SRL"]
    falls = made.runs[made.runs["target"] == "L"].groupby("label")["mean_relative_instability"].mean()
    assert list(joined[2].get_xdata()[[0, -1]]) == pytest.approx([1 - falls["L r=4"], 1 - falls["L r=300"]])
    assert [text.get_text() for text in ax.texts] == ["4", "300"] * 3
    scale = ax.xaxis.get_transform()
    assert scale.inverted().transform(scale.transform([0.5, 0.999, 1, 1.003])) == pytest.approx([0.5, 0.999, 1, 1.003])
    wide = replace(made, runs=made.runs.assign(mean_relative_instability=made.runs["mean_relative_instability"] - 0.04))
    ax = figures.accuracy_by_stability(wide).axes[0]
    ax.figure.draw_without_rendering()
    words = [tick.get_window_extent() for tick in ax.get_xticklabels()]
    assert len(words) > 3 and all(left.x1 < right.x0 for left, right in pairwise(words)), "no two ticks touch"


@pytest.mark.parametrize(("name", "draw"), [
    ("figure1-vgg11", figures.accuracy_by_epoch), ("figure1-vgg11", figures.accuracy_by_instability),
    ("figure1-vgg11", lambda made: figures.single_run(made, "L r=40", 1)), ("figureA2", figures.instability_by_epoch),
    ("figure3", lambda made: figures.accuracy_by_epoch(made, made.labels)),
    ("figure4", lambda made: figures.by_rate(made, "final_accuracy")),
    ("figure5", lambda made: figures.gains(measures.gains(made.runs), {
        label: f"a long name of {label} (480 here)" for label in made.labels if label != "none"})),
    ("figureA1", lambda made: figures.activation_histograms(measures.last_layers(made.histograms))),
    ("figureA1", lambda made: figures.distance_by_layer(measures.normality(made.histograms))),
])
def test_no_word_goes_beyond_the_picture(study, name, draw):
    figure = draw(study(name))
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure).draw()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.01


def test_a_picture_grows_by_what_would_be_cut_off_and_by_nothing_else(tmp_path):
    for name, label in (("short", "a short name"), ("long", 3 * "a name too long for its axis, ")):
        figures.save(figures.axes(y=label).figure, tmp_path, name, pd.DataFrame())
    short, long = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("short", "long"))
    assert short.shape[:2] == (840, 1040) and long.shape[0] > 1000 and long.shape[1] == 1040
    assert (long[[0, -1], :, :3] == 1).all(), "ink at the edge"


def test_what_is_missing_is_left_out_and_named(tmp_path):
    store = stock(tmp_path / "results", "figure4", seeds=1, but=("R r=40", "S r=60 l2"))
    made = study_of(store, "figure4", "smoke", seeds=1)
    lines = drawn(figures.by_rate(made, "final_accuracy"))
    assert len(lines["prune R"].get_xdata()) == len(lines["prune S, l2"].get_xdata()) == \
        len(lines["prune L, l2"].get_xdata()) - 1
    assert "Missing: 2 of 26 runs (R r=40 and S r=60 l2: seed 0)" in text.caption(made)


def test_of_many_configurations_that_lack_the_same_seeds_the_first_is_named_and_the_others_counted(tmp_path):
    made = study_of(stock(tmp_path / "results", "figure4", seeds=1, but=("R r=40",)), "figure4", "smoke", seeds=2)
    assert "Missing: 27 of 52 runs (R r=40: seed 0, 1; none and 24 more: seed 1)." in text.caption(made)


@pytest.mark.parametrize("figure", ["figure1-vgg11", "figure5", "figure3"])
def test_methods_of_a_figure_have_colours_of_their_own(figure):
    runs = experiments.experiment(figure).runs(experiments.profile("paper"), DATA, [0])
    # unstructured pruning has its structured partner's colour, dashed
    printed = [spec for _, spec in runs if not (spec.pruning and spec.pruning.structure == "weight")]
    assert len({figures.method_colour(spec) for spec in printed}) == len(printed)


def test_a_method_has_one_colour_at_every_profile(study):
    printed = study("figure1-vgg11").printed
    assert figures.method_colour(printed["S r=4"]) != figures.method_colour(printed["S r=40"])
    ax = figures.accuracy_by_epoch(study("figure1-vgg11")).axes[0]
    colours = {line.get_label(): matplotlib.colors.to_hex(line.get_color()) for line in ax.get_lines()}
    assert colours["prune S, E[BN], 4%"] == figures.method_colour(printed["S r=4"]).lower()


def test_what_was_pruned_before_training_is_a_level_and_no_point_of_the_correlation(tmp_path):
    store, size = Store(tmp_path), experiments.profile("smoke")
    data = experiments.data_spec(size, "digits", "f" * 64)
    for run in experiments.experiment("final-figure2").runs(size, data, range(3)):
        if not run.label.startswith("ResNet18"):
            write(store, run, 0.6 + 0.01 * run.spec.seed, 0.1, "smoke")
    vgg11 = study_of(store, "final-figure2", seeds="0-2").restrict(["none", "S r=4", "S r=40", "R r=40", "L r=40", "scratch"])
    ax = figures.accuracy_by_instability(vgg11).axes[0]
    levels = [line.get_label() for line in ax.get_lines() if line.get_linestyle() == ":"]
    assert levels == ["no pruning", "prune S, l2, before training"] and ax.get_xscale() == "log"
    assert len(vgg11.runs) == 18 and len(ax.collections) >= 4
