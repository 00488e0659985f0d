"""What is measured of a network besides its accuracy."""

import math
import time

import numpy as np
import torch
from scipy import stats
from threadpoolctl import threadpool_limits
from torch import nn

from gstlib import flatness
from gstlib.data import Images, Loader
from gstlib.errors import InputError
from gstlib.spec import FlatnessSpec
from gstlib.training.engine import exactly

RELATIVE, DRAWS = 0.1, 10  # the scale-invariant measure: how far, in norms of each filter, and how often
SAMPLE = 0  # seed of the draw of the images measured: the same for every run, so that runs are compared on one sample


@torch.no_grad()
def bn_histogram(model: nn.Module, loader: Loader, epoch: int, images: int = 512) -> list[dict]:
    """How normal are normalised activations? (section A.1, Figure A1, claim C18)

    For each batch normalisation, in forward order, its input over `images`
    training images drawn at random is centred and scaled by that batch's own
    mean and standard deviation per channel, the network being in training
    mode, so that every layer sees what it sees in training; running
    statistics, a pruner's of activations too, are put back.  Rows: epoch (-1: before training), layer,
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
            ks = float(stats.ks_1samp(values, stats.norm.cdf, method="asymp").statistic)
            counts, _ = np.histogram(np.clip(values, -5, 5), edges)
            index = len({row["layer"] for row in rows})
            rows.extend({"epoch": epoch, "layer": name, "layer_index": index, "ks": ks, "sd": float(values.std()),
                         "left": left, "right": right, "count": int(count)}
                        for left, right, count in zip(edges[:-1], edges[1:], counts))
        return hook

    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    # all of the network's: behind a shortcut a pruner's mean of activations lies outside any norm
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
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


def check_flatness(loader: Loader | Images, how: FlatnessSpec) -> None:
    """Raise `InputError` where there are too few test images for what `how` asks."""
    if len(loader.test_y) < max(how.images, 2 * how.hessian_images):
        raise InputError(f"flatness is measured on {how.images} test images, its Hessian on {how.hessian_images} of them "
                         f"and on as many others, but there are {len(loader.test_y)}; use a larger data set or profile")


def measure_flatness(model: nn.Module, loader: Loader, epoch: int, how: FlatnessSpec) -> dict[str, list[dict]]:
    """How flat is the loss? (v4 Figure 6, claim C20; see `gstlib.flatness`)

    On `how.images` test images in an order drawn once for all runs, since folders are sorted by class; in evaluation
    mode and float32, the network left as it is.  Rows by table.  One of "flatness": epoch, images, hessian_images; loss
    and accuracy; trace of the gradient covariance (uncentred), its standard error over the images (trace_error),
    trace_centred; curvature_error, that of the sum of the leading eigenvalues; curvature_other, the second derivatives
    along the same eigenvectors on as many other images, and its error; relative_mean and relative_worst, the loss after
    moves of a tenth of each filter's norm; seconds.  "eigenvalue": number (from 1), eigenvalue.
    "direction": number (of the eigenvector), step, loss, accuracy.
    """
    began, h = time.perf_counter(), how.hessian_images
    order = torch.randperm(len(loader.test_y), generator=torch.Generator().manual_seed(SAMPLE)).to(loader.device)

    def images(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        return loader.normalise(loader.test_x[order[start:end]]).contiguous(), loader.test_y[order[start:end]]

    def error(each: torch.Tensor) -> float:
        return float(each.std()) / math.sqrt(len(each))

    some, few = images(0, how.images), images(0, h)
    with exactly(), threadpool_limits(1 if loader.device.type == "cpu" else None):  # SciPy's too, as training has
        values, vectors = flatness.leading(flatness.hessian(model, *few), how.eigenvalues)
        curves = [(number, step, *found) for number, vector in enumerate(vectors[:how.directions], 1)
                  for step, found in zip(how.steps, flatness.along(model, *some, vector, how.steps))]
        (loss, accuracy), = flatness.along(model, *some, vectors[0], [0.0])
        norms, mean = flatness.gradients(model, *some, 8 if loader.device.type == "cpu" else 64)
        moved = flatness.relative(model, *some, RELATIVE, DRAWS)
        own, other = (flatness.curvatures(model, *each, vectors) for each in (few, images(h, 2 * h)))
    trace = float(norms.mean())
    row = {"epoch": epoch, "images": how.images, "hessian_images": h, "loss": loss, "accuracy": accuracy,
           "trace": trace, "trace_error": error(norms), "trace_centred": max(0.0, trace - float(mean.square().sum())),
           "curvature_error": error(own), "curvature_other": float(other.mean()), "curvature_other_error": error(other),
           "relative_mean": sum(moved) / DRAWS, "relative_worst": max(moved), "seconds": time.perf_counter() - began}
    return {"flatness": [row],
            "eigenvalue": [{"number": number, "eigenvalue": float(value)} for number, value in enumerate(values, 1)],
            "direction": [dict(zip(("number", "step", "loss", "accuracy"), point)) for point in curves]}
