"""What a network computes, counted on tensors without values."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from gstlib import models
from gstlib.data import SIDE


class Count(NamedTuple):
    """Of one image's forward pass: multiply-accumulates, numbers that layers with weights write; and parameters."""

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
        moved = images * ((4 if training else 2) * size * self.activations + 3 * SIDE * SIDE)
        return moved + training * self.parameters * (2 * size + 8 * 4)


@functools.cache
def count(model: str, width: float = 1.0, classes: int = 10) -> Count:
    """What the convolutions and linear layers of `model` compute; all other layers are negligible."""
    with torch.device("meta"):
        network, image = models.build(model, classes, width).eval(), torch.empty(1, 3, SIDE, SIDE)
    written = dict.fromkeys((torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm),
                            lambda *_, out_shape, **__: math.prod(out_shape))
    with FlopCounterMode(display=False) as products:
        network(image)
    with FlopCounterMode(display=False, custom_mapping=written) as activations:
        network(image)
    return Count(products.get_total_flops() // 2, activations.get_total_flops(),
                 sum(p.numel() for p in network.parameters()))
