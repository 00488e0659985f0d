"""How a step is executed. Knows tensors, not science: no score, event or effect appears here."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from gstlib.data import Loader
from gstlib.spec import OptimiserSpec, InputError


class Measured(NamedTuple):
    """Mean cross-entropy (nats) and top-1 accuracy (0 … 1) over a pass."""

    loss: float
    accuracy: float


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`: "auto" is CUDA where there is one, else the CPU.

    Raises `InputError` for a name torch does not know and for CUDA where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}; choose from auto, cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {name!r}; choose from auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"device {name!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices; "
                         "use --device cpu or auto")
    return device


class Engine:
    """Runs training and test passes of one model, eagerly, on the loader's device.

    `precision`: "float32", "tf32" (float32 storage, TF32 products on a GPU)
    or "bf16" (autocast over float32 parameters).
    """

    def __init__(self, model: nn.Module, spec: OptimiserSpec, loader: Loader, precision: str = "float32"):
        self.model, self.spec, self.loader, self.precision = model, spec, loader, precision
        self.device = loader.device
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        if spec.name == "adam":
            self.optimiser = torch.optim.Adam(model.parameters(), lr=spec.lr, weight_decay=spec.weight_decay, fused=True)
        else:
            self.optimiser = torch.optim.SGD(model.parameters(), lr=spec.lr, momentum=spec.momentum,
                                             weight_decay=spec.weight_decay, fused=True)

    def learning_rate(self, epoch: int) -> float:
        """The rate of `epoch` (from 0): multiplied by `decay` from each milestone on."""
        return self.spec.lr * self.spec.decay ** sum(epoch >= milestone for milestone in self.spec.milestones)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(x).float()

    def train_epoch(self, epoch: int, after_batch: Callable[[], None] = lambda: None) -> Measured:
        """One pass over the training images, `after_batch` called after each optimiser step.

        The result is the mean over the pass as it ran, each batch measured
        before its own step.
        """
        self.model.train()
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate(epoch)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for x, y in self.loader.epoch():
            self.optimiser.zero_grad(set_to_none=True)
            logits = self._forward(x)
            loss = nn.functional.cross_entropy(logits, y)
            loss.backward()
            self.optimiser.step()
            sums += _sums(loss.detach() * len(y), logits, y)
            after_batch()
        return _measured(sums, len(self.loader.y))

    @torch.inference_mode()
    def test(self) -> Measured:
        """One pass over the test images in evaluation mode; changes no weight and no running statistic."""
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for x, y in self.loader.test():
            logits = self._forward(x)
            sums += _sums(nn.functional.cross_entropy(logits, y, reduction="sum"), logits, y)
        return _measured(sums, len(self.loader.test_y))


def _sums(loss: torch.Tensor, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.stack([loss.double(), (logits.detach().argmax(1) == y).sum().double()])


def _measured(sums: torch.Tensor, n: int) -> Measured:
    loss, right = (sums / n).tolist()
    return Measured(loss, right)
