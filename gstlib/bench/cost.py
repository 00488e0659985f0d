"""What the figures cost at each profile: runs, epochs, operations, hours on a GPU and on a CPU of two cores.

Runs and operations are counted from the experiments' own specifications.  Hours come from what a results folder holds
(stored runs, and `bench*.json` as `python -m gstlib bench` writes it), and say so; without it they are a target or the
floor, and say that.  Imports torch only to count operations.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import pandas as pd
from tabulate import tabulate

from gstlib import data, experiments
from gstlib.spec import DataSpec, RunSpec
from gstlib.store import Store

FIGURES = {"conv4": "figure2", "vgg11": "figure1-vgg11", "resnet18": "figure1-resnet18"}  # whose runs are benchmarked
GPUS = ("H100", "H200")  # count as one: alike in arithmetic, the latter's memory 1.4 times as fast
PEAK_OPERATIONS, PEAK_BYTES = 800e12, 3e12  # per second, what an H100 reaches in bf16, and to and from its memory
TARGETS = {"vgg11": 60.0, "resnet18": 240.0}  # seconds of a run at profile paper, as a share of a lockstep group's time
CORES = 2  # runs side by side on the CPU that the estimates speak of
ALL = "all, each run once"
_ALIKE = {"vgg19": "vgg11"}  # whose operations take as long, where a network was not measured itself


def paper_spec(model: str) -> RunSpec:
    """The first pruned run, at profile `paper`, of the figure that stands for `model`."""
    known = DataSpec("cifar10", "random images")
    runs = experiments.experiment(FIGURES[model]).runs(experiments.profile("paper"), known, [0])
    return next(run.spec for run in runs if run.spec.pruning is not None)


class Count(NamedTuple):
    """Of one image's forward pass: multiply-accumulates, outputs of convolutions and linear layers; parameters."""

    products: int
    activations: int
    parameters: int

    def operations(self, images: int, training: bool = True) -> int:
        """Floating-point operations on so many images: two a product, and training takes three forward passes."""
        return (6 if training else 2) * self.products * images

    def traffic(self, images: float, precision: str, training: bool = True) -> float:
        """Least bytes that a training step, or a test of so many images, moves to and from memory, all being fused
        that can be: uint8 images read; what convolutions and linear layers write, and in training its gradient, written
        and read once in the training precision.  A step also reads the weights forward and backward in that precision,
        and in float32 writes and reads gradients, and reads and writes parameters and Adam's two moments.
        """
        size = 2 if precision == "bf16" else 4
        moved = images * ((4 if training else 2) * size * self.activations + 3 * data.SIDE**2)
        return moved + training * self.parameters * (2 * size + 8 * 4)


@functools.cache
def count(model: str, width: float = 1.0, classes: int = 10) -> Count:
    """What the convolutions and linear layers of `model` compute; all other layers are negligible."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from gstlib import models

    with torch.device("meta"):
        network, image = models.build(model, classes, width).eval(), torch.empty(1, 3, data.SIDE, data.SIDE)
    written = dict.fromkeys((torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm),
                            lambda *_, out_shape, **__: math.prod(out_shape))
    with FlopCounterMode(display=False) as products:
        network(image)
    with FlopCounterMode(display=False, custom_mapping=written) as activations:
        network(image)
    return Count(products.get_total_flops() // 2, activations.get_total_flops(),
                 sum(p.numel() for p in network.parameters()))


@functools.cache
def load(spec: RunSpec) -> tuple[int, float]:
    """A run's floating-point operations, and the least seconds that an H100 needs for them.

    Counted are training, whole test passes (each tested epoch, each strike), and at the end every image of the set.
    The least is the larger of operations over peak and memory traffic over bandwidth, training and testing apart.
    """
    (train, test), (tested, _, strikes), o = data.sizes(spec.data), spec.tests(), spec.optimiser
    counted = count(spec.model.name, spec.model.width, spec.data.classes)
    steps, measured = math.ceil(train / o.batch_size), (tested + strikes) * test + sum(data.whole(spec.data))
    training, testing = counted.operations(o.epochs * train), counted.operations(measured, training=False)
    moved = o.epochs * steps * counted.traffic(train / steps, spec.precision)
    return training + testing, (max(training / PEAK_OPERATIONS, moved / PEAK_BYTES) + max(
        testing / PEAK_OPERATIONS, counted.traffic(measured, spec.precision, training=False) / PEAK_BYTES))


def durations(store: Store) -> Callable[[RunSpec, str], tuple[float, str]]:
    """A function (specification, "cuda" or "cpu") -> seconds of a run, and what they rest on.

    The seconds are its share of the time of one of `GPUS`, or of `CORES` cores: the mean of the stored runs of the same
    shape, else the fastest row of its network in a benchmark; on a GPU else the target, else the floor.  They are nan
    where nothing is known, as for narrow networks on a GPU.  A benchmark and a target are scaled by operations; for a
    narrower network that is a lower bound, since small operations take longer than their number says, and so it is for
    float32, since both are those of bf16.
    """
    stored, paces = defaultdict(list), defaultdict(list)
    for _, spec, about in store.about():
        device = about.get("device_type")
        if isinstance(about.get("seconds"), float) and (device == "cpu" or any(name in about["device"] for name in GPUS)):
            # "all" images of a folder may be any number, which a run's provenance states
            sizes = about.get("images", (spec.data.train_size, spec.data.test_size))
            stored[device, _shape(spec, sizes)].append(about["seconds"] / (CORES if device == "cpu" else 1))
    for row in (row for result in store.benchmarks("rows") for row in result["rows"] if row.get("steps_per_s")):
        seconds = row["train_s_per_run"] + row["test_s_per_run"] + row["events_s_per_run"]
        paces[row["device"], row["model"]].append(seconds / row["operations_per_run"])

    def duration(spec: RunSpec, device: str) -> tuple[float, str]:
        if device == "cuda" and spec.model.width != 1:
            return math.nan, ""
        if seconds := stored.get((device, _shape(spec, data.sizes(spec.data)))):
            return sum(seconds) / len(seconds), "measured"
        bound = None if spec.model.width == 1 and spec.precision == "bf16" else "at least"
        for name in (spec.model.name, _ALIKE.get(spec.model.name)):
            if (device, name) in paces:
                return load(spec)[0] * min(paces[device, name]), bound or "benchmark"
            if device == "cuda" and name in TARGETS:
                printed, _ = load(replace(paper_spec(name), pruning=None))
                return load(spec)[0] * TARGETS[name] / printed, bound or "target"
        return (load(spec)[1], "floor") if device == "cuda" else (math.nan, "")

    return duration


def _shape(spec: RunSpec, sizes) -> tuple:
    """What a run's time depends on, near enough; `sizes`: its training and test images."""
    return spec.model, tuple(sizes), spec.optimiser.epochs, spec.optimiser.batch_size, spec.precision, spec.data.augment


def by_figure(store: Store, profile: str) -> pd.DataFrame:
    """A row a figure at `profile` with its number of seeds, and one for all figures together.

    Columns: figure, runs (each specification once), shared (runs that a figure above has already), epochs, operations,
    floor (hours at an H100's peak), gpu and cpu (hours; nan: unknown), gpu_basis and cpu_basis.
    """
    size, duration = experiments.profile(profile), durations(store)
    # what a run costs does not depend on the images, so the fingerprint may be anything
    known = experiments.data_spec(size, size.data, "0" * 64)
    seeds = range(size.first_seed, size.first_seed + size.seeds)
    wanted, seen, rows = [], {}, []
    for figure in experiments.EXPERIMENTS.values():
        runs = {run.spec.id: replace(run.spec, seed=0) for run in figure.runs(size, known, seeds)}
        wanted.append((figure.name, len(runs.keys() & seen.keys()), runs.values()))
        seen |= runs
    for name, shared, specs in (*wanted, (ALL, 0, seen.values())):
        operations, floors = zip(*map(load, specs))
        rows.append({"figure": name, "runs": len(specs), "shared": shared,
                     "epochs": sum(spec.optimiser.epochs for spec in specs),
                     "operations": float(sum(operations)), "floor": sum(floors) / 3600})
        for column, device in (("gpu", "cuda"), ("cpu", "cpu")):
            rows[-1][column], rows[-1][f"{column}_basis"] = hours(specs, device, duration)
    return pd.DataFrame(rows)


def hours(specs: Iterable[RunSpec], device: str, duration: Callable[[RunSpec, str], tuple[float, str]]) -> tuple[float, str]:
    """Hours of these runs on "cuda" or "cpu" and what they rest on, by `durations`; nan and "" where one is unknown."""
    seconds, basis = zip(*(duration(spec, device) for spec in specs))
    return sum(seconds) / 3600, ", ".join(sorted(set(basis))) if all(basis) else ""


def markdown(costs: pd.DataFrame) -> str:
    """`by_figure` as a Markdown table; hours say in italics what they rest on."""
    rows = [[f"**{ALL}**" if row["figure"] == ALL else row["figure"], row["runs"], row["shared"], f"{row['epochs']:,}",
             _short(row["operations"] / 1e15), readable(row["floor"]),
             *(f"{readable(row[name])} *{row[f'{name}_basis']}*".removesuffix(" **") for name in ("gpu", "cpu"))]
            for row in costs.to_dict("records")]
    return tabulate(rows, ["figure", "runs", "shared", "epochs", "PFLOP", "floor", "GPU", "CPU"], "pipe",
                    disable_numparse=True, colalign=("left", *["right"] * 7))


def readable(hours: float) -> str:
    """Hours in the unit in which they are easiest to read."""
    per, unit = next((pair for pair in ((1, "h"), (60, "min"), (3600, "s")) if hours * pair[0] >= 1), (3.6e6, "ms"))
    return "–" if math.isnan(hours) else f"{_short(hours * per)}\u00a0{unit}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"
