"""What the paper's figures cost at each profile: runs, epochs, operations, hours on an H100 and on a CPU of two cores.

Runs and operations are counted from the experiments' own specifications.
Hours come from measurements that a results folder holds (stored runs, and
`bench*.json` as `python -m gstlib bench` writes it), and say so; without one
they are a target or the floor, and say that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd

from gstlib import experiments
from gstlib.bench import measure as bench
from gstlib.book import tables
from gstlib.data import SIDE
from gstlib.experiments import PROFILES, Profile
from gstlib.spec import RunSpec
from gstlib.store import Store

PEAK_OPERATIONS, PEAK_BYTES = 800e12, 3e12  # per second, what an H100 reaches in bf16, and to and from its memory
TARGETS = {"vgg11": 60.0, "resnet18": 240.0}  # seconds of a run at profile paper, as a share of a lockstep group's time
CORES = 2  # runs side by side on the CPU that the estimates speak of
FLOOR, TARGET, MEASURED, BENCHMARK, AT_LEAST = "floor", "target", "measured", "benchmark", "at least"
_ALIKE = {"vgg19": "vgg11"}  # whose operations take as long, where a network was not measured itself
_DIGITS = (1442, 355)  # scikit-learn's, training and test
ALL = "all, each run once"
PUBLISHED = "the paper's own runs"


class Work(NamedTuple):
    """A run's floating-point operations, and the least seconds that an H100 needs for it."""

    operations: int
    floor: float


def work(spec: RunSpec) -> Work:
    """Count a run: training, a test pass after each tested epoch, and one more at each event.

    The floor is the larger of operations over peak and memory traffic over
    bandwidth, training and testing apart, all that can be fused being fused
    (`bench.Count.traffic`).
    """
    train, test = sizes(spec)
    counted, o = bench.count(spec.model.name, spec.model.width, spec.data.classes), spec.optimiser
    epochs, steps = range(o.epochs), math.ceil(train / o.batch_size)
    passes = sum(map(spec.tested_after, epochs))
    passes += sum(map(spec.pruning.schedule.is_event, epochs)) if spec.pruning else 0
    training, testing = o.epochs * counted.operations(train), passes * counted.operations(test, training=False)
    written = 2 * (2 if spec.precision == "bf16" else 4) * counted.activations
    moved = o.epochs * steps * counted.traffic(train / steps, spec.precision)
    moved_testing = passes * test * (written + 3 * SIDE * SIDE)
    return Work(training + testing, max(training / PEAK_OPERATIONS, moved / PEAK_BYTES)
                + max(testing / PEAK_OPERATIONS, moved_testing / PEAK_BYTES))


def sizes(spec: RunSpec) -> tuple[int, int]:
    """Training and test images of a run; where the specification says "all", those of the whole set."""
    whole = _DIGITS if spec.data.name == "digits" else (bench.TRAIN, bench.TEST)
    return spec.data.train_size or whole[0], spec.data.test_size or whole[1]


class Estimate(NamedTuple):
    """Seconds of a run (its share of the time, where runs go together), and what the number rests on."""

    seconds: float
    basis: str


class Pace:
    """How long runs take, from what the results folder of `store` holds.

    `gpu`: the fastest measured row of a CUDA benchmark, else the target, else
    the floor.  `cpu`: stored runs of the same shape that a CPU trained, else a
    benchmark on a CPU.  A benchmark and a target are scaled by operations; for
    a network narrower than the one measured that is a lower bound, since small
    operations take longer than their number says, and so it is for float32,
    since both are those of bf16.
    """

    def __init__(self, store: Store):
        rows = [row for result in tables.benchmarks(store) for row in result["rows"] if row.get("steps_per_s")]
        self._per_operation = {}
        for device in ("cuda", "cpu"):
            for row in (row for row in rows if row["device"] == device):
                seconds = row["train_s_per_run"] + row["test_s_per_run"] + row["events_s_per_run"]
                key, pace = (device, row["model"]), seconds / row["operations_per_run"]
                self._per_operation[key] = min(pace, self._per_operation.get(key, math.inf))
        runs = pd.DataFrame([{"shape": _shape(spec), "seconds": about["seconds"]} for _, spec, about in store.about()
                             if about.get("device_type") == "cpu" and isinstance(about.get("seconds"), float)],
                            columns=["shape", "seconds"])
        self.stored = runs.groupby("shape", sort=False)["seconds"].mean().to_dict()

    def gpu(self, spec: RunSpec, of: Work) -> Estimate:
        """A run's share of an H100's time."""
        model, basis = spec.model.name, AT_LEAST if spec.precision != "bf16" else None
        for name in (model, _ALIKE.get(model)):
            if ("cuda", name) in self._per_operation:
                return Estimate(of.operations * self._per_operation["cuda", name], basis or BENCHMARK)
            if name in TARGETS:
                reference = bench.operations_per_run(bench.model_spec(name))
                return Estimate(TARGETS[name] * of.operations / reference, basis or TARGET)
        return Estimate(of.floor, FLOOR)

    def cpu(self, spec: RunSpec, of: Work) -> Estimate | None:
        """A run's share of the time of `CORES` cores; None where nothing was measured."""
        if (stored := self.stored.get(_shape(spec))) is not None:
            return Estimate(stored / CORES, MEASURED)
        return self.by_benchmark(spec, of)

    def by_benchmark(self, spec: RunSpec, of: Work) -> Estimate | None:
        """The same from a benchmark alone, whether or not such runs are stored."""
        for name in (spec.model.name, _ALIKE.get(spec.model.name)):
            if ("cpu", name) in self._per_operation:
                basis = BENCHMARK if spec.model.width == 1 and spec.precision == "bf16" else AT_LEAST
                return Estimate(of.operations * self._per_operation["cpu", name], basis)
        return None


def _shape(spec: RunSpec) -> tuple:
    """What a run's time depends on, near enough."""
    return spec.model, sizes(spec), spec.optimiser.epochs, spec.optimiser.batch_size, spec.precision, spec.data.augment


def table(store: Store, profile: str) -> pd.DataFrame:
    """A row a figure at `profile` with its number of seeds, one for all figures together, and one for those of the paper
    with the paper's number of seeds where the profile has no fewer.

    Columns: figure, configurations, seeds, runs (each specification once),
    shared (runs that a figure above has already), epochs, operations, floor
    (hours at an H100's peak), gpu and cpu (hours), gpu_basis and cpu_basis.
    Hours on a GPU are stated for full-width networks alone; nan means unknown.
    """
    size, pace = PROFILES[profile], Pace(store)
    rows, seen, own = [], {}, {}
    for figure in experiments.EXPERIMENTS.values():
        runs = _runs(size, figure)
        own |= {run.spec.id: run.spec for run in runs if run.spec.seed < (figure.published_runs or 0)}
        row = {"figure": figure.name, "configurations": len(runs) // size.seeds, "seeds": size.seeds}
        once = {run.spec.id: run.spec for run in runs}
        rows.append(row | {"shared": len(once.keys() & seen.keys())} | _sums(once.values(), pace, size.width == 1))
        seen |= once
    for name, specs in ((ALL, seen), (PUBLISHED, own)):
        rows.append({"figure": name, "seeds": size.seeds, "shared": 0} | _sums(specs.values(), pace, size.width == 1))
    return pd.DataFrame(rows)


def _runs(size: Profile, figure: experiments.Experiment) -> list[experiments.Labelled]:
    # what a run costs does not depend on the images, so the fingerprint may be anything
    return figure.runs(size, experiments.data_spec(size, size.data, "0" * 64), range(size.seeds))


def _sums(specs: Iterable[RunSpec], pace: Pace, full_width: bool) -> dict:
    counted = [(spec, work(spec)) for spec in specs]
    gpu = [pace.gpu(*pair) if full_width else None for pair in counted]
    cpu = [pace.cpu(*pair) for pair in counted]
    return {"runs": len(counted), "epochs": sum(spec.optimiser.epochs for spec, _ in counted),
            "operations": float(sum(of.operations for _, of in counted)), "floor": sum(of.floor for _, of in counted) / 3600,
            **_hours("gpu", gpu), **_hours("cpu", cpu)}


def _hours(name: str, estimates: list[Estimate | None]) -> dict:
    if None in estimates:
        return {name: math.nan, f"{name}_basis": ""}
    return {name: sum(e.seconds for e in estimates) / 3600,
            f"{name}_basis": ", ".join(sorted({e.basis for e in estimates}))}


def markdown(costs: pd.DataFrame) -> str:
    """`table` as a Markdown table; hours say in italics what they rest on."""
    lines = ["| figure | runs | shared | epochs | PFLOP | floor | H100 | CPU |",
             "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for row in costs.to_dict("records"):
        mark = "**" if row["figure"] in (ALL, PUBLISHED) else ""
        cells = [row["figure"], row["runs"], row["shared"], f"{row['epochs']:,}", _short(row["operations"] / 1e15),
                 duration(row["floor"])]
        for device in ("gpu", "cpu"):
            basis = row[f"{device}_basis"]
            cells.append(duration(row[device]) + (f" *{basis}*" if basis else ""))
        lines.append("| " + " | ".join([f"{mark}{cells[0]}{mark}", *map(str, cells[1:])]) + " |")
    return "\n".join(lines)


def duration(hours: float) -> str:
    """Hours in the unit in which they are easiest to read."""
    if math.isnan(hours):
        return "–"
    value, unit = next((hours * per, unit) for per, unit in ((1, "h"), (60, "min"), (3600, "s"), (3.6e6, "ms"))
                       if hours * per >= 1 or unit == "ms")
    return f"{_short(value)}\u00a0{unit}"


def _short(value: float) -> str:
    """Two digits of what is below ten, none behind the point above."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def stored_over_benchmark(store: Store) -> pd.Series:
    """How far the benchmark, scaled by operations, is off on a CPU: a stored run's seconds over it, by its network.

    The mean over the stored runs that a CPU trained; empty where either is missing.
    """
    pace, found = Pace(store), {}
    for _, spec, _ in store.about():
        guess = pace.by_benchmark(spec, work(spec))
        if _shape(spec) in pace.stored and guess is not None:
            found.setdefault(f"{spec.model.name}, width {spec.model.width:g}", []).append(
                pace.stored[_shape(spec)] / CORES / guess.seconds)
    return pd.Series({name: sum(ratios) / len(ratios) for name, ratios in found.items()}, dtype=float)
