import dataclasses

import pytest
import torch

from gstlib import experiments
from gstlib.training import pace
from gstlib.campaign import runner
from gstlib.errors import InputError
from gstlib.experiments import Labelled
from gstlib.spec import OptimiserSpec, PruningSpec
from gstlib.store import Store
from gstlib.training import train
from gstlib.training.checkpoint import Checkpoints


@pytest.fixture
def runs(tiny_spec):
    return [Labelled("none", tiny_spec(seed=seed)) for seed in range(5)]


def run(store, runs, digits, **options):
    return runner.run(store, runs, digits, "digits", "smoke", "cpu", quiet=True, **options)


def test_trains_what_is_missing_and_nothing_twice(tmp_path, digits, runs):
    store = Store(tmp_path / "results")
    first = run(store, runs[:2] + runs[:1], digits, workers=1)
    assert first.trained == [r.spec.id for r in runs[:2]] and first.stored == 0
    second = run(store, runs[:3], digits, workers=1)
    assert second.trained == [runs[2].spec.id] and second.stored == 2


def test_worker_processes_give_the_same_rows(tmp_path, digits, runs):
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    run(here, runs[:2], digits, workers=1)
    run(there, runs[:2], digits, workers=2)
    for labelled in runs[:2]:
        a, b = (s.read(labelled.spec.id).tables["epoch"].drop(columns="seconds") for s in (here, there))
        assert a.equals(b)


def test_groups_hold_one_shape_and_no_more_than_asked(tiny_spec):
    other = tiny_spec(optimiser=OptimiserSpec(epochs=3, batch_size=32))
    mixed = [Labelled("a", tiny_spec(seed=s)) for s in range(3)] + [Labelled("b", other)]
    sizes = [[r.label for r in group] for group in runner.groups(mixed[::-1], 2)]
    assert sorted(sizes) == [["a"], ["a", "a"], ["b"]]


@pytest.mark.parametrize("in_a_capture", [False, True])
def test_more_replicas_than_memory_holds_goes_on_with_fewer(tmp_path, digits, runs, monkeypatch, in_a_capture):
    real, tried = train.train_group, []

    def small_memory(specs, *rest):
        tried.append(len(specs))
        if len(specs) > 2:
            try:
                raise torch.OutOfMemoryError("made up")
            finally:
                if in_a_capture:  # which cannot be ended properly then
                    raise RuntimeError("capture failed")
        return real(specs, *rest)

    monkeypatch.setattr(train, "train_group", small_memory)
    store = Store(tmp_path)
    outcome = run(store, runs, digits, replicas=5)
    assert tried == [5, 2, 2, 1]
    assert sorted(outcome.trained) == sorted(r.spec.id for r in runs) == store.ids()


def test_memory_for_not_even_one_run_is_said(tmp_path, digits, runs, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(train, "train_group", no_memory)
    with pytest.raises(InputError, match="does not fit into the memory"):
        run(Store(tmp_path), runs[:3], digits, replicas=3)


def test_one_diverging_run_does_not_take_its_company_along(tmp_path, digits, tiny_spec):
    # a rate no float32 survives
    bad = Labelled("bad", tiny_spec(optimiser=OptimiserSpec(lr=1e30, epochs=2, batch_size=32, milestones=(1,))))
    good = Labelled("good", tiny_spec(optimiser=OptimiserSpec(epochs=2, batch_size=32, milestones=(1,))))
    store = Store(tmp_path)
    outcome = run(store, [bad, good], digits, replicas=2)
    assert outcome.trained == [good.spec.id] == store.ids()
    assert list(outcome.failed) == [bad.spec.id] and "no longer finite" in outcome.failed[bad.spec.id]


def test_what_cannot_end_in_time_is_begun_last_or_not_at_all(tmp_path, digits, runs, tiny_spec, monkeypatch):
    monkeypatch.setattr(pace, "seconds_per_run", lambda spec, device, replicas: 3600.0 if spec.optimiser.epochs == 3 else 0.01)
    long = Labelled("long", tiny_spec(optimiser=OptimiserSpec(epochs=3, batch_size=32)))
    store = Store(tmp_path)
    outcome = run(store, [long, runs[0]], digits, workers=1, time_limit=5, partial=False)
    assert outcome.trained == [runs[0].spec.id] and outcome.left == [long.spec.id]
    outcome = run(store, [long, runs[1]], digits, workers=1, time_limit=5)
    assert outcome.trained == [runs[1].spec.id, long.spec.id] and not outcome.left


def test_work_in_progress_at_the_limit_goes_on_next_time(tmp_path, digits, tiny_spec, monkeypatch):
    monkeypatch.setattr(pace, "seconds_per_run", lambda spec, device, replicas: 3600.0)
    long = Labelled("long", tiny_spec(optimiser=OptimiserSpec(epochs=60, batch_size=32)))
    store = Store(tmp_path)
    outcome = run(store, [long], digits, workers=1, time_limit=1 / 60)
    assert outcome.left == [long.spec.id] and not store.ids()
    epoch, _ = Checkpoints(tmp_path / "checkpoints", "cpu").position(long.spec.id)
    assert 0 < epoch < 60
    outcome = run(store, [long], digits, workers=1)
    assert outcome.trained == [long.spec.id] and store.read(long.spec.id).provenance["resumed"] == 1
    assert not list((tmp_path / "checkpoints").iterdir()) and not list((tmp_path / "leases").iterdir())


def test_a_specification_that_cannot_be_trained_is_refused_before_anything_is(tmp_path, digits, runs, tiny_spec):
    wrong = Labelled("wrong", tiny_spec(pruning=PruningSpec(("conv99",), (0,), (1,), (0.5,), 1)))
    with pytest.raises(InputError, match="conv99"):
        run(Store(tmp_path / "results"), [*runs, wrong], digits)
    assert not (tmp_path / "results").exists()


def test_campaign_lists_each_missing_run_once_in_order_of_worth(tmp_path, monkeypatch):
    monkeypatch.setenv("GSTLIB_DATA", str(tmp_path))
    lacking = runner.campaign(Store(tmp_path), "digits")
    ids = [labelled.spec.id for _, labelled in lacking]
    assert len(ids) == len(set(ids))
    stages = list(dict.fromkeys(stage for stage, _ in lacking))
    assert stages[0] == experiments.Stage("figure1-vgg11", "quarter", 5)
    assert stages == [stage for stage in experiments.CAMPAIGN if stage in stages]
    first = [labelled for stage, labelled in lacking if stage == stages[0]]
    assert len(first) == 25
    assert {dataclasses.replace(labelled.spec, seed=0).id for labelled in first} == {
        r.spec.id for r in experiments.figures.figure1_vgg11(experiments.profile("quarter"), first[0].spec.data, [0])}


def test_a_campaign_loads_its_data_once(tmp_path, digits, runs, monkeypatch):
    loaded, trained = [], []
    monkeypatch.setattr(runner.data, "load", lambda source, **_: loaded.append(source) or digits)
    monkeypatch.setattr(runner, "run", lambda store, runs, images, *rest, **_: trained.append(images) or runner.Outcome())
    runner.run_campaign(Store(tmp_path), "digits", "cpu", time_limit=5)
    assert loaded == ["digits"] and len(trained) == 2 * len(experiments.CAMPAIGN) and all(images is digits for images in trained)
