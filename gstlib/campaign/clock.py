"""Whether runs still fit into a time limit."""

from __future__ import annotations

import time

import torch

from gstlib.spec import RunSpec
from gstlib.training import pace, train


class Clock:
    """Judges by runs of the same shape so far, else by a short measurement on `device` (None: all may begin)."""

    def __init__(self, minutes: float | None, device: torch.device | None):
        self.deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        self.device, self.seconds = device, {}

    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self.deadline

    def allows(self, specs: list[RunSpec], epoch: int) -> bool:
        """Whether runs of one shape, trained in lockstep from `epoch` on, would end in time."""
        shape = train.shape(specs[0])
        if shape not in self.seconds and self.device is not None and self.deadline < float("inf"):
            self.seconds[shape] = pace.seconds_per_run(specs[0], self.device, len(specs))
        left = len(specs) * (1 - epoch / specs[0].optimiser.epochs)
        return time.monotonic() + left * self.seconds.get(shape, 0) < self.deadline

    def learn(self, spec: RunSpec, seconds: float) -> None:
        """Learn from a run, which took `seconds`; in company, its share of the group's time."""
        self.seconds[train.shape(spec)] = seconds
