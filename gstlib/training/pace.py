"""How long a run would take on the device at hand."""

import functools
import time
from dataclasses import replace

import torch

from gstlib.data import SIDE, Images, sizes, whole
from gstlib.errors import InputError
from gstlib.spec import FlatnessSpec, RunSpec
from gstlib.training import train
from gstlib.training.engine import Engine, ran_out


@functools.lru_cache(maxsize=2)
def synthetic(n: int, test: int, classes: int = 10) -> Images:
    """`n` training and `test` test images of random pixels, the same ones every time."""
    g = torch.Generator().manual_seed(0)
    parts = [part for size in (n, test) for part in (
        torch.randint(0, 256, (size, 3, SIDE, SIDE), dtype=torch.uint8, generator=g),
        torch.randint(0, classes, (size,), generator=g))]
    return Images(*parts, "cifar10", "random images", "random images")


def seconds_per_run(spec: RunSpec, device: torch.device, replicas: int = 1) -> float:
    """Estimated seconds of a run of `spec` on `device`; on a GPU, its share of a lockstep group of `replicas`.

    From a few steps and tests, measured once for every shape of run.  Passes
    are not compiled for it, which takes a minute: on a GPU the estimate is on
    the safe side.  Raises `InputError` where not even one run fits.
    """
    (n, test), o, (tested, events, strikes) = sizes(spec.data), spec.optimiser, spec.tests()
    # tests after strikes begin at the layer struck: four after one epoch count as one whole test; in the end every image once
    images = test * (tested + max(events, strikes / 4)) + sum(whole(spec.data))
    alike = replace(spec, data=replace(spec.data, train_size=None, test_size=None), pruning=None, measures=(),
                    measured_at=None, flatness=FlatnessSpec(), seed=0)
    step, tested = _pace(alike, device, replicas if device.type == "cuda" else 1)
    return o.epochs * n / o.batch_size * step + images * tested


@functools.cache
def _pace(spec: RunSpec, device: torch.device, replicas: int) -> tuple[float, float]:
    """Seconds of a training step, a replica's share, and of a test image."""
    steps, tests, batch = *((20, 2000) if device.type == "cuda" else (2, 250)), spec.optimiser.batch_size
    images = synthetic(steps * batch, tests, spec.data.classes).to(device)

    def timed(act, argument: int) -> float:
        act(argument)  # warms up, and captures
        began = time.perf_counter()
        act(argument)  # ends with what was measured on the host, hence after the device
        return time.perf_counter() - began

    try:
        with train.tuned(device):
            engine = Engine([train.Run(spec, images, device).replica for _ in range(replicas)], fuse=False)
            return timed(engine.train_epoch, 0) / steps / replicas, timed(engine.test, 0) / tests
    except RuntimeError as error:
        if not ran_out(error):
            raise
        if replicas == 1:
            raise InputError(f"one run of {spec.model.name} does not fit into the memory of {device}") from error
    return _pace(spec, device, replicas // 2)
