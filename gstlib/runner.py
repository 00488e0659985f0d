"""Which runs are missing, and getting them done: in this process or in worker processes."""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from tqdm import tqdm

from gstlib import data, train
from gstlib.engine import pick_device
from gstlib.experiments import Labelled
from gstlib.spec import InputError
from gstlib.store import Store


@dataclass
class Outcome:
    """What a call of `run` did: ids trained now, ids left for lack of time, and failures by id."""

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


def run(
    store: Store,
    runs: Iterable[Labelled],
    images: data.Images,
    source: str,
    profile: str,
    device: str = "auto",
    workers: int | None = None,
    time_limit: float | None = None,
    quiet: bool = False,
) -> Outcome:
    """Train what `store` lacks of `runs` and store each run as it ends.

    On a CPU each run has one thread, and `workers` processes (as many as
    there are cores, when None) work side by side: two runs of one thread
    were measured faster than one run of two, and a run's rows then do not
    depend on the number of cores.  On a GPU one run goes after the other.
    `source` is what `data.load` was given, for the workers to load again.
    With `time_limit` (minutes) no run is begun that, judged by the slowest
    so far, would not end in time.  KeyboardInterrupt ends the workers; what
    was finished is stored.

    Raises `InputError` when a specification cannot be trained, the device is
    not there or the store cannot be written, before anything is trained.
    """
    chosen = pick_device(device)
    todo = missing(store, runs)
    for labelled in todo:
        train.check(labelled.spec)
    outcome = Outcome()
    if not todo:
        return outcome
    store.check_writable()
    if chosen.type == "cuda":
        workers = 1
    workers = min(workers or _cores(), len(todo))
    if workers < 1:
        raise InputError(f"workers must be at least 1, not {workers}")
    clock = _Clock(time_limit)
    show = _Display(todo, quiet)
    try:
        if workers == 1:
            _here(store, todo, images, profile, chosen, clock, show, outcome)
        else:
            _processes(store, todo, source, profile, workers, clock, show, outcome)
    finally:
        show.close()
    return outcome


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Clock:
    """Decides whether one more run still fits into the time limit."""

    def __init__(self, minutes: float | None):
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.slowest = 0.0

    def allows_one_more(self) -> bool:
        return self.deadline is None or time.monotonic() + self.slowest < self.deadline

    def ended(self, seconds: float) -> None:
        self.slowest = max(self.slowest, seconds)


class _Display:
    """One bar over all epochs of all runs; its text shows the run, its epoch and its accuracy."""

    def __init__(self, todo: list[Labelled], quiet: bool):
        self.labels = {r.spec.id: f"{r.label} seed {r.spec.seed}" for r in todo}
        total = sum(r.spec.optimiser.epochs for r in todo)
        self.bar = tqdm(total=total, unit="epoch", disable=quiet, dynamic_ncols=True, smoothing=0.05,
                        mininterval=0.5, desc=f"{len(todo)} runs")

    def __call__(self, p: train.Progress) -> None:
        self.bar.set_postfix_str(f"{self.labels[p.run_id]}, epoch {p.epoch + 1}/{p.epochs}, "
                                 f"test {100 * p.test_accuracy:.1f}%", refresh=False)
        self.bar.update()

    def say(self, text: str) -> None:
        if not self.bar.disable:
            self.bar.write(text)

    def close(self) -> None:
        self.bar.close()


def _here(store, todo, images, profile, device, clock, show, outcome) -> None:
    for labelled in todo:
        if not clock.allows_one_more():
            outcome.left.append(labelled.spec.id)
            continue
        began = time.monotonic()
        try:
            result = train.train(labelled.spec, images, device, show, profile)
        except InputError as error:
            outcome.failed[labelled.spec.id] = str(error)
            show.say(f"failed: {error}")
            continue
        store.write(labelled.spec, result.provenance, result.tables)
        clock.ended(time.monotonic() - began)
        outcome.trained.append(labelled.spec.id)


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
            if clock.allows_one_more():
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
                clock.ended(news[2])
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
