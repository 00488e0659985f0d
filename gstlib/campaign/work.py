"""What is left to do, and what became of what was done: every run has one end and is counted once."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from gstlib.campaign.clock import Clock
from gstlib.campaign.display import Display
from gstlib.campaign.leases import Leases
from gstlib.campaign.todo import Task
from gstlib.errors import InputError
from gstlib.store import Store
from gstlib.training import train
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


class Work:
    """The runs without an end yet, from which groups are taken.

    A run is in `open` until `_end` takes it out and its caller puts it into the outcome.  Groups are made up anew at
    each `take`, from what is open, not taken and not another's: no list of them is kept that could lose a run.
    """

    def __init__(self, store: Store, tasks: list[Task], replicas: int, clock: Clock, leases: Leases,
                 checkpoints: Checkpoints, show: Display):
        self.store, self.clock, self.leases, self.checkpoints, self.show = store, clock, leases, checkpoints, show
        self.open = {task.spec.id: task for task in tasks}
        self._outcome, self._replicas = Outcome(), replicas
        self._taken: set[str] = set()
        self._elsewhere: dict[str, float] = {}  # when another was last seen to have a run
        self._alone: set[str] = set()  # runs of groups in which one failed
        self._fits: dict[tuple, int] = {}  # most replicas of a shape, once more did not fit
        self._losses = dict.fromkeys(self.open, 0)
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
        """Store the rows of `group`."""
        for task, result in zip(group, results, strict=True):
            self.store.write(task.spec, result.provenance, result.tables)
            self.clock.learn(task.spec, result.provenance["seconds"])
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
            self._taken.discard(task.spec.id)
            self.leases.release(task.spec.id)

    def _groups(self) -> list[list[Task]]:
        """Runs of one shape that stand at one position together, in the order in which they first come."""
        alike: dict[tuple, list[Task]] = {}
        for run_id, task in self.open.items():
            if run_id not in self._taken and time.monotonic() - self._elsewhere.get(run_id, -1.0) >= 1.0:
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
        self._taken.update(task.spec.id for task in together)
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
        self._taken.discard(task.spec.id)
        return self.open.pop(task.spec.id).spec.id
