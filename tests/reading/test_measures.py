"""Every measure against a count by hand, and that figure, text and claim share it."""

import math
import re

import numpy as np
import pandas as pd
import pytest
from made_up import stock
from scipy import stats

from gstlib import claims
from gstlib.claims import verdicts
from gstlib.reading import figures, measures, text
from gstlib.reading.study import study

KEY = {"label": "L r=40", "seed": 0, "run": "a"}


def events(**columns):
    return pd.DataFrame(columns | {name: value for name, value in KEY.items() if name not in columns})


def test_every_strike_is_an_event_with_its_own_accuracies():
    each = measures.instability(events(epoch=[3, 3, 7], layer=["x", "y", "x"], t_pre=[0.8, 0.6, 0.4],
                                       t_post=[0.6, 0.6, 0.5]))
    assert each["instability"].tolist() == pytest.approx([0.2, 0, 0.1])
    assert each["relative_instability"].tolist() == pytest.approx([0.25, 0, -0.25])


def tables(accuracy=(0.9, 0.7, np.nan, 0.65), t_pre=(0.7, 0.3), t_post=(0.3, 0.3), images=5000):
    epochs = pd.DataFrame({"epoch": range(len(accuracy)), "test_accuracy": accuracy, "train_accuracy": 1.0,
                           "parameters": 7})
    struck = pd.DataFrame({"epoch": 1, "layer": list("ab")[:len(t_pre)], "t_pre": t_pre, "t_post": t_post})
    final = pd.DataFrame([{"images": images, "accuracy": 0.66, "loss": 1.5, "train_accuracy": 0.9, "train_loss": 0.2}])
    return {"epoch": epochs, "event": struck, "final": final}


def test_a_run_in_one_row():
    row = measures.summary(tables(), 4000)
    assert (row["final_accuracy"], row["final_train_loss"], row["parameters"]) == (0.66, 0.2, 7)
    assert row["gap"] == pytest.approx(0.66 - 0.9) and row["events"] == 2
    assert row["best_accuracy"] == 0.65, "0.9 and 0.7 were measured before the last event"
    assert row["mean_instability"] == pytest.approx(0.2) and row["log_instability"] == pytest.approx(math.log10(0.2))
    assert row["mean_relative_instability"] == pytest.approx(0.4 / 0.7 / 2)
    unpruned = measures.summary(tables() | {"event": pd.DataFrame()}, 4000)
    assert unpruned["best_accuracy"] == 0.9 and unpruned["events"] == 0 and math.isnan(unpruned["log_instability"])
    assert measures.summary(tables(t_post=(0.3, 0.68)), 4000)["best_accuracy"] == 0.68, "right after the last event"


@pytest.mark.parametrize(("test_size", "smallest"), [(4000, 1 / 8000), (None, 1 / 10000)])
def test_no_instability_counts_as_half_the_smallest_in_logarithms(test_size, smallest):
    row = measures.summary(tables(t_pre=(0.7, 0.7), t_post=(0.7, 0.7)), test_size)
    assert row["mean_instability"] == 0 and 10 ** row["log_instability"] == pytest.approx(smallest / 2)


def test_recovery_of_clusters_by_hand():
    epochs = events(epoch=range(14), test_accuracy=[.5, .6, .5, .3, .59, .6, .7, .2, np.nan, .8, .4, .5, .5, .5])
    struck = events(epoch=[1, 2, 2, 6, 9], layer=list("abcaa"), removed=1,
                    t_pre=[.6, .5, .4, .7, .8], t_post=[.5, .4, .3, .2, .8])
    found = measures.recovery(epochs, struck)
    assert found["first"].tolist() == [1, 6, 9] and found["last"].tolist() == [2, 6, 9]
    assert found["removed"].tolist() == [3, 1, 1] and found["t_post"].tolist() == [.3, .2, .8]
    # back at .6 at epoch 5, 3 after the cluster's last; at .7 at epoch 9, the next event's own; the last never fell
    assert found["wait"].tolist() == [3, 3, 0] and found["recovered"].all()
    never = measures.recovery(epochs, struck.assign(t_pre=[.95, .5, .4, .9, .81]))
    assert never["wait"].tolist() == [4, 3, 4] and not never["recovered"].any(), "cut off by the next or the end"


def test_share_recovered_counts_what_was_cut_off_while_it_was_seen():
    # 4 clusters: one back after 1; one cut off after 2; of the two left one back after 3, one after 8
    wait, recovered = [1, 2, 3, 8], [True, False, True, True]
    assert measures.share_recovered(wait, recovered, 2) == pytest.approx(1 / 4)
    assert measures.share_recovered(wait, recovered, 5) == pytest.approx(1 - 3 / 4 * 1 / 2)
    curve = stats.ecdf(stats.CensoredData(uncensored=[1, 3, 8], right=[2])).cdf
    assert measures.share_recovered(wait, recovered, 5) == pytest.approx(curve.evaluate(5))
    assert measures.share_recovered([4, 4], [False, False]) == 0 and measures.share_recovered([0], [True]) == 1


def test_tenths_and_magnitudes_are_those_of_the_event_at_or_before_epoch_35():
    epochs = events(epoch=range(55))
    struck = events(epoch=[31, 34, 37], structure="weight", target="D3", mean_score=[1.0, np.nan, 3.0],
                    **{f"decile_{k}": [1, (k + 1) ** 2, 5] for k in range(10)})
    found = measures.decile_magnitudes(struck, epochs).set_index("tenth")
    assert found["mean"].tolist() == [(k + 1) ** 2 for k in range(10)] and found.loc[9, "relative"] == 81 / 25
    shape = measures.decile_shapes(struck, epochs).iloc[0]
    assert shape["ninth_over_fifth"] == pytest.approx(math.log10(81 / 25)) and shape["exponential_fit"] < 0.95
    runs = pd.DataFrame([KEY | {"target": "D3"}, KEY | {"target": "none"}, KEY | {"target": "D9-remaining"}])
    rows = measures.by_decile(runs, struck, epochs)
    assert rows["decile"].tolist() == [3] and rows["magnitude"].tolist() == [1], "the event at 34 took nothing"
    # at a quarter of the length epoch 35 is 9
    assert measures.magnitude_event(struck.assign(epoch=[5, 9, 10]), events(epoch=range(14)))["epoch"].item() == 9


def test_fit_of_an_exponential():
    def fit(quantile):
        means = quantile((np.arange(100_000) + 0.5) / 100_000).reshape(10, -1).mean(1)
        return measures.exponential_fit(means[None])[0]

    assert fit(stats.expon(scale=0.02).ppf) == pytest.approx(1, abs=1e-4)
    assert fit(stats.halfnorm.ppf) == pytest.approx(0.926, abs=1e-3)
    assert fit(stats.uniform.ppf) < 0.6
    drawn = np.sort(np.random.default_rng(0).exponential(size=10**6)).reshape(10, -1).mean(1)
    assert measures.exponential_deciles() == pytest.approx(drawn, rel=0.01)


def histogram(sd=1.0, off=()):
    return pd.DataFrame([KEY | {"epoch": epoch, "layer": f"bn{n}", "layer_index": n, "ks": ks(n),
                                "sd": 0.6 if (epoch, n) in off else sd, "left": left, "right": left + 1, "count": 1}
                         for epoch, ks in ((-1, lambda i: 0.05), (80, lambda i: i / 100))
                         for n in range(16) for left in (-5, 0)])


def test_normality_of_the_last_eight_layers():
    row = measures.normality_by_run(histogram()).iloc[0]
    assert (row["ks_before"], row["ks_after"], row["ks_rho"]) == pytest.approx((0.05, 0.115, 1))
    layers = measures.normality(histogram())
    assert len(layers) == 16 and sorted(layers["number"].unique()) == list(range(9, 17)) and text.refused(layers) == ""


def test_a_layer_that_was_not_normalised_is_refused_with_a_sentence():
    made = histogram(off=[(-1, 12)])
    layers = measures.normality(made)
    assert layers["ks"].isna().sum() == 1
    row = measures.normality_by_run(made).iloc[0]
    assert math.isnan(row["ks_before"]) and row["ks_after"] == pytest.approx(0.115)
    assert "1 of 16 measurements (convolution 13)" in text.refused(layers)
    assert measures.normality(histogram(sd=1.021))["ks"].isna().all()
    assert measures.normality(histogram(sd=0.981))["ks"].notna().all()
    titles = [ax.get_title(loc="left") for ax in figures.activation_histograms(measures.last_layers(made)).axes]
    assert titles[4] == "conv 13: KS refused → 0.12"


def test_pattern_is_the_correlation_with_the_reference_at_the_same_seed():
    falls = {("L l2 weights", 0): [.1, .4, .2], ("z", 0): [.2, .8, .4],
             ("L l2 weights", 1): [.3, .1, .2], ("z", 1): [.1, .3, .2]}
    rows = pd.concat([pd.DataFrame({"label": label, "seed": seed, "run": f"{label}{seed}", "epoch": [1, 1, 4],
                                    "layer": list("aba"), "t_pre": 0.9, "t_post": 0.9 - np.array(fall)})
                      for (label, seed), fall in falls.items()])
    found = measures.pattern(rows, "L l2 weights").set_index(["label", "seed"])["pattern"]
    assert found["z", 0] == pytest.approx(1) and found["z", 1] == pytest.approx(-1) and found["L l2 weights", 0] == 1


def test_flatness_in_one_row_a_run():
    two = [KEY, KEY | {"seed": 1, "run": "b"}]
    measured = {"loss": 1.5, "trace": 400.0, "relative_mean": 1.75, "relative_worst": 2.5}
    rows = pd.DataFrame([key | measured for key in two])
    eigenvalues = pd.DataFrame([key | {"eigenvalue": value} for key, values in zip(two, ((30, 12, -2), (-1, -2, -3)))
                                for value in values])
    one, other = measures.flatness(rows, eigenvalues).to_dict("records")
    assert (one["curvature"], one["takeuchi"], one["rise_mean"], one["rise_worst"]) == (40, 10, 0.25, 1)
    logs = [one[f"log_{name}"] for name in ("trace", "takeuchi", "curvature")]
    assert logs == pytest.approx([math.log10(400), 1, math.log10(40)])
    assert other["curvature"] == -6 and math.isnan(other["log_curvature"]) and math.isnan(other["log_takeuchi"])
    assert measures.flatness(pd.DataFrame(), pd.DataFrame()).empty


# --- one measure, one definition


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stock(tmp_path_factory.mktemp("shared") / "results", "figure1-vgg11", "figure2", "figure4", "figureA1",
                 "final-figure2")


def seen(store, figure, column, labels):
    """What the claims see: a column's values by configuration, mean over seeds."""
    return verdicts.by_seed(study(store, figure), {column: labels})[column].mean()


def test_instability_of_claim_figure_and_text(store):
    made, labels = study(store, "figure4"), ("S r=4", "L r=100")
    claim = seen(store, "figure4", "mean_instability", labels)
    (line,) = [c.lines[0] for c in figures.by_rate(made, "mean_instability").axes[0].containers
               if c.get_label() == "prune S, E[BN]"]
    assert line.get_ydata()[0] == pytest.approx(claim["S r=4"] / 100)
    assert text.by_seed(made, "S r=4", "mean_instability").mean() == pytest.approx(claim["S r=4"])
    each = measures.instability(made.events)
    assert each.loc[each["label"] == "S r=4", "instability"].mean() == pytest.approx(claim["S r=4"] / 100)


def test_gap_of_claim_and_figure(store):
    made = study(store, "figure2")
    rows = measures.by_decile(made.runs, made.events, made.epochs)
    claim = seen(store, "figure2", "gap", ("D7 filter",))
    lines = [c.lines[0] for c in figures.gap_by_decile(rows, "filter").axes[0].containers]
    drawn = {line.get_xdata()[0]: line.get_ydata()[0] for line in lines}
    assert drawn[7] == pytest.approx(claim["D7 filter"] / 100)


def test_ninth_over_fifth_of_claim_and_figure(store):
    made = study(store, "figure2")
    claim = seen(store, "figure2", "ninth_over_fifth", ("D0 weight",))
    lines = figures.magnitude_deciles(measures.decile_magnitudes(made.events, made.epochs)).axes[0].get_lines()
    drawn = {line.get_label(): line.get_ydata() for line in lines}["single weights"]
    assert math.log10(drawn[8] / drawn[4]) == pytest.approx(claim["D0 weight"]) and drawn[4] == 1


def test_tenths_of_claim_figure_and_text_are_of_the_same_targets_and_means_of_logarithms(store):
    made = study(store, "figure2")
    scale = made.events["target"].map({"D0": 2.0, "D9-remaining": 4.0}).fillna(1.0)
    other = made.events.assign(decile_8=made.events["decile_8"] * scale)
    expected = math.log10(9 / 5) + math.log10(2) / 11  # of eleven targets one, and none of the other reading
    lines = figures.magnitude_deciles(measures.decile_magnitudes(other, made.epochs)).axes[0].get_lines()
    drawn = {line.get_label(): line.get_ydata() for line in lines}["single weights"]
    assert math.log10(drawn[8]) == pytest.approx(expected)
    shapes = measures.decile_shapes(other, made.epochs)
    assert shapes.groupby(["structure", "seed"])["ninth_over_fifth"].mean().to_numpy() == pytest.approx(expected)


def test_normality_of_claim_and_figure(store):
    made = study(store, "figureA1")
    claim = seen(store, "figureA1", "ks_after", ("none",))["none"]
    bars = figures.distance_by_layer(measures.normality(made.histograms)).axes[0].containers
    assert {c.get_label(): c for c in bars}["after training"].lines[0].get_ydata().mean() == pytest.approx(claim)


def test_flatness_of_claim_figure_and_table(store):
    made, labels = study(store, "final-figure2"), ("S r=4", "L r=40")
    claim = 10 ** seen(store, "final-figure2", "log_curvature", labels)
    rows = measures.flatness(made.flatness, made.eigenvalues).merge(made.runs, on=measures.KEYS)
    figure = figures.sharpness_by_instability(made, rows, "curvature", "curvature")
    points = {c.get_label(): c.lines[0] for c in figure.axes[0].containers}
    for label, name in (("S r=4", "prune S, l2, 4%"), ("L r=40", "prune L, l2, 13%")):
        assert points[name].get_ydata()[0] == pytest.approx(claim[label])
        instability = made.runs.loc[made.runs["label"] == label, "log_instability"].mean()
        assert points[name].get_xdata()[0] == pytest.approx(10**instability)
    shown = re.search(r"\| L r=40 +\| 3 +\| (\d+) ", text.flatness_table(rows, labels))[1]
    assert float(shown) == pytest.approx(claim["L r=40"], abs=1)
    assert {line.get_label() for line in figure.axes[0].get_lines() if line.get_linestyle() == ":"} == {
        "no pruning", "prune S, l2, before training"}
    table = text.flatness_correlations(rows)
    pruned = rows.dropna(subset="mean_relative_instability")
    r = stats.pearsonr(pruned["trace"], -pruned["mean_relative_instability"]).statistic
    assert re.search(rf"trace +\| stability +\| {len(pruned)} +\| {r:.2f} ", table) and len(pruned) == 5 * 3


def test_curves_along_eigenvectors_are_means_over_them_and_the_seeds(store):
    made = study(store, "final-figure2")
    curves = made.directions[made.directions["label"] == "L r=40"]
    lines = figures.along_eigenvectors(made, "loss").axes[0].get_lines()
    line = {line.get_label(): line for line in lines}["prune L, l2, 13%"]
    assert line.get_xdata() == pytest.approx(curves["step"].unique())
    assert line.get_ydata() == pytest.approx(curves.groupby("step")["loss"].mean())


def test_recovery_of_claim_and_text(store):
    made = study(store, "figure1-vgg11")
    claim = seen(store, "figure1-vgg11", "recovered", ("L r=40",))["L r=40"]
    run = made.restrict(["L r=40"], 0)
    clusters = measures.recovery(run.epochs, run.events)
    assert measures.share_recovered(clusters["wait"], clusters["recovered"]) == claim == 1
    assert (clusters["wait"] == 1).all(), "made-up accuracy is back at the next epoch"


def test_slope_of_claim_and_sentence(store):
    made = study(store, "figure1-vgg11")
    row = claims.evaluate(store, "smoke").set_index("id").loc["C1"]
    found = text.accuracy_slopes(made)
    assert (found.value, found.low, found.n) == pytest.approx((row["small_estimate"], row["small_low"], row["small_n"]))
    assert f"{found.value:+.2f} [{found.low:+.2f}" in text.correlation_sentence(made)


def test_gains_are_over_the_unpruned_run_of_the_same_seed_in_the_same_circumstances():
    runs = pd.DataFrame([("none", "none", 0, "x", 0.50), ("none", "none", 1, "x", 0.60), ("a", "L", 0, "x", 0.53),
                         ("a", "L", 1, "x", 0.58), ("a", "L", 2, "x", 0.9), ("b", "L", 0, "y", 0.7)],
                        columns=["label", "target", "seed", "circumstances", "final_accuracy"])
    found = measures.gains(runs)
    assert found["gain"].tolist() == pytest.approx([0.03, -0.02]) and set(found["label"]) == {"a"}


def test_stability_and_accuracy_of_each_period_by_another_implementation():
    rng = np.random.default_rng(0)
    runs = pd.DataFrame({"run": range(24), "retrain": [5, 10] * 12, "rate": [0.1, 0.2] * 12,
                         "mean_relative_instability": rng.uniform(0, 0.02, 24), "final_accuracy": rng.uniform(0.8, 0.9, 24)})
    runs.loc[24] = [24, 0, 0.0, math.nan, 0.7]  # never pruned
    found = measures.stability_and_accuracy(runs).set_index("retrain")
    assert list(found.index) == [5, 10] and found["runs"].tolist() == [12, 12] and found["rate"].tolist() == [0.1, 0.2]
    for period, row in found.iterrows():
        part = runs[runs["retrain"] == period]
        x, y = 1 - part["mean_relative_instability"], part["final_accuracy"]
        expected = stats.pearsonr(x, y)
        assert row["r"] == pytest.approx(expected.statistic)
        assert [row["r_low"], row["r_high"]] == pytest.approx(list(expected.confidence_interval(0.95)))
        # tau from its definition: concordant less discordant pairs
        signs = [np.sign(a - b) * np.sign(c - d) for a, c in zip(x, y) for b, d in zip(x, y)]
        assert row["tau"] == pytest.approx(sum(signs) / (12 * 11)) and row["tau_low"] < row["tau"] < row["tau_high"]
    few = measures.stability_and_accuracy(runs[runs["run"] < 6])
    assert few["r"].isna().all() and few["runs"].tolist() == [3, 3]
