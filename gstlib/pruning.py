"""When units go, and which: the schedule as data, and selection with exact counts.

A *unit* is whatever one score belongs to: a filter or neuron (structured) or
a single weight (unstructured).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gstlib.errors import InputError, check_choice, plain

if TYPE_CHECKING:
    import torch

TARGETS = ("S", "R", "L", *(f"D{k}" for k in range(11)), "D9-remaining")
SCORES = {"filter": ("ebn", "ebn-signed", "l1", "l2", "activation"), "weight": ("magnitude",)}  # by the structure of units
# what happens to the units taken (`gstlib.effects`), and whether it lasts a number of training batches
EFFECTS = {"remove": "never", "remove-weights": "never", "zero": "may", "zero-restore": "must",
           "zero-cumulative": "must", "gaussian": "may", "gaussian-transient": "must"}


def check_effect(effect: str, batches: int) -> None:
    """Raise `InputError` when `effect` is unknown or cannot last for `batches` training batches."""
    check_choice("effect", effect, EFFECTS)
    batches = number("batches", batches, whole=True)
    if batches < 0:
        raise InputError(f"batches must not be negative, not {batches}")
    if batches and EFFECTS[effect] == "never":
        raise InputError(f"effect {effect!r} is for good and takes no number of batches")
    if EFFECTS[effect] == "must" and not batches:
        raise InputError(f"effect {effect!r} needs a number of batches to last for")


def check_method(target: str, score: str, structure: str, effect: str, batches: int) -> None:
    """Raise `InputError` for an unknown way of pruning, or parts of one that do not go together."""
    check_choice("target", target, TARGETS)
    check_choice("structure", structure, SCORES)
    check_choice(f"score for structure {structure!r}", score, SCORES[structure])
    check_effect(effect, batches)
    if effect != "remove" and structure == "weight":
        raise InputError(f"effect {effect!r} acts on whole filters; use structure 'filter'")


def _is_scalar(value) -> bool:
    return getattr(value, "shape", None) == ()  # an array or tensor of no dimension, or one of numpy's numbers


def number(name: str, value, whole: bool = False) -> int | float:
    """`value` as Python's own int or float; raises `InputError` for what is no such number."""
    value = value.item() if _is_scalar(value) else value
    if (isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
            or whole and value != int(value)):
        raise InputError(f"{name} must be a {'whole ' if whole else ''}number, not {plain(repr(value))}")
    return int(value) if whole else value


@dataclass(frozen=True)
class Schedule:
    """Pruning schedule of section A.3: layer l has events after epochs range(start_l, end_l + 1, retrain).

    Each of `start`, `end` and `fraction` is a sequence (an array too) with an
    entry a layer, or one number for a single layer.  Epochs count from 0.
    With `scratch` every layer has a single event before the first step
    instead, which belongs to epoch -1.  Raises `InputError` for an epoch or a
    period that is no whole number, a fraction outside 0 … 1, a start below 0,
    an end before its start, a retrain period below 1, or sequences of unequal length.
    """

    start: Sequence[int]
    end: Sequence[int]
    fraction: Sequence[float]
    retrain: int
    scratch: bool = False

    def __post_init__(self):
        for name, whole in (("start", True), ("end", True), ("fraction", False)):
            value = getattr(self, name)
            entries = (value,) if isinstance(value, str) or not hasattr(value, "__len__") or _is_scalar(value) else value
            object.__setattr__(self, name, tuple(number(name, entry, whole) for entry in entries))
        object.__setattr__(self, "retrain", number("retrain", self.retrain, True))
        if not len(self.start) == len(self.end) == len(self.fraction) or not self.start:
            raise InputError("start, end and fraction need one entry a layer each, but have "
                             f"{len(self.start)}, {len(self.end)} and {len(self.fraction)}")
        if self.retrain < 1:
            raise InputError(f"retrain must be at least 1 epoch, not {self.retrain}")
        for start, end, fraction in zip(self.start, self.end, self.fraction):
            if start < 0:
                raise InputError(f"start must be an epoch from 0 on, not {start}")
            if end < start:
                raise InputError(f"end {end} lies before start {start}")
            if not 0 <= fraction <= 1:
                raise InputError(f"fraction must lie in 0 … 1, not {fraction}")

    def event_epochs(self, layer: int) -> range:
        """Epochs after whose training `layer` (index in the schedule's order) has an event."""
        return range(-1, 0) if self.scratch else range(self.start[layer], self.end[layer] + 1, self.retrain)

    def struck(self, epoch: int) -> int:
        """How many layers have an event after `epoch`."""
        return sum(epoch in self.event_epochs(layer) for layer in range(len(self.start)))

    def removed(self, sizes: Sequence[int], epoch: int) -> list[int]:
        """Cumulative number of units removed in each layer once `epoch` is over.

        `sizes` gives the layers' numbers of units.  After event i of n the
        number is floor(total * i / n) with total = floor(fraction * size), so
        the last event always completes the total exactly.
        """
        if len(sizes) != len(self.start):
            raise InputError(f"the schedule has {len(self.start)} layers, but {len(sizes)} sizes were given")
        counts = []
        for layer, size in enumerate(sizes):
            events = self.event_epochs(layer)
            done = sum(1 for event in events if event <= epoch)
            # 0.3 * 10 is 3.0000000000000004 and 0.29 * 100 is 28.999999999999996:
            # a fraction that was meant to be whole must not lose a unit to binary.
            total = math.floor(round(self.fraction[layer] * size, 9))
            counts.append(total * done // len(events))
        return counts

    @property
    def iterative_rate(self) -> float:
        """Largest share of a layer that one event removes, max over layers of p_l / n_l."""
        return max(p / len(self.event_epochs(layer)) for layer, p in enumerate(self.fraction))


def select(scores: torch.Tensor, present: torch.Tensor, k: int, target: str,
           generator: torch.Generator | None = None) -> torch.Tensor:
    """The `k` units to take now, as a bool tensor of `scores`' shape.

    Only units with `present` True are taken, and exactly `k` of them, ties or
    not (the unit with the smaller index counts as the smaller).  `target`:
    "S" the smallest scores, "L" the largest, "R" random (drawn with
    `generator`, or torch's global one), "Dk" for k = 0 … 9 upward from the
    lower end of the k-th decile of the layer's original units: the window
    begins at N k // 10 in the order of the scores still present, N counting
    the units gone as well, so that ten per cent in all removes just decile k
    (section A.3.2).  "D10" removes downward from the very largest.
    "D9-remaining" is the other reading, whose window begins at nine tenths of
    the units still present.  A window that would run past the largest score
    is moved down to end there.

    Raises `InputError` for an unknown target, shapes that differ, k outside
    0 … number present, or scores that are not finite where they are looked at
    ("R" looks at none).
    """
    import torch

    check_choice("target", target, TARGETS)
    if scores.shape != present.shape:
        raise InputError(f"scores {tuple(scores.shape)} and present {tuple(present.shape)} differ in shape")
    flat, alive = scores.detach().flatten(), present.flatten().bool()
    candidates = alive.nonzero().squeeze(1)
    n = candidates.numel()
    if not 0 <= k <= n:
        raise InputError(f"cannot take {k} units of the {n} present")
    taken = torch.zeros_like(alive)
    if k == 0:
        return taken.view(present.shape)
    if target == "R":
        device = candidates.device if generator is None else generator.device
        order = torch.randperm(n, generator=generator, device=device).to(candidates.device)
        chosen = candidates[order[:k]]
    else:
        values = flat[candidates]
        if not torch.isfinite(values).all():
            raise InputError("scores of units still present are not finite; has the training diverged?")
        order = torch.sort(values, stable=True).indices
        if target in ("L", "D10"):
            window = slice(n - k, n)
        else:
            begin = (0 if target == "S" else n * 9 // 10 if target == "D9-remaining"
                     else flat.numel() * int(target[1:]) // 10)
            begin = min(begin, n - k)
            window = slice(begin, begin + k)
        chosen = candidates[order[window]]
    taken[chosen] = True
    return taken.view(present.shape)


def deciles(scores: torch.Tensor) -> list[float]:
    """Mean score in each tenth of the units, the smallest first: any shape -> ten floats (nan where a tenth is empty)."""
    ordered = scores.flatten().double().sort().values
    n = len(ordered)
    return [float(ordered[n * k // 10: n * (k + 1) // 10].mean()) for k in range(10)]
