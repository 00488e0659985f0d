import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from made_up import fill
from PIL import Image

from gstlib import experiments
from gstlib.__main__ import main
from gstlib.campaign import runner
from gstlib.errors import InputError
from gstlib.experiments import Experiment, Labelled, Profile, Size
from gstlib.reading.study import study
from gstlib.spec import ModelSpec, OptimiserSpec, PruningSpec, RunSpec
from gstlib.store import Store, runs
from gstlib.training import train

LABELS = ["none", "S r=4", "S r=40", "L r=40", "S r=4 l2"]
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def tiny():
    """A profile whose runs take a fifth of a second: two epochs of 64 digits, in which r = 4 and r = 40 are one run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(experiments.PROFILES, "tiny", Profile(
            "tiny", "tiny", "digits", Size(160, 1 / 16, 64, 32), {"conv4": Size(30, 1 / 16, 64, 32)}, test_size=40,
            test_every=1, seeds=1, precision="float32", channels_last=False))
        yield


@pytest.fixture
def results(tmp_path) -> Path:
    return tmp_path / "results"


def run(results: Path, *arguments: str) -> int:
    return main(["run", "figure1-vgg11", "--profile", "tiny", "--results", str(results), "--device", "cpu",
                 "--workers", "1", "--quiet", *arguments])


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("trained") / "results"
    assert run(place) == 0
    return place


@pytest.fixture
def filled(trained, results, capsys) -> Store:
    shutil.copytree(trained, results)
    capsys.readouterr()
    return Store(results)


def no_training(monkeypatch) -> None:
    for name in ("train", "train_group"):
        monkeypatch.setattr(train, name, lambda *_, **__: pytest.fail("trained"))


def trial(monkeypatch, *specs: RunSpec) -> None:
    """An experiment named trial that consists of these runs, on the data that is there."""
    def runs(profile, data, seeds):
        return [Labelled(f"run {n}", dataclasses.replace(spec, data=data)) for n, spec in enumerate(specs)]

    monkeypatch.setitem(experiments.EXPERIMENTS, "trial", Experiment("trial", "trial", runs))


def printed(capsys):
    return json.loads(capsys.readouterr().out)


def test_run_trains_and_stores_what_is_missing(results, capsys):
    assert run(results) == 0
    out = capsys.readouterr().out
    assert "4 runs trained, 0 were stored already, 0 left for lack of time, 0 failed" in out and str(results) in out
    store = Store(results)
    runs = [store.read(run_id) for run_id in store.ids()]
    assert len(runs) == 4 and {len(r.tables["epoch"]) for r in runs} == {2}
    assert sorted(len(r.tables["event"]) for r in runs) == [0, 2, 2, 2]
    assert {r.provenance["profile"] for r in runs} == {"tiny"} and {r.spec.model.name for r in runs} == {"vgg11"}


def test_a_second_run_trains_nothing(filled, results, capsys, monkeypatch):
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in results.rglob("*.parquet")}
    no_training(monkeypatch)
    assert run(results) == 0
    assert "0 runs trained, 4 were stored already" in capsys.readouterr().out
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in results.rglob("*.parquet")}


def test_only_what_is_missing_is_trained(filled, results, capsys):
    gone = filled.ids()[2]
    filled.file(gone).unlink()
    assert run(results, "--seeds", "2") == 0
    assert "5 runs trained, 3 were stored already" in capsys.readouterr().out
    assert filled.file(gone).exists() and len(filled.ids()) == 8


def test_figures_share_their_runs(filled, results, capsys):
    assert main(["status", "figureA2", "--profile", "tiny", "--results", str(results), "--json"]) == 0
    assert [row["missing"] for row in printed(capsys)] == [0] * 5


def test_list_names_every_run(results, capsys):
    command = ["list", "figure1-vgg11", "figure3", "figure3", "--profile", "tiny", "--seeds", "0,7", "--results", str(results)]
    assert main([*command, "--json"]) == 0
    rows = printed(capsys)
    assert len(rows) == 2 * (5 + 7) and not any(row["stored"] for row in rows)
    assert {row["seed"] for row in rows} == {0, 7} and {row["figure"] for row in rows} == {"figure1-vgg11", "figure3"}
    assert [row["label"] for row in rows[:5]] == LABELS
    assert all(len(row["id"]) == 16 for row in rows) and {row["epochs"] for row in rows} == {2}
    assert main(command) == 0
    text = capsys.readouterr().out
    assert all(row["id"] in text for row in rows) and len(text.splitlines()) == 25
    assert not results.exists()


def test_list_takes_all_figures_when_none_is_named(results, capsys):
    counts = []
    for names in ([], ["all"]):
        command = ["list", *names, "--profile", "paper", "--data", "digits", "--results", str(results), "--json"]
        assert main(command) == 0
        counts.append(len(printed(capsys)))
    early, final = (5, 4, 10, 24, 7, 26, 13, 1, 5, 4), (10, 22, 6, 12, 9, 3, 4)
    beyond = (40, 12, 33, 15)
    assert counts[0] == counts[1] == 10 * sum(early + final + beyond)


def test_list_prints_the_rates_of_the_paper(results, capsys):
    main(["list", "figure4", "--profile", "paper", "--data", "digits", "--seeds", "1", "--results", str(results),
          "--json"])
    rates = {row["label"]: row["rate"] for row in printed(capsys)}
    assert (rates["none"], rates["S r=4"], rates["L r=40"], rates["R r=60"], rates["S r=100 l2"]) == (
        "", "1.3%", "12.9%", "18.0%", "30.0%")


def test_status_counts_stored_and_missing(filled, results, capsys):
    filled.file(next(i for i in filled.ids() if filled.read(i).spec.pruning is None)).unlink()
    command = ["status", "figure1-vgg11", "--profile", "tiny", "--results", str(results)]
    assert main([*command, "--seeds", "3", "--json"]) == 0
    rows = printed(capsys)
    assert [row["label"] for row in rows] == LABELS and all(row["wanted"] == 3 for row in rows)
    assert sum(row["stored"] for row in rows) == 4 and sum(row["missing"] for row in rows) == 11
    assert main(command) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_what_a_folder_holds_is_told_without_the_images_of_its_runs(results, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GSTLIB_DATA", str(tmp_path / "nowhere"))
    given = ["--results", str(results)]
    assert main(["status", "--profile", "mini", *given]) == 2  # of images that nobody has
    fill(results, "mini"), fill(results, "quarter")
    capsys.readouterr()

    assert main(["status", *given]) == 0  # a line a figure
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert len(lines) == 1 + len(experiments.EXPERIMENTS) and lines["figure"] == ["mini", "quarter"]
    assert lines["figure1-vgg11"] == ["15/25", "15/25"] and lines["figureA1"] == ["0/5", "0/5"]

    assert main(["status", "figure1-vgg11", "figureA1", *given, "--json"]) == 0  # a row a configuration
    rows = printed(capsys)
    assert [row["profile"] for row in rows] == 6 * ["mini"] + 6 * ["quarter"] and sum(row["stored"] for row in rows) == 30
    assert main(["list", "figure1-vgg11", "--profile", "quarter", *given, "--json"]) == 0
    assert {row["id"] for row in printed(capsys) if row["stored"]} <= {*Store(results).ids()}
    assert main(["export", "figure1-vgg11", "--profile", "quarter", *given, "--archive", str(tmp_path / "runs.zip")]) == 0
    assert "15 runs packed" in capsys.readouterr().out


def test_verify_reads_every_run(filled, results, capsys):
    assert main(["verify", "--results", str(results), "--json"]) == 0
    rows = printed(capsys)
    assert [row["id"] for row in rows] == filled.ids() and all(row["ok"] and row["problem"] == "" for row in rows)
    assert {(row["model"], row["profile"], row["epochs"]) for row in rows} == {("vgg11", "tiny", 2)}
    assert main(["verify", "--results", str(results)]) == 0
    assert "4 runs are as they were written, 0 are not" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "text", "other name", "link to nothing"])
def test_verify_names_what_is_damaged(filled, results, capsys, damage):
    place = filled.file(filled.ids()[1])
    name = place.stem
    if damage == "cut":
        place.write_bytes(place.read_bytes()[:-100])
    elif damage == "text":
        place.write_text("nonsense")
    elif damage == "link to nothing":
        place.unlink()
        place.symlink_to("nothing")
    else:
        place.write_bytes(filled.file(filled.ids()[0]).read_bytes())
    assert main(["verify", "--results", str(results), "--json"]) == 1
    bad = [row for row in printed(capsys) if not row["ok"]]
    assert [row["id"] for row in bad] == [name] and bad[0]["problem"]
    assert main(["verify", "--results", str(results)]) == 1
    assert "1 are not" in capsys.readouterr().out


def test_verify_of_an_empty_folder(tmp_path, capsys):
    assert main(["verify", "--results", str(tmp_path)]) == 0
    assert "0 runs are as they were written, 0 are not" in capsys.readouterr().out


def test_verify_tells_newer_runs_from_damaged_ones_and_changes_nothing(filled, results, capsys, monkeypatch):
    first, second = filled.ids()[:2]
    found = filled.read(first)
    filled.file(first).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(runs, "SCHEMA", 99)
        filled.write(found.spec, found.provenance, {name: rows.to_dict("records") for name, rows in found.tables.items()})
    filled.file(second).write_bytes(b"nonsense")
    before = sorted(results.rglob("*"))
    assert main(["verify", "--results", str(results), "--json"]) == 1
    rows = {row["id"]: row["ok"] for row in printed(capsys)}
    assert (rows[first], rows[second]) == (None, False) and sorted(results.rglob("*")) == before
    filled.file(second).unlink()
    assert main(["verify", "--results", str(results)]) == 0
    assert "2 runs are as they were written, 0 are not; 1 are of a newer gstlib" in capsys.readouterr().out
    assert run(results) == 2 and "schema 99" in capsys.readouterr().err  # nothing could be stored in its place


def test_a_damaged_run_is_reported_and_trained_again(filled, results, capsys):
    damaged = filled.ids()[1]
    before = filled.read(damaged).tables["epoch"]
    filled.file(damaged).write_bytes(filled.file(damaged).read_bytes()[:-50])
    assert run(results) == 0
    out, err = capsys.readouterr()
    assert "1 runs trained, 3 were stored already" in out and damaged in err and "counts as missing" in err
    after = filled.read(damaged).tables["epoch"]
    assert after.drop(columns="seconds").equals(before.drop(columns="seconds"))


def test_a_damaged_run_counts_as_missing_wherever_runs_are_counted(filled, results, capsys):
    damaged = filled.ids()[1]
    filled.file(damaged).write_bytes(b"nonsense")
    asked = ["figure1-vgg11", "--profile", "tiny", "--results", str(results), "--json"]
    for data in ([], ["--data", "digits"]):
        assert main(["list", *asked, *data]) == 0
        assert {row["id"] for row in printed(capsys) if not row["stored"]} == {damaged}
        assert main(["status", *asked, *data]) == 0
        assert sum(row["missing"] for row in printed(capsys)) in (1, 2)  # a run may have two labels


def test_runs_travel_in_an_archive(filled, results, tmp_path, capsys):
    archive, other = str(tmp_path / "runs.zip"), tmp_path / "other"
    assert main(["export", "--archive", archive, "--results", str(results)]) == 0
    assert main(["import", "--archive", archive, "--results", str(other)]) == 0
    assert "4 runs added" in capsys.readouterr().out and Store(other).ids() == filled.ids()
    assert main(["import", "--archive", archive, "--results", str(other)]) == 0
    assert "0 runs added" in (out := capsys.readouterr().out) and "4 were there already" in out


def test_what_is_asked_for_without_a_figure_is_exported_alone(filled, results, tmp_path, capsys):
    command = ["export", "--archive", str(tmp_path / "runs.zip"), "--results", str(results)]
    for asked in ["figureA2", "--profile", "tiny"], []:
        assert main([*command, *asked]) == 0
        assert "4 runs packed" in capsys.readouterr().out
    for asked in ["--profile", "smoke"], ["--seeds", "1,"]:
        assert main([*command, *asked]) == 2
        assert "no run to export" in capsys.readouterr().err
    assert main([*command, "--profile", "huge"]) == 2


BAD = {
    "figure": ["run", "figure9"],
    "figure of list": ["list", "figure1"],
    "figure of status": ["status", "figure1-vgg11", "all"],
    "profile": ["run", "--profile", "huge"],
    "profile of list": ["list", "--profile", ""],
    "data": ["run", "--data", "mnist"],
    "data folder": ["run", "--data", "./nowhere/at/all"],
    "data file": ["list", "--data", __file__],
    "seeds": ["run", "--seeds", "many"],
    "no seeds": ["run", "--seeds", "0"],
    "negative seeds": ["run", "--seeds", "-3"],
    "backward seeds": ["status", "--seeds", "5-2"],
    "seeds too large": ["list", "--seeds", "2147483648,0"],
    "astronomical number of seeds": ["list", "--seeds", "1000000000000000"],
    "workers": ["run", "--workers", "0"],
    "negative workers": ["run", "--workers", "-1"],
    "replicas": ["run", "--replicas", "0"],
    "time limit": ["run", "--time-limit", "-1"],
    "no time": ["run", "--time-limit", "0"],
    "time that is no number": ["run", "--time-limit", "nan"],
    "device": ["run", "--device", "gpu"],
    "all beside another": ["list", "all", "figure3"],
    "a campaign of figures": ["list", "--campaign", "figure3"],
    "a campaign of seeds": ["run", "--campaign", "--seeds", "3", "--profile", "smoke"],
    "a name longer than a name may be": ["list", "--data", "./" + 300 * "x"],
    "a text of control codes": ["run", "--data", "./\x1b]0;title\x07\nx"],
    "empty data": ["list", "figure3", "--data", ""],
    "verify": ["verify"],
    "import": ["import", "--archive", "nowhere.zip"],
    "export": ["export", "--archive", "runs.zip"],
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
def test_bad_input_is_told_in_one_line_and_nothing_is_written(arguments, results, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    no_training(monkeypatch)
    given = [*arguments, "--results", str(results)]
    if "--profile" not in given and given[0] not in ("verify", "import"):
        given += ["--profile", "tiny"]
    assert main(given) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("gstlib: ") and err[:-1].isprintable() and err.endswith("\n") and len(err) < 600
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_told(device, results, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert run(results, "--device", device) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "--device cpu" in err and not results.exists()


def test_a_results_folder_that_cannot_be_written_is_told_before_training(tmp_path, capsys, monkeypatch):
    no_training(monkeypatch)
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "file", tmp_path / "file" / "results"):
        assert run(place) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and str(place) in err
    assert (tmp_path / "file").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("command", ["list", "status", "verify"])
def test_a_results_folder_that_is_a_file_is_told(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = [] if command == "verify" else ["figure1-vgg11", "--profile", "tiny"]
    assert main([command, *arguments, "--results", str(tmp_path / "file")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and str(tmp_path / "file") in err


def test_a_run_that_cannot_be_trained_stops_all_before_any_is(results, tiny_spec, capsys, monkeypatch):
    no_training(monkeypatch)
    trial(monkeypatch, tiny_spec(), tiny_spec(model=ModelSpec("conv4", 1 / 8),
                                              pruning=PruningSpec(("fc1",), (0,), (0,), (0.5,), 1)))
    assert main(["run", "trial", "--profile", "tiny", "--results", str(results), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "fc1" in err and not results.exists()


@pytest.mark.parametrize("figure, profile, why", [
    ("figure1-vgg11", "mini", "400 of class 0, but there are 35"), ("final-figure2", "paper", "flatness is measured on 512")])
def test_too_few_images_stop_all_before_any_run_is_trained(figure, profile, why, results, capsys, monkeypatch):
    no_training(monkeypatch)
    command = ["run", figure, "--profile", profile, "--data", "digits", "--seeds", "1", "--device", "cpu", "--workers", "1"]
    assert main([*command, "--results", str(results)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and why in err and "use a larger data set" in err and not results.exists()


def test_a_failing_run_does_not_stop_the_others(results, tiny_spec, capsys, monkeypatch):
    bad = tiny_spec(optimiser=OptimiserSpec("sgd", lr=1e30, epochs=2, batch_size=32))
    trial(monkeypatch, tiny_spec(), bad, tiny_spec(seed=1))
    command = ["run", "trial", "--profile", "tiny", "--results", str(results), "--device", "cpu", "--workers", "1",
               "--quiet"]
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert "2 runs trained" in out and "1 failed" in out and err.count("\n") == 1 and "no longer finite" in err
    assert len(Store(results).ids()) == 2


def test_an_interrupted_run_keeps_what_is_finished_and_goes_on(results, capsys, monkeypatch):
    written, write = [], Store.write

    def interrupted(self, spec, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(spec.id)
        return write(self, spec, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", interrupted)
        assert run(results) == 130
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "interrupted" in err and Store(results).ids() == sorted(written)
    assert run(results) == 0
    assert "2 runs trained, 2 were stored already" in capsys.readouterr().out


def test_an_interrupt_that_an_import_swallows_and_fails_for_is_one_line_too(filled, results, capsys, monkeypatch):
    def half_imported(*_):
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise AttributeError("module 'numpy._core' has no attribute '_multiarray_umath'")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    try:
        monkeypatch.setattr(Store, "ids", half_imported)
        assert main(["verify", "--results", str(results)]) == 130
        assert capsys.readouterr().err == "gstlib: interrupted\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_cannot_go_on_is_not_said_to(filled, results, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "read", interrupted)
    assert main(["verify", "--results", str(results)]) == 130
    assert capsys.readouterr().err == "gstlib: interrupted\n"


def test_a_folder_that_may_not_be_looked_into_is_bad_input(results, capsys, monkeypatch):
    def refused(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    no_training(monkeypatch)
    (results / "leases").mkdir(parents=True)
    monkeypatch.setattr(Path, "iterdir", refused)
    assert run(results) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and str(results / "leases") in err


def test_the_results_folder_may_come_from_the_environment(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GSTLIB_RESULTS", str(tmp_path / "elsewhere"))
    assert main(["verify"]) == 2
    assert "elsewhere" in capsys.readouterr().err


def test_a_variable_that_is_set_but_empty_counts_as_not_set(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("GSTLIB_RESULTS", "GSTLIB_DATA", "GSTLIB_CACHE"):
        monkeypatch.setenv(name, "")
    assert main(["verify"]) == 2
    assert "results folder results does not exist" in capsys.readouterr().err
    assert main(["list", "figure3", "--data", "cifar10-folder"]) == 2
    assert "data/cifar10-folder" in capsys.readouterr().err
    assert main(["list", "figure3", "--profile", "tiny"]) == 0 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("results", ["", "x" * 300, "a\nb\x1b[31m"])
@pytest.mark.parametrize("command", [["verify"], ["list", "figure3"], ["run", "figure3"], ["import", "--archive", "x.zip"]])
def test_a_results_folder_that_cannot_be_is_told_in_one_line(command, results, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    no_training(monkeypatch)
    if command == ["run", "figure3"] and "\n" in results or command == ["list", "figure3"] and "\n" in results:
        return  # an odd name, but a name
    assert main([*command, "--results", results]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err[:-1].isprintable() and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["train"], ["run", "--speed", "9"], ["run", "--workers", "two"]])
def test_what_the_parser_refuses_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["list", "run", "status", "verify"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and "--results" in out and len(out.splitlines()) > 4


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": -1}, {"time_limit": 0}, {"time_limit": -2.0}])
def test_the_runner_refuses_what_the_command_line_does(options, results, tiny_spec):
    with pytest.raises(InputError):
        runner.run(Store(results), [Labelled("none", tiny_spec())], "digits", "tiny", "cpu", **options)
    assert not results.exists()


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_module_runs(tmp_path):
    done = python("-m", "gstlib", "list", "figure1-vgg11", "--seeds", "1", "--results", str(tmp_path / "r"), "--json")
    assert done.returncode == 0 and done.stderr == "" and [row["label"] for row in json.loads(done.stdout)] == LABELS


def test_the_module_refuses_in_one_line(tmp_path):
    done = python("-m", "gstlib", "verify", "--results", str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and "nowhere" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["gstlib", "gstlib.store", "gstlib.spec", "gstlib.experiments", "gstlib.__main__"])
def test_reading_imports_no_torch(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'torchvision', 'sklearn') if m in sys.modules])"
    done = python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_an_interrupt_while_modules_are_imported_is_one_line_too():
    """What takes a second is imported within a command; `python -m` itself is in the interpreter's hands."""
    done = python("-c", "import sys, gstlib.__main__; print(sorted({'numpy', 'pandas', 'scipy', 'torch'} & {*sys.modules}))")
    assert done.stdout == "[]\n"


def test_verifying_imports_no_torch(filled, results):
    code = ("import sys; from gstlib.__main__ import main; code = main(['verify', '--results', sys.argv[1]]); "
            "print('torch' in sys.modules, code)")
    done = python("-c", code, str(results))
    assert done.stdout.splitlines()[-1] == "False 0" and "4 runs are as they were written" in done.stdout


def test_a_closed_pipe_is_no_error(filled, results):
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen([sys.executable, "-m", "gstlib", "verify", "--results", str(results)], cwd=ROOT,
                               stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    _, err = process.communicate(timeout=120)
    assert (err, process.returncode) == ("", 141)


def test_a_full_disk_behind_standard_output_is_told(filled, results):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "gstlib", "verify", "--results", str(results)], cwd=ROOT,
                              stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), BrokenPipeError(32, "Broken pipe")])
def test_what_fails_elsewhere_is_not_laid_on_standard_output(filled, results, capsys, monkeypatch, error):
    monkeypatch.setattr(Store, "ids", mock.Mock(side_effect=error))
    assert main(["verify", "--results", str(results)]) == 1
    assert capsys.readouterr() == ("", f"gstlib: {error}\n")


RUN = """
import dataclasses, os, sys
from gstlib import experiments, __main__
from gstlib.experiments import Profile, Size
experiments.PROFILES["tiny"] = Profile("tiny", "tiny", "digits", Size(160, 1 / 16, 64, 32), {}, test_size=40,
                                       test_every=1, seeds=1, precision="float32", channels_last=False)
sys.exit(__main__.main(["run", "figure1-vgg11", "--profile", "tiny", "--device", "cpu", "--workers", "1",
                        "--results", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("stderr", ["2>&-", "2> >(exec head -c 5 >/dev/null)"])
def test_a_run_whose_standard_error_is_closed_or_broken_goes_on(results, stderr):
    done = subprocess.run(["bash", "-c", f'"$@" {stderr}', "bash", sys.executable, "-c", RUN, str(results)], cwd=ROOT,
                          stdout=subprocess.PIPE, text=True, timeout=240)
    assert done.returncode == 0 and "4 runs trained" in done.stdout and len(Store(results).ids()) == 4


def test_a_broken_standard_error_does_not_hide_that_nothing_was_trained(tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run(["bash", "-c", '"$@" 2>&-', "bash", sys.executable, "-c", RUN, str(tmp_path / "file")],
                          cwd=ROOT, timeout=240)
    assert done.returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["2> >(exec head -c 5 >/dev/null)", "2>&-", ">&- 2>&- <&-"])
def test_workers_go_on_without_a_standard_error(results, streams, tmp_path):
    """They decode images that no cache keeps, which they would show."""
    random = np.random.default_rng(0)
    for place in [tmp_path / f"set/{part}/{name}/{n}.png" for part in ("train", "test") for name in "ab" for n in range(32)]:
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place)
    code = RUN.replace('"1",', '"2", "--executor", "processes",').replace("figure1-vgg11", "figureA1")
    done = subprocess.run(["bash", "-c", f'"$@" {streams}', "bash", sys.executable, "-c",
                           f"if __name__ == '__main__':{code.replace(chr(10), chr(10) + '    ')}", str(results),
                           "--data", str(tmp_path / "set"), "--seeds", "2"], cwd=ROOT, timeout=240,
                          env=os.environ | {"GSTLIB_CACHE": "/dev/null/cache"})
    assert done.returncode == 0 and len(Store(results).ids()) == 2


def test_characters_that_a_terminal_lacks_are_shown_by_their_numbers(filled, results, tmp_path):
    archive = tmp_path / "läufe.zip"
    done = subprocess.run([sys.executable, "-m", "gstlib", "export", "--results", str(results), "--archive", str(archive)],
                          cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "") and "l\\xe4ufe.zip" in done.stdout and archive.exists()


def test_commands_work_where_texts_are_ascii():
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-m", "gstlib", "list", "figure3", "--seeds", "1", "--json"], cwd=ROOT,
                          env=os.environ | plain, capture_output=True, text=True)
    assert done.returncode == 0 and len(json.loads(done.stdout)) == 7


def test_commands_work_where_docstrings_are_stripped_and_no_home_is(tmp_path):
    done = subprocess.run([sys.executable, "-OO", "-m", "gstlib", "list", "figure3", "--seeds", "1", "--json"], cwd=ROOT,
                          env={n: v for n, v in os.environ.items() if n != "HOME"}, capture_output=True, text=True)
    assert done.returncode == 0 and len(json.loads(done.stdout)) == 7


def test_a_benchmark_is_written_after_every_measurement(tmp_path, monkeypatch, capsys):
    from gstlib.bench import measure

    place, asked = tmp_path / "new" / "bench.json", []

    def run(device, *chosen):
        *options, keep = chosen
        asked.append(options)
        for number in range(2):
            keep({"rows": [number]})
            assert json.loads((tmp_path / "new" / "bench.json").read_text()) == {"rows": [number]}
        return {"rows": [number]}

    monkeypatch.setattr(measure, "run", run)
    assert main(["bench", "--json", "--models", "vgg11", "conv4", "--replicas", "1", "10", "--techniques",
                 "--output", str(place)]) == 0
    assert json.loads(capsys.readouterr().out) == {"rows": [1]}
    assert main(["bench", "--quick", "--json", "--techniques", "capture", "streams", "--output", str(place)]) == 0
    assert asked == [[False, ["vgg11", "conv4"], [1, 10], []], [True, None, None, ["capture", "streams"]]]
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    assert main(["bench", "--output", str(tmp_path / "file" / "bench.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_benchmark_of_what_is_not_there_is_refused(capsys):
    assert main(["bench", "--models", "vgg12", "--device", "cpu"]) == 2
    assert "vgg12" in capsys.readouterr().err


@pytest.mark.parametrize("classes", [2, 7, 97])
def test_any_number_of_classes_trains_and_reads_back_whole(classes, tmp_path, results, capsys):
    """97 are more than the profile has images, and leave a last batch of a single one."""
    random = np.random.default_rng(0)
    for part, number in (("train", 64 // classes + 1), ("test", 40 // classes + 1)):
        for name in range(classes):
            (tmp_path / "set" / part / f"{name:02d}").mkdir(parents=True)
            for index in range(number):
                pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / part / f"{name:02d}" / f"{index}.png")
    command = ["figure1-vgg11", "--profile", "tiny", "--data", str(tmp_path / "set"), "--results", str(results)]
    assert main(["run", *command, "--workers", "1", "--quiet"]) == 0
    assert "4 runs trained" in capsys.readouterr().out
    assert main(["status", *command, "--json"]) == 0
    assert [row["missing"] for row in printed(capsys)] == [0] * 5
    found = study(Store(results), "figure1-vgg11", "tiny", str(tmp_path / "set"))
    assert not found.missing and len(found.runs) == 5 and found.spec("none").data.classes == classes
    assert found.spec("none").data.train_size == max(64, classes)
