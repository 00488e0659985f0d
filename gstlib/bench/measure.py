"""How fast training is, against the loop that a PyTorch user would write and against what the device could do.

Everything runs on random images of CIFAR-10's shape: timing needs no others.  Network, masks and events are those of
the paper's figures at profile `paper`; the plain loop trains the same network unmasked.
"""

import functools
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import resource_tracker
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

from gstlib import models
from gstlib.bench import cost
from gstlib.convolution import Conv2d, has_bf16
from gstlib.data import SIDE, sizes, whole
from gstlib.errors import InputError, check_choice
from gstlib.spec import RunSpec
from gstlib.training import train
from gstlib.training.engine import Engine, cores, ran_out, switched_off
from gstlib.training.pace import synthetic
from gstlib.training.provenance import provenance

SWITCHES = {"capture": "CUDA graph", "streams": "streams", "fuse": "compiled", "autotune": "cuDNN autotuning"}
TECHNIQUES = ("bf16", "channels-last", *SWITCHES)  # two of the specification, then the engine's switches


class Effort(NamedTuple):
    """How long is measured: blocks of so many steps as make `products` multiply-accumulates forward an image."""

    products: float
    blocks: int
    test_images: int

    def steps(self, spec: RunSpec) -> int:
        """Training steps in a block, at most an epoch's."""
        epoch = -(-sizes(spec.data)[0] // spec.optimiser.batch_size)
        return max(1, round(min(epoch, self.products / cost.count(spec.model.name, spec.model.width).products)))


class Case(NamedTuple):
    """What is measured: a specification, how many replicas, and those of the engine's switches that are set."""

    spec: RunSpec
    replicas: int = 1
    switches: Mapping[str, bool] = {}


class Timing(NamedTuple):
    """Seconds: of a lockstep step by block, of a test image, of an epoch's events, of an E[BN] pass (None: has none);
    bytes of GPU memory held in the end, graphs included; the engine's techniques that were really in use."""

    blocks: list[float]
    test: float
    event: float
    ebn: float | None
    memory: int | None
    techniques: list[str]

    @property
    def step(self) -> float:
        """Seconds of one step of all replicas, the median over blocks."""
        return statistics.median(self.blocks)


def _timed(device: torch.device, act: Callable[[], object]) -> float:
    wait = functools.partial(getattr(torch, device.type).synchronize, device)  # does nothing on a CPU
    wait()
    began = time.perf_counter()
    act()
    wait()
    return time.perf_counter() - began


def measure(case: Case, device: torch.device, how: Effort, meet: Callable[[], object] = lambda: None) -> Timing:
    """Time blocks of training, a test pass and events of `case`; `meet()` is called before each block."""
    timed, spec, cuda = functools.partial(_timed, device), case.spec, device.type == "cuda"
    n = min(how.steps(spec) * spec.optimiser.batch_size, sizes(spec.data)[0])
    if cuda:
        torch.cuda.empty_cache()
    with train.tuned(device):
        images = synthetic(n, how.test_images).to(device)
        runs = [train.Run(replace(spec, seed=seed), images, device) for seed in range(case.replicas)]
        engine = Engine([run.replica for run in runs], **case.switches)
        pruner, after = runs[0].pruner, [run.pruner.batch for run in runs]
        engine.train_epoch(0, after)  # warms up, and captures
        blocks = []
        for _ in range(how.blocks):
            meet()
            # a short last step counts as the fraction that it is
            blocks.append(timed(lambda: engine.train_epoch(0, after)) * spec.optimiser.batch_size / n)
        test = min(timed(lambda: engine.test(0)) for _ in range(2)) / how.test_images  # the first one warms up
        epochs = [epoch for epoch in range(spec.optimiser.epochs) if pruner.schedule.struck(epoch)][:12]
        event = statistics.median([timed(lambda: pruner.epoch(epoch, lambda: 0.0)) for epoch in epochs][1:])
        ebn = statistics.median(timed(lambda: [layer.scores() for layer in pruner.layers]) for _ in range(21))
    return Timing(blocks, test, event, ebn if spec.pruning.score == "ebn" else None,
                  torch.cuda.memory_reserved(device) if cuda else None, engine.techniques)


def _heed() -> None:
    """Let this process end without a word when it is interrupted, or was since it was born."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def measure_all(case: Case, device: torch.device, how: Effort) -> Timing:
    """`measure`; on a CPU the replicas are shared out to a process a core, which begin each block together, and the
    slowest one's time counts."""
    processes = min(case.replicas, cores())
    if device.type == "cuda" or processes == 1:
        return measure(case, device, how)
    context = multiprocessing.get_context("spawn")
    # Ctrl-C reaches the whole process group; processes that are still importing would each print a traceback
    resource_tracker.ensure_running()  # where it is begun by the first process, it lifts the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with context.Manager() as manager, ProcessPoolExecutor(processes, context, _heed) as crew:
            meet = manager.Barrier(processes, timeout=600).wait
            shares = [case._replace(replicas=len(range(i, case.replicas, processes))) for i in range(processes)]
            results = [crew.submit(measure, share, device, how, meet) for share in shares]
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            parts = [part.result() for part in results]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return parts[0]._replace(blocks=[max(block) for block in zip(*(part.blocks for part in parts))],
                             test=max(part.test for part in parts))


def plain_loop(spec: RunSpec, device: torch.device, how: Effort) -> float:
    """Seconds of a step (median over blocks) of the loop that a PyTorch user would write for `spec`'s network.

    torchvision's CIFAR10 with transforms, DataLoader with random order and workers (2, or 4 and pinned memory on a
    GPU), eager, float32 with TF32 allowed, torch's own convolutions, strides and number of threads, Adam, loss and
    accuracy read after every step.  The workers begin before the clock.
    """
    from torchvision import datasets, transforms  # takes seconds, which worker processes can do without

    cuda, batch, steps = device.type == "cuda", spec.optimiser.batch_size, how.steps(spec)
    torch.set_float32_matmul_precision("high" if cuda else "highest")  # on a CPU "high" may mean bf16
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = True, False
    images, warm = synthetic(min(steps * batch, sizes(spec.data)[0]), batch), 10 if cuda else 1
    pictures = datasets.CIFAR10.__new__(datasets.CIFAR10)  # without its files
    pictures.data, pictures.targets = images.train_x.permute(0, 2, 3, 1).numpy(), images.train_y.tolist()
    augmentation = [transforms.RandomCrop(SIDE, padding=4), transforms.RandomHorizontalFlip()]
    pictures.transform, pictures.target_transform = transforms.Compose(
        [*augmentation * spec.data.augment, transforms.ToTensor(),
         transforms.Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))]), None
    order = RandomSampler(pictures, replacement=True, num_samples=(warm + steps * how.blocks) * batch)
    loader = DataLoader(pictures, batch, sampler=order, num_workers=4 if cuda else 2, pin_memory=cuda)
    model = models.build(spec.model.name, spec.data.classes, spec.model.width).to(device).train()
    for layer in model.modules():
        if isinstance(layer, Conv2d):
            layer.__class__ = nn.Conv2d
    optimiser, criterion = torch.optim.Adam(model.parameters(), lr=spec.optimiser.lr), nn.CrossEntropyLoss()
    loss_sum, right, ends = 0.0, 0, []
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
    float32 where that is faster or the only one it has), bytes/s of a large copy, reading and writing counted; the best
    of `repeats`."""
    def fastest(act: Callable[[], object]) -> float:
        return min(_timed(device, act) for _ in range(repeats))

    cuda = device.type == "cuda"
    n, size = (8192, 2**30) if cuda else (2048, 2**27)
    types = [torch.bfloat16] * (cuda or has_bf16()) + [torch.float32] * (not cuda)
    factors = [torch.randn(n, n, device=device).to(dtype) for dtype in types]
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"peak_operations_per_s": max(2 * n**3 / fastest(lambda: factor @ factor) for factor in factors),
            "peak_bytes_per_s": 2 * size / fastest(lambda: target.copy_(source))}


def row(case: Case, timing: Timing | None, plain: float, device: torch.device, peak: Mapping[str, float]) -> dict:
    """A row of the table: rates summed over replicas; everything else is one run's share of its group's time.

    Times in seconds where the name does not say ms; `gap` is the time of a step over the larger of its two floors;
    operations and bytes are counts.  Without a `timing` the replicas did not fit into memory.
    """
    spec, o = case.spec, case.spec.optimiser
    about = {"model": spec.model.name, "device": device.type, "replicas": case.replicas}
    if timing is None:
        return about | {"steps_per_s": None, "ratio_to_plain_loop": None, "note": "does not fit into memory"}
    (train_images, test_images), (tested, events, strikes) = sizes(spec.data), spec.tests()
    counted = cost.count(spec.model.name, spec.model.width, spec.data.classes)
    step = timing.step / case.replicas
    # tested side by side on a CPU, in turn on a GPU
    image = timing.test / (min(case.replicas, cores()) if device.type == "cpu" else 1)
    operations, moved = counted.operations(o.batch_size), counted.traffic(o.batch_size, spec.precision)
    compute, memory = operations / peak["peak_operations_per_s"], moved / peak["peak_bytes_per_s"]
    epoch = step * train_images / o.batch_size
    return about | {
        "batch_size": o.batch_size, "precision": spec.precision,
        "steps_per_s": 1 / step, "images_per_s": o.batch_size / step,
        "plain_steps_per_s": 1 / plain, "ratio_to_plain_loop": plain / step,
        "seconds_per_epoch": epoch, "train_s_per_run": o.epochs * epoch,
        "test_s_per_run": (tested * test_images + sum(whole(spec.data))) * image,
        "events_s_per_run": strikes * test_images * image + events * timing.event,
        "ms_per_step": 1e3 * step, "compute_floor_ms": 1e3 * compute, "memory_floor_ms": 1e3 * memory,
        "gap": step / max(compute, memory), "share_of_peak": compute / step, "peak_memory_bytes": timing.memory,
        "operations_per_step": operations, "bytes_per_step": moved,
        "operations_per_run": cost.load(spec)[0], "note": ""}


def without(technique: str, case: Case, device: torch.device, used: Sequence[str]) -> tuple[str, Case] | None:
    """The name of `technique` in a table, and `case` without it; None where it is not among those that were `used`."""
    if technique in SWITCHES:
        name = SWITCHES[technique]
        return (name, case._replace(switches={technique: False})) if name in used else None
    other = "tf32" if device.type == "cuda" else "float32"
    name, change = {"bf16": (f"bf16 (else {other})", {"precision": other}),
                    "channels-last": ("channels-last", {"channels_last": False})}[technique]
    return name, case._replace(spec=replace(case.spec, **change))


def run(device: torch.device, quick: bool = False, networks: Sequence[str] | None = None,
        replicas: Sequence[int] | None = None, techniques: Sequence[str] | None = None,
        keep: Callable[[dict], object] = lambda _: None) -> dict:
    """Measure the engine on `device`: {"machine", "rows", "techniques", "costs"}, all JSON.

    Rows are those of `row`; a number of replicas that memory does not hold has one that says so in its note.
    Techniques: steps/s with all of them and without this one, and the quotient, for each that was in use.  Costs: of a
    run of the smallest group (one alone, where that was asked for), in ms and in training steps.

    quick: a few steps, 1 and 5 replicas (on a CPU one a core), techniques on VGG11 alone.
    networks, replicas, techniques: which of `cost.FIGURES`, which numbers of runs in lockstep (on a CPU shared out to a
    process a core), which of `TECHNIQUES` to leave off; None: all, 1 to 20.
    keep: called with the result so far after every measurement.
    """
    cuda, began = device.type == "cuda", time.perf_counter()
    networks, tried = cost.FIGURES if networks is None else networks, TECHNIQUES if techniques is None else techniques
    replicas = replicas or (((1, 5) if cuda else sorted({1, cores()})) if quick else (1, 2, 5, 10, 20))
    for kind, names, known in (("model", networks, cost.FIGURES), ("technique", tried, TECHNIQUES)):
        for name in names:
            check_choice(kind, name, known)
    if min(replicas) < 1:
        raise InputError(f"replicas must be numbers from 1 on, not {min(replicas)}")
    how = {(True, True): Effort(3e9, 2, 10_000), (True, False): Effort(2e10, 3, 10_000),
           (False, True): Effort(3e8, 2, 125), (False, False): Effort(1e9, 3, 1000)}[cuda, quick]
    specs, bar = {model: cost.paper_spec(model) for model in networks}, tqdm(unit="measurement")
    timings, gains, costs, peak = [], [], [], {}

    def done(what: str, act: Callable, *arguments):
        bar.set_description(what)
        result = act(*arguments)
        bar.update()
        return result

    def kept() -> dict:
        machine = provenance(synthetic(1, 1), device, "paper", time.perf_counter() - began) | peak | {
            "cores": cores(), "without": sorted(switched_off()), "quick": quick, "blocks": how.blocks,
            "steps": {name: how.steps(spec) for name, spec in specs.items()}}
        keep(result := {"machine": machine, "rows": [row(*what, device, peak) for what in timings], "techniques": gains,
                        "costs": costs})
        return result

    peak |= done("peak rates", peaks, device)
    kept()
    for model, spec in specs.items():
        plain, fitting = done(f"{model}, plain loop", plain_loop, spec, device, how), {}
        for n in replicas:
            try:
                fitting[n] = done(f"{model}, replicas: {n}", measure_all, Case(spec, n), device, how)
            except RuntimeError as error:
                if not ran_out(error):
                    raise
            timings.append((Case(spec, n), fitting.get(n), plain))
            kept()
        if not fitting:
            continue
        (alone, first), about = min(fitting.items()), {"model": model, "device": device.type}
        step, test_images = first.step / alone, sizes(spec.data)[1]
        costs += [about | {"cost": what, "ms": 1e3 * seconds, "training_steps": seconds / step} for what, seconds in (
            ("training step", step), ("event, without its test passes", first.event),
            ("E[BN] of all pruned layers", first.ebn), (f"test pass of {test_images} images", first.test * test_images))
            if seconds is not None]
        n = max((n for n in fitting if n <= 10), default=alone) if cuda else alone
        for technique in tried if model == "vgg11" or not quick else ():
            if found := without(technique, Case(spec, n), device, fitting[n].techniques):
                name, case = found
                slower = done(f"{model} without {name}", measure_all, case, device, how).step
                gains.append(about | {"replicas": n, "technique": name, "steps_per_s": n / fitting[n].step,
                                      "steps_per_s_without": n / slower, "gain": slower / fitting[n].step})
                kept()
    # again: whatever else the machine did can only have slowed one of the two
    peak |= {name: max(rate, peak[name]) for name, rate in done("peak rates", peaks, device).items()}
    bar.close()
    return kept()


def report(result: dict) -> str:
    """The result of `run` as text: machine, rows, techniques, costs."""
    machine = result["machine"]
    about = (f"{machine['device']}, {machine['cores']} cores, torch {machine['versions']['torch']}, "
             f"{machine['finished']}; {machine['peak_operations_per_s'] / 1e12:.3g} TFLOP/s, "
             f"{machine['peak_bytes_per_s'] / 1e9:.3g} GB/s measured")
    constant = ["device", "batch_size", "precision", "operations_per_step", "bytes_per_step", "operations_per_run"]
    frames = [pd.DataFrame(result[name]).drop(columns=constant, errors="ignore")
              for name in ("rows", "techniques", "costs") if result[name]]
    return "\n\n".join([about, *(frame.to_string(index=False, float_format="{:.3g}".format, na_rep="")
                                 for frame in frames)])
