"""Where groups of runs are trained: in this process, in worker processes, or on a Ray cluster.

An executor takes groups from `runner.Work` until there are none or it is
asked to stop, and reports what became of each.  Training itself is the same
call everywhere (`attempt`), so the rows are too.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

import torch

from gstlib import data
from gstlib.errors import InputError
from gstlib.experiments import Labelled
from gstlib.spec import RunSpec
from gstlib.training import train
from gstlib.training.checkpoint import Checkpoints
from gstlib.training.engine import ran_out

if TYPE_CHECKING:
    from gstlib.campaign.runner import Work

_PATIENCE = 120.0  # seconds that a worker has to finish its step and write its checkpoints


@dataclass
class Job:
    """What an executor is given: the work, the images and where they came from, the devices, when to stop."""

    work: Work
    images: data.Images
    source: str
    profile: str
    device: torch.device
    workers: int | None
    checkpoints: Checkpoints
    stop: Callable[[], bool]
    gpus_per_group: float = 1.0


def attempt(specs: list[RunSpec], images: data.Images, device: torch.device, profile: str, progress: Callable,
            checkpoints: Checkpoints, stop: Callable[[], bool]) -> tuple:
    """Train a group; what became of it: ("done", results, seconds), ("failed", why), ("memory",) or ("stopped",)."""
    began = time.monotonic()
    try:
        results = train.train_group(specs, images, device, progress, profile, checkpoints, stop)
    except train.Stopped:
        return ("stopped",)
    except InputError as error:
        return ("failed", str(error))
    except RuntimeError as error:
        if not ran_out(error):
            raise
    else:
        return ("done", results, time.monotonic() - began)
    # out here nothing holds the group any more; what a smaller one is to have must be free, cycles included
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return ("memory",)


def report(work: Work, group: list[Labelled], fate: tuple, device: torch.device) -> None:
    """Tell `work` what `attempt` gave."""
    kind, *news = fate
    if kind == "done":
        work.done(group, *news)
    elif kind == "failed":
        work.failed(group, *news)
    elif kind == "memory":
        work.out_of_memory(group, device)
    else:
        work.stopped(group)


def local(job: Job) -> None:
    """One group after the other, in this process."""
    while not job.stop():
        if group := job.work.take():
            lost = lambda: any(job.work.leases.lost(labelled.spec.id) for labelled in group)  # noqa: E731
            fate = attempt([labelled.spec for labelled in group], job.images, job.device, job.profile, job.work.show,
                           job.checkpoints, lambda: job.stop() or lost())
            report(job.work, group, fate, job.device)
        elif job.work.pending:
            time.sleep(0.5)
        else:
            return


class _Worker:
    """A worker process, its end of the pipe, and the group it has."""

    def __init__(self, job: Job, device: torch.device):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.device, self.group = device, None
        self.process = context.Process(target=_worker, daemon=True,
                                       args=(theirs, job.source, job.profile, str(device), job.checkpoints))
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def give(self, group: list[Labelled]) -> None:
        """Have `group` trained."""
        self.group = group
        with suppress(OSError):  # where the process has died meanwhile, the end of its pipe tells
            self.connection.send([labelled.spec for labelled in group])

    def end(self) -> str:
        """Close the pipe, wait for the process or kill it; returns how it ended."""
        self.connection.close()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        code = self.process.exitcode or 0
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def processes(job: Job) -> None:
    """Worker processes of this machine: one a core, or one a GPU, each with one group at a time."""
    several = job.device.type == "cuda" and job.device.index is None
    devices = [torch.device("cuda", i) for i in range(job.workers)] if several else [job.device] * job.workers
    idle, crew, stopping = devices, [], None
    try:
        while True:
            if stopping is None and job.stop():
                stopping = time.monotonic()
                for worker in crew:
                    worker.process.terminate()
            free = [worker for worker in crew if worker.group is None]
            while stopping is None and (free or idle):
                if not (group := job.work.take()):
                    break
                if not free:
                    free = [_Worker(job, idle.pop())]
                    crew += free
                free.pop().give(group)
            busy = {worker.connection: worker for worker in crew if worker.group is not None}
            if not busy:
                if stopping is not None or not job.work.pending:
                    return
                time.sleep(0.5)
                continue
            if stopping is not None and time.monotonic() - stopping > _PATIENCE:
                for worker in busy.values():
                    worker.process.kill()
            for connection in wait(list(busy), timeout=0.2):
                worker = busy[connection]
                try:
                    kind, *news = connection.recv()
                except (EOFError, OSError):
                    crew.remove(worker)
                    idle.append(worker.device)
                    how = worker.end()
                    job.work.stopped(worker.group) if stopping is not None else job.work.lost(worker.group, how)
                    continue
                if kind == "progress":
                    job.work.show(*news)
                    continue
                group, worker.group = worker.group, None
                report(job.work, group, (kind, *news), worker.device)
    finally:
        for worker in crew:
            worker.process.terminate()
        for worker in crew:
            worker.end()


def _worker(connection: Connection, source: str, profile: str, device: str, checkpoints: Checkpoints) -> None:
    """A worker's life: a group, its fate, the next group, until the pipe ends."""
    # Ctrl-C reaches the whole process group; the parent alone decides what to do about it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent, asked = os.getppid(), []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))

    def stop() -> bool:
        return bool(asked) or os.getppid() != parent

    try:
        images = data.load(source, download=False)
        while not stop():
            specs = connection.recv()
            connection.send(attempt(specs, images, torch.device(device), profile,
                                    lambda p: connection.send(("progress", p)), checkpoints, stop))
    except (EOFError, BrokenPipeError):  # the parent is gone
        return


def connect(address: str | None, device: str, workers: int | None) -> torch.device:
    """Join the Ray cluster at `address` (None: make one of this machine) and say on what kind of device it trains.

    Raises `InputError` where Ray is not installed, the cluster cannot be
    reached, or it has no such device.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError('Ray is not installed; install it with: pip install "gstlib[ray]"') from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not ray.is_initialized():
        try:
            # tasks find gstlib where the driver does; cluster nodes have it installed
            ray.init(address=address, log_to_driver=False, logging_level="warning",
                     **({} if address else {"num_cpus": workers, "include_dashboard": False}))
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(f"the Ray cluster at {address or 'this machine'} cannot be used: {error}") from error
    kind = device.partition(":")[0]
    if kind == "auto":
        kind = "cuda" if ray.cluster_resources().get("GPU", 0) else "cpu"
    name = {"cuda": "GPU", "cpu": "CPU"}.get(kind)
    if name is None or not ray.cluster_resources().get(name, 0):
        raise InputError(f"device {device!r} was asked for, but the Ray cluster has none; "
                         f"it has {ray.cluster_resources().get('CPU', 0):.0f} CPUs and "
                         f"{ray.cluster_resources().get('GPU', 0):.0f} GPUs")
    return torch.device(kind)


class _Board:
    """An actor on the driver's node: what workers report, and whether they are to stop."""

    def __init__(self):
        self.reports: list[train.Progress] = []
        self.stopping = False

    def add(self, progress: train.Progress) -> None:
        self.reports.append(progress)

    def news(self) -> list[train.Progress]:
        news, self.reports = self.reports, []
        return news

    def stop(self) -> None:
        self.stopping = True

    def stopped(self) -> bool:
        return self.stopping


def on_ray(job: Job) -> None:
    """A group at a time on every CPU of a Ray cluster, or on every `gpus_per_group`-th part of its GPUs.

    Workers and nodes that are lost are replaced by what is left of the
    cluster, where their groups go on from their checkpoints; for that the
    results folder and the data must be at the same path on every node.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(_Board).remote()
    on_gpu = job.device.type == "cuda"
    needs = {"num_cpus": 0 if on_gpu else 1, "num_gpus": job.gpus_per_group if on_gpu else 0}
    # retries are `Work`'s: it knows how far the checkpoints are
    task = ray.remote(max_retries=0, **needs)(_ray_task)

    def slots() -> int:
        there = ray.cluster_resources()
        n = int(there.get("GPU", 0) / job.gpus_per_group + 1e-9) if on_gpu else int(there.get("CPU", 0))
        return min(n, job.workers) if job.workers else n

    running: dict = {}
    stopping = None
    try:
        while True:
            if stopping is None and job.stop():
                stopping = time.monotonic()
                board.stop.remote()
            while stopping is None and len(running) < slots() and (group := job.work.take()):
                specs = [labelled.spec for labelled in group]
                running[task.remote(specs, job.source, job.profile, job.device.type, job.checkpoints, board)] = group
            if not running and (stopping is not None or not job.work.pending and slots()):
                return
            done = ray.wait(list(running), timeout=0.5)[0] if running else time.sleep(0.5) or []
            for progress in ray.get(board.news.remote()):
                job.work.show(progress)
            for reference in done:
                group = running.pop(reference)
                try:
                    fate = ray.get(reference)
                except InputError:
                    raise
                except ray.exceptions.RayTaskError:
                    raise  # a fault in training itself, which would come again
                except ray.exceptions.RayError as error:
                    lost = stopping is None
                    job.work.lost(group, type(error).__name__) if lost else job.work.stopped(group)
                    continue
                report(job.work, group, fate, job.device)
            if stopping is not None and time.monotonic() - stopping > _PATIENCE:
                for reference in running:
                    ray.cancel(reference, force=True)
    finally:
        board.stop.remote()
        if running and stopping is None:  # an error: give the others time to keep their checkpoints
            ray.wait(list(running), num_returns=len(running), timeout=_PATIENCE)
        ray.kill(board)


@functools.cache
def _images(source: str) -> data.Images:
    return data.load(source, download=False)


def _ray_task(specs: list[RunSpec], source: str, profile: str, device: str, checkpoints: Checkpoints, board) -> tuple:
    """`attempt` on a node of the cluster, where Ray has made one GPU (or part of it) visible."""
    import ray

    asked, answer = time.monotonic(), False

    def stop() -> bool:
        nonlocal asked, answer
        if not answer and time.monotonic() - asked >= 1.0:
            try:
                answer = ray.get(board.stopped.remote(), timeout=60)
            except ray.exceptions.RayError:  # nobody waits for these rows any more
                answer = True
            asked = time.monotonic()
        return answer

    return attempt(specs, _images(source), torch.device(device), profile,
                   lambda progress: board.add.remote(progress), checkpoints, stop)


EXECUTORS = {"local": local, "processes": processes, "ray": on_ray}
