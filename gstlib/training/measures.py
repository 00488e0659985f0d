"""What is measured of a network besides its accuracy."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats
from torch import nn

from gstlib.data import Loader

SAMPLE = 0  # seed of the draw of the images measured: the same for every run, so that runs are compared on one sample


@torch.no_grad()
def bn_histogram(model: nn.Module, loader: Loader, epoch: int, images: int = 512) -> list[dict]:
    """How normal are normalised activations? (section A.1, Figure A1, claim C18)

    For each batch normalisation, in forward order, its input over `images`
    training images drawn at random is centred and scaled by that batch's own
    mean and standard deviation per channel, the network being in training
    mode, so that every layer sees what it sees in training; running
    statistics are put back.  Rows: epoch (-1: before training), layer,
    layer_index, ks (Kolmogorov-Smirnov distance of all these values to the
    standard normal), sd (their standard deviation: 1 but for what batch
    normalisation adds to a small variance), left, right, count; 80 bins from
    -5 to 5, values outside counted in the outermost ones.
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
            rows.extend({"epoch": epoch, "layer": name, "layer_index": index, "ks": ks, "sd": float(values.std()),
                         "left": left, "right": right, "count": int(count)}
                        for left, right, count in zip(edges[:-1], edges[1:], counts))
        return hook

    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(buffer, buffer.clone()) for _, norm in norms for buffer in norm.buffers()]
    chosen = torch.randperm(len(loader.y), generator=torch.Generator().manual_seed(SAMPLE))[:images].to(loader.x.device)
    hooks = [module.register_forward_pre_hook(record(name)) for name, module in norms]
    try:
        model.train()
        model(loader.normalise(loader.x[chosen]))
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, value in before:
            buffer.copy_(value)
    return rows
