"""Sentences and tables: the right numbers, and nothing claimed where there are too few runs."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from made_up import DATA, SMOKE, fill, stock, write
from scipy import stats

from gstlib import experiments
from gstlib.reading import figures, measures, text
from gstlib.reading.study import study
from gstlib.store import Store


@pytest.fixture(scope="module")
def figure1(tmp_path_factory):
    return study(fill(tmp_path_factory.mktemp("made-up") / "results"), "figure1-vgg11")


def cells(table):
    """A Markdown table's rows by their first cell; of methods the labels."""
    rows = [[re.sub(r".* \(`(.+)`\)", r"\1", cell.strip()) for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_numbers_are_shown_with_their_interval_and_logarithms_as_ratios():
    nan = float("nan")
    assert text.number(1, 0.5, 2, "points", 0.9) == "1.00 [0.50, 2.00] points (90% interval)"
    assert text.number(1, nan, nan, "points") == "1.00 points" and text.number(nan, nan, nan, "points") == "–"
    assert text.number(0, -1, 1, text.RATIO) == "1.00 [0.10, 10.00] times"
    assert text.number(3.2, 2.3, 4.1, text.RATIO) == "1585 [200, 12589] times"


def test_a_row_a_configuration(figure1):
    rows = cells(text.markdown_table(figure1))
    values = figure1.runs[figure1.runs["label"] == "L r=40"]["final_accuracy"] * 100
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert rows["L r=40"][2] == f"{values.mean():.1f} [{low:.1f}, {high:.1f}]"
    assert rows["none"][:2] == ["3", "0"] and rows["none"][4] == "–" and rows["none"][5] == "0.1 [0.1, 0.1]" and rows["none"][6] == "–"


def test_a_method_has_the_name_of_the_figures_and_the_label_of_the_commands(figure1):
    assert "| prune L, E[BN], 13% (`L r=40`)" in text.markdown_table(figure1)
    assert "| no pruning (`none`)" in text.comparison(figure1, [("none", "S r=4")])
    assert text.method(figure1, "zeroing 50") == "zeroing 50"


def test_the_outcome_states_each_configuration_s_means_or_of_many_the_extremes(figure1, tmp_path):
    found = text.outcome(figure1)
    means = 100 * figure1.runs.groupby("label")[["final_accuracy", "mean_instability"]].mean()
    assert f"prune L, E[BN], 13% {means['final_accuracy']['L r=40']:.1f}%" in found
    assert f"no pruning {means['final_accuracy']['none']:.1f}%" in found and found.count("no pruning") == 1
    assert f"prune S, E[BN], 4% {means['mean_instability']['S r=4']:.2g} points" in found
    assert text.outcome(figure1.restrict(["none"])) == ""
    many = study(stock(tmp_path / "results", "figure4", seeds=1), "figure4", seeds=1)
    best = many.runs.groupby("label")["final_accuracy"].mean().idxmax()
    assert text.legend_name(many, best) in text.outcome(many) and text.outcome(many).count(";") <= 3


def test_configurations_are_compared_seed_by_seed(figure1):
    rows = cells(text.comparison(figure1, [("L r=40", "none"), ("S r=4", "S r=7")]))
    runs = figure1.runs.set_index(["label", "seed"])["final_accuracy"] * 100
    test = stats.ttest_rel(runs["L r=40"], runs["none"])
    low, high = test.confidence_interval(0.95)
    assert rows["L r=40"] == ["none", f"{(runs['L r=40'] - runs['none']).mean():+.2f} [{low:+.2f}, {high:+.2f}]",
                              f"{test.pvalue:.2g}", "3"]
    assert rows["S r=4"] == ["S r=7", "not run", "–", "0"]
    ratio = cells(text.comparison(figure1, [("L r=40", "S r=40")], "log_instability"))["L r=40"][1]
    each = figure1.runs.set_index(["label", "seed"])["mean_instability"]
    expected = np.exp(np.log(each["L r=40"] / each["S r=40"]).mean())
    assert ratio.startswith(f"{expected:.2f} [") and ratio.endswith("times")


def test_training_loss_stands_beside_test_accuracy_both_less_those_without_pruning(figure1):
    worse = figure1.runs.assign(log_train_loss=np.log10(np.where(figure1.runs["label"] == "L r=40", 0.2, 0.1)))
    rows = cells(text.training_beside_test(replace(figure1, runs=worse)))
    assert [label for label in rows if label in figure1.labels] == figure1.labels[1:]
    assert rows["L r=40"][2] == "2.00 [2.00, 2.00] times" and rows["S r=4"][2] == "1.00 [1.00, 1.00] times"
    assert rows["L r=40"][1] == cells(text.comparison(figure1, [("L r=40", "none")]))["L r=40"][1] + " points"


def test_a_seed_that_lacks_a_run_is_left_out_of_a_comparison(tmp_path):
    store = fill(tmp_path / "results")
    gone = next(r for r in experiments.figures.figure1_vgg11(SMOKE, DATA, [1]) if r.label == "none")
    store.file(gone.spec.id).unlink()
    assert cells(text.comparison(study(store, "figure1-vgg11"), [("L r=40", "none")]))["L r=40"][-1] == "2"


def test_the_slope_within_seeds_and_the_paper_s_pooled_r_beside_it(figure1):
    pruned = figure1.runs.dropna(subset="mean_instability")
    test = stats.pearsonr(pruned["mean_instability"], pruned["final_accuracy"])
    assert text.pooled(figure1.runs) == (pytest.approx(test.statistic), pytest.approx(test.pvalue), 12)
    slopes = [stats.linregress(np.log10(runs["mean_instability"]), 100 * runs["final_accuracy"]).slope
              for _, runs in pruned.groupby("seed")]
    assert text.accuracy_slopes(figure1).value == pytest.approx(np.mean(slopes))
    sentence = text.correlation_sentence(figure1)
    assert "Among these ways of pruning" in sentence and "(3 seeds)" in sentence and "not independent" in sentence
    few = text.correlation_sentence(figure1.restrict(["none", "L r=40"], 0))
    assert few == "Only 1 pruned runs are stored, too few for a slope."


def test_a_trend_is_the_mean_slope_of_complete_seeds(tmp_path):
    made = study(stock(tmp_path, "figure2"), "figure2")
    rows = measures.by_decile(made.runs, made.events, made.epochs)
    rows = rows[rows["structure"] == "weight"]
    gone = rows[~((rows["seed"] == 2) & (rows["target"] == "D4"))]
    assert text.trend(rows, "decile", "gap", "per decile").endswith("(3 seeds).")
    assert text.trend(gone, "decile", "gap", "per decile").endswith("(2 seeds).")
    assert text.trend(rows.head(0), "decile", "gap", "per decile") == "too few runs for a trend."
    # one seed's level tells nothing of the order within seeds, and claims look within them
    apart = rows.assign(gap=rows["decile"] / 100 + rows["seed"])
    assert "$\\rho = 1.00$" in text.trend(apart, "decile", "gap", "per decile")
    told = text.decile_trend(rows)
    assert told.count("without D10") == 3 and told.count("test accuracy") == told.count("training accuracy") == 2
    assert told.count("Spearman") == 4 and "nan" not in told, "the made-up training accuracy is constant"


def test_what_bf16_changes_is_told_seed_by_seed(tmp_path):
    store = Store(tmp_path)
    finals = {"none": (0.5, 0.6, 0.7), "none bf16": (0.502, 0.602, 0.702),  # float32 is smoke's own
              "L r=40": (0.5, 0.6, 0.7), "L r=40 bf16": (0.51, 0.61, 0.71)}
    falls = {"L r=40": (0.1, 0.2, 0.3), "L r=40 bf16": (0.44, 0.45, 0.49)}
    for run in experiments.figures.precision(SMOKE, DATA, range(3)):
        write(store, run, finals[run.label][run.spec.seed], falls.get(run.label, (0,) * 3)[run.spec.seed])
    told = text.precisions(study(store, "precision"))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines() if line.startswith("|")]
    half = stats.t.ppf(0.975, 2) * 10 / 3**0.5
    assert ["none", "3", "accuracy, %", f"60.00 [{60 - half:.2f}, {60 + half:.2f}]",
            f"60.20 [{60.2 - half:.2f}, {60.2 + half:.2f}]", "0.20 [0.20, 0.20]"] in rows
    assert rows[-1][2:4] == ["instability", f"20.00 [{20 - half:.2f}, {20 + half:.2f}]"]
    assert told.endswith("1 of 2 mean accuracies differ by no more than 0.3 points; 0 of 1 mean "
                         "instabilities in bf16 lie within the interval of those in float32.")


def test_one_precision_alone_compares_nothing(tmp_path):
    store = Store(tmp_path)
    write(store, experiments.figures.figure2(SMOKE, DATA, [0])[0], 0.5, 0.1)
    assert "run precision --profile smoke" in text.precisions(study(store, "precision"))
    assert "run precision --profile smoke" in text.precisions(study(fill(tmp_path / "other"), "precision"))


def test_provenance_of_anyone_holds_no_markup(tmp_path):
    store = fill(tmp_path)
    made = study(store, "figure1-vgg11")
    about = made.provenance.assign(device="<b>[x](y)`$z$")
    assert "Device: ‹b›(x)(y)''z'." in text.caption(replace(made, provenance=about))


def test_a_rate_of_less_than_half_a_per_cent_is_not_said_to_be_none():
    runs = dict(experiments.experiment("final-figureC3").runs(experiments.profile("mini"), DATA, [0]))
    names = [text.legend_name(SimpleNamespace(spec=runs.get), label) for label in ("S r=1 10%", "S r=1 6%")]
    assert names == ["prune S, l1, 0.2%", "prune S, l1, 0.1%"]


def test_a_caption_names_the_seeds_that_more_than_one_kind_of_processor_trained(figure1):
    assert "kind of processor" not in text.caption(figure1)
    about = figure1.provenance.assign(instructions="AVX512")
    for column in ("device", "instructions"):
        mixed = about.assign(**{column: about[column].where(about["run"] != about["run"].iloc[0], "another")})
        seed = about["seed"].iloc[0]
        assert text.caption(replace(figure1, provenance=mixed)).endswith(f"until the first event: seed {seed}.")


def test_a_caption_states_what_its_runs_had_and_counts_each_run_once(tmp_path):
    profile = experiments.profile("mini")
    data = experiments.data_spec(profile, "cifar10-folder", "f" * 64)
    store = Store(tmp_path)
    for run in experiments.experiment("figure5").runs(profile, data, [10]):
        if run.label in ("none", "zeroing 1105"):
            write(store, run, 0.6, 0.1, "mini")
    found = study(store, "figure5", "mini", seeds=[10])
    words = text.caption(found)
    assert "vgg11: width 1/2, 1,024 training images, 81 epochs, events tested on 4,000 images." in words
    assert len(found.wanted) == 13 and f"Missing: 8 of {len({run.spec.id for run in found.wanted})} runs" in words
    assert "full width, all training images" in text.caption(
        replace(found, wanted=[run._replace(spec=found.printed[run.label]) for run in found.wanted]))


def test_events_that_took_nothing_and_events_that_raised_accuracy_are_told(figure1):
    assert text.empty_events(figure1) == ""
    events = figure1.events.copy()
    mine = events.index[events["label"] == "S r=40"]
    events.loc[mine[: len(mine) // 2], "removed"] = 0
    events.loc[mine[-1], "t_post"] = 0.9
    changed = replace(figure1, events=events)
    share = len(mine) // 2 / len(mine)
    assert text.empty_events(changed).startswith(f"{len(mine) // 2} of {len(events)} events")
    left = len(mine) - len(mine) // 2
    assert cells(text.markdown_table(changed))["S r=40"][-1] == f"{(left - 1) / left:.0%}, {share:.0%} take nothing"
    assert cells(text.markdown_table(figure1))["S r=40"][-1] == "100%"


def test_what_does_not_learn_its_images_is_named_with_the_lowest_of_its_runs(figure1):
    whole = replace(figure1, runs=figure1.runs.assign(final_train_accuracy=1.0))
    assert text.not_learnt([whole]).startswith("Every configuration")
    below = whole.runs.assign(final_train_accuracy=whole.runs["final_train_accuracy"].where(whole.runs["label"] != "S r=4", 0.998))
    said = text.not_learnt([whole, replace(whole, runs=below)])
    assert said.count("\n- ") == 1 and said.endswith("prune S, E[BN], 4% (`S r=4`) 99.8%"), said
    nothing = figure1.restrict([])
    assert text.not_learnt([nothing]) == "" and text.not_learnt([nothing, whole]).startswith("Every configuration that was run")


def test_what_a_profile_cuts_to_one_run_is_told_once_and_by_one_name_everywhere(tmp_path):
    made = study(stock(tmp_path / "results", "figure5"), "figure5")
    pairs = [(label, "none") for label in made.labels[1:]]
    for words in (text.markdown_table(made), text.comparison(made, pairs), text.training_beside_test(made)):
        assert words.count("zeroing 50 (18 here)") == 1 and "1500" not in words and "1105" not in words, words
    assert "1500" not in text.outcome(made) and "1105" not in text.outcome(made)
    assert figures.drawn(made, made.labels) == text.distinct(made)
