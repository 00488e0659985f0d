"""What is left to do, and what became of what was done: every run has one end and is counted once."""

import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from gstlib.campaign.leases import Leases
from gstlib.campaign.todo import Task
from gstlib.errors import InputError, say
from gstlib.spec import RunSpec
from gstlib.store import DamagedRun, Store
from gstlib.training import pace, train
from gstlib.training.checkpoint import Checkpoints

RETRIES = 3  # how often a run is begun again after its worker was lost


@dataclass
class Outcome:
    """What became of all runs: number stored by others or before, ids trained now, ids left for lack of time, failures
    by id."""

    stored: int = 0
    trained: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class Clock:
    """Judges by runs of the same shape so far, else by a short measurement on `device` (None: all may begin)."""

    def __init__(self, minutes: float | None, device: torch.device | None):
        self.deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        self.device, self.seconds = device, {}

    def allows(self, specs: list[RunSpec], epoch: int) -> bool:
        """Whether runs of one shape, trained in lockstep from `epoch` on, would end in time."""
        shape = train.shape(specs[0])
        if shape not in self.seconds and self.device is not None and self.deadline < float("inf"):
            self.seconds[shape] = pace.seconds_per_run(specs[0], self.device, len(specs))
        left = len(specs) * (1 - epoch / specs[0].optimiser.epochs)
        return time.monotonic() + left * self.seconds.get(shape, 0) < self.deadline


class Display:
    """One bar over all epochs of all runs; its text shows the run, its epoch and its accuracy."""

    def __init__(self, tasks: list[Task], quiet: bool):
        self.tasks, self.epochs = {task.spec.id: task for task in tasks}, Counter()
        self.bar = tqdm(total=sum(task.spec.optimiser.epochs for task in tasks), unit="epoch", disable=quiet,
                        dynamic_ncols=True, smoothing=0.05, mininterval=0.5, desc=f"{len(tasks)} runs")

    def __call__(self, p: train.Progress) -> None:
        task = self.tasks[p.run_id]
        self.bar.set_postfix_str(f"{task.label} seed {task.spec.seed}, epoch {p.epoch + 1}/{p.epochs}, "
                                 f"test {100 * p.test_accuracy:.1f}%", refresh=False)
        self.stands(p.run_id, p.epoch + 1)

    def stands(self, run_id: str, epochs: int) -> None:
        """So many epochs of a run are done, here or elsewhere."""
        self.bar.update(epochs - self.epochs[run_id])
        self.epochs[run_id] = epochs

    def say(self, text: str, always: bool = False) -> None:
        """A line above the bar; without a bar, only what must be said."""
        if always or not self.bar.disable:
            say(text)


class Work:
    """The runs without an end yet, from which groups are taken.

    A run is in `open` until `_end` takes it out and its caller puts it into the outcome.  Groups are made up anew at
    each `take`, from what is open and not locked by us or another: no list of them is kept that could lose a run.
    """

    def __init__(self, store: Store, tasks: list[Task], replicas: int, clock: Clock, leases: Leases,
                 checkpoints: Checkpoints, show: Display):
        self.store, self.clock, self.leases, self.checkpoints, self.show = store, clock, leases, checkpoints, show
        self.open = {task.spec.id: task for task in tasks}
        self._outcome, self._replicas = Outcome(), replicas
        self._elsewhere: dict[str, float] = {}  # when another was last seen to have a run
        self._alone: set[str] = set()  # runs of groups in which one failed
        self._fits: dict[tuple, int] = {}  # most replicas of a shape, once more did not fit
        self._losses: Counter[str] = Counter()
        self._positions: dict[str, tuple[int, int]] = {}
        self._refresh(tasks)

    def outcome(self) -> Outcome:
        """What became of every run; those without an end are left."""
        self._outcome.left = list(self.open)
        return self._outcome

    def take(self) -> list[Task] | None:
        """A group to be trained now, locked; None when there is none at the moment."""
        late = []
        for group in self._groups():
            if not self.clock.allows([task.spec for task in group], self._positions[group[0].spec.id][0]):
                late.append(group)
            elif ours := self._lock(group):
                return ours
        return next(filter(None, map(self._lock, late)), None)

    def done(self, group: list[Task], results: list[train.Result]) -> None:
        """Store the rows of `group`; a run fails whose rows no run can have."""
        for task, result in zip(group, results, strict=True):
            try:
                self.store.write(task.spec, result.provenance, result.tables)
            except DamagedRun as error:
                self.failed([task], str(error))
                continue
            self.clock.seconds[train.shape(task.spec)] = result.provenance["seconds"]  # in company, a run's share
            self.checkpoints.remove(task.spec.id)
            self._outcome.trained.append(self._end(task))

    def failed(self, group: list[Task], why: str) -> None:
        """One of `group` cannot be trained: alone, each shows whether it is the one."""
        if len(group) > 1:
            self._alone.update(task.spec.id for task in group)
            self.stopped(group)
        else:
            self.checkpoints.remove(group[0].spec.id)
            self._fail(group[0], why)

    def out_of_memory(self, group: list[Task], device: object) -> None:
        """`group` does not fit: go on with half as many. Raises `InputError` when it is a single run."""
        name, half = group[0].spec.model.name, len(group) // 2
        if not half:
            raise InputError(f"one run of {name} does not fit into the memory of {device}")
        self._fits[train.shape(group[0].spec)] = half
        self.show.say(f"{len(group)} runs of {name} in lockstep exceed the memory of {device}; going on with {half}")
        self.stopped(group)

    def lost(self, group: list[Task]) -> None:
        """The worker that trained `group` is gone: begin again from the checkpoints, `RETRIES` times at most."""
        self.show.say(f"the worker training {group[0].label} seed {group[0].spec.seed} was lost")
        self.stopped(group)
        for task in group:
            self._losses[task.spec.id] += 1
            if (n := self._losses[task.spec.id]) > RETRIES:
                self._fail(task, f"run {task.spec.id}: its worker was lost {n} times")

    def stopped(self, group: list[Task]) -> None:
        """`group` is trained no more; it may be taken again, and goes on from its checkpoints."""
        self._refresh(group)
        for task in group:
            self.leases.release(task.spec.id)

    def _groups(self) -> list[list[Task]]:
        """Runs of one shape that stand at one position together, in the order in which they first come."""
        alike: dict[tuple, list[Task]] = {}
        for run_id, task in self.open.items():
            if run_id not in self.leases.held and time.monotonic() - self._elsewhere.get(run_id, -1.0) >= 1.0:
                alike.setdefault((train.shape(task.spec), task.profile, task.source, self._positions[run_id],
                                  run_id in self._alone and run_id), []).append(task)
        return [same[i:i + n] for (shape, *_), same in alike.items() for n in [self._fits.get(shape, self._replicas)]
                for i in range(0, len(same), n)]

    def _lock(self, group: list[Task]) -> list[Task]:
        """What of `group` is ours to train in lockstep now."""
        ours: list[Task] = []
        for task in group:
            run_id = task.spec.id
            try:
                if not self.leases.take(run_id):
                    self._elsewhere[run_id] = time.monotonic()
                elif any(self.store.runs([run_id])):  # another finished it since
                    self.show.stands(run_id, task.spec.optimiser.epochs)
                    self._end(task)
                    self._outcome.stored += 1
                else:
                    ours.append(task)
            except InputError as error:
                self._fail(task, str(error))
        self._refresh(ours)
        # others may have taken some of them further
        together = [task for task in ours if self._positions[task.spec.id] == self._positions[ours[0].spec.id]]
        for task in ours:
            if task not in together:
                self.leases.release(task.spec.id)
        return together

    def _refresh(self, tasks: list[Task]) -> None:
        for task in tasks:
            position = self._positions[task.spec.id] = self.checkpoints.position(task.spec.id)
            self.show.stands(task.spec.id, position[0])

    def _fail(self, task: Task, why: str) -> None:
        self._outcome.failed[self._end(task)] = why
        self.show.say(f"failed: {why}")

    def _end(self, task: Task) -> str:
        """Take a run out of `open`; its id."""
        self.leases.release(task.spec.id)
        return self.open.pop(task.spec.id).spec.id
