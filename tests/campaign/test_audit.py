import pytest

from gstlib.__main__ import main
from gstlib.campaign.audit import audit, compare
from gstlib.spec import PruningSpec
from gstlib.store import Store
from gstlib.training import train

PRUNING = PruningSpec(("conv7", "conv8"), (0, 0), (1, 1), (0.5, 0.5), 1, target="L")


@pytest.fixture(scope="module")
def made(tiny_spec, digits, tmp_path_factory):
    """A store with one run, and that run's specification and result."""
    spec, folder = tiny_spec(pruning=PRUNING), tmp_path_factory.mktemp("audited")
    result = train.train(spec, digits, profile="smoke")
    Store(folder).write(spec, result.provenance, result.tables)
    return folder, spec, result


def test_a_run_trained_again_is_the_same_to_the_last_bit_and_nothing_is_written(made, capsys):
    folder, spec, _ = made
    before = {place: place.read_bytes() for place in folder.rglob("*") if place.is_file()}
    found = audit(Store(folder), "smoke", "digits", device="cpu", quiet=True)
    assert found.id == spec.id and found.alike and found.same and found.ok
    assert (found.first_loss, found.final_accuracy, found.same_removals) == (0, 0, True)
    assert main(["audit", "--results", str(folder), "--device", "cpu", "--quiet"]) == 0
    assert "the same bit for bit" in capsys.readouterr().out
    assert before == {place: place.read_bytes() for place in folder.rglob("*") if place.is_file()}


@pytest.mark.parametrize("device, first_loss, accuracy, ok", [
    (None, 1.001, 0, False), ("another", 1.001, 0, True), ("another", 1.06, 0, False), ("another", 1, 0.04, False)])
def test_other_rows_are_allowed_within_tolerance_on_another_machine_alone(made, tmp_path, device, first_loss, accuracy, ok):
    folder, spec, result = made
    tables = {name: [dict(row) for row in rows] for name, rows in result.tables.items()}
    tables["epoch"][0]["train_loss"] *= first_loss
    tables["final"][0]["accuracy"] -= accuracy if tables["final"][0]["accuracy"] > accuracy else -accuracy
    about = result.provenance | ({"device": device} if device else {})
    Store(tmp_path).write(spec, about, tables)
    stored, again = (Store(path).read(spec.id) for path in (tmp_path, folder))
    found = compare(stored, again)
    assert (found.alike, found.same, found.ok) == (device is None, False, ok)
    code = main(["audit", "--results", str(tmp_path), "--device", "cpu", "--quiet", "--run", spec.id])
    assert code == (0 if ok else 1)


def test_a_run_without_events_is_compared_too(tiny_spec, digits, tmp_path):
    result = train.train(tiny_spec(), digits, profile="smoke")
    Store(tmp_path).write(tiny_spec(), result.provenance, result.tables)
    found = audit(Store(tmp_path), "smoke", "digits", device="cpu", quiet=True)
    assert found.same and found.same_removals and found.ok


def test_other_removals_are_never_allowed(made):
    stored = Store(made[0]).read(made[1].id)
    fewer = stored._replace(provenance=stored.provenance | {"device": "another"}, tables=stored.tables | {
        "event": stored.tables["event"].assign(removed_total=lambda rows: rows["removed_total"] - 1)})
    assert not compare(fewer, stored).ok and not compare(fewer, stored).same_removals


def test_a_run_that_is_not_there_or_on_other_images_is_refused(made, capsys):
    folder, spec, _ = made
    for arguments in (["--run", "0" * 16], ["--profile", "mini", "--data", "digits"]):
        assert main(["audit", "--results", str(folder), *arguments]) == 2
        assert "on these images; name the profile and the images" in capsys.readouterr().err
    assert main(["audit", "--results", str(folder / "nowhere")]) == 2


def test_a_run_of_other_techniques_need_not_be_the_same_bit_for_bit(tiny_spec, digits, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("GSTLIB_WITHOUT", "fused-optimiser")
        result = train.train(tiny_spec(), digits, profile="smoke")
    Store(tmp_path).write(tiny_spec(), result.provenance, result.tables)
    found = audit(Store(tmp_path), "smoke", "digits", device="cpu", quiet=True)
    assert not found.alike and not found.same and abs(found.first_loss) < 1e-3


def test_wall_clock_seconds_are_no_difference(made):
    stored = Store(made[0]).read(made[1].id)
    slower = {name: table.assign(seconds=table["seconds"] + 1) if "seconds" in table else table
              for name, table in stored.tables.items()}
    assert any("seconds" in table for table in slower.values()) and compare(stored, stored._replace(tables=slower)).same


def test_on_a_gpu_rows_need_not_be_the_same_bit_for_bit(made):
    run = Store(made[0]).read(made[1].id)
    run = run._replace(provenance=run.provenance | {"device": "a GPU", "device_type": "cuda"})
    other = run._replace(tables=run.tables | {"epoch": run.tables["epoch"].assign(train_loss=lambda rows: 1.001 * rows["train_loss"])})
    found = compare(run, other)
    assert (found.alike, found.same, found.ok) == (False, False, True)
