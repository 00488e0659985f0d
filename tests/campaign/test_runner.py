import dataclasses

import pytest
import torch

from gstlib import experiments
from gstlib.campaign import runner, todo, work
from gstlib.errors import InputError
from gstlib.experiments import Labelled
from gstlib.spec import OptimiserSpec, PruningSpec
from gstlib.store import Store
from gstlib.training import train
from gstlib.training.checkpoint import Checkpoints


@pytest.fixture
def runs(tiny_spec):
    return [Labelled("none", tiny_spec(seed=seed)) for seed in range(5)]


def run(store, runs, **options):
    return runner.run(store, runs, "digits", "smoke", "cpu", quiet=True, **options)


def test_trains_what_is_missing_and_nothing_twice(tmp_path, runs):
    store = Store(tmp_path / "results")
    first = run(store, runs[:2] + runs[:1], workers=1)
    assert first.trained == [r.spec.id for r in runs[:2]] and first.stored == 0
    second = run(store, runs[:3], workers=1)
    assert second.trained == [runs[2].spec.id] and second.stored == 2


def test_what_a_kill_left_of_a_stored_run_is_removed(tmp_path, runs):
    """Killed after a run was stored and before its checkpoint and its lock were removed, whether or not more is left."""
    store = Store(tmp_path)
    run(store, runs[:1], workers=1)
    for more in (runs[:1], runs[:2]):
        for folder, ending in (("checkpoints", "ckpt"), ("leases", "lock")):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{runs[0].spec.id}.{ending}").write_text("left")
        run(store, more, workers=1)
        assert not [*(tmp_path / "checkpoints").iterdir(), *(tmp_path / "leases").iterdir()]


def test_worker_processes_give_the_same_rows(tmp_path, runs):
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    run(here, runs[:2], workers=1)
    run(there, runs[:2], workers=2)
    for labelled in runs[:2]:
        a, b = (s.read(labelled.spec.id).tables["epoch"].drop(columns="seconds") for s in (here, there))
        assert a.equals(b)


@pytest.mark.parametrize("in_a_capture", [False, True])
def test_more_replicas_than_memory_holds_goes_on_with_fewer(tmp_path, runs, monkeypatch, in_a_capture):
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
    outcome = run(store, runs, replicas=5)
    assert tried == [5, 2, 2, 1]
    assert sorted(outcome.trained) == sorted(r.spec.id for r in runs) == store.ids()


def test_memory_for_not_even_one_run_is_said(tmp_path, runs, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(train, "train_group", no_memory)
    with pytest.raises(InputError, match="does not fit into the memory"):
        run(Store(tmp_path), runs[:3], replicas=3)


def test_one_diverging_run_does_not_take_its_company_along(tmp_path, tiny_spec):
    # a rate no float32 survives
    bad = Labelled("bad", tiny_spec(optimiser=OptimiserSpec(lr=1e30, epochs=2, batch_size=32, milestones=(1,))))
    good = Labelled("good", tiny_spec(optimiser=OptimiserSpec(epochs=2, batch_size=32, milestones=(1,))))
    store = Store(tmp_path)
    outcome = run(store, [bad, good], replicas=2)
    assert outcome.trained == [good.spec.id] == store.ids()
    assert list(outcome.failed) == [bad.spec.id] and "no longer finite" in outcome.failed[bad.spec.id]


def test_what_cannot_end_in_time_is_begun_last(tmp_path, runs, tiny_spec, monkeypatch):
    monkeypatch.setattr(work.pace, "seconds_per_run", lambda spec, *_: 3600.0 if spec.optimiser.epochs == 3 else 0.01)
    long = Labelled("long", tiny_spec(optimiser=OptimiserSpec(epochs=3, batch_size=32)))
    outcome = run(Store(tmp_path), [long, runs[0]], workers=1, time_limit=5)
    assert outcome.trained == [runs[0].spec.id, long.spec.id] and not outcome.left


def test_work_in_progress_at_the_limit_goes_on_next_time(tmp_path, tiny_spec, monkeypatch):
    monkeypatch.setattr(work.pace, "seconds_per_run", lambda *_: 3600.0)
    long = Labelled("long", tiny_spec(optimiser=OptimiserSpec(epochs=400, batch_size=32)))
    store = Store(tmp_path)
    outcome = run(store, [long], workers=1, time_limit=1 / 60)
    assert outcome.left == [long.spec.id] and not store.ids()
    epoch, _ = Checkpoints(tmp_path / "checkpoints", "cpu").position(long.spec.id)
    assert 0 < epoch < 400
    outcome = run(store, [long], workers=1)
    assert outcome.trained == [long.spec.id] and store.read(long.spec.id).provenance["resumed"] == 1
    assert not list((tmp_path / "checkpoints").iterdir()) and not list((tmp_path / "leases").iterdir())


def test_a_specification_that_cannot_be_trained_is_refused_before_anything_is(tmp_path, runs, tiny_spec):
    wrong = Labelled("wrong", tiny_spec(pruning=PruningSpec(("conv99",), (0,), (1,), (0.5,), 1)))
    with pytest.raises(InputError, match="conv99"):
        run(Store(tmp_path / "results"), [*runs, wrong])
    assert not (tmp_path / "results").exists()


def test_the_campaign_names_each_run_once_in_order_of_worth(monkeypatch):
    looked, identify = [], todo.data.identify
    monkeypatch.setattr(todo.data, "identify", lambda source: looked.append(source) or identify(source))
    planned = todo.campaign("cpu", "digits")
    assert looked == ["digits"]  # of a folder's images each is looked at
    ids = [task.spec.id for task in planned]
    assert len(ids) == len(set(ids))
    stages = experiments.CAMPAIGN["cpu"]
    wanted = [task.spec.id for figure, profile, seeds, labels in stages
              for task in todo.plan([figure], profile, "digits", seeds) if task.label in (labels or [task.label])]
    assert ids == list(dict.fromkeys(wanted))
    assert all((task.figure, task.profile) in {stage[:2] for stage in stages} for task in planned)


def test_a_campaign_leaves_a_seed_to_the_kind_of_processor_that_began_it(monkeypatch):
    monkeypatch.setattr(todo.experiments, "CAMPAIGN", {"cpu": (
        experiments.Stage("figure1-vgg11", "mini", 1, ("none", "L r=40")), experiments.Stage("figure1-vgg11", "mini", 3))})
    of = {seed: todo.plan(["figure1-vgg11"], "mini", "digits", [seed]) for seed in range(10, 15)}

    def seeds(elsewhere):
        planned = todo.campaign("cpu", "digits", elsewhere)
        return [seed for seed in of if {task.spec.id for task in of[seed]} <= {task.spec.id for task in planned}], len(planned)

    ids = {seed: [task.spec.id for task in tasks] for seed, tasks in of.items()}
    assert seeds({}) == seeds({ids[11][0]: False}) == ([10, 11, 12], 15)
    # begun there: left alone; ended there: counts; begun here and there: left alone too
    assert seeds({ids[11][0]: True}) == ([10, 12, 13], 15)
    assert seeds(dict.fromkeys(ids[11], True)) == ([10, 11, 12], 15)
    assert seeds({ids[12][0]: True, ids[12][1]: False, ids[11][4]: True}) == ([10, 13, 14], 15)
    # of a stage of some configurations these count alone: ended there in seed 10, whose others are left alone
    assert seeds({task.spec.id: True for task in of[10] if task.label in ("none", "L r=40")}) == ([11, 12, 13], 17)


def test_what_another_kind_of_processor_trained_is_told_by_its_provenance(tmp_path, runs):
    store = Store(tmp_path)
    run(store, runs[:1])
    stored = store.read(runs[0].spec.id)
    assert runner.elsewhere(store, torch.device("cpu")) == {stored.spec.id: False}
    for number, (about, other) in enumerate([({"device": "another"}, True), ({"instructions": "none"}, True), ({"commit": "x"}, False)]):
        there = Store(tmp_path / str(number))
        there.write(stored.spec, stored.provenance | about, {name: rows.to_dict("records") for name, rows in stored.tables.items()})
        assert runner.elsewhere(there, torch.device("cpu")) == {stored.spec.id: other}


def test_a_campaign_trains_what_its_stages_lack_each_at_its_profile(tmp_path, runs, monkeypatch):
    stages = [experiments.Stage("figure1-vgg11", profile, 1) for profile in ("smoke", "quarter", "smoke")]
    listed = dict(zip(stages, ([runs[0], runs[1]], [runs[1], runs[2]])))
    monkeypatch.setattr(todo.experiments, "CAMPAIGN", {"cpu": tuple(stages), "cuda": ()})
    monkeypatch.setattr(todo, "plan", lambda figures, profile, *_: [todo.Task(*run, profile, "digits") for run in listed[
        experiments.Stage(figures[0], profile, 1)]])
    store = Store(tmp_path)
    assert run(store, runs[:1]).trained == [runs[0].spec.id]
    outcome = runner.run_campaign(store, "digits", "cpu", workers=1, quiet=True)
    assert outcome.trained == [runs[1].spec.id, runs[2].spec.id] and outcome.stored == 1 and not outcome.left
    assert [store.read(x.spec.id).provenance["profile"] for x in runs[1:3]] == ["smoke", "quarter"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_run_of_the_campaign_has_an_estimate(device, monkeypatch):
    monkeypatch.setattr(work.pace, "_pace", lambda spec, *_: (0.001, 0.0001))
    for task in todo.campaign(device, "digits"):
        assert 0 < work.pace.seconds_per_run(task.spec, torch.device("cpu")) < 1e5


def test_a_short_measurement_is_near_what_a_run_takes(tmp_path, tiny_spec):
    spec = tiny_spec(data=dataclasses.replace(tiny_spec().data, train_size=256, test_size=100),
                     optimiser=OptimiserSpec(epochs=6, batch_size=32))
    store = Store(tmp_path)
    run(store, [Labelled("x", spec)], workers=1)
    estimate = work.pace.seconds_per_run(spec, torch.device("cpu"))
    assert 0.1 < estimate / store.read(spec.id).provenance["seconds"] < 10
