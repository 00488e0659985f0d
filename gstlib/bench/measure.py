"""How fast training is, against the loop that a PyTorch user would write and against what the device could do.

Everything runs on random images of CIFAR-10's shape: timing needs no others.
Network, masks and events are those of the paper's figures at profile
`paper`; the plain loop trains the same network unmasked.
"""

from __future__ import annotations

import functools
import gc
import itertools
import multiprocessing
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pandas as pd
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from gstlib import convolution, data, experiments, models
from gstlib.data import SIDE, Images, Loader
from gstlib.errors import InputError
from gstlib.reading import study
from gstlib.spec import DataSpec, OptimiserSpec, RunSpec
from gstlib.store import Store
from gstlib.training import train
from gstlib.training.engine import Engine, Replica, cores, ran_out

TRAIN, TEST = 50_000, 10_000  # CIFAR-10's images, to which epochs and runs are scaled
FIGURES = {"conv4": "figure2", "vgg11": "figure1-vgg11", "resnet18": "figure1-resnet18"}
_RANDOM = "random images"  # stands where a data set has its fingerprint
_barrier = None  # in a worker process: where the processes of one row wait for each other


class Size(NamedTuple):
    """How much is measured: blocks of as many steps as make `work` forward multiply-accumulates an image of the batch."""

    replicas: tuple[int, ...]
    work: float
    blocks: int
    test_images: int
    techniques: tuple[str, ...] = tuple(FIGURES)
    models: tuple[str, ...] = tuple(FIGURES)
    width: float = 1.0
    batch_size: int = 128

    def steps(self, model: str) -> int:
        """Training steps in a block, at most an epoch's (391)."""
        return max(1, round(min(-(-TRAIN // self.batch_size), self.work / count(model, self.width).products)))


def default_size(device: torch.device, quick: bool) -> Size:
    """1 to 20 replicas; when `quick`, on a CPU no more than it has cores."""
    if device.type == "cuda":
        return Size((1, 5), 3e9, 2, TEST, ("vgg11",)) if quick else Size((1, 2, 5, 10, 20), 2e10, 3, TEST)
    numbers = (1, 2, 5, 10, 20)
    if quick:
        return Size(tuple(n for n in numbers if n <= cores()), 3e8, 2, 125, ("vgg11",))
    return Size(numbers, 1e9, 3, 1000)


class Count(NamedTuple):
    """Of one image's forward pass: multiply-accumulates, numbers written by convolutions and linear layers; parameters."""

    products: int
    activations: int
    parameters: int

    def operations(self, images: int, training: bool = True) -> int:
        """Floating-point operations on so many images: two a product, and training takes three forward passes."""
        return (6 if training else 2) * self.products * images

    def traffic(self, images: int, precision: str) -> int:
        """Least bytes that a training step moves to and from memory, all that can be fused being fused.

        Outputs of convolutions and linear layers, and their gradients, written
        and read once in the training precision; uint8 images read; weights
        read forward and backward in the training precision; in float32
        gradients written and read, parameters and Adam's two moments read and written.
        """
        size = 2 if precision == "bf16" else 4
        return images * (4 * size * self.activations + 3 * SIDE * SIDE) + self.parameters * (2 * size + 8 * 4)


@functools.cache
def count(model: str, width: float = 1.0, classes: int = 10) -> Count:
    """What the convolutions and linear layers of `model` compute; all other layers are negligible."""
    products, written = [], []

    def record(module, _inputs, output):
        products.append(output.numel() * module.weight[0].numel())
        written.append(output.numel())

    with torch.device("meta"):
        network = models.build(model, classes, width).eval()
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(record)
        network(torch.empty(1, 3, SIDE, SIDE))
    return Count(sum(products), sum(written), sum(p.numel() for p in network.parameters()))


def operations_per_run(spec: RunSpec) -> int:
    """Floating-point operations of a run at CIFAR-10's size with a test pass after each tested epoch."""
    counted = count(spec.model.name, spec.model.width, spec.data.classes)
    return spec.optimiser.epochs * counted.operations(TRAIN) + _tests(spec) * counted.operations(TEST, training=False)


def _tests(spec: RunSpec) -> int:
    return sum(map(spec.tested_after, range(spec.optimiser.epochs)))


def _events(spec: RunSpec) -> int:
    return sum(map(spec.pruning.schedule.is_event, range(spec.optimiser.epochs))) if spec.pruning else 0


@functools.lru_cache(maxsize=2)
def synthetic(n: int, test: int, classes: int = 10) -> Images:
    """`n` training and `test` test images of random pixels and labels, the same ones every time."""
    g = torch.Generator().manual_seed(0)
    parts = [part for size in (n, test) for part in (
        torch.randint(0, 256, (size, 3, SIDE, SIDE), dtype=torch.uint8, generator=g),
        torch.randint(0, classes, (size,), generator=g))]
    return Images(*parts, "cifar10", _RANDOM, _RANDOM)


def model_spec(model: str, width: float = 1.0, batch_size: int = 128) -> RunSpec:
    """The first pruned run of the figure that stands for `model`, at profile `paper`."""
    profile = replace(experiments.profile("paper"), width=width, batch_size=batch_size)
    runs = experiments.experiment(FIGURES[model]).runs(profile, DataSpec("cifar10", _RANDOM), [0])
    return next(run.spec for run in runs if run.spec.pruning is not None)


class Case(NamedTuple):
    """What is measured: a specification, how many replicas, and which of the engine's techniques are left off."""

    spec: RunSpec
    replicas: int = 1
    one_thread: bool = True
    small_maps: bool = True
    capture: bool | None = None
    streams: bool = True
    fuse: bool | None = None
    autotune: bool = True
    fused_optimiser: bool = True
    batches_on_device: bool = True
    sums_on_device: bool = True


class Cost(NamedTuple):
    """Seconds: of a lockstep step by block, of a test image, of an event, of an E[BN] pass (None: the run has none);
    bytes of memory at their peak."""

    blocks: list[float]
    test: float
    event: float | None
    ebn: float | None
    memory: int

    @property
    def step(self) -> float:
        """Seconds of one step of all replicas, the median over blocks."""
        return statistics.median(self.blocks)


def _timed(device: torch.device, act: Callable[[], object]) -> float:
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    act()
    wait()
    return time.perf_counter() - began


def measure(case: Case, device: torch.device, steps: int, blocks: int, test_images: int,
            meet: Callable[[], object] = lambda: None) -> Cost:
    """Time blocks of training, a test pass and events of `case`; `meet()` is called before each block."""
    timed = functools.partial(_timed, device)
    n, threads = min(steps * case.spec.optimiser.batch_size, TRAIN), torch.get_num_threads()
    images = synthetic(n, test_images, case.spec.data.classes)
    _forget_peak(device)
    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(train._one_thread())
            torch.set_num_threads(1 if case.one_thread else threads)
        if not case.small_maps:
            stack.enter_context(patch.object(convolution, "_SMALL", 0))
        specs = [replace(case.spec, seed=seed) for seed in range(case.replicas)]
        runs = train._Group(specs, images, device, lambda _: None, "").runs
        if not case.fused_optimiser:
            for run in runs:
                use_plain_adam(run.replica)
        engine = Engine([run.replica for run in runs], case.capture, case.streams, case.fuse, case.autotune)
        after = [run.pruner.batch for run in runs if run.pruner is not None]
        if not case.batches_on_device:
            after += [feed_from_host(run.replica, images) for run in runs]
        if not case.sums_on_device:
            after += [run.replica.sums.tolist for run in runs]
        engine.train_epoch(0, after)  # warms up, and captures
        seconds = []
        for _ in range(blocks):
            meet()
            seconds.append(timed(lambda: engine.train_epoch(0, after)))
        test = min(timed(lambda: engine.test(0)) for _ in range(2))  # the first one warms up
        event = ebn = None
        if (pruner := runs[0].pruner) is not None:
            epochs = [epoch for epoch in range(case.spec.optimiser.epochs) if pruner.schedule.is_event(epoch)][:12]
            event = statistics.median([timed(lambda: pruner.epoch(epoch, lambda: 0.0)) for epoch in epochs][1:])
            if case.spec.pruning.score == "ebn":
                ebn = statistics.median(timed(lambda: [layer.scores() for layer in pruner.layers]) for _ in range(21))
        # a short last step counts as the fraction that it is
        return Cost([s * case.spec.optimiser.batch_size / n for s in seconds], test / test_images, event, ebn,
                    _peak_memory(device))


def _forget_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # Linux begins its high-water mark anew
            Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def feed_from_host(replica: Replica, images: Images) -> Callable[[], None]:
    """Let `replica` take batches made on the host; returns what must be called after every step.

    The batches are those that its own data path would have made.
    """
    loader, cpu = replica.loader, torch.device("cpu")
    host = Loader(images, loader.batch_size, loader.augment, 0, cpu, loader.memory_format is torch.channels_last)
    host.generator.set_state(loader.generator.get_state())
    x = torch.empty((loader.batch_size, 3, SIDE, SIDE), device=loader.device, memory_format=loader.memory_format)
    y = torch.empty(loader.batch_size, dtype=torch.int64, device=loader.device)
    loader.next_batch = lambda size: (x[:size], y[:size])
    supply = (host.next_batch(size) for _ in iter(host.begin_epoch, "never") for size in host.batch_sizes())

    def feed() -> None:
        for there, here in zip((x, y), next(supply)):
            there[:len(here)].copy_(here.pin_memory() if there.is_cuda else here, non_blocking=True)

    feed()
    return feed


def use_plain_adam(replica: Replica) -> None:
    """Give `replica` the Adam that torch takes where nothing is asked for."""
    plain = torch.optim.Adam(replica.model.parameters(), capturable=replica.device.type == "cuda")
    plain.param_groups[0]["lr"] = replica.optimiser.param_groups[0]["lr"]
    replica.optimiser = plain


def measure_together(processes: int, case: Case, *how) -> Cost:
    """`measure` with the replicas shared out to so many processes, which begin each block together; the slowest one's
    time counts."""
    shares = [case.replicas // processes + (i < case.replicas % processes) for i in range(processes)]
    parts = [_crew(processes).submit(_member, case._replace(replicas=share), *how) for share in shares]
    costs = [part.result() for part in parts]
    return costs[0]._replace(blocks=[max(block) for block in zip(*(cost.blocks for cost in costs))],
                             test=max(cost.test for cost in costs), memory=sum(cost.memory for cost in costs))


@functools.cache  # the processes stay for the next measurement; to start one takes seconds
def _crew(processes: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, context, _enter, (context.Barrier(processes),))


def _enter(barrier) -> None:
    global _barrier
    _barrier = barrier


def _member(*arguments) -> Cost:
    return measure(*arguments, meet=lambda: _barrier.wait(timeout=600))


def _cost(case: Case, device: torch.device, *how) -> Cost:
    if device.type == "cpu" and case.replicas > 1:
        return measure_together(min(case.replicas, cores()), case, device, *how)
    return measure(case, device, *how)


class _Pictures(Dataset):
    """PIL images made from an array one by one, transformed one by one, as torchvision's CIFAR10 does."""

    def __init__(self, images: Images, length: int, transform):
        self.x, self.y = images.train_x.permute(0, 2, 3, 1).contiguous().numpy(), images.train_y.tolist()
        self.length, self.transform = length, transform

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int):
        index %= len(self.y)
        return self.transform(Image.fromarray(self.x[index])), self.y[index]


def plain_loop(spec: RunSpec, device: torch.device, steps: int, blocks: int) -> float:
    """Seconds of a step (median over blocks) of the loop that a PyTorch user would write for `spec`'s network.

    Data set of PIL images, transforms, DataLoader with shuffling and workers
    (2, or 4 and pinned memory on a GPU), eager, float32 with TF32 allowed,
    torch's own convolutions, strides and number of threads, Adam, loss and
    accuracy read after every step.  The workers begin before the clock does.
    """
    from torchvision import transforms  # takes seconds, which worker processes can do without

    cuda, batch = device.type == "cuda", spec.optimiser.batch_size
    torch.set_float32_matmul_precision("high" if cuda else "highest")  # on a CPU "high" may mean bf16
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = True, False
    augmentation = [transforms.RandomCrop(SIDE, padding=4), transforms.RandomHorizontalFlip()] if spec.data.augment else []
    transform = transforms.Compose(
        [*augmentation, transforms.ToTensor(), transforms.Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))])
    images, warm = synthetic(min(steps * batch, TRAIN), batch, spec.data.classes), 10 if cuda else 1
    loader = DataLoader(_Pictures(images, (warm + steps * blocks) * batch, transform), batch_size=batch, shuffle=True,
                        num_workers=4 if cuda else 2, pin_memory=cuda)
    loss_sum, right, ends = 0.0, 0, []
    with patch.object(convolution, "_SMALL", 0):
        model = models.build(spec.model.name, spec.data.classes, spec.model.width).to(device)
        optimiser = torch.optim.Adam(model.parameters(), lr=spec.optimiser.lr)
        criterion = nn.CrossEntropyLoss()
        model.train()
        for x, y in loader:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            optimiser.zero_grad()
            logits = model(x)
            loss = criterion(logits, y)
            loss.backward()
            optimiser.step()
            loss_sum += loss.item() * len(y)
            right += (logits.argmax(1) == y).sum().item()
            ends.append(time.perf_counter())
    ends = ends[warm - 1::steps]
    return statistics.median(after - before for before, after in zip(ends, ends[1:])) / steps


def peaks(device: torch.device, repeats: int = 10) -> dict[str, float]:
    """Rates that the whole device was measured to reach: operations/s of a large matrix product in bf16 (on a CPU in
    float32 where that is faster), bytes/s of a large copy, reading and writing counted; the best of `repeats`."""
    def fastest(act: Callable[[], object]) -> float:
        return min(_timed(device, act) for _ in range(repeats))

    n, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**27)
    rates = []
    for dtype in (torch.bfloat16,) if device.type == "cuda" else (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates.append(2 * n**3 / fastest(lambda: a @ b))
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"peak_operations_per_s": max(rates), "peak_bytes_per_s": 2 * size / fastest(lambda: target.copy_(source))}


def row(spec: RunSpec, device: torch.device, replicas: int, cost: Cost | None, plain: float, peak: dict[str, float]) -> dict:
    """A row of the table: rates summed over replicas; everything else is one run's share of its group's time.

    Times in seconds where the name does not say ms; `gap` is the time of a
    step over the larger of its two floors; operations and bytes are counts.
    Without a `cost` the replicas did not fit into memory.
    """
    if cost is None:
        return {"model": spec.model.name, "device": device.type, "replicas": replicas, "steps_per_s": None,
                "ratio_to_plain_loop": None, "note": "does not fit into memory"}
    batch, epochs = spec.optimiser.batch_size, spec.optimiser.epochs
    counted = count(spec.model.name, spec.model.width, spec.data.classes)
    step, test = cost.step / replicas, cost.test * TEST
    if device.type == "cpu":
        test /= min(replicas, cores())  # tested side by side; on a GPU in turn
    operations, moved = counted.operations(batch), counted.traffic(batch, spec.precision)
    compute, memory = operations / peak["peak_operations_per_s"], moved / peak["peak_bytes_per_s"]
    return {
        "model": spec.model.name, "device": device.type, "replicas": replicas, "batch_size": batch,
        "precision": spec.precision, "steps_per_s": 1 / step, "images_per_s": batch / step,
        "plain_steps_per_s": 1 / plain, "ratio_to_plain_loop": plain / step,
        "seconds_per_epoch": step * TRAIN / batch, "train_s_per_run": epochs * step * TRAIN / batch,
        "test_s_per_run": _tests(spec) * test,
        "events_s_per_run": _events(spec) * (test + cost.event),  # the pass before an event is its epoch's own
        "ms_per_step": 1e3 * step, "compute_floor_ms": 1e3 * compute, "memory_floor_ms": 1e3 * memory,
        "gap": step / max(compute, memory), "share_of_peak": compute / step, "peak_memory_bytes": cost.memory,
        "operations_per_step": operations, "bytes_per_step": moved, "operations_per_run": operations_per_run(spec),
        "note": "",
    }


def _without(case: Case) -> dict[str, Case]:
    """For each technique of a CPU, the case that lacks it and nothing else."""
    return {"bf16 (else float32)": case._replace(spec=replace(case.spec, precision="float32")),
            "channels-last": case._replace(spec=replace(case.spec, channels_last=False)),
            "small-map convolution": case._replace(small_maps=False),
            "a thread a run (else one run on all)": case._replace(one_thread=False),
            "fused optimiser": case._replace(fused_optimiser=False)}


def _without_on_gpu(case: Case) -> dict[str, Case]:
    return {"bf16 (else TF32)": case._replace(spec=replace(case.spec, precision="tf32")),
            "channels-last": case._replace(spec=replace(case.spec, channels_last=False)),
            "CUDA graph": case._replace(capture=False), "a stream a replica": case._replace(streams=False),
            "compiled passes": case._replace(fuse=False), "cuDNN autotuning": case._replace(autotune=False),
            "fused optimiser": case._replace(fused_optimiser=False),
            "data path on the device": case._replace(batches_on_device=False),
            "sums read once an epoch": case._replace(sums_on_device=False)}


def run(device: torch.device, quick: bool = False, progress: bool = True, size: Size | None = None) -> dict:
    """Measure the engine on `device`: {"machine", "rows", "techniques", "costs"}, all JSON.

    Rows are those of `row`.  Replicas are lockstep runs, on a CPU shared out
    to a process of one thread a core; a number that memory does not hold
    has a row that says so in its note.  Techniques: steps/s with all of them
    and without this one, and the quotient.  Costs: of one run alone, in ms
    and in training steps.  `quick` takes a few steps only, `progress` shows
    a bar on standard error, `size` overrides `default_size`.
    """
    began, cuda = time.perf_counter(), device.type == "cuda"
    size, variants = size or default_size(device, quick), _without_on_gpu if cuda else _without
    left_off = len(variants(Case(model_spec(size.models[0]))))
    total = 2 + len(size.models) * (1 + len(size.replicas)) + len(set(size.techniques) & set(size.models)) * left_off
    measured, techniques, costs = [], [], []
    with tqdm(total=total, disable=not progress, unit="measurement", dynamic_ncols=True) as bar:
        def done(what: str, act: Callable, *arguments):
            bar.set_description(what)
            result = act(*arguments)
            bar.update()
            return result

        peak = done("peak rates", peaks, device)
        for model in size.models:
            spec, steps = model_spec(model, size.width, size.batch_size), size.steps(model)
            how = device, steps, size.blocks, size.test_images
            plain = done(f"{model}, plain loop", plain_loop, spec, *how[:3])
            fitting: dict[int, Cost] = {}
            for n in size.replicas:
                try:
                    fitting[n] = done(f"{model}, replicas: {n}", _cost, Case(spec, n), *how)
                except RuntimeError as error:
                    if not ran_out(error):
                        raise
                measured.append((spec, device, n, fitting.get(n), plain))
            if not fitting:
                continue
            rate, alone = {n: n / cost.step for n, cost in fitting.items()}, min(fitting)
            parts = {"training step": 1 / rate[alone], "event, without its test passes": fitting[alone].event,
                     "E[BN] of all pruned layers": fitting[alone].ebn,
                     f"test pass of {TEST} images": fitting[alone].test * TEST}
            costs += [{"model": model, "device": device.type, "cost": name, "ms": 1e3 * seconds,
                       "training_steps": seconds * rate[alone]} for name, seconds in parts.items() if seconds is not None]
            company = max((n for n in fitting if n <= (10 if cuda else cores())), default=alone)
            for name, case in variants(Case(spec, company if cuda else alone)).items() if model in size.techniques else ():
                without = case.replicas / done(f"{model} without {name}", _cost, case, *how).step
                with_it = rate[case.replicas if case.one_thread else company]
                techniques.append({"model": model, "device": device.type, "replicas": case.replicas, "technique": name,
                                   "steps_per_s": with_it, "steps_per_s_without": without, "gain": with_it / without})
        again = done("peak rates", peaks, device)  # whatever else the machine did can only have slowed one of the two
    peak = {name: max(rate, again[name]) for name, rate in peak.items()}
    rows = [row(*what, peak) for what in measured]
    machine = train.provenance(synthetic(1, 1), device, "paper", time.perf_counter() - began) | peak | {
        "cores": cores(), "quick": quick, "blocks": size.blocks,
        "steps": {model: size.steps(model) for model in size.models}}
    return {"machine": machine, "rows": rows, "techniques": techniques, "costs": costs}


def table(result: dict) -> str:
    """The result of `run` as text: machine, rows, techniques, costs."""
    machine, rows = result["machine"], pd.DataFrame(result["rows"])
    shown = rows.reindex(columns=[
        "model", "replicas", "steps_per_s", "images_per_s", "plain_steps_per_s", "ratio_to_plain_loop", "seconds_per_epoch",
        "train_s_per_run", "test_s_per_run", "events_s_per_run", "ms_per_step", "compute_floor_ms", "memory_floor_ms",
        "gap", "share_of_peak", "peak_memory_bytes", "note"])
    shown["peak_GiB"] = shown.pop("peak_memory_bytes").astype(float) / 2**30
    parts = [f"{machine['device']}, {machine['cores']} cores, torch {machine['versions']['torch']}, {machine['finished']}; "
             f"{machine['peak_operations_per_s'] / 1e12:.3g} TFLOP/s, {machine['peak_bytes_per_s'] / 1e9:.3g} GB/s measured"]
    parts += [frame.to_string(index=False, float_format=lambda value: f"{value:.3g}", na_rep="")
              for frame in (shown, pd.DataFrame(result["techniques"]), pd.DataFrame(result["costs"])) if not frame.empty]
    return "\n\n".join(parts)


def seconds_per_run(spec: RunSpec, device: torch.device, replicas: int = 1) -> float:
    """Estimated seconds of a run of `spec` on `device`; on a GPU, its share of a lockstep group of `replicas`.

    From a few training steps and a test batch, measured once for every shape
    of run, with fewer replicas where memory does not hold so many.  Passes are
    not compiled for it, which takes a minute: on a GPU the estimate is on the
    safe side.  A data set whose size the specification does not say counts as
    CIFAR-10.  Raises `InputError` where not even one run fits.
    """
    sizes = {"digits": (1442, 355)}.get(spec.data.name, (TRAIN, TEST))
    n, test = (asked or whole for asked, whole in zip((spec.data.train_size, spec.data.test_size), sizes))
    o = spec.optimiser
    shape = RunSpec(DataSpec("cifar10", _RANDOM, spec.data.classes, augment=spec.data.augment), spec.model,
                    OptimiserSpec(o.name, batch_size=o.batch_size, epochs=1, milestones=()),
                    precision=spec.precision, channels_last=spec.channels_last)
    step, test_image = _pace(shape, device, replicas if device.type == "cuda" else 1)
    # an event is tested before and after; before is the epoch's own test
    return o.epochs * n / o.batch_size * step + (_tests(spec) + _events(spec)) * test * test_image


@functools.cache
def _pace(shape: RunSpec, device: torch.device, replicas: int) -> tuple[float, float]:
    try:
        cost = measure(Case(shape, replicas, fuse=False), device, *((20, 1, 2000) if device.type == "cuda" else (2, 1, 250)))
    except RuntimeError as error:
        if not ran_out(error):
            raise
        if replicas == 1:
            raise InputError(f"one run of {shape.model.name} does not fit into the memory of {device}") from error
    else:
        return cost.step / replicas, cost.test
    return _pace(shape, device, replicas // 2)


def stored_runs(n: int = 10_000) -> dict[str, float]:
    """Seconds that the commands `list` and `status` (process start included), the heads of all runs (`about`) and the
    tables of the largest figure take in a results folder of `n` runs.

    The runs are made up, with the rows of profile `paper`: all figures, one
    seed after the other.  Of Figure 4 ten seeds are loaded, 260 runs.  `first`
    is the time of the first look at the folder, which makes the index.
    """
    profile, images = experiments.profile("paper"), data.load("digits")
    spec = experiments.data_spec(profile, images.name, images.fingerprint)
    about = train.provenance(images, torch.device("cpu"), profile.name, 1.0)
    epoch = {"lr": 1e-3, "train_loss": 0.1, "train_accuracy": 0.9, "test_loss": 1.0, "test_accuracy": 0.5,
             "test_accuracy_clean": 0.5, "parameters": 100, "seconds": 1.0}
    event = {"units": 64, "removed": 1, "removed_total": 1, "mean_score": 0.3, **{f"decile_{k}": k / 7 for k in range(10)},
             "t_pre": 0.5, "t_post": 0.4}
    took, tables, written = {}, {}, 0
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        store.check_writable()
        for seed in tqdm(itertools.count(), desc="storing", unit="seed", leave=False):
            for figure in experiments.EXPERIMENTS.values():
                for label, run in figure.runs(profile, spec, [seed]):
                    if store.file(run.id).exists() or written == n:
                        continue
                    if (figure.name, label) not in tables:
                        rows = [{"epoch": e} | epoch for e in range(run.optimiser.epochs)]
                        events = [] if run.pruning is None else [
                            {"epoch": e, "layer": name} | event for index, name in enumerate(run.pruning.layers)
                            for e in run.pruning.schedule.event_epochs(index) if e < run.optimiser.epochs]
                        tables[figure.name, label] = {"epoch": rows, "event": events}
                    store.write(run, about, tables[figure.name, label])
                    written += 1
            if written == n:
                break

        def timed(name: str, function: Callable[[], object]) -> None:
            began = time.perf_counter()
            function()
            took[name] = time.perf_counter() - began

        def command(name: str) -> None:
            subprocess.run([sys.executable, "-m", "gstlib", name, "--profile", "paper", "--data", "digits", "--results", folder],
                           check=True, stdout=subprocess.DEVNULL)

        for name in ("list", "status"):
            timed(name, lambda: command(name))
        timed("about, first", lambda: list(Store(folder).about()))
        timed("about", lambda: list(Store(folder).about()))
        timed("figure", lambda: study.study(Store(folder), "figure4", "paper", "digits", 10))
    return took
