"""Which runs are missing, and getting them done: in this process or in worker processes."""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from gstlib import data, experiments, train
from gstlib.engine import pick_device
from gstlib.experiments import Labelled
from gstlib.spec import InputError, RunSpec
from gstlib.store import Store


@dataclass
class Outcome:
    """What a call of `run` did: number stored before, ids trained now, ids left for lack of time, failures by id."""

    stored: int = 0
    trained: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def missing(store: Store, runs: Iterable[Labelled]) -> list[Labelled]:
    """The runs that `store` lacks, each specification once, in the order given."""
    seen: dict[str, Labelled] = {}
    for labelled in runs:
        if labelled.spec.id not in store:
            seen.setdefault(labelled.spec.id, labelled)
    return list(seen.values())


def plan(figures: Iterable[str], profile: str, source: str | None = None,
         seeds=None) -> tuple[list[tuple[str, Labelled]], data.Images]:
    """Every run of `figures` at `profile` as (figure, run), and the images they are specified on.

    `source` is what `data.load` takes (None: the profile's own data set),
    `seeds` what `experiments.parse_seeds` takes (None: the profile's number).
    """
    size = experiments.profile(profile)
    chosen = [experiments.experiment(name) for name in figures]
    numbers = experiments.parse_seeds(size.seeds if seeds is None else seeds)
    images = data.load(source or size.data)
    spec = experiments.data_spec(size, images.name, images.fingerprint, images.classes)
    return [(what.name, run) for what in chosen for run in what.runs(size, spec, numbers)], images


def train_missing(store: Store, figures: Iterable[str], profile: str, source: str | None = None, seeds=None,
                  device: str = "auto", **options) -> Outcome:
    """Train and store what is missing of `figures`: `plan`, then `run` with its `options`."""
    pick_device(device)
    planned, images = plan(figures, profile, source, seeds)
    return run(store, [labelled for _, labelled in planned], images, source or experiments.profile(profile).data,
               profile, device, **options)


def campaign(store: Store, source: str | None = None) -> list[tuple[experiments.Stage, Labelled]]:
    """Every run of `experiments.CAMPAIGN` that `store` lacks, each once, in the order in which it is worth most."""
    lacking: dict[str, tuple[experiments.Stage, Labelled]] = {}
    for stage in experiments.CAMPAIGN:
        planned, _ = plan([stage.figure], stage.profile, source, stage.seeds)
        for labelled in missing(store, [labelled for _, labelled in planned]):
            lacking.setdefault(labelled.spec.id, (stage, labelled))
    return list(lacking.values())


def run_campaign(store: Store, source: str | None = None, device: str = "auto", time_limit: float | None = None,
                 **options) -> Outcome:
    """Work off `experiments.CAMPAIGN` from wherever `store` stands, stage by stage, within `time_limit` minutes."""
    ends = None if time_limit is None else time.monotonic() + 60 * time_limit
    total = Outcome()
    for stage in experiments.CAMPAIGN:
        left = None if ends is None else max(1e-9, (ends - time.monotonic()) / 60)
        outcome = train_missing(store, [stage.figure], stage.profile, source, stage.seeds, device, time_limit=left, **options)
        total.stored += outcome.stored
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
) -> Outcome:
    """Train what `store` lacks of `runs` and store each run as it ends.

    On a CPU each run has one thread, and `workers` processes (as many as
    there are cores, when None) work side by side: two runs of one thread
    were measured faster than one run of two, and a run's rows then do not
    depend on the number of cores.  On a GPU up to `replicas` runs of one
    shape (10, when None) are trained in lockstep, fewer where memory holds
    fewer.  `source` is what `data.load` was given, for the workers to load
    again.  With `time_limit` (minutes) nothing is begun that would not end in
    time, judged by runs of the same shape so far or by a short measurement.  KeyboardInterrupt ends the workers; what
    was finished is stored.

    Raises `InputError` when a specification cannot be trained, the device is
    not there or the store cannot be written, before anything is trained.
    """
    chosen = pick_device(device)
    if workers is not None and workers < 1:
        raise InputError(f"workers must be at least 1, not {workers}")
    if replicas is not None and replicas < 1:
        raise InputError(f"replicas must be at least 1, not {replicas}")
    if time_limit is not None and not time_limit > 0:
        raise InputError(f"the time limit must be a positive number of minutes, not {time_limit}")
    runs = list(runs)
    todo = missing(store, runs)
    for labelled in todo:
        train.check(labelled.spec)
    outcome = Outcome(stored=len({labelled.spec.id for labelled in runs}) - len(todo))
    if not todo:
        return outcome
    store.check_writable()
    if replicas is None:
        replicas = 10 if chosen.type == "cuda" else 1
    workers = 1 if chosen.type == "cuda" or replicas > 1 else min(workers or cores(), len(todo))
    clock = _Clock(time_limit, chosen)
    show = _Display(todo, quiet)
    try:
        if workers == 1:
            _here(store, groups(todo, replicas), images, profile, chosen, clock, show, outcome)
        else:
            _processes(store, todo, source, profile, workers, clock, show, outcome)
    finally:
        show.close()
    return outcome


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Clock:
    """Decides whether more runs still fit into the time limit: by runs of their shape so far, else by a short measurement."""

    def __init__(self, minutes: float | None, device: torch.device):
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.device = device
        self.seconds: dict[tuple, float] = {}

    def allows(self, group: list[Labelled]) -> bool:
        """Whether `group`, trained in lockstep from now on, would end in time."""
        if self.deadline is None:
            return True
        if time.monotonic() >= self.deadline:
            return False
        spec = group[0].spec
        if train.shape(spec) not in self.seconds:
            from gstlib import bench  # which itself needs the runner

            self.seconds[train.shape(spec)] = bench.seconds_per_run(spec, self.device)
        return time.monotonic() + len(group) * self.seconds[train.shape(spec)] < self.deadline

    def ended(self, spec: RunSpec, seconds: float) -> None:
        """Learn from a run of `spec`'s shape; in company, its share of the group's time."""
        self.seconds[train.shape(spec)] = seconds


class _Display:
    """One bar over all epochs of all runs; its text shows the run, its epoch and its accuracy."""

    def __init__(self, todo: list[Labelled], quiet: bool):
        self.done: dict[str, int] = {}
        self.labels = {r.spec.id: f"{r.label} seed {r.spec.seed}" for r in todo}
        total = sum(r.spec.optimiser.epochs for r in todo)
        self.bar = tqdm(total=total, unit="epoch", disable=quiet, dynamic_ncols=True, smoothing=0.05,
                        mininterval=0.5, desc=f"{len(todo)} runs")

    def __call__(self, p: train.Progress) -> None:
        self.done[p.run_id] = p.epoch + 1
        self.bar.set_postfix_str(f"{self.labels[p.run_id]}, epoch {p.epoch + 1}/{p.epochs}, "
                                 f"test {100 * p.test_accuracy:.1f}%", refresh=False)
        self.bar.update()

    def take_back(self, group: list[Labelled]) -> None:
        """Forget the epochs of runs that begin anew."""
        self.bar.n -= sum(self.done.pop(labelled.spec.id, 0) for labelled in group)
        self.bar.refresh()

    def say(self, text: str) -> None:
        if not self.bar.disable:
            self.bar.write(text)

    def close(self) -> None:
        self.bar.close()


def groups(runs: Iterable[Labelled], replicas: int) -> list[list[Labelled]]:
    """Runs of one shape together, at most `replicas` at a time, in the order in which they first come."""
    by_shape: dict[tuple, list[Labelled]] = {}
    for labelled in runs:
        by_shape.setdefault(train.shape(labelled.spec), []).append(labelled)
    return [same[i:i + replicas] for same in by_shape.values() for i in range(0, len(same), replicas)]


def _here(store, waiting: list[list[Labelled]], images, profile, device, clock, show, outcome) -> None:
    waiting = list(waiting)
    while waiting:
        group = waiting.pop(0)
        if not clock.allows(group):
            outcome.left += [labelled.spec.id for labelled in group]
            continue
        began = time.monotonic()
        try:
            results = train.train_group([labelled.spec for labelled in group], images, device, show, profile)
        except torch.OutOfMemoryError as error:
            if len(group) == 1:
                raise InputError(f"one run of {group[0].spec.model.name} does not fit into the memory of {device}") from error
            fits = len(group) // 2
            show.say(f"{len(group)} runs of {group[0].spec.model.name} in lockstep exceed the memory of {device}; "
                     f"going on with {fits}")
            show.take_back(group)
            todo = [labelled for labelled in (*group, *(x for other in waiting for x in other))]
            waiting = groups(todo, fits)
            continue
        except InputError as error:
            if len(group) > 1:  # one diverged; alone, each shows whether it is the one
                show.take_back(group)
                waiting[:0] = [[labelled] for labelled in group]
                continue
            outcome.failed[group[0].spec.id] = str(error)
            show.say(f"failed: {error}")
            continue
        for labelled, result in zip(group, results):
            store.write(labelled.spec, result.provenance, result.tables)
            outcome.trained.append(labelled.spec.id)
        clock.ended(group[0].spec, (time.monotonic() - began) / len(group))


def _worker(source: str, profile: str, tasks, results) -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides what to do about it
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    images = data.load(source, download=False)
    while (spec := tasks.get()) is not None:
        began = time.monotonic()
        try:
            result = train.train(spec, images, "cpu", lambda p: results.put(("progress", p)), profile)
        except InputError as error:
            results.put(("failed", spec, str(error)))
        else:
            results.put(("done", spec, result, time.monotonic() - began))


def _processes(store, todo, source, profile, workers, clock, show, outcome) -> None:
    context = multiprocessing.get_context("spawn")
    tasks, results = context.SimpleQueue(), context.Queue()
    crew = [context.Process(target=_worker, args=(source, profile, tasks, results), daemon=True)
            for _ in range(workers)]
    for process in crew:
        process.start()
    waiting, busy = list(todo), 0

    def hand_out() -> None:
        nonlocal busy
        while waiting and busy < workers:
            labelled = waiting.pop(0)
            if clock.allows([labelled]):
                tasks.put(labelled.spec)
                busy += 1
            else:
                outcome.left.append(labelled.spec.id)

    try:
        hand_out()
        while busy:
            try:
                kind, *news = results.get(timeout=1.0)
            except queue.Empty:
                dead = [p for p in crew if not p.is_alive()]
                if dead:
                    raise RuntimeError(f"a worker process ended with code {dead[0].exitcode} in the midst of a run; "
                                       "finished runs are stored, run the command again for the rest") from None
                continue
            if kind == "progress":
                show(*news)
                continue
            busy -= 1
            spec = news[0]
            if kind == "done":
                store.write(spec, news[1].provenance, news[1].tables)
                clock.ended(spec, news[2])
                outcome.trained.append(spec.id)
            else:
                outcome.failed[spec.id] = news[1]
                show.say(f"failed: {news[1]}")
            hand_out()
        for _ in crew:
            tasks.put(None)
        for process in crew:
            process.join(timeout=10)
    finally:
        for process in crew:
            if process.is_alive():
                process.terminate()
