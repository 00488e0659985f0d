"""Where groups of runs are trained: in this process, in worker processes, or on a Ray cluster.

An executor has `slots` for groups; `submit` gives a future of what `attempt` returns, the same call everywhere, and
so the rows are the same.  `gone` tells whether an error means that the worker is, `news` what workers have reported;
`stop` has them end after their step, or at once; `close` frees what is held.
"""

import functools
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass

import torch

from gstlib import data
from gstlib.errors import Forgiving, InputError
from gstlib.spec import RunSpec
from gstlib.training import train
from gstlib.training.checkpoint import Checkpoints
from gstlib.training.engine import ran_out


@dataclass
class Setting:
    """What executors are given: options of `runner.train_all`, and what training in this process is to ask and tell."""

    device: torch.device
    workers: int | None
    checkpoints: Checkpoints
    stop: Callable[[], bool]
    show: Callable[[train.Progress], None]
    gpus_per_group: float


def attempt(specs: list[RunSpec], images: data.Images, device: torch.device, profile: str, progress: Callable,
            checkpoints: Checkpoints, stop: Callable[[], bool]) -> list[train.Result] | Exception:
    """The results of a group; or why there are none: a `Stopped`, an `InputError` or a `MemoryError`."""
    try:
        return train.train_group(specs, images, device, progress, profile, checkpoints, stop)
    except (train.Stopped, InputError) as error:
        return error
    except RuntimeError as error:
        if not ran_out(error):
            raise
    # out here nothing holds the group any more; what a smaller one is to have must be free, cycles included
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return MemoryError()


_images = functools.cache(functools.partial(data.load, download=False))  # in a worker, once for all its groups


class Local:
    """One group after the other, in this process: a future from here is done."""

    def __init__(self, setting: Setting):
        self.setting, self.slots, self.news, self.load = setting, 1, tuple, functools.cache(data.load)
        self.stop = self.close = lambda now=False: None

    def submit(self, specs: list[RunSpec], source: str, profile: str) -> Future:
        s, future = self.setting, Future()
        future.set_result(attempt(specs, self.load(source), s.device, profile, s.show, s.checkpoints, s.stop))
        return future


class Processes:
    """Workers on this machine, one a core or GPU, each a pool of its own: one that is killed breaks no other."""

    def __init__(self, setting: Setting):
        self.setting, self.slots = setting, setting.workers
        self.context = multiprocessing.get_context("spawn")
        self.ending = self.context.RawValue("b", False)  # without a lock, which a killed worker might hold
        self.pools, self.queues, self.futures, self.workers = {}, {}, {}, []
        if setting.device.type == "cpu":
            # a step reads and writes all weights and moments: with large pages, where there are any, one of VGG11 took 9 % less
            os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")

    def submit(self, specs: list[RunSpec], source: str, profile: str) -> Future:
        slot = next(i for i in range(self.slots) if i not in self.futures or self.futures[i].done())
        device = self.setting.device
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", slot)
        if slot not in self.pools:
            self.queues[slot] = self.context.SimpleQueue()
            self.pools[slot] = ProcessPoolExecutor(1, self.context, _begin, (self.ending, self.queues[slot]))
        others = multiprocessing.active_children()
        # workers are born deaf to signals, which reach the whole process group: this process alone decides
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self.futures[slot] = self.pools[slot].submit(
                _work, specs, source, device, profile, self.setting.checkpoints)
        except BrokenExecutor:  # its worker has died since
            del self.pools[slot]
            return self.submit(specs, source, profile)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.workers += [child for child in multiprocessing.active_children() if child not in others]
        return self.futures[slot]

    def gone(self, error: BaseException) -> bool:
        return isinstance(error, BrokenExecutor)

    def news(self) -> Iterable[train.Progress]:
        for queue in self.queues.values():
            while not queue.empty():
                yield queue.get()

    def stop(self, now: bool = False) -> None:
        self.ending.value = True
        for worker in self.workers if now else ():
            worker.kill()

    def close(self) -> None:
        for pool in self.pools.values():
            pool.shutdown()


def _begin(ending, news) -> None:
    """Set up a worker process; one whose master is gone ends after its step."""
    global _ending, _news, _training
    sys.stderr = Forgiving(sys.stderr)  # which the user may have closed
    _news, _training, master = news, threading.Lock(), multiprocessing.parent_process()
    _ending = lambda: ending.value or os.getppid() != master.pid  # noqa: E731

    def guard() -> None:
        master.join()
        with _training:
            os._exit(1)

    threading.Thread(target=guard, daemon=True).start()


def _work(specs: list[RunSpec], source: str, device: torch.device, profile: str, checkpoints: Checkpoints):
    """`attempt` in a worker process."""
    with _training:
        return attempt(specs, _images(source), device, profile, _news.put, checkpoints, _ending)


def connect(address: str | None, device: str, workers: int | None) -> torch.device:
    """Join the Ray cluster at `address` (None: make one of this machine) and say on what kind of device it trains.

    Raises `InputError` where Ray is not installed, the cluster cannot be reached, or it has no such device.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError('Ray is not installed; in the checkout it is installed with: pip install -e ".[ray]"') from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not ray.is_initialized():
        try:
            # tasks find gstlib where the driver does; cluster nodes have it installed
            ray.init(address=address, log_to_driver=False, logging_level="warning",
                     **({} if address else {"num_cpus": workers, "include_dashboard": False}))
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(f"the Ray cluster at {address or 'this machine'} cannot be used: {error}") from error
    there, kind = ray.cluster_resources(), device.partition(":")[0]
    if kind == "auto":
        kind = "cuda" if there.get("GPU") else "cpu"
    if not there.get({"cuda": "GPU", "cpu": "CPU"}.get(kind)):
        raise InputError(f"device {device!r} was asked for, but the Ray cluster has none; it has "
                         f"{there.get('CPU', 0):.0f} CPUs and {there.get('GPU', 0):.0f} GPUs")
    return torch.device(kind)


class OnRay:
    """A group at a time on every CPU of a Ray cluster, or on every `gpus_per_group`-th part of its GPUs.

    The rest of the cluster takes up what a lost worker or node had: results and data are at one path on every node.
    """

    def __init__(self, setting: Setting):
        import ray
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.ray, self.setting, self.references = ray, setting, []
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": here}
        self.orders, self.reports = Queue(actor_options=options), Queue(actor_options=options)
        self.kind, self.part = ("GPU", setting.gpus_per_group) if setting.device.type == "cuda" else ("CPU", 1)
        needs = {"num_cpus": 0} | {f"num_{self.kind.lower()}s": self.part}
        # retries are `Work`'s: it knows how far the checkpoints are
        self.task = ray.remote(max_retries=0, **needs)(_ray_task)

    @property
    def slots(self) -> int:
        n = int(self.ray.cluster_resources().get(self.kind, 0) / self.part + 1e-9)
        return min(n, self.setting.workers or n)

    def submit(self, specs: list[RunSpec], source: str, profile: str) -> Future:
        s = self.setting
        self.references.append(self.task.remote(
            specs, source, s.device, profile, s.checkpoints, self.orders, self.reports))
        return self.references[-1].future()

    def gone(self, error: BaseException) -> bool:
        errors = self.ray.exceptions  # a task's own error is a fault in training, which would come again
        return isinstance(error, errors.RayError) and not isinstance(error, errors.RayTaskError)

    def news(self) -> Iterable[train.Progress]:
        return self.reports.get_nowait_batch(self.reports.qsize())

    def stop(self, now: bool = False) -> None:
        self.orders.put("stop")
        for reference in self.references if now else ():
            self.ray.cancel(reference, force=True)

    def close(self) -> None:
        self.orders.shutdown(force=True)
        self.reports.shutdown(force=True)


def _ray_task(specs: list[RunSpec], source: str, device: torch.device, profile: str, checkpoints: Checkpoints,
              orders, reports):
    """`attempt` on a node of the cluster, where Ray has made one GPU (or part of it) visible."""
    asked = time.monotonic()

    def stop() -> bool:
        nonlocal asked
        if time.monotonic() - asked < 1.0:
            return False
        asked = time.monotonic()
        return not orders.empty()

    return attempt(specs, _images(source), device, profile, reports.actor.put_nowait.remote, checkpoints, stop)


EXECUTORS = {"local": Local, "processes": Processes, "ray": OnRay}
