"""A specification that grows: runs stored before a field came read back with their ids and rows."""

import dataclasses
from pathlib import Path

import pandas as pd
import pytest

from gstlib import spec as specification
from gstlib.spec import OptimiserSpec, RunSpec, later
from gstlib.store import Store

RESULTS = Store(Path(__file__).parents[2] / "book" / "results")


@dataclasses.dataclass(frozen=True)
class Grown(OptimiserSpec):
    nesterov: float = later(0.0)


@pytest.fixture
def grown(monkeypatch):
    """gstlib as it will be once optimisers have one field more."""
    monkeypatch.setitem(RunSpec.__annotations__, "optimiser", Grown)
    specification._kinds.cache_clear()
    yield
    specification._kinds.cache_clear()


@pytest.fixture(scope="module")
def before():
    return dict(RESULTS.runs())


def test_every_committed_run_keeps_its_id_and_rows_when_a_field_is_added(before, grown):
    assert list(before) == RESULTS.ids() and before
    for run_id, run in RESULTS.runs():
        assert run.spec.optimiser == Grown(**dataclasses.asdict(before[run_id].spec.optimiser)) and run.spec.id == run_id
        for name, rows in before[run_id].tables.items():
            pd.testing.assert_frame_equal(run.tables[name], rows, check_exact=True)


def test_a_run_with_the_new_field_set_is_newer_to_the_older_gstlib(before, grown, tmp_path, capsys):
    run_id, run = next(iter(before.items()))
    smoothed = dataclasses.replace(run.spec, optimiser=Grown(**dataclasses.asdict(run.spec.optimiser) | {"nesterov": 0.1}))
    store = Store(tmp_path)
    store.write(smoothed, run.provenance, {name: rows.to_dict("records") for name, rows in run.tables.items()})
    assert smoothed.id != run_id and [key for key, _ in store.runs()] == [smoothed.id]
    RunSpec.__annotations__["optimiser"] = OptimiserSpec
    specification._kinds.cache_clear()
    assert not list(store.runs()) and "nesterov" in capsys.readouterr().err and store.ids() == [smoothed.id]
