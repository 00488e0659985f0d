"""Studies from a store: which runs, which columns, what is missing, and which command makes it."""

import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
from made_up import ABOUT, DATA, SMOKE, fill, rows, stock, write

from gstlib import experiments
from gstlib.__main__ import parser
from gstlib.campaign import runner
from gstlib.errors import InputError
from gstlib.reading import measures, text
from gstlib.reading.study import about_spec, command, find_data, study
from gstlib.store import Store


@pytest.fixture
def store(tmp_path):
    return fill(tmp_path / "results")


def test_a_study_finds_every_run_and_all_their_seeds(store):
    found = study(store, "figure1-vgg11", "smoke")
    assert len(found.runs) == 15 and not found.missing, "more seeds than the profile's two"
    assert found.labels == ["none", "S r=4", "S r=40", "L r=40", "S r=4 l2"]
    assert "3 runs per configuration; intervals are 95% t intervals over seeds" in text.caption(found)
    assert "3 runs per configuration. Device" in text.caption(found, 0), "of a picture that has no interval"
    assert "Missing" not in text.caption(found)


def test_rows_say_what_a_configuration_is(tmp_path):
    found = study(stock(tmp_path, "figure5", "figure2"), "figure5")
    row = found.runs[found.runs["label"] == "transient 50"].iloc[0]
    assert row[["target", "score", "structure", "effect", "retrain", "model"]].tolist() == [
        "L", "l2", "filter", "gaussian-transient", 3, "vgg11"]
    assert row["batches"] == found.spec("transient 50").pruning.batches
    assert row["rate"] == pytest.approx(0.129, abs=1e-3)
    assert found.printed["transient 50"].pruning.batches == 50
    plain = found.runs[found.runs["label"] == "none"].iloc[0]
    assert (plain["target"], plain["rate"], plain["events"]) == ("none", 0, 0)
    deciles = study(Store(tmp_path), "figure2").events
    assert set(deciles["target"]) == {*measures.DECILES, "D9-remaining"}
    assert set(deciles["structure"]) == {"weight", "filter"}


def test_a_number_of_seeds_counts_from_the_profile_s_first(tmp_path):
    store = fill(tmp_path, "mini")
    assert study(store, "figure1-vgg11", "mini").runs["seed"].unique().tolist() == [10, 11, 12]
    assert {run.spec.seed for run in study(store, "figure1-vgg11", "mini", seeds=2).wanted} == {10, 11}
    assert {run.spec.seed for run in study(store, "figure1-vgg11", "mini", seeds="2-3").wanted} == {2, 3}


def test_a_further_seed_counts_once_a_run_that_no_other_experiment_asks_for_is_stored(tmp_path):
    store, (first, *_) = Store(tmp_path), experiments.experiment("beyond-regularisers").runs(SMOKE, DATA, [0])
    further = {run.label: run for run in experiments.experiment("beyond-regularisers").runs(SMOKE, DATA, [1])}
    for run, seeds in ((first, {0}), (further["none"], {0}), (further["none, GroupNorm"], {0, 1})):
        write(store, run, 0.5, 0.1)
        assert {run.spec.seed for run in study(Store(tmp_path), "beyond-regularisers").wanted} == seeds


def test_missing_runs_are_named(store):
    gone = next(r for r in experiments.figures.figure1_vgg11(SMOKE, DATA, [1]) if r.label == "L r=40")
    store.file(gone.spec.id).unlink()
    found = study(store, "figure1-vgg11", "smoke")
    assert [r.spec.id for r in found.missing] == [gone.spec.id]
    assert "Missing: 1 of 15 runs (L r=40: seed 1)" in text.caption(found)
    assert "2 to 3 runs per configuration" in text.caption(found)
    assert f"Make them with `{found.command}`." in text.caption(found)


def test_what_is_compared_is_of_seeds_that_all_have(store):
    gone = {run.spec.id for run in study(store, "figure1-vgg11").wanted if run.label == "S r=40" and run.spec.seed > 0}
    for run_id in gone:
        store.file(run_id).unlink()
    whole = study(Store(store.path), "figure1-vgg11")
    shown = whole.comparable()
    assert len(whole.runs) == 13 and len(shown.runs) == 5 and set(shown.runs["seed"]) == set(shown.epochs["seed"]) == {0}
    assert shown.missing == whole.missing and shown.wanted == whole.wanted
    words = text.caption(shown)
    assert "1 run per configuration" in words and "Left out: 8 runs of seeds that not every configuration has yet" in words
    assert "Missing: 2 of 15 runs (S r=40: seed 1, 2)" in words and "Left out" not in text.caption(whole)
    other = whole.restrict(["none"], 1).runs["run"].iloc[0]
    store.file(next(run.spec.id for run in whole.wanted if run.label == "S r=40" and run.spec.seed == 0)).unlink()
    assert other in set(study(Store(store.path), "figure1-vgg11").comparable().runs["run"]), "what has no run hides none"


def test_seeds_that_one_network_lacks_are_shown_of_another():
    found = study(Store("book/results"), "final-figure2", "mini", seeds=[10, 11, 12])
    runs = found.runs[(found.runs["model"] == "vgg11") | (found.runs["seed"] == 10) | (found.runs["target"] == "none")]
    shown = replace(found, runs=runs).comparable()
    assert {model: {*part["seed"]} for model, part in shown.runs.groupby("model")} == {"vgg11": {10, 11, 12}, "resnet18": {10}}
    assert {*shown.epochs.loc[shown.epochs["model"] == "resnet18", "seed"]} == {10}


def test_without_a_seed_that_all_have_everything_is_shown(store):
    whole = study(store, "figure1-vgg11")
    for run in whole.wanted:
        if (run.spec.seed == 0) == (run.label == "none"):
            store.file(run.spec.id).unlink()
    left = study(Store(store.path), "figure1-vgg11")
    assert len(left.comparable().runs) == len(left.runs) == 6


def test_a_damaged_run_counts_as_missing_with_a_message(store, capsys):
    spec = experiments.figures.figure1_vgg11(SMOKE, DATA, [0])[0].spec
    store.file(spec.id).write_bytes(store.file(spec.id).read_bytes()[:-50])
    found = study(Store(store.path), "figure1-vgg11")
    assert [run.spec.id for run in found.missing] == [spec.id] and "counts as missing" in capsys.readouterr().err


def test_no_runs_at_all_names_the_command(store):
    with pytest.raises(InputError, match="python -m gstlib run"):
        study(store, "figure1-vgg11", "paper")
    found = study(store, "figure3", "smoke")
    assert found.runs.empty and found.events.empty and found.histograms.empty
    with pytest.raises(InputError, match="python -m gstlib run figure3 --profile smoke"):
        text.caption(found)


def test_the_command_that_a_study_names_makes_what_it_lacks(tmp_path, digits):
    place = tmp_path / "my results"
    data = experiments.data_spec(SMOKE, "digits", digits.fingerprint)
    write(Store(place), experiments.figures.figure5(SMOKE, data, [2])[0], 0.5, 0.0)
    for asked, seeds in ((None, [0, 1, 2]), ("0,2", [0, 2]), ([3], [3])):
        found = study(Store(place), "figure5", "smoke", seeds=asked)
        program, *words = shlex.split(found.command)[2:]
        args = parser().parse_args(words)
        assert program == "gstlib" and args.command == "run" and args.results == str(place)
        planned = runner.plan(args.figures, args.profile, args.data, args.seeds)
        assert {task.spec.seed for task in planned} == set(seeds)
        missing = [task.spec.id for task in runner.missing(Store(place), planned)]
        assert sorted(missing) == sorted({run.spec.id for run in found.missing})
    shown = command(["figure1-vgg11", "figure3"], "mini", "/my images", "r")
    assert shown == "python -m gstlib run figure1-vgg11 figure3 --profile mini --data '/my images' --results r"


def test_results_of_two_data_sets_are_never_mixed(store):
    other = experiments.data_spec(SMOKE, "digits", "e" * 64)
    write(store, experiments.figures.figure1_vgg11(SMOKE, other, [0])[0], 0.5, 0.0)
    with pytest.raises(InputError, match="several data sets"):
        study(store, "figure1-vgg11", "smoke")


def test_any_number_of_classes_reads_back_what_it_trained(tmp_path):
    store = Store(tmp_path)
    data = experiments.data_spec(SMOKE, "cifar10-folder", "a" * 64, classes=7)
    # Figure 2's images are augmented and Conv4 has a size of its own; neither is what other figures ask for
    for what in (experiments.figures.figure2, experiments.figures.figure1_vgg11):
        for run in what(SMOKE, data, range(2)):
            store.write(run.spec, ABOUT, rows(run.spec, 0.5, 0.1))
    assert find_data(store, SMOKE, "cifar10-folder") == replace(data, augment=False)
    for figure in ("figure1-vgg11", "figure2"):
        found = study(store, figure, "smoke", "cifar10-folder")
        assert not found.missing and len(found.runs)


def test_a_part_of_a_study_counts_its_own_runs_alone(store):
    part = study(store, "figure1-vgg11").restrict(["L r=40"], 1)
    assert len(part.runs) == 1 and set(part.events["seed"]) == {1} and [r.spec.seed for r in part.wanted] == [1]
    assert "1 run per configuration, too few for intervals" in text.caption(part)


def test_reading_imports_no_torch():
    code = ("import sys; from gstlib.reading import figures, measures, study, text; "
            "assert not {'torch', 'gstlib.training', 'gstlib.campaign'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_circumstances_are_all_but_pruning_and_seed():
    runs = {run.label: run.spec for run in experiments.experiment("beyond-regularisers").runs(SMOKE, DATA, [0])}
    other = {run.label: run.spec for run in experiments.experiment("beyond-regularisers").runs(SMOKE, DATA, [1])}
    where = {label: about_spec(spec)["circumstances"] for label, spec in runs.items()}
    assert where["L r=40"] == where["L r=40 l2"] == where["none"] == about_spec(other["none"])["circumstances"]
    assert where["L r=40, SGD"] == where["none, SGD"] and len(set(where.values())) == 7
    assert where["L r=40 l2, GroupNorm"] == where["none, GroupNorm"]
