"""What became of every run, whatever happened in whatever order."""

import dataclasses
import random

import pytest

from gstlib.campaign import work
from gstlib.campaign.leases import Leases
from gstlib.campaign.todo import Task
from gstlib.campaign.work import RETRIES, Clock, Display, Work
from gstlib.spec import OptimiserSpec
from gstlib.store import DamagedRun
from gstlib.training.checkpoint import Checkpoints
from gstlib.training.train import Result, shape


class Shelf(set):
    """As much of a store as `Work` uses."""

    def runs(self, ids):
        return [(run_id, None) for run_id in ids if run_id in self]

    def write(self, spec, provenance, tables):
        assert spec.id not in self, "stored twice"
        self.add(spec.id)


class Scene:
    """Work on `n` runs of two shapes, and a rival that holds some of them."""

    def __init__(self, folder, tiny_spec, monkeypatch, n=12, replicas=3, minutes=None):
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        long = OptimiserSpec(epochs=5, batch_size=32)
        specs = [tiny_spec(seed=i) if i % 3 else tiny_spec(seed=i, optimiser=long) for i in range(n)]
        self.tasks = [Task(f"run {i}", spec, "tiny", "digits") for i, spec in enumerate(specs)]
        self.store, self.rival = Shelf(), Leases(folder / "leases")
        self.checkpoints = Checkpoints(folder / "checkpoints", "cpu")
        self.work = Work(self.store, self.tasks, replicas, Clock(minutes, None), Leases(folder / "leases"),
                         self.checkpoints, Display(self.tasks, quiet=True))

    def take(self):
        """A group, one second after the last try."""
        self.now += 1
        return self.work.take()

    def save(self, task, epoch):
        assert self.checkpoints.save(task.spec.id, epoch, 0, {})

    def done(self, group):
        self.work.done(group, [Result({}, {"seconds": 1.0}) for _ in group])

    def ends(self):
        """Ids by what became of them; every run is in one place."""
        outcome = self.work.outcome()
        ended = [*outcome.trained, *outcome.left, *outcome.failed]
        assert len(set(ended)) == len(ended) and outcome.stored + len(ended) == len(self.tasks)
        return outcome


@pytest.fixture
def scene(tmp_path, tiny_spec, monkeypatch):
    return lambda **sizes: Scene(tmp_path, tiny_spec, monkeypatch, **sizes)


def test_runs_that_fall_to_us_at_unequal_positions_are_all_trained(scene):
    s = scene(n=3, replicas=1)
    a, b = s.tasks[1:]
    s.rival.take(a.spec.id), s.rival.take(b.spec.id)
    s.done(s.take())
    assert s.take() is None and len(s.work.open) == 2
    s.save(a, 1), s.save(b, 2)
    s.rival.release(a.spec.id), s.rival.release(b.spec.id)
    for task in (a, b):
        assert (group := s.take()) == [task]
        s.done(group)
    assert s.take() is None and not s.work.open and len(s.ends().trained) == 3


def test_a_group_keeps_to_one_position(scene):
    s = scene(n=3, replicas=3)
    s.save(s.tasks[2], 1)  # by another process, after positions were read
    assert s.take() == [s.tasks[0]] and s.take() == [s.tasks[1]] and s.take() == [s.tasks[2]]


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_every_run_has_one_end(scene, seed):
    s, rng = scene(), random.Random(seed)
    theirs, running = [], []

    def rival_takes():
        task = rng.choice(s.tasks)
        if task.spec.id not in s.store and task.spec.id not in s.rival.held and s.rival.take(task.spec.id):
            theirs.append(task)

    def rival_stops():
        if theirs:
            task = theirs.pop(rng.randrange(len(theirs)))
            if rng.random() < 0.5:
                s.store.add(task.spec.id)
            elif rng.random() < 0.7:
                s.save(task, rng.randrange(1, 3))
            s.rival.release(task.spec.id)

    def take():
        if group := s.take():
            assert 1 <= len(group) <= 3 and len({s.checkpoints.position(task.spec.id) for task in group}) == 1
            assert not {task.spec.id for task in group} & {t.spec.id for other in running for t in other}
            running.append(group)

    def report():
        if running:
            group = running.pop(rng.randrange(len(running)))
            fate = rng.choice(["done", "done", "failed", "lost", "stopped", "memory"])
            if fate == "done":
                s.done(group)
            elif fate == "failed":
                s.work.failed(group, "because")
            elif fate == "memory" and len(group) > 1:
                s.work.out_of_memory(group, "cpu")
            elif fate == "lost":
                s.work.lost(group)
            else:
                s.work.stopped(group)

    for _ in range(150):
        rng.choice([rival_takes, rival_stops, take, take, report])()
        assert {task.spec.id for group in running for task in group} <= set(s.work.open)
        s.ends()
    while theirs:
        rival_stops()
    while running:
        report()
    while group := s.take():
        s.done(group)
    assert not s.work.open and not s.ends().left and not list(s.work.leases.folder.iterdir())


def test_a_run_that_loses_every_worker_is_given_up(scene):
    s = scene(n=2, replicas=1)
    for _ in range(RETRIES + 1):
        group = s.take()
        assert group == s.tasks[:1]
        s.work.lost(group)
    s.done(s.take())
    assert list(s.ends().failed) == [s.tasks[0].spec.id] and "lost 4 times" in s.ends().failed[s.tasks[0].spec.id]


def test_a_run_that_cannot_be_locked_fails_and_the_others_do_not(scene):
    s = scene(n=2, replicas=1)
    (s.work.leases.folder / f"{s.tasks[0].spec.id}.lock").mkdir()
    assert s.take() == [s.tasks[1]]
    assert "cannot be locked" in s.ends().failed[s.tasks[0].spec.id]


def test_a_run_whose_rows_are_impossible_fails_and_the_others_do_not(scene, monkeypatch):
    s = scene(n=6, replicas=2)
    bad, write = s.tasks[1], Shelf.write

    def refuse(self, spec, *rest):
        if spec.id == bad.spec.id:
            raise DamagedRun("its loss is negative")
        write(self, spec, *rest)

    monkeypatch.setattr(Shelf, "write", refuse)
    while group := s.take():
        s.save(group[0], 1)
        s.done(group)
    assert s.ends().failed == {bad.spec.id: "its loss is negative"} and len(s.ends().trained) == 5
    assert not list(s.checkpoints.folder.iterdir()) and not list(s.work.leases.folder.iterdir())


def test_what_would_not_end_in_time_is_begun_last(scene, monkeypatch):
    s = scene(n=4, replicas=2, minutes=5)
    s.work.clock.device = "cpu"
    monkeypatch.setattr(work.pace, "seconds_per_run", lambda spec, *_: 3600.0 if spec.optimiser.epochs == 5 else 0.1)
    assert s.take() == s.tasks[1:3] and s.take() == [s.tasks[0], s.tasks[3]]
    s.work.clock.seconds[shape(s.tasks[0].spec)] = 1.0
    assert s.work.clock.allows([s.tasks[0].spec], 0)


def test_runs_of_two_profiles_or_data_sets_are_not_put_together(scene):
    s = scene(n=1)
    spec = s.tasks[0].spec
    others = [Task("x", dataclasses.replace(spec, seed=7 + i), *where) for i, where in enumerate(
        [("tiny", "digits"), ("small", "digits"), ("tiny", "elsewhere")])]
    s.work.open |= {task.spec.id: task for task in others}
    s.work._positions |= {task.spec.id: (0, 0) for task in others}
    s.work.show.tasks |= {task.spec.id: task for task in others}
    assert [len(s.take()) for _ in range(3)] == [2, 1, 1]
