import dataclasses
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch

from gstlib.errors import InputError
from gstlib.spec import FlatnessSpec, OptimiserSpec, PruningSpec
from gstlib.training import checkpoint, train
from gstlib.training.checkpoint import Checkpoints

# events after epochs 0 and 1 of three, each with an effect that lasts into the next epoch
PRUNING = PruningSpec(("conv7", "conv8"), (0, 0), (2, 2), (0.5, 0.5), 1)
STEPS = 2  # of an epoch: 64 images, 32 at a time


@pytest.fixture(scope="module")
def company(tiny_spec):
    sgd = OptimiserSpec(epochs=3, batch_size=32, milestones=(1,))
    spec = tiny_spec(optimiser=sgd, measures=("bn-histogram",))
    kinds = [None, PRUNING, dataclasses.replace(PRUNING, effect="gaussian", batches=3),
             dataclasses.replace(PRUNING, effect="gaussian-transient", batches=3),
             dataclasses.replace(PRUNING, effect="zero", batches=3),
             dataclasses.replace(PRUNING, target="R", effect="zero-restore", batches=3),
             dataclasses.replace(PRUNING, score="activation", effect="zero-cumulative", batches=3),
             dataclasses.replace(PRUNING, score="l2", scratch=True)]
    company = [dataclasses.replace(spec, pruning=pruning, seed=seed) for seed, pruning in enumerate(kinds)]
    measured = {"measures": ("bn-histogram", "flatness"), "measured_at": 1, "flatness": FlatnessSpec(20, 16, 3, 1, step=0.4)}
    return [company[0], dataclasses.replace(company[1], **measured), *company[2:]]


@pytest.fixture(scope="module")
def whole(company, digits):
    """The results of runs never interrupted."""
    return train.train_group(company, digits)


def rows(result):
    return {name: pd.DataFrame(table).drop(columns="seconds", errors="ignore") for name, table in result.tables.items()}


def assert_same(results, expected):
    for result, other in zip(results, expected, strict=True):
        for name, table in rows(other).items():
            pd.testing.assert_frame_equal(rows(result)[name], table, check_exact=True)


def after(calls):
    """A `stop` that says so when it is asked for the `calls`-th time."""
    asked = []

    def stop():
        asked.append(True)
        return len(asked) == calls

    return stop


def go(specs, digits, checkpoints, stop=lambda: False):
    return train.train_group(specs, digits, "cpu", lambda _: None, "tiny", checkpoints, stop)


# asked after each of 2 steps and after each epoch, 3 epochs: 9 places to stop at, of which one of each kind and the last
@pytest.mark.parametrize("calls", [1, 6, 9])
def test_stopped_anywhere_ends_with_the_same_rows(tmp_path, digits, company, whole, calls):
    checkpoints = Checkpoints(tmp_path, "cpu")
    with pytest.raises(train.Stopped):
        go(company, digits, checkpoints, after(calls))
    epoch, step = divmod(calls - 1, STEPS + 1)
    expected = (epoch, step + 1) if step < STEPS else (epoch + 1, 0)
    assert {checkpoints.position(spec.id) for spec in company} == {expected}
    results = go(company, digits, checkpoints)
    assert_same(results, whole)
    assert [result.provenance["resumed"] for result in results] == [1] * len(company)


@pytest.mark.slow
def test_stopped_after_every_single_step(tmp_path, digits, company, whole):
    checkpoints, stops = Checkpoints(tmp_path, "cpu"), 0
    while True:
        try:
            results = go(company, digits, checkpoints, after(1))
            break
        except train.Stopped:
            stops += 1
    assert stops == 3 * (STEPS + 1) and results[0].provenance["resumed"] == stops
    assert_same(results, whole)


def test_company_may_change_between_sittings(tmp_path, digits, company, whole):
    checkpoints = Checkpoints(tmp_path, "cpu")
    with pytest.raises(train.Stopped):
        go(company, digits, checkpoints, after(5))
    results = go(company[:1], digits, checkpoints) + go(company[1:], digits, checkpoints)
    assert_same(results, whole)


def test_time_spent_before_counts(tmp_path, digits, company):
    checkpoints = Checkpoints(tmp_path, "cpu")
    with pytest.raises(train.Stopped):
        go(company[:1], digits, checkpoints, after(1))
    state = checkpoints.load(company[0].id)
    checkpoints.save(company[0].id, 0, 1, state | {"seconds": 1000.0, "epoch_seconds": 900.0})
    result = go(company[:1], digits, checkpoints)[0]
    assert 1000 < result.provenance["seconds"] < 1100
    assert [row["seconds"] > 900 for row in result.tables["epoch"]] == [True, False, False]


def test_checkpoints_are_kept_as_often_as_asked(tmp_path, digits, company):
    often, seldom = Checkpoints(tmp_path / "a", "cpu", every=1e-9), Checkpoints(tmp_path / "b", "cpu", every=1e9)
    go(company[:1], digits, often)
    go(company[:1], digits, seldom)
    assert often.position(company[0].id) == (3, 0)
    assert not (tmp_path / "b").exists()


def test_runs_at_different_epochs_are_refused_by_name(tmp_path, digits, company):
    checkpoints = Checkpoints(tmp_path, "cpu")
    with pytest.raises(train.Stopped):
        go(company[:1], digits, checkpoints, after(3))
    with pytest.raises(InputError, match=f"{company[0].id} at epoch 1, step 0.*{company[1].id} at epoch 0"):
        go(company[:2], digits, checkpoints)


@pytest.fixture
def kept(tmp_path, digits, company):
    """(checkpoints, the specification of the one that is in them)"""
    checkpoints = Checkpoints(tmp_path, "cpu")
    with pytest.raises(train.Stopped):
        go(company[2:3], digits, checkpoints, after(4))
    return checkpoints, company[2]


@pytest.mark.parametrize("where", [0.0, 0.0002, 0.001, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_flipped_byte_is_found_and_the_run_begins_anew(kept, digits, whole, where, capsys):
    checkpoints, spec = kept
    place = checkpoints.file(spec.id)
    raw = bytearray(place.read_bytes())
    raw[int(where * len(raw))] ^= 0x55
    place.write_bytes(raw)
    assert checkpoints.position(spec.id) == (0, 0) and "is passed over" in capsys.readouterr().err
    assert_same(go([spec], digits, checkpoints), whole[2:3])


@pytest.mark.parametrize("length", [0, 1, 100, 1000, -1])
def test_a_truncated_checkpoint_is_found(kept, length):
    checkpoints, spec = kept
    place = checkpoints.file(spec.id)
    place.write_bytes(place.read_bytes()[:length])
    assert checkpoints.position(spec.id) == (0, 0) and checkpoints.load(spec.id) is None


def test_another_runs_checkpoint_under_this_name_is_found(kept, company):
    checkpoints, spec = kept
    os.rename(checkpoints.file(spec.id), checkpoints.file(company[0].id))
    assert checkpoints.position(company[0].id) == (0, 0)


class Planted:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_planted_pickle_runs_nothing(kept, tmp_path, how):
    checkpoints, spec = kept
    trap = tmp_path / "sprung"
    if how == "pickle":
        content = pickle.dumps(Planted(trap), protocol=2)
    else:
        torch.save({"run": Planted(trap)}, tmp_path / "planted")
        content = (tmp_path / "planted").read_bytes()
    head = {"gstlib.checkpoint": 1, "id": spec.id, "epoch": 1, "step": 1, "kind": checkpoints.kind}
    head["sha256"] = checkpoint.digest(head, content)
    checkpoints.file(spec.id).write_bytes(json.dumps(head).encode() + b"\n" + content)
    assert checkpoints.position(spec.id) == (1, 1)  # as far as its digest goes it is whole
    assert checkpoints.load(spec.id) is None and not trap.exists()


@pytest.mark.parametrize("change", ["code", "torch", "device"])
def test_another_kind_of_checkpoint_is_not_mixed_in(kept, change, capsys):
    checkpoints, spec = kept
    checkpoints.kind[change] = "another"
    assert checkpoints.position(spec.id) == (0, 0) and checkpoints.file(spec.id).exists()
    assert f"another {change}" in capsys.readouterr().err


def test_a_run_that_another_kind_of_cpu_began_is_begun_anew(kept, monkeypatch, capsys):
    checkpoints, spec = kept
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert Checkpoints(checkpoints.folder, "cpu").position(spec.id) == (0, 0) and checkpoints.position(spec.id) == (1, 1)
    assert "another processor" in capsys.readouterr().err


def test_a_newer_schema_is_left_alone(kept, capsys):
    checkpoints, spec = kept
    place = checkpoints.file(spec.id)
    line, _, content = place.read_bytes().partition(b"\n")
    place.write_bytes(json.dumps(json.loads(line) | {"gstlib.checkpoint": 99}).encode() + b"\n" + content)
    assert checkpoints.position(spec.id) == (0, 0) and place.exists()
    assert "newer" in capsys.readouterr().err


def test_where_no_checkpoint_can_be_written_training_goes_on(tmp_path, digits, company, whole, capsys):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "below", "cpu", every=1e-9)
    assert_same(go(company[:1], digits, checkpoints), whole[:1])
    assert "no checkpoint could be written" in capsys.readouterr().err


def test_a_write_that_fails_leaves_the_last_checkpoint(kept, monkeypatch):
    checkpoints, spec = kept
    before = checkpoints.file(spec.id).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert not checkpoints.save(spec.id, 2, 0, {"more": 1})
    assert checkpoints.file(spec.id).read_bytes() == before and len(list(checkpoints.folder.iterdir())) == 1


def test_removing_takes_what_a_killed_writer_left(kept):
    checkpoints, spec = kept
    (checkpoints.folder / f".{spec.id}.ckpt-abc.tmp").write_text("half")
    checkpoints.remove(spec.id)
    checkpoints.remove(spec.id)
    assert list(checkpoints.folder.iterdir()) == []


@pytest.mark.parametrize("odd", ["folder", "pipe", "dangling link", "endless", "deep", "huge", "text as epoch",
                                 "no epoch", "epoch too late", "step too late", "a list", "a list of kinds"])
def test_what_is_no_checkpoint_is_passed_over_and_never_waited_for(kept, company, digits, whole, odd, capsys):
    checkpoints, spec = kept
    place = checkpoints.file(spec.id)
    raw = place.read_bytes()
    place.unlink()
    if odd == "folder":
        place.mkdir()
    elif odd == "pipe":
        os.mkfifo(place)
    elif odd in ("dangling link", "endless"):
        place.symlink_to("/dev/zero" if odd == "endless" else "nowhere")
    elif odd == "deep":
        place.write_bytes(b"[" * 4000 + b"\n")
    elif odd == "huge":
        place.write_bytes(raw)
        os.truncate(place, 2**40)
    else:
        line, _, content = raw.partition(b"\n")
        forge(place, content, **{"text as epoch": {"epoch": "three"}, "no epoch": {"epoch": None}, "a list of kinds": {"kind": []},
                                 "epoch too late": {"epoch": 10**4000}, "step too late": {"step": 10**9},
                                 "a list": {}}[odd], head=json.loads(line))
        if odd == "a list":
            place.write_bytes(b"[]\n" + content)
    assert odd == "step too late" or checkpoints.position(spec.id) == (0, 0)
    assert_same(go([spec], digits, checkpoints), whole[2:3])
    assert capsys.readouterr().err.count("is passed over") == 1  # once, however often it was read


def forge(place, content, head, **changes):
    """Write a checkpoint with a right digest, whatever is in it."""
    head = head | changes
    head.pop("sha256", None)
    head["sha256"] = checkpoint.digest(head, content)
    place.write_bytes(json.dumps(head).encode() + b"\n" + content)


FORGED = {
    "nothing": lambda state: {}, "a list": lambda state: [1], "no run": lambda state: {**state, "run": None},
    "another network": lambda state: {**state, "run": {**state["run"], "replica": {}}},
    "no tables": lambda state: {**state, "run": {**state["run"], "tables": "{}"}},
    "rows of other epochs": lambda state: {**state, "run": {**state["run"], "tables": json.dumps(
        {"epoch": [], "event": [], "histogram": [], "final": []})}},
    "resumed a text": lambda state: {**state, "resumed": "once"},
}


@pytest.mark.parametrize("what", FORGED)
def test_a_sealed_checkpoint_without_its_run_s_state_is_passed_over(kept, digits, whole, what, capsys):
    checkpoints, spec = kept
    epoch, step = checkpoints.position(spec.id)
    checkpoints.save(spec.id, epoch, step, FORGED[what](checkpoints.load(spec.id)))
    results = go([spec], digits, checkpoints)
    assert_same(results, whole[2:3])
    assert results[0].provenance["resumed"] == 0 and capsys.readouterr().err.count("is passed over") == 1


def test_a_compressed_checkpoint_is_passed_over_unread(kept, capsys):
    checkpoints, spec = kept
    line, _, content = checkpoints.file(spec.id).read_bytes().partition(b"\n")
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    forge(checkpoints.file(spec.id), packed.getvalue(), json.loads(line))
    assert checkpoints.load(spec.id) is None and "compressed" in capsys.readouterr().err


@pytest.mark.parametrize("every", [0, -1.0, float("nan")])
def test_time_between_checkpoints_must_be_positive(tmp_path, every):
    with pytest.raises(InputError, match="checkpoints"):
        Checkpoints(tmp_path, "cpu", every)


def test_the_code_that_computes_is_named_whole():
    """Every module of gstlib that training loads is in the fingerprint."""
    code = ("import sys, gstlib.training.train as t; from pathlib import Path; top = Path(t.__file__).parents[1]; "
            "print(*[str(Path(m.__file__).relative_to(top)) for n, m in sys.modules.items() "
            "if n.startswith('gstlib') and m.__file__])")
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    top = Path(checkpoint.__file__).parents[1]
    hashed = {str(place.relative_to(top)) for pattern in checkpoint._SOURCES for place in top.glob(pattern)}
    assert {"network/masking.py", "training/engine.py", "data/batches.py"} <= set(loaded) <= hashed
