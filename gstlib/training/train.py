"""One run, from its specification to its rows."""

import ctypes
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from gstlib import models
from gstlib.data import Images, Loader, mislabelled
from gstlib.errors import InputError
from gstlib.pruner import Pruner
from gstlib.spec import RunSpec
from gstlib.training.checkpoint import Checkpoints
from gstlib.training.engine import Engine, Measured, Replica
from gstlib.training.measures import bn_histogram, check_flatness, measure_flatness
from gstlib.training.provenance import provenance


class Result(NamedTuple):
    """What a run leaves: rows by table (see `train_group`) and its provenance."""

    tables: dict[str, list[dict]]
    provenance: dict


class Progress(NamedTuple):
    """State of a run after an epoch, for whoever shows it."""

    run_id: str
    epoch: int
    epochs: int
    test_accuracy: float


class Stopped(Exception):
    """Training ended because it was asked to, after a whole step; where there are checkpoints, it goes on from there."""


def kind(spec: RunSpec) -> tuple:
    """What `check` looks at: runs that agree in it are fine together."""
    p = spec.pruning
    return spec.model, spec.data.classes, p and (p.layers, p.score, p.structure, p.effect)


def check(spec: RunSpec) -> None:
    """Raise `InputError` when `spec` cannot be trained, before any data is touched: a layer that is
    not there, E[BN] without batch normalisation."""
    with torch.device("meta"):
        model = models.build(spec.model.name, spec.data.classes, spec.model.width)
    if spec.pruning is not None:
        _pruner(spec, model)


def check_images(spec: RunSpec, images: Images) -> None:
    """Raise `InputError` when `images` are not those of `spec`, or too few for it."""
    chosen = images.subset(spec.data)
    if "flatness" in spec.measures:
        check_flatness(chosen, spec.flatness)


def _pruner(spec: RunSpec, model: nn.Module) -> Pruner:
    p = spec.pruning
    return Pruner(model, p.schedule, p.layers, score=p.score, target=p.target, effect=p.effect,
                  structure=p.structure, seed=_seed(spec, "pruning"), batches=p.batches)


def _seed(spec: RunSpec, purpose: str) -> int:
    """A seed for one purpose, so that a run's draws for one never shift those for another."""
    purposes = ("model", "order", "pruning", "labels")
    return int(np.random.SeedSequence([spec.seed, purposes.index(purpose)]).generate_state(1)[0])


def train(spec: RunSpec, images: Images, device: str | torch.device = "cpu",
          progress: Callable[[Progress], None] = lambda _: None, profile: str = "") -> Result:
    """Train `spec` on `images` and return its rows: `train_group` for a single run."""
    return train_group([spec], images, device, progress, profile)[0]


def shape(spec: RunSpec) -> tuple:
    """What runs must have in common to be trained in lockstep; seeds, schedules, scores and effects may differ."""
    o = spec.optimiser
    return spec.data, spec.model, spec.precision, spec.channels_last, o.name, o.batch_size, o.epochs


def train_group(specs: Sequence[RunSpec], images: Images, device: str | torch.device = "cpu",
                progress: Callable[[Progress], None] = lambda _: None, profile: str = "",
                checkpoints: Checkpoints | None = None, stop: Callable[[], bool] = lambda: False) -> list[Result]:
    """Train runs of one shape in lockstep and return their rows, which are those of each run alone.

    Epoch rows: epoch (from 0), lr, train_loss, train_accuracy (running means
    over the epoch's batches as trained on, labels smoothed or wrong included), test_loss, test_accuracy (the
    network as it stands then, noise in force included; before the epoch's
    event), test_accuracy_clean (noise switched off), parameters (left),
    seconds (of the group's epoch, divided by its runs).  Epochs that
    `spec.tested_after` leaves out have no test columns.  Event rows: see
    `Pruner.epoch`.  Histogram rows: see `measures.bn_histogram`; tables
    "flatness", "eigenvalue", "direction": see `measures.measure_flatness`.  One final row:
    images, accuracy and loss over every image of the set that was not trained
    on; train_accuracy and train_loss over the training images, in evaluation
    mode as well.  Where some labels are wrong it has train_true and
    train_wrong, the training accuracy on either kind, and an event's row both
    before and after (train_true_pre and so on).

    With `checkpoints` the runs go on from theirs, keep new ones as often as
    those say, and end with the rows of a run never interrupted (on a CPU bit
    for bit, seconds aside); whoever stores the rows removes the checkpoints.
    `stop` is asked after every step: when it says so, a last checkpoint is
    kept and `Stopped` raised.

    Raises `InputError` when the runs differ in shape or stand at different
    epochs, the data are not those of the specification or a loss is no longer
    finite.
    """
    for spec in specs[1:]:
        if shape(spec) != shape(specs[0]):
            raise InputError(f"runs {specs[0].id} and {spec.id} differ in data, model, precision, optimiser, batch size "
                             "or number of epochs and cannot be trained in lockstep")
    device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as tensors there name it
    with tuned(device):
        return _Group(specs, images, device, progress, profile, checkpoints, stop).train()


@contextmanager
def tuned(device: torch.device) -> Iterator[None]:
    """Settings of this process for training on a CPU: one thread, so that rows do not depend on the number of cores (sums
    are split among threads); no denormal numbers, which the moments of masked weights decay into and which cost hundreds
    of cycles each; memory kept from batch to batch, since activations that are given back to the system return page by
    page, a quarter of the time of a test pass (VGG11)."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        _of_memory("mallopt", -4, 0)  # M_MMAP_MAX: nothing in a mapping of its own
        _of_memory("mallopt", -1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing given back
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
        _of_memory("malloc_trim", 0)


def _of_memory(call: str, *arguments: int) -> None:
    """Call GNU's C library, where it is the one in use."""
    with suppress(AttributeError):
        getattr(ctypes.CDLL(None), call)(*arguments)


class Run:
    """One run of a group: its network, its pruner, its rows."""

    def __init__(self, spec: RunSpec, images: Images, device: torch.device):
        self.spec = spec
        torch.manual_seed(_seed(spec, "model"))
        model = models.build(spec.model.name, spec.data.classes, spec.model.width)
        self.model = model.to(
            device, memory_format=torch.channels_last if spec.channels_last else torch.contiguous_format)
        loader = Loader(images, spec.optimiser.batch_size, spec.data.augment, _seed(spec, "order"),
                        device, spec.channels_last)
        self.wrong: torch.Tensor | None = None  # which training labels are wrong, where some are
        if share := spec.data.wrong_labels:
            loader.y, self.wrong = mislabelled(loader.y, share, spec.data.classes, _seed(spec, "labels"))
        self.parameters = sum(p.numel() for p in model.parameters())
        self.pruner = _pruner(spec, model) if spec.pruning is not None else None
        self.replica = Replica(model, spec.optimiser, loader, spec.precision)
        self.tables: dict[str, list[dict]] = {"epoch": [], "event": [], "histogram": [], "final": []}
        if "flatness" in spec.measures:
            check_flatness(loader, spec.flatness)
        self.last_tested = float("nan")

    def state_dict(self) -> dict:
        """Everything that the rest of the run depends on. torch's global generator is not in it: it only initialises."""
        return {"replica": self.replica.state_dict(), "tables": json.dumps(self.tables), "last_tested": self.last_tested,
                "pruner": None if self.pruner is None else self.pruner.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave."""
        self.replica.load_state_dict(state["replica"])
        self.tables, self.last_tested = json.loads(state["tables"]), state["last_tested"]
        if self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])

    def measure(self, epoch: int) -> None:
        """Take the measures that are taken before the first epoch (-1) and after the last."""
        if "bn-histogram" in self.spec.measures:
            self.tables["histogram"] += bn_histogram(self.model, self.replica.loader, epoch)

    def begin(self, test: Callable[..., Measured]) -> None:
        """What comes before the first step: measures, and what is removed from the untrained network."""
        self.measure(-1)
        if self.pruner is not None:
            self.strike(-1, lambda: test().accuracy)

    def measure_end(self, unseen: tuple[torch.Tensor, torch.Tensor]) -> None:
        """How good the trained network is: on the images that it never saw, and on those that it was trained on."""
        loader = self.replica.loader
        test, train = self.replica.measure(*unseen), self.replica.measure(loader.x, loader.y)
        self.tables["final"].append({"images": len(unseen[1]), "accuracy": test.accuracy, "loss": test.loss,
                                     "train_accuracy": train.accuracy, "train_loss": train.loss} | self.fitted())

    def fitted(self) -> dict[str, float]:
        """Accuracy on the training images with true labels and on those with wrong ones, against the labels as trained on;
        nothing where all labels are true."""
        if self.wrong is None:
            return {}
        x, y = self.replica.loader.x, self.replica.loader.y
        return {f"train_{kind}": self.replica.measure(x[chosen], y[chosen]).accuracy
                for kind, chosen in (("true", ~self.wrong), ("wrong", self.wrong))}

    def strike(self, epoch: int, evaluate: Callable[[], float]) -> None:
        """Let the events at the end of `epoch` happen; where some labels are wrong their rows say what it did to either."""
        fitted: list[dict[str, float]] = []

        def look() -> float:
            accuracy = evaluate()
            fitted.append(self.fitted())
            return accuracy

        for event in self.pruner.epoch(epoch, look):
            before = {f"{name}_pre": value for name, value in fitted[0].items()}
            if event["removed"]:  # else there was no second look
                fitted.pop(0)
            self.tables["event"].append(event | before | {f"{name}_post": value for name, value in fitted[0].items()})

    def end_epoch(self, epoch: int, trained: Measured, test: Callable[..., Measured]) -> None:
        """Test where the specification says so, let events happen, write the rows."""
        if not np.isfinite(trained.loss):
            raise InputError(f"run {self.spec.id}: the training loss is no longer finite after epoch {epoch}; "
                             "lower the learning rate or use precision float32")
        row = {"epoch": epoch, "lr": self.replica.learning_rate(epoch),
               "train_loss": trained.loss, "train_accuracy": trained.accuracy}
        if "flatness" in self.spec.measures and epoch == self.spec.flatness_epoch:
            self.tables |= measure_flatness(self.model, self.replica.loader, epoch, self.spec.flatness)
        tested: list[Measured] = []
        struck = [layer.name for layer, k in self.pruner.due(epoch) if k] if self.pruner else []

        def evaluate() -> float:
            n = len(tested)  # the pass before the first strike, then one after each
            tested.append(test(since=struck[n - 1] if n else None, keep=struck[n] if n < len(struck) else None))
            return tested[-1].accuracy

        clean = None
        due = self.spec.tested_after(epoch)
        if self.pruner is not None:
            if due and self.pruner.noise_in_force:
                with self.pruner.silenced():
                    clean = test().accuracy
            self.strike(epoch, evaluate)
        if due and not tested:
            evaluate()
        if tested:
            self.last_tested = tested[0].accuracy
            row |= {"test_loss": tested[0].loss, "test_accuracy": self.last_tested,
                    "test_accuracy_clean": self.last_tested if clean is None else clean}
        row["parameters"] = self.parameters - (self.pruner.parameters_removed() if self.pruner else 0)
        self.tables["epoch"].append(row)


class _Group:
    """Runs of one shape, epoch by epoch."""

    def __init__(self, specs, images: Images, device: torch.device, progress, profile: str,
                 checkpoints: Checkpoints | None = None, stop: Callable[[], bool] = lambda: False):
        self.device, self.progress, self.profile = device, progress, profile
        self.checkpoints, self.stop = checkpoints, stop
        self.images, self.unseen = images.subset(specs[0].data), images.unseen(specs[0].data)
        resident = self.images.to(device)
        self.runs = [Run(spec, resident, device) for spec in specs]
        # epochs and steps of the next one that are done; seconds spent on them, on the epoch and in all, a run's share
        self.epoch, self.step, self.resumed = 0, 0, 0
        self.began = self.saved = time.perf_counter()
        self.epoch_began = self.began
        if checkpoints is not None and not self._take_up(checkpoints):
            self.runs = [Run(spec, resident, device) for spec in specs]
        self.engine = Engine([run.replica for run in self.runs])

    def train(self) -> list[Result]:
        """All epochs that are left; returns each run's rows and provenance."""
        epochs = self.runs[0].spec.optimiser.epochs
        ticks = [*(run.pruner.batch for run in self.runs if run.pruner is not None), self._after_step]
        if (self.epoch, self.step) == (0, 0):
            for index, run in enumerate(self.runs):
                run.begin(functools.partial(self.engine.test, index))
        while self.epoch < epochs:
            epoch = self.epoch
            trained = self.engine.train_epoch(epoch, ticks, self.step)
            for index, run in enumerate(self.runs):
                run.end_epoch(epoch, trained[index], functools.partial(self.engine.test, index))
            now = time.perf_counter()
            for run in self.runs:
                run.tables["epoch"][-1]["seconds"] = (now - self.epoch_began) / len(self.runs)
                self.progress(Progress(run.spec.id, epoch, epochs, run.last_tested))
            self.epoch, self.step, self.epoch_began = epoch + 1, 0, now
            self._pause()
        for run in self.runs:
            run.measure(epochs - 1)
            run.measure_end(self.unseen)
        seconds = (time.perf_counter() - self.began) / len(self.runs)
        about = provenance(self.images, self.device, self.profile, seconds, len(self.runs)) | {
            "resumed": self.resumed, "techniques": self.engine.techniques}
        return [Result(run.tables, about) for run in self.runs]

    def _after_step(self) -> None:
        self.step += 1
        self._pause()

    def _pause(self) -> None:
        """Keep a checkpoint where one is due, and stop where that is asked for."""
        stop = self.stop()
        if self.checkpoints is not None and (stop or time.perf_counter() - self.saved >= self.checkpoints.every):
            now, n = time.perf_counter(), len(self.runs)
            state = {"resumed": self.resumed, "seconds": (now - self.began) / n,
                     "epoch_seconds": (now - self.epoch_began) / n}
            for run in self.runs:
                self.checkpoints.save(run.spec.id, self.epoch, self.step, state | {"run": run.state_dict()})
            self.saved = time.perf_counter()  # writing counts as time between two
        if stop:
            raise Stopped

    def _take_up(self, checkpoints: Checkpoints) -> bool:
        """Go on from the runs' checkpoints, if there are any; False where one that is whole holds no state of its run."""
        positions = {run.spec.id: checkpoints.position(run.spec.id) for run in self.runs}
        if len(set(positions.values())) > 1:
            raise InputError("runs stand at different epochs and cannot be trained in lockstep: "
                             + ", ".join(f"{run_id} at epoch {epoch}, step {step}"
                                         for run_id, (epoch, step) in positions.items()))
        states = [checkpoints.load(run.spec.id) for run in self.runs]
        if None in states:
            return True
        now, n = time.perf_counter(), len(self.runs)
        (epoch, step), steps = next(iter(positions.values())), len(self.runs[0].replica.loader.batch_sizes())
        for run, state in zip(self.runs, states):
            try:
                tables = run.tables.keys()
                run.load_state_dict(state["run"])
                if not tables <= run.tables.keys() or len(run.tables["epoch"]) != epoch or step > steps:
                    raise ValueError("no run can stand so")
                past = state["resumed"] + 1, now - n * state["seconds"], now - n * state["epoch_seconds"]
            except Exception as error:  # whoever knows how it is sealed may have put anything into it
                checkpoints.pass_over(run.spec.id, error)
                return False
        (self.resumed, self.began, self.epoch_began), self.epoch, self.step = past, epoch, step
        return True
