"""Trains what is missing: one loop hands groups to an executor, waits, and says what became of each."""

import functools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, redirect_stderr, suppress
from math import inf
from pathlib import Path

import torch

from gstlib import data
from gstlib.campaign.executors import EXECUTORS, Setting, connect
from gstlib.campaign.leases import Leases
from gstlib.campaign.todo import Task, campaign, missing, plan
from gstlib.campaign.work import Clock, Display, Outcome, Work
from gstlib.errors import Forgiving, InputError, check_choice
from gstlib.experiments import Labelled
from gstlib.store import Store
from gstlib.training import train
from gstlib.training.checkpoint import Checkpoints
from gstlib.training.engine import cores, pick_device
from gstlib.training.provenance import processor

REPLICAS = 10  # runs in lockstep on a GPU, where neither the user nor its memory says otherwise
_PATIENCE = 120.0  # seconds that workers have to end their step and keep their checkpoints


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop; finished runs are stored, the others keep their checkpoints. `signum`: which signal."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def run(store: Store, runs: Iterable[Labelled], source: str, profile: str, device: str = "auto", **options) -> Outcome:
    """`train_all` for `runs`, whose images are those of `data.load(source)`."""
    return train_all(store, lambda _: [Task(*run, profile, source) for run in runs], device, **options)


def train_missing(store: Store, figures: Iterable[str], profile: str, source: str | None = None, seeds=None,
                  device: str = "auto", **options) -> Outcome:
    """`train_all` for `figures` at `profile`; `source` and `seeds` as in `plan`."""
    return train_all(store, lambda _: plan(figures, profile, source, seeds), device, **options)


def run_campaign(store: Store, source: str | None = None, device: str = "auto", **options) -> Outcome:
    """`train_all` for the campaign of this kind of device."""
    on_ray = options.get("executor") == "ray"  # whose processors are not this machine's
    return train_all(store, lambda chosen: campaign(chosen.type, source, {} if on_ray else elsewhere(store, chosen)), device,
                     **options)


def elsewhere(store: Store, device: torch.device) -> dict[str, bool]:
    """Of every stored run, whether another kind of processor than `device` trained it."""
    here = processor(device)
    return {run_id: any(about.get(what, kind) != kind for what, kind in here.items()) for run_id, _, about in store.about()}


def train_all(store: Store, find: Callable[[torch.device], list[Task]], device: str = "auto", workers: int | None = None,
              replicas: int | None = None, time_limit: float | None = None, quiet: bool = False,
              executor: str | None = None, address: str | None = None, gpus_per_group: float = 1.0,
              checkpoint_every: float = 300.0) -> Outcome:
    """What became of all tasks, once those that `store` lacks are trained and stored, each as it ends.

    find: gives the tasks for a device.
    device: auto, cpu, cuda (every GPU of this machine) or cuda:N.
    workers: groups trained at a time; None: one a GPU, or one a core, since a run on a CPU has one thread.
    replicas: most runs of one shape that are trained in lockstep; None: 10 on a GPU, or what its memory holds.
    time_limit: minutes; what would not end in time is begun last, and goes on from its checkpoint another time.
    executor: local, processes or ray; None: processes where there is more than one worker.
    address: of a Ray cluster; None: one made of this machine.
    gpus_per_group: of a GPU of the Ray cluster.
    checkpoint_every: seconds between two checkpoints of a run, from which it goes on after whatever interrupts it.

    Runs that another process trains into the same folder are waited for. SIGINT and SIGTERM end the step, keep
    checkpoints and raise `Interrupted`; a second one does so at once. Raises `InputError` before anything is trained
    when a specification cannot be, the images are others or too few, the device is not there or the store cannot be
    written.
    """
    for rule, given, least, most in (
            ("workers must be at least 1", workers, 1, inf), ("replicas must be at least 1", replicas, 1, inf),
            ("the time limit must be a positive number of minutes", time_limit, 1e-9, inf),
            ("a group is trained on one GPU or a part of it (0 … 1)", gpus_per_group, 1e-9, 1)):
        if given is not None and not least <= given <= most:
            raise InputError(f"{rule}, not {given}")
    if executor is not None:
        check_choice("executor", executor, EXECUTORS)
    if address is not None and executor != "ray":
        raise InputError("an address is that of a Ray cluster; add --executor ray")
    chosen = connect(address, device, workers) if executor == "ray" else pick_device(device)
    checkpoints = Checkpoints(store.path / "checkpoints", chosen.type, checkpoint_every)
    tasks = find(chosen)
    todo = missing(store, tasks)
    done = {task.spec.id for task in tasks} - {task.spec.id for task in todo}
    _tidy(done, checkpoints, store.path / "leases")
    if not todo:
        return Outcome(len(done))
    for spec in {train.kind(task.spec): task.spec for task in todo}.values():  # a campaign has a thousand runs
        train.check(spec)
    load = functools.cache(data.load)
    for task in {(task.source, task.spec.data, task.spec.measures, task.spec.flatness): task for task in todo}.values():
        train.check_images(task.spec, load(task.source))
    del load  # and with it the images, which workers load themselves
    store.check_writable(task.spec.id for task in todo)
    on_gpu = chosen.type == "cuda"
    if executor != "ray":
        there = cores() if not on_gpu else torch.cuda.device_count() if chosen.index is None else 1
        workers = min(workers or there, len(todo))
        # who asks for lockstep on a CPU wants to see it at work
        executor = executor or ("processes" if workers > 1 and (on_gpu or replicas is None) else "local")
    clock = Clock(time_limit, None if executor == "ray" else chosen)
    with (_signals() as signals, Leases(store.path / "leases") as leases, redirect_stderr(Forgiving(sys.stderr)),
          (show := Display(todo, quiet)).bar):
        work = Work(store, todo, replicas or (REPLICAS if on_gpu else 1), clock, leases, checkpoints, show)
        setting = Setting(chosen, workers, checkpoints, lambda: signals or time.monotonic() >= clock.deadline, show,
                          gpus_per_group)
        _train(work, EXECUTORS[executor](setting), setting)
    if signals:
        raise Interrupted(signals[0])
    outcome = work.outcome()
    outcome.stored += len(done)
    return outcome


def _tidy(stored: set[str], checkpoints: Checkpoints, leases: Path) -> None:
    """Remove what a campaign that was killed just when it had stored a run left of that run's beginnings."""
    left = {place.name.lstrip(".")[:16] for folder in (checkpoints.folder, leases) if folder.is_dir()
            for place in folder.iterdir()} & stored
    if left:
        with suppress(InputError), Leases(leases) as held:
            for run_id in filter(held.take, left):
                checkpoints.remove(run_id)


def _train(work: Work, executor, setting: Setting) -> None:
    """Hand out groups until every run has its end, or it is time to stop."""
    running: dict[Future, list[Task]] = {}
    stopping, told = inf, False
    try:
        while True:
            if stopping == inf and setting.stop():
                stopping = time.monotonic()
                executor.stop()
            while not setting.stop() and len(running) < executor.slots and (group := work.take()):
                future = executor.submit([task.spec for task in group], group[0].source, group[0].profile)
                running[future] = group
            if not running:
                if setting.stop() or not work.open:
                    return
                if not told:
                    setting.show.say(f"waiting for {len(work.open)} runs that another process trains", always=True)
                told = True
                time.sleep(0.5)
            for future in wait(running, 0.2, FIRST_COMPLETED).done:
                _report(work, running.pop(future), future, executor, setting.device)
            for progress in executor.news():
                setting.show(progress)
            if time.monotonic() - stopping > _PATIENCE:
                executor.stop(now=True)
    except BaseException as error:
        executor.stop(now=isinstance(error, Interrupted))
        wait(running, _PATIENCE)  # the others' checkpoints are worth having
        executor.stop(now=True)
        raise
    finally:
        executor.close()


def _report(work: Work, group: list[Task], future: Future, executor, device: torch.device) -> None:
    """Tell `work` what became of a group."""
    if error := future.exception():
        if not executor.gone(error):
            raise error
        work.lost(group)
    elif isinstance(result := future.result(), MemoryError):
        work.out_of_memory(group, device)
    elif isinstance(result, InputError):
        work.failed(group, str(result))
    elif isinstance(result, train.Stopped):
        work.stopped(group)
    else:
        work.done(group, result)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list to which SIGINT and SIGTERM only add their numbers; the second one is raised at once."""
    numbers: list[int] = []

    def asked(number: int, _frame) -> None:
        numbers.append(number)
        if len(numbers) > 1:
            raise Interrupted(number)

    main = threading.current_thread() is threading.main_thread()  # nowhere else can handlers be set
    before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield numbers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
