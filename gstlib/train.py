"""One run, from its specification to its rows."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import nn

from gstlib import models
from gstlib.data import Images, Loader
from gstlib.engine import Engine, Measured
from gstlib.pruner import Pruner
from gstlib.spec import InputError, RunSpec


class Result(NamedTuple):
    """What a run leaves: rows by table ("epoch", "event", "histogram") and its provenance."""

    tables: dict[str, list[dict]]
    provenance: dict


class Progress(NamedTuple):
    """State of a run after an epoch, for whoever shows it."""

    run_id: str
    epoch: int
    epochs: int
    test_accuracy: float


def check(spec: RunSpec) -> None:
    """Raise `InputError` when `spec` cannot be trained, before any data is touched: a layer that is
    not there, E[BN] without batch normalisation."""
    with torch.device("meta"):
        model = models.build(spec.model.name, spec.data.classes, spec.model.width)
    if spec.pruning is not None:
        _pruner(spec, model)


def _pruner(spec: RunSpec, model: nn.Module) -> Pruner:
    p = spec.pruning
    return Pruner(model, p.schedule, p.layers, score=p.score, target=p.target, effect=p.effect,
                  structure=p.structure, seed=_seed(spec, "pruning"), batches=p.batches)


def _seed(spec: RunSpec, purpose: str) -> int:
    """A seed for one purpose, so that a run's draws for one never shift those for another."""
    purposes = ("model", "order", "pruning")
    return int(np.random.SeedSequence([spec.seed, purposes.index(purpose)]).generate_state(1)[0])


def train(
    spec: RunSpec,
    images: Images,
    device: str | torch.device = "cpu",
    progress: Callable[[Progress], None] = lambda _: None,
    profile: str = "",
) -> Result:
    """Train `spec` on `images` and return its rows.

    Epoch rows: epoch (from 0), lr, train_loss, train_accuracy (running means
    over the epoch's batches as trained on), test_loss, test_accuracy (the
    network as it stands then, noise in force included; before the epoch's
    event), test_accuracy_clean (noise switched off), parameters (left),
    seconds.  Epochs that `spec.tested_after` leaves out have no test columns.
    Event rows: see `Pruner.epoch`.  Histogram rows: see `bn_histogram`.

    Raises `InputError` when the data are not those of the specification or
    the loss is no longer finite.
    """
    device = torch.device(device)
    if device.type == "cpu":
        with _one_thread():
            return _train(spec, images, device, progress, profile)
    return _train(spec, images, device, progress, profile)


@contextmanager
def _one_thread():
    """One thread, so that a CPU's rows do not depend on its number of cores (sums are split among threads),
    and no denormal numbers, which the moments of masked weights decay into and which cost hundreds of cycles each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def _train(spec: RunSpec, images: Images, device: torch.device, progress, profile: str) -> Result:
    started = time.perf_counter()
    images = images.subset(spec.data)
    torch.manual_seed(_seed(spec, "model"))
    model = models.build(spec.model.name, spec.data.classes, spec.model.width)
    model = model.to(device, memory_format=torch.channels_last if spec.channels_last else torch.contiguous_format)
    loader = Loader(images, spec.optimiser.batch_size, spec.data.augment, _seed(spec, "order"),
                    device, spec.channels_last)
    parameters = sum(p.numel() for p in model.parameters())
    pruner = _pruner(spec, model) if spec.pruning is not None else None
    engine = Engine(model, spec.optimiser, loader, spec.precision)
    tables: dict[str, list[dict]] = {"epoch": [], "event": [], "histogram": []}
    if "bn-histogram" in spec.measures:
        tables["histogram"] += bn_histogram(model, loader, epoch=-1)
    last_tested = float("nan")
    for epoch in range(spec.optimiser.epochs):
        began = time.perf_counter()
        trained = engine.train_epoch(epoch, pruner.batch if pruner else lambda: None)
        if not np.isfinite(trained.loss):
            raise InputError(f"run {spec.id}: the training loss is no longer finite after epoch {epoch}; "
                             "lower the learning rate or use precision float32")
        row = {"epoch": epoch, "lr": engine.learning_rate(epoch),
               "train_loss": trained.loss, "train_accuracy": trained.accuracy}
        tested: list[Measured] = []

        def evaluate() -> float:
            tested.append(engine.test())
            return tested[-1].accuracy

        clean = None
        if pruner is not None:
            if spec.tested_after(epoch) and pruner.noise_in_force:
                with pruner.silenced():
                    clean = engine.test().accuracy
            tables["event"] += pruner.epoch(epoch, evaluate)
        if not tested and spec.tested_after(epoch):
            evaluate()
        if tested:
            last_tested = tested[0].accuracy
            row |= {"test_loss": tested[0].loss, "test_accuracy": last_tested,
                    "test_accuracy_clean": last_tested if clean is None else clean}
        row["parameters"] = parameters - (pruner.parameters_removed() if pruner else 0)
        row["seconds"] = time.perf_counter() - began
        tables["epoch"].append(row)
        progress(Progress(spec.id, epoch, spec.optimiser.epochs, last_tested))
    if "bn-histogram" in spec.measures:
        tables["histogram"] += bn_histogram(model, loader, epoch=spec.optimiser.epochs - 1)
    return Result(tables, provenance(images, device, profile, time.perf_counter() - started))


@torch.no_grad()
def bn_histogram(model: nn.Module, loader: Loader, epoch: int, images: int = 512) -> list[dict]:
    """How normal are normalised activations? (section A.1, Figure A1, claim C18)

    For each batch normalisation, in forward order, its input over the first
    `images` training images is centred and scaled by that batch's own mean
    and standard deviation per channel, as in training.  Rows: epoch (-1:
    before training), layer, layer_index, ks (Kolmogorov-Smirnov distance of
    all these values to the standard normal), left, right, count; 80 bins
    from -5 to 5, values outside counted in the outermost ones.
    """
    rows: list[dict] = []
    edges = np.linspace(-5, 5, 81)

    def record(name: str):
        def hook(module, inputs):
            x = inputs[0].float()
            axes = [0, *range(2, x.dim())]
            x = (x - x.mean(axes, keepdim=True)) / (x.var(axes, unbiased=False, keepdim=True) + module.eps).sqrt()
            values = np.sort(x.flatten().cpu().numpy().astype(np.float64))
            n = len(values)
            cdf = stats.norm.cdf(values)
            ks = float(max((np.arange(1, n + 1) / n - cdf).max(), (cdf - np.arange(n) / n).max()))
            counts, _ = np.histogram(np.clip(values, -5, 5), edges)
            index = len({row["layer"] for row in rows})
            rows.extend({"epoch": epoch, "layer": name, "layer_index": index, "ks": ks, "left": left, "right": right,
                         "count": int(count)} for left, right, count in zip(edges[:-1], edges[1:], counts))
        return hook

    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [module.register_forward_pre_hook(record(name)) for name, module in norms]
    try:
        model.eval()
        model(loader.normalise(loader.x[:images]))
    finally:
        for hook in hooks:
            hook.remove()
    return rows


def provenance(images: Images, device: torch.device, profile: str, seconds: float) -> dict:
    """Where and with what a result was made: data, device, versions, commit, date; no path and no host name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "data": images.name, "data_title": images.title, "fingerprint": images.fingerprint,
        "profile": profile, "device": name, "device_type": device.type, "threads": torch.get_num_threads(),
        "seconds": round(seconds, 3), "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(), "python": platform.python_version(),
        "versions": {package: _version(package) for package in ("gstlib", "torch", "torchvision", "numpy")},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "source tree"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def commit() -> str:
    """The commit that gstlib's source is at, with "+changes" where gstlib/ differs from it; "unknown" outside git.

    The environment variable GSTLIB_COMMIT stands in where the source travels without its history.
    """
    if stated := os.environ.get("GSTLIB_COMMIT"):
        return stated
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
