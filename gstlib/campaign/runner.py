"""Which runs are missing, in what order they are done, and what becomes of each; `executors` says where."""

from __future__ import annotations

import functools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from gstlib import data, experiments
from gstlib.bench import measure as bench
from gstlib.campaign import executors
from gstlib.campaign.executors import EXECUTORS
from gstlib.campaign.leases import Leases
from gstlib.errors import InputError, check_choice
from gstlib.experiments import Labelled
from gstlib.spec import RunSpec
from gstlib.store import DamagedRun, Store
from gstlib.training import train
from gstlib.training.checkpoint import Checkpoints
from gstlib.training.engine import cores, pick_device

REPLICAS = 10  # runs in lockstep on a GPU, where neither the user nor its memory says otherwise
RETRIES = 3  # how often a run is begun again after its worker was lost


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop; finished runs are stored, the others keep their checkpoints. `signum`: which signal."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@dataclass
class Outcome:
    """What a call of `run` did: number stored before, ids trained now, ids left for lack of time, failures by id."""

    stored: int = 0
    trained: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def missing(store: Store, runs: Iterable[Labelled]) -> list[Labelled]:
    """The runs that `store` lacks, each specification once, in the order given.

    Stored ones are read and verified: a damaged one is reported, and lacks.
    Raises `NewerSchema` where a newer gstlib's file is in a run's place.
    """
    once: dict[str, Labelled] = {}
    for labelled in runs:
        once.setdefault(labelled.spec.id, labelled)
    stored = {run_id for run_id, _ in store.runs(once)}
    for run_id in once.keys() - stored:
        with suppress(KeyError, DamagedRun):
            store.read(run_id)
    return [labelled for run_id, labelled in once.items() if run_id not in stored]


def plan(figures: Iterable[str], profile: str, source: str | None = None, seeds=None,
         load: Callable[[str], data.Images] = data.load) -> tuple[list[tuple[str, Labelled]], data.Images]:
    """Every run of `figures` at `profile` as (figure, run), and the images they are specified on.

    `source` is what `load` takes (None: the profile's own data set), `seeds`
    what `experiments.parse_seeds` takes (None: the profile's number).
    """
    return experiments.listed(figures, profile, seeds, lambda own: load(source or own))


def train_missing(store: Store, figures: Iterable[str], profile: str, source: str | None = None, seeds=None,
                  device: str = "auto", load: Callable[[str], data.Images] = data.load, **options) -> Outcome:
    """Train and store what is missing of `figures`: `plan`, then `run` with its `options`."""
    _device(device, options.get("executor"), options.get("address"), options.get("workers"))
    planned, images = plan(figures, profile, source, seeds, load)
    return run(store, [labelled for _, labelled in planned], images, source or experiments.profile(profile).data,
               profile, device, **options)


def campaign(store: Store, source: str | None = None, device: str = "auto") -> list[tuple[experiments.Stage, Labelled]]:
    """Every run of the device's `experiments.CAMPAIGN` that `store` lacks, each once, the most valuable first."""
    lacking: dict[str, tuple[experiments.Stage, Labelled]] = {}
    for stage in experiments.CAMPAIGN[pick_device(device).type]:
        planned, _ = experiments.listed([stage.figure], stage.profile, stage.seeds,
                                        lambda own: data.identify(source or own))
        for labelled in missing(store, [labelled for _, labelled in planned]):
            lacking.setdefault(labelled.spec.id, (stage, labelled))
    return list(lacking.values())


def run_campaign(store: Store, source: str | None = None, device: str = "auto", time_limit: float | None = None,
                 **options) -> Outcome:
    """Work off the device's `experiments.CAMPAIGN` from wherever `store` stands, stage by stage, within `time_limit` minutes."""
    ends = None if time_limit is None else time.monotonic() + 60 * time_limit
    total, load = Outcome(), functools.cache(data.load)  # once for all stages
    # what cannot end in time is begun only when no later stage has anything that can
    for partial in (False, True) if ends is not None else (True,):
        total.left.clear()
        for stage in experiments.CAMPAIGN[pick_device(device).type]:
            left = None if ends is None else max(1e-9, (ends - time.monotonic()) / 60)
            outcome = train_missing(store, [stage.figure], stage.profile, source, stage.seeds, device,
                                    load, time_limit=left, partial=partial, **options)
            total.stored += 0 if partial and ends is not None else outcome.stored
            total.trained += outcome.trained
            total.left += outcome.left
            total.failed |= outcome.failed
    return total


def run(
    store: Store,
    runs: Iterable[Labelled],
    images: data.Images,
    source: str,
    profile: str,
    device: str = "auto",
    workers: int | None = None,
    replicas: int | None = None,
    time_limit: float | None = None,
    quiet: bool = False,
    executor: str | None = None,
    address: str | None = None,
    gpus_per_group: float = 1.0,
    checkpoint_every: float = 300.0,
    partial: bool = True,
) -> Outcome:
    """Train what `store` lacks of `runs` and store each run as it ends.

    `executor`: "local" (in this process), "processes" (worker processes of
    this machine) or "ray" (the cluster at `address`, see `executors`); None
    takes worker processes where there are several processors or GPUs to use.  On a CPU each run has
    one thread, and `workers` runs (as many as there are cores, when None) are
    trained side by side: two runs of one thread were measured faster than one
    run of two, and a run's rows then do not depend on the number of cores.
    On a GPU up to `replicas` runs of one shape (10, when None) are trained in
    lockstep, fewer where memory holds fewer; `workers` is then the number of
    GPUs, and on a Ray cluster each group has `gpus_per_group` of one.  `source` is what `data.load` was given, for workers to load again.

    A run goes on from its checkpoint, of which one is kept every
    `checkpoint_every` seconds.  Runs that another process trains into the
    same results folder are waited for.  With `time_limit` (minutes) what
    would not end in time, judged by runs of the same shape so far or by a
    short measurement, is begun last, and at the limit work in progress is
    kept for the next call; `partial` False begins no such thing.  SIGINT and
    SIGTERM end the step, keep checkpoints and raise `Interrupted`; a second
    one insists.

    Raises `InputError` when a specification cannot be trained, the device is
    not there or the store cannot be written, before anything is trained.
    """
    chosen = _device(device, executor, address, workers)
    if not 0 < gpus_per_group <= 1:
        raise InputError(f"a group is trained on one GPU or a part of it (0 … 1), not on {gpus_per_group}")
    if workers is not None and workers < 1:
        raise InputError(f"workers must be at least 1, not {workers}")
    if replicas is not None and replicas < 1:
        raise InputError(f"replicas must be at least 1, not {replicas}")
    if time_limit is not None and not time_limit > 0:
        raise InputError(f"the time limit must be a positive number of minutes, not {time_limit}")
    checkpoints = Checkpoints(store.path / "checkpoints", chosen.type, checkpoint_every)
    runs = list(runs)
    todo = missing(store, runs)
    for labelled in todo:
        train.check(labelled.spec)
    outcome = Outcome(stored=len({labelled.spec.id for labelled in runs}) - len(todo))
    if not todo:
        return outcome
    store.check_writable()
    on_gpu = chosen.type == "cuda"
    if workers is None and executor != "ray":
        workers = (torch.cuda.device_count() if chosen.index is None else 1) if on_gpu else cores()
    if replicas is None:
        replicas = REPLICAS if on_gpu else 1
    elif executor is None and not on_gpu:
        executor = "local"  # who asks for lockstep on a CPU wants to see it at work
    if executor is None:
        executor = "processes" if min(workers, len(todo)) > 1 else "local"
    show = _Display(todo, quiet)
    with _Signals() as signals, Leases(store.path / "leases") as leases:
        clock = _Clock(time_limit, None if executor == "ray" else chosen)
        work = Work(store, todo, replicas, clock, leases, checkpoints, show, outcome, partial)
        job = executors.Job(work, images, source, profile, chosen, workers, checkpoints,
                            stop=lambda: signals.number is not None or clock.over(), gpus_per_group=gpus_per_group)
        try:
            EXECUTORS[executor](job)
        finally:
            work.close()
            show.close()
    if signals.number is not None:
        raise Interrupted(signals.number)
    return outcome


def _device(name: str, executor: str | None, address: str | None, workers: int | None) -> torch.device:
    """The device to train on: of this machine, or the kind that a Ray cluster has."""
    if executor is not None:
        check_choice("executor", executor, EXECUTORS)
    if executor == "ray":
        return executors.connect(address, name, workers)
    if address is not None:
        raise InputError("an address is that of a Ray cluster; add --executor ray")
    return pick_device(name)


class _Signals:
    """Context in which SIGINT and SIGTERM only leave their number here; the second one is raised at once."""

    def __init__(self):
        self.number: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():  # nowhere else can handlers be set
            self._before = {n: signal.signal(n, self._asked) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, _frame) -> None:
        if self.number is not None:
            raise Interrupted(number)
        self.number = number


class _Clock:
    """Decides whether more runs still fit into the time limit: by runs of their shape so far, else by a short measurement."""

    def __init__(self, minutes: float | None, device: torch.device | None):
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.device = device
        self.seconds: dict[tuple, float] = {}

    def over(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def allows(self, group: list[Labelled], epoch: int) -> bool:
        """Whether `group`, trained in lockstep from `epoch` on, would end in time."""
        if self.deadline is None:
            return True
        if self.over():
            return False
        spec = group[0].spec
        if train.shape(spec) not in self.seconds:
            if self.device is None:  # others train: nothing to measure on, and checkpoints keep what does not end
                return True
            self.seconds[train.shape(spec)] = bench.seconds_per_run(spec, self.device, len(group))
        left = 1 - epoch / spec.optimiser.epochs
        return time.monotonic() + len(group) * left * self.seconds[train.shape(spec)] < self.deadline

    def ended(self, spec: RunSpec, seconds: float) -> None:
        """Learn from a run of `spec`'s shape; in company, its share of the group's time."""
        self.seconds[train.shape(spec)] = seconds


class _Display:
    """One bar over all epochs of all runs; its text shows the run, its epoch and its accuracy."""

    def __init__(self, todo: list[Labelled], quiet: bool):
        self.done: dict[str, int] = {}
        self.labels = {r.spec.id: f"{r.label} seed {r.spec.seed}" for r in todo}
        self.epochs = {r.spec.id: r.spec.optimiser.epochs for r in todo}
        self.bar = tqdm(total=sum(self.epochs.values()), unit="epoch", disable=quiet, dynamic_ncols=True, smoothing=0.05,
                        mininterval=0.5, desc=f"{len(todo)} runs")

    def __call__(self, p: train.Progress) -> None:
        self.bar.set_postfix_str(f"{self.labels[p.run_id]}, epoch {p.epoch + 1}/{p.epochs}, "
                                 f"test {100 * p.test_accuracy:.1f}%", refresh=False)
        self.bar.update(p.epoch + 1 - self.done.get(p.run_id, 0))
        self.done[p.run_id] = p.epoch + 1

    def stands(self, run_id: str, epoch: int | None = None) -> None:
        """Show a run where it stands without having been trained there now (None: at its end)."""
        epoch = self.epochs[run_id] if epoch is None else epoch
        self.bar.n += epoch - self.done.get(run_id, 0)
        self.done[run_id] = epoch
        self.bar.refresh()

    def say(self, text: str) -> None:
        """A line above the bar."""
        if not self.bar.disable:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.bar.close()


def groups(runs: Iterable[Labelled], replicas: int,
           position: Callable[[str], tuple[int, int]] = lambda _: (0, 0)) -> list[list[Labelled]]:
    """Runs of one shape that stand at one position together, at most `replicas` at a time, in the order in which
    they first come."""
    alike: dict[tuple, list[Labelled]] = {}
    for labelled in runs:
        alike.setdefault((train.shape(labelled.spec), position(labelled.spec.id)), []).append(labelled)
    return [same[i:i + replicas] for same in alike.values() for i in range(0, len(same), replicas)]


class Work:
    """What is left to do, and what became of what was done; executors take groups from it and report each's fate."""

    def __init__(self, store: Store, todo: list[Labelled], replicas: int, clock: _Clock, leases: Leases,
                 checkpoints: Checkpoints, show: _Display, outcome: Outcome, partial: bool = True):
        self.store, self.clock, self.leases, self.checkpoints = store, clock, leases, checkpoints
        self.show, self.outcome, self.partial, self.replicas = show, outcome, partial, replicas
        self._positions = {labelled.spec.id: checkpoints.position(labelled.spec.id) for labelled in todo}
        for run_id, (epoch, _) in self._positions.items():
            show.stands(run_id, epoch)
        self._waiting = groups(todo, replicas, self._positions.__getitem__)
        self._late: list[list[Labelled]] = []
        self._elsewhere: list[Labelled] = []
        self._asked = float("-inf")
        self._losses: dict[str, int] = {}

    def take(self) -> list[Labelled] | None:
        """A group to be trained now, leased; None when there is none at the moment (see `pending`)."""
        while self._waiting and not self.clock.over():
            group = self._waiting.pop(0)
            if not self.clock.allows(group, self._positions[group[0].spec.id][0]):
                self._late.append(group)
            elif group := self._leased(group):
                return group
        while self._late and self.partial and not self.clock.over():
            if group := self._leased(self._late.pop(0)):
                return group
        if self._elsewhere and not self.clock.over() and time.monotonic() - self._asked >= 1.0:
            self._asked = time.monotonic()
            asked, self._elsewhere = self._elsewhere, []
            self._waiting = groups(self._leased(asked), self.replicas, self._positions.__getitem__)
            return self._waiting.pop(0) if self._waiting else None
        return None

    @property
    def pending(self) -> bool:
        """Whether `take` may give something later: runs that others are training may yet fall to us."""
        return bool(self._waiting or self._elsewhere) and not self.clock.over()

    def done(self, group: list[Labelled], results: list[train.Result], seconds: float) -> None:
        """Store the rows of `group`, which took `seconds`."""
        for labelled, result in zip(group, results):
            self.store.write(labelled.spec, result.provenance, result.tables)
            self.checkpoints.remove(labelled.spec.id)
            self.leases.release(labelled.spec.id)
            self.outcome.trained.append(labelled.spec.id)
        if self._positions[group[0].spec.id] == (0, 0):
            self.clock.ended(group[0].spec, seconds / len(group))

    def failed(self, group: list[Labelled], why: str) -> None:
        """One of `group` cannot be trained: alone, each shows whether it is the one."""
        if len(group) > 1:
            self._return(group, 1)
            return
        run_id = group[0].spec.id
        self.checkpoints.remove(run_id)
        self.leases.release(run_id)
        self.outcome.failed[run_id] = why
        self.show.say(f"failed: {why}")

    def out_of_memory(self, group: list[Labelled], device: torch.device) -> None:
        """`group` does not fit: go on with half as many. Raises `InputError` when it is a single run."""
        name = group[0].spec.model.name
        if len(group) == 1:
            raise InputError(f"one run of {name} does not fit into the memory of {device}")
        self.replicas = len(group) // 2
        self.show.say(f"{len(group)} runs of {name} in lockstep exceed the memory of {device}; "
                      f"going on with {self.replicas}")
        rest = [labelled for other in self._waiting for labelled in other]
        self._waiting = []
        self._return([*group, *rest], self.replicas)

    def lost(self, group: list[Labelled], how: str) -> None:
        """The worker that trained `group` is gone: begin again from the checkpoints, `RETRIES` times at most."""
        for labelled in group:
            self._losses[labelled.spec.id] = self._losses.get(labelled.spec.id, 0) + 1
        worn = [x for x in group if self._losses[x.spec.id] > RETRIES]
        self.show.say(f"the worker training {group[0].label} seed {group[0].spec.seed} was lost ({how}); "
                      + ("given up" if worn else "going on from the last checkpoint"))
        for labelled in worn:
            self.leases.release(labelled.spec.id)
            self.outcome.failed[labelled.spec.id] = f"run {labelled.spec.id}: its worker was lost {RETRIES + 1} times ({how})"
        if again := [x for x in group if x not in worn]:
            self._return(again, self.replicas)

    def stopped(self, group: list[Labelled]) -> None:
        """`group` was stopped on request; its checkpoints are kept."""
        for labelled in group:
            self.leases.release(labelled.spec.id)
        self.outcome.left += [labelled.spec.id for labelled in group]

    def close(self) -> None:
        """Nothing more is taken: what was never begun counts as left."""
        rest = [x for group in (*self._waiting, *self._late, self._elsewhere) for x in group]
        for labelled in rest:
            self.leases.release(labelled.spec.id)
        self.outcome.left += [labelled.spec.id for labelled in rest]
        self._waiting, self._late, self._elsewhere = [], [], []

    def _leased(self, group: list[Labelled]) -> list[Labelled]:
        """Of `group` what is ours to train now; others' runs are set apart, stored ones counted."""
        ours = []
        for labelled in group:
            run_id = labelled.spec.id
            if not self.leases.take(run_id):
                self._elsewhere.append(labelled)
            elif any(self.store.runs([run_id])):  # another finished it since
                self.leases.release(run_id)
                self.outcome.stored += 1
                self.show.stands(run_id)
            else:
                ours.append(labelled)
        if len({self._refreshed(labelled.spec.id) for labelled in ours}) > 1:  # others took some of them further
            self._waiting[:0] = groups(ours, self.replicas, self._positions.__getitem__)
            return []
        return ours

    def _refreshed(self, run_id: str) -> tuple[int, int]:
        self._positions[run_id] = self.checkpoints.position(run_id)
        self.show.stands(run_id, self._positions[run_id][0])
        return self._positions[run_id]

    def _return(self, runs: list[Labelled], replicas: int) -> None:
        for labelled in runs:
            self._refreshed(labelled.spec.id)
        self._waiting[:0] = groups(runs, replicas, self._positions.__getitem__)
