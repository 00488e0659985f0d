"""3x3 convolution, products in bf16 and 2x2 pooling that a CPU does faster.

On maps of 4x4 and below, where this paper's pruned layers work, the CPU
library's convolution spends most of a training step in its backward pass.
Unfolding the few pixels and multiplying once made a whole training step of
half-width VGG11 at batch 128 (bf16, one thread) 20 to 45 % shorter.

A processor without instructions for bf16 takes ten times as long for products
in it as in float32; there bf16 values are multiplied and summed in float32 and
the results rounded, which is what the instructions do.

Its pooling of contiguous maps goes pixel by pixel; two maxima, of whole rows
and then of columns, give the same values ten times as fast (of channels-last
maps 1.2 to 1.5 times).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

_SMALL = 16  # pixels of a map up to which the product wins


def _windows(size: int):
    """For each of the three kernel offsets: the output range and the input range that it joins."""
    for offset in (-1, 0, 1):
        low, high = max(0, -offset), min(size, size - offset)
        yield slice(low, high), slice(low + offset, high + offset)


class _SmallMapConvolution(torch.autograd.Function):
    """Stride 1, padding 1: x (n, c, h, w), weight (o, c, 3, 3), bias (o,) or None -> (n, o, h, w)."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        n, c, h, w = x.shape
        columns = x.new_zeros(n, h, w, 3, 3, c)
        pixels = x.permute(0, 2, 3, 1)
        for i, (out_rows, in_rows) in enumerate(_windows(h)):
            for j, (out_columns, in_columns) in enumerate(_windows(w)):
                columns[:, out_rows, out_columns, i, j] = pixels[:, in_rows, in_columns]
        columns = columns.view(n * h * w, 9 * c)
        kernel = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
        ctx.save_for_backward(columns, kernel)
        ctx.shape, ctx.biased = x.shape, bias is not None
        y = columns @ kernel.t() if bias is None else torch.addmm(bias, columns, kernel.t())
        return y.view(n, h, w, -1).permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable  # what was saved has no graph: a second derivative would be wrong
    def backward(ctx, grad):
        columns, kernel = ctx.saved_tensors
        n, c, h, w = ctx.shape
        grad = grad.permute(0, 2, 3, 1).reshape(n * h * w, -1)
        grad_weight = (grad.t() @ columns).view(-1, 3, 3, c).permute(0, 3, 1, 2)
        spread = (grad @ kernel).view(n, h, w, 3, 3, c)
        grad_x = grad.new_zeros(n, h, w, c)
        for i, (out_rows, in_rows) in enumerate(_windows(h)):
            for j, (out_columns, in_columns) in enumerate(_windows(w)):
                grad_x[:, in_rows, in_columns] += spread[:, out_rows, out_columns, i, j]
        return grad_x.permute(0, 3, 1, 2), grad_weight, grad.sum(0) if ctx.biased else None


@functools.cache
def has_bf16() -> bool:
    """Whether this processor has instructions for bf16."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def in_bf16(product: Callable, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`product` as autocast has it; without bf16 instructions that of the rounded values in float32, rounded.

    The casts' own gradients round those that go back through them.
    """
    if (x.device.type != "cpu" or not torch.is_autocast_enabled("cpu")
            or torch.get_autocast_dtype("cpu") != torch.bfloat16 or has_bf16()):
        return product(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        x, weight, bias = (part if part is None else part.bfloat16().float() for part in (x, weight, bias))
        return product(x, weight, bias).bfloat16()


class Linear(nn.Linear):
    """`torch.nn.Linear`, in bf16 also fast on processors without instructions for it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)."""
        return in_bf16(nn.functional.linear, x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`, computed as one matrix product when training on small maps on a CPU; bf16 as in `Linear`."""

    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return in_bf16(self._product, x, weight, bias)

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        small = (
            self.training and torch.is_grad_enabled()  # in evaluation mode second derivatives may be wanted
            and x.dim() == 4 and x.device.type == "cpu" and x.shape[-2] * x.shape[-1] <= _SMALL
            and self.kernel_size == (3, 3) and self.stride == (1, 1) and self.padding == (1, 1)
            and self.dilation == (1, 1) and self.groups == 1 and self.padding_mode == "zeros"
        )
        if not small:
            return super()._conv_forward(x, weight, bias)
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return _SmallMapConvolution.apply(x, weight, bias)


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d`, as two maxima where a CPU pools by windows of 2x2 and needs no gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (n, c, h, w) -> (n, c, h', w'), as `torch.nn.MaxPool2d`."""
        plain = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode) == (2, 2, 0, 1, False)
        if (plain and x.dim() == 4 and x.device.type == "cpu" and not torch.is_grad_enabled()
                and x.shape[2] % 2 == x.shape[3] % 2 == 0 and not self.return_indices):
            rows = torch.maximum(x[:, :, ::2], x[:, :, 1::2])
            return torch.maximum(rows[..., ::2], rows[..., 1::2])
        return super().forward(x)
