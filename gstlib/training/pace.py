"""How long a run would take on the device at hand."""

from __future__ import annotations

import functools
import time
from dataclasses import replace

import torch

from gstlib import models
from gstlib.data import SIZES, Images, Loader
from gstlib.errors import InputError
from gstlib.spec import FlatnessSpec, RunSpec
from gstlib.training.engine import Engine, Replica, ran_out


def seconds_per_run(spec: RunSpec, device: torch.device, replicas: int = 1) -> float:
    """Estimated seconds of a run of `spec` on `device`; on a GPU, its share of a lockstep group of `replicas`.

    From a few steps and tests, measured once for every shape of run.  Passes
    are not compiled for it, which takes a minute: on a GPU the estimate is on
    the safe side.  Raises `InputError` where not even one run fits.
    """
    whole = SIZES.get(spec.data.name, (50_000, 10_000))
    n, test = (asked or every for asked, every in zip((spec.data.train_size, spec.data.test_size), whole))
    o, p = spec.optimiser, spec.pruning
    images = test * sum(map(spec.tested_after, range(o.epochs))) + sum(whole)  # in the end every image once
    if p is not None:  # tests after strikes begin at the layer struck: four after one epoch count as one whole test
        strikes = [sum(epoch in p.schedule.event_epochs(i) for i in range(len(p.layers))) for epoch in range(o.epochs)]
        images += test * sum(max(1, number / 4) for number in strikes if number)
    alike = replace(spec, data=replace(spec.data, train_size=None, test_size=None), pruning=None, measures=(),
                    measured_at=None, flatness=FlatnessSpec(), seed=0)
    step, tested = _pace(alike, device, replicas if device.type == "cuda" else 1)
    return o.epochs * n / o.batch_size * step + images * tested


@functools.cache
def _pace(spec: RunSpec, device: torch.device, replicas: int) -> tuple[float, float]:
    """Seconds of a training step, a replica's share, and of a test image."""
    steps, tests, batch = *((20, 2000) if device.type == "cuda" else (2, 250)), spec.optimiser.batch_size
    parts = [torch.randint(0, high, (n, *size), dtype=kind) for n in (steps * batch, tests) for high, size, kind in (
        (256, (3, 32, 32), torch.uint8), (spec.data.classes, (), torch.int64))]
    images = Images(*parts, "random", "random", "random").to(device)

    def replica() -> Replica:
        layout = torch.channels_last if spec.channels_last else torch.contiguous_format
        model = models.build(spec.model.name, spec.data.classes, spec.model.width).to(device, memory_format=layout)
        loader = Loader(images, batch, spec.data.augment, 0, device, spec.channels_last)
        return Replica(model, spec.optimiser, loader, spec.precision)

    def timed(act, argument: int) -> float:
        act(argument)  # warms up, and captures
        began = time.perf_counter()
        act(argument)  # ends with what was measured on the host, hence after the device
        return time.perf_counter() - began

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a run has on a CPU
    try:
        engine = Engine([replica() for _ in range(replicas)], fuse=False)
        return timed(engine.train_epoch, 0) / steps / replicas, timed(engine.test, 0) / tests
    except RuntimeError as error:
        if not ran_out(error):
            raise
        if replicas == 1:
            raise InputError(f"one run of {spec.model.name} does not fit into the memory of {device}") from error
    finally:
        torch.set_num_threads(threads)
    return _pace(spec, device, replicas // 2)
