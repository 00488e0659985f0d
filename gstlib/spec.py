"""What a run is: frozen dataclasses, their canonical JSON, and the id made from it.

Everything that changes a run's result is a field here, and nothing else is:
how fast it was computed, in whose company and on which machine is provenance
and lies beside the result.  Defaults are written out in the canonical JSON,
so that a later change of a default cannot silently rename old results; a
field that came `later` is left out while it has its default, so that old
results keep their ids.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass, field

from gstlib.errors import InputError, check_choice
from gstlib.pruning import Schedule, check_method

MODELS = ("conv4", "vgg11", "vgg19", "conv6-gn", "resnet18", "resnet20", "resnet56")
DATASETS = ("digits", "cifar10", "cifar10-folder", "cifar100", "svhn", "fashion-mnist")
PRECISIONS = ("float32", "tf32", "bf16")
MEASURES = ("bn-histogram", "flatness")

RECOVERY = 5  # epochs after an event in which every one is tested
_LARGEST = 2**31  # no number of epochs, batches, images or seeds comes near it

# Raised when the code comes to compute something else from the same fields,
# so that results from before and after are never taken for one another.
# 2: events struck and measured layer by layer, deciles of the original units, noise that stays in the weights,
# VGG's published initialisation, final accuracy on every image that was not trained on.
SEMANTICS = 2


def later(default):
    """A field that came after runs were stored: left out of the JSON, hence of the id, while it has its default."""
    return field(default=default, metadata={"later": True})


def _as_floats(spec, *names: str) -> None:
    """Make numbers floats: 1 and 1.0 are equal, and 0.0 and -0.0, but their JSON, and with it the id, would differ."""
    for name in names:
        object.__setattr__(spec, name, float(getattr(spec, name)) + 0.0)


@dataclass(frozen=True)
class DataSpec:
    """Images: which set, proven by which fingerprint, how many of them, augmented or not.

    `fingerprint` is the sha256 (hex) over the whole set's pixels and labels,
    `train_size` and `test_size` a class-balanced prefix of it (None: all).
    `wrong_labels` is the share of the training labels that are replaced, see
    `gstlib.data.batches.mislabelled`; test labels stay.
    """

    name: str
    fingerprint: str
    classes: int = 10
    train_size: int | None = None
    test_size: int | None = None
    augment: bool = False
    wrong_labels: float = later(0.0)

    def __post_init__(self):
        _as_floats(self, "wrong_labels")
        check_choice("data set", self.name, DATASETS)
        if not 0 <= self.wrong_labels < 1:
            raise InputError(f"wrong_labels is a share, 0 or more and below 1, not {self.wrong_labels}")
        if self.classes < 2:
            raise InputError(f"a data set needs at least 2 classes, not {self.classes}")
        for name in ("train_size", "test_size"):
            size = getattr(self, name)
            if size is not None and size < self.classes:
                raise InputError(f"{name} must be at least one image a class ({self.classes}), not {size}")


@dataclass(frozen=True)
class ModelSpec:
    """A network by name and width factor (1.0: as published)."""

    name: str
    width: float = 1.0

    def __post_init__(self):
        _as_floats(self, "width")
        check_choice("model", self.name, MODELS)
        if not (math.isfinite(self.width) and 0 < self.width <= 4):
            raise InputError(f"width must lie in (0, 4], not {self.width}")


@dataclass(frozen=True)
class OptimiserSpec:
    """Optimiser and its schedule: the rate is multiplied by `decay` at each epoch of `milestones`."""

    name: str = "adam"
    lr: float = 0.001
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 128
    epochs: int = 325
    milestones: tuple[int, ...] = (150, 300)
    decay: float = 0.1
    label_smoothing: float = later(0.0)

    def __post_init__(self):
        _as_floats(self, "lr", "momentum", "weight_decay", "decay", "label_smoothing")
        check_choice("optimiser", self.name, ("adam", "sgd"))
        for name in ("momentum", "weight_decay", "decay"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"{name} must be finite and not negative, not {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing is a share, 0 or more and below 1, not {self.label_smoothing}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr must be positive, not {self.lr}")
        if self.epochs < 1 or self.batch_size < 2:
            raise InputError("epochs must be at least 1 and batch_size at least 2 "
                             f"(batch normalisation needs two), not {self.epochs} and {self.batch_size}")


@dataclass(frozen=True)
class PruningSpec:
    """A pruning (or noise) schedule, one entry a layer, and what it does to whom.

    `start`, `end` and `fraction` follow `layers`; `retrain` is the number of
    epochs between events (section A.3 of the paper).  `batches` counts the
    training batches that a temporary effect lasts; 0 is a single blow.
    `scratch`: one event before the first step, whatever the epochs say.
    """

    layers: tuple[str, ...]
    start: tuple[int, ...]
    end: tuple[int, ...]
    fraction: tuple[float, ...]
    retrain: int
    target: str = "S"
    score: str = "ebn"
    structure: str = "filter"
    effect: str = "remove"
    batches: int = 0
    scratch: bool = later(False)

    def __post_init__(self):
        object.__setattr__(self, "fraction", tuple(float(share) + 0.0 for share in self.fraction))
        check_method(self.target, self.score, self.structure, self.effect, self.batches)
        if len(self.schedule.start) != len(self.layers):
            raise InputError(f"{len(self.layers)} layers but {len(self.schedule.start)} start epochs")

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The `gstlib.pruning.Schedule` of these fields."""
        return Schedule(self.start, self.end, self.fraction, self.retrain, self.scratch)


@dataclass(frozen=True)
class FlatnessSpec:
    """How much of the measure "flatness" is computed; the defaults are the published ones (v4 Figure 6).

    Gradients, curves and perturbations take `images` test images, eigenvalues the first `hessian_images` of them; the
    loss is followed along `directions` eigenvectors to `reach` on either side in steps of `step`.
    """

    images: int = 512
    hessian_images: int = 512
    eigenvalues: int = 100
    directions: int = 10
    reach: float = 0.4
    step: float = 0.01

    def __post_init__(self):
        _as_floats(self, "reach", "step")
        if not 1 < self.hessian_images <= self.images:
            raise InputError("the measure flatness needs at least 2 images for its Hessian, and of its own, not "
                             f"{self.hessian_images} of {self.images}")
        if not 0 <= self.directions <= self.eigenvalues or self.eigenvalues < 1:
            raise InputError("the measure flatness follows the loss along leading eigenvectors, so not along "
                             f"{self.directions} of {self.eigenvalues}")
        if not 0 < self.step <= self.reach <= 100 * self.step:
            raise InputError(f"steps of {self.step} up to {self.reach} are not 1 to 100 steps")

    @property
    def steps(self) -> tuple[float, ...]:
        """How far to go along an eigenvector, from -`reach` to `reach`; 0, from where the way begins, among them."""
        each = round(self.reach / self.step)
        return tuple(round(i * self.step, 9) for i in range(-each, each + 1))


@dataclass(frozen=True)
class RunSpec:
    """One training run, whole: the same specification gives the same rows (bit for bit on one CPU type)."""

    data: DataSpec
    model: ModelSpec
    optimiser: OptimiserSpec = OptimiserSpec()
    pruning: PruningSpec | None = None
    seed: int = 0
    precision: str = "float32"
    channels_last: bool = False
    test_every: int = 1
    measures: tuple[str, ...] = ()
    semantics: int = SEMANTICS
    measured_at: int | None = later(None)  # epoch after which, before its event, flatness is measured (None: the last)
    flatness: FlatnessSpec = later(FlatnessSpec())

    def __post_init__(self):
        check_choice("precision", self.precision, PRECISIONS)
        for measure in self.measures:
            check_choice("measure", measure, MEASURES)
        if "flatness" not in self.measures and (self.measured_at, self.flatness) != (None, FlatnessSpec()):
            raise InputError("measured_at and flatness say how the measure flatness is taken, which this run does not take")
        if not 0 <= self.flatness_epoch < self.optimiser.epochs:
            raise InputError(f"measured_at must be an epoch from 0 to {self.optimiser.epochs - 1}, not {self.measured_at}")
        if self.test_every < 1:
            raise InputError(f"test_every must be at least 1, not {self.test_every}")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed must lie in 0 … 2^31-1, not {self.seed}")

    @functools.cached_property
    def id(self) -> str:
        """Sixteen hex digits of the sha256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Canonical JSON: every field but `later` ones at their default, sorted keys, no white space."""
        return json.dumps(self, default=_fields, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> RunSpec:
        """Inverse of `to_json`. Raises `InputError` for fields that are unknown, missing or wrong."""
        try:
            return _build(cls, json.loads(text))
        except (TypeError, OverflowError, RecursionError, json.JSONDecodeError) as error:
            raise InputError(f"not a run's specification: {error}") from error

    @property
    def flatness_epoch(self) -> int:
        """The epoch after which flatness is measured, where it is."""
        return self.optimiser.epochs - 1 if self.measured_at is None else self.measured_at

    def tested_after(self, epoch: int) -> bool:
        """Whether the test set is evaluated after `epoch`.

        Always at an event (t_pre) and for `RECOVERY` epochs after one, so
        that a recovery is seen; at the last epoch; and at epochs whose number
        (from 1) `test_every` divides.
        """
        return ((epoch + 1) % self.test_every == 0 or epoch == self.optimiser.epochs - 1
                or self.pruning is not None and any(map(self.pruning.schedule.struck, range(epoch - RECOVERY, epoch + 1))))

    def tests(self) -> tuple[int, int, int]:
        """How many epochs are tested, how many have an event, and how many strikes these have, each with a test; what is
        removed before the first epoch is not counted."""
        epochs = range(self.optimiser.epochs)
        strikes = [self.pruning.schedule.struck(epoch) if self.pruning else 0 for epoch in epochs]
        return sum(map(self.tested_after, epochs)), sum(map(bool, strikes)), sum(strikes)


def _fields(part) -> dict:
    values = ((f, getattr(part, f.name)) for f in dataclasses.fields(part))
    return {f.name: value for f, value in values if not (f.metadata.get("later") and value == f.default)}


@functools.cache
def _kinds(cls) -> dict[str, typing.Any]:
    return typing.get_type_hints(cls)


def _build(cls, values):
    """The `cls` that the JSON object `values` describes."""
    if not isinstance(values, dict):
        raise InputError(f"a {cls.__name__} must be a JSON object, not {values!r:.60}")
    kinds = _kinds(cls)
    if unknown := sorted(values.keys() - kinds.keys()):
        raise InputError(f"{cls.__name__} has fields that this gstlib does not know ({', '.join(unknown)[:200]}); update gstlib")
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in values and not f.metadata.get("later")]
    if missing:
        raise InputError(f"{cls.__name__} lacks {', '.join(missing)}")
    return cls(**{name: _value(kinds[name], value, f"{cls.__name__}'s {name}") for name, value in values.items()})


def _value(kind, value, what: str):
    """The JSON `value` as a field annotated with `kind` holds it."""
    if type(value) is kind in (str, bool, float):
        return value
    if isinstance(kind, types.UnionType):  # a kind or None
        return None if value is None else _value(typing.get_args(kind)[0], value, what)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value)
    if typing.get_origin(kind) is tuple and type(value) is list:
        return tuple(_value(typing.get_args(kind)[0], entry, what) for entry in value)
    # true is 1 to Python, but not here
    if type(value) is int and kind in (int, float):
        if -_LARGEST < value < _LARGEST:
            return value
        raise InputError(f"{what} is out of bounds: {value!r:.60}")
    raise InputError(f"{what} must be of type {kind.__name__}, not {value!r:.60}")
