"""Scores: one number per unit, the larger the more the unit is taken to matter.

Pure functions of a layer's parameters, or of what its units gave in training.
All compute in float64, whatever the parameters' type: pruning sorts by these
numbers, and among nearly dead units the differences are smaller than float32
can tell apart.
"""

import math

import torch

from gstlib.errors import InputError


def l1(weight: torch.Tensor) -> torch.Tensor:
    """l1 norm of each filter or row: weight (units, …) -> (units,) float64."""
    return weight.detach().double().abs().flatten(1).sum(1)


def l2(weight: torch.Tensor) -> torch.Tensor:
    """l2 norm of each filter or row: weight (units, …) -> (units,) float64."""
    return weight.detach().double().flatten(1).norm(dim=1)


def magnitude(weight: torch.Tensor) -> torch.Tensor:
    """Absolute value of every single weight, in the weight's own shape, float64."""
    return weight.detach().double().abs()


def ebn(gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """E[BN], the expected activation after batch normalisation and ReLU (sections 3.1.1 and A.1).

    gamma and beta, both (units,), are the scale and shift of the batch
    normalisation.  With its output taken as normal, mean beta and standard
    deviation g = |gamma|, and z = beta / g:

        E[max(0, .)] = g phi(z) + beta Phi(z),   and max(beta, 0) for g = 0.

    For z << 0 the two terms cancel to almost nothing, so the sum is taken as
    g (max(z, 0) + h(|z|)) with h(a) = phi(a) - a Phi(-a), where
    Phi(-a) = phi(a) sqrt(pi/2) erfcx(a / sqrt(2)) brings out the common
    factor phi(a).  Returns (units,) float64, never negative and never NaN;
    below z of about -38 the value itself is smaller than any float64 and
    comes out as 0.  Raises `InputError` when the inputs differ in shape or
    are not finite.
    """
    gamma, beta = gamma.detach().double(), beta.detach().double()
    if gamma.shape != beta.shape or gamma.dim() != 1:
        raise InputError(f"gamma and beta need one entry a unit each, not {tuple(gamma.shape)} and {tuple(beta.shape)}")
    if not (torch.isfinite(gamma).all() and torch.isfinite(beta).all()):
        raise InputError("gamma and beta must be finite; has the training diverged?")
    g = gamma.abs()
    # beyond 40 standard deviations h underflows; the clamp keeps inf * 0 away
    a = (beta.abs() / torch.where(g > 0, g, 1.0)).clamp(max=40.0)
    phi = torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    h = phi * (1 - a * math.sqrt(math.pi / 2) * torch.special.erfcx(a / math.sqrt(2)))
    return beta.clamp(min=0) + g * h.clamp(min=0)


def ebn_signed(gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """E[BN] as the authors' code has it, with gamma's sign kept: gamma phi(z) + beta Phi(z), z = beta / gamma.

    For gamma < 0 that is -E[BN](gamma, -beta), which is never positive: such
    units count as the smallest.  Shapes and errors as in `ebn`.
    """
    sign = torch.where(gamma.detach() < 0, -1.0, 1.0).double()
    return sign * ebn(gamma, sign * beta.detach())


def activation(activation: torch.Tensor) -> torch.Tensor:
    """The running mean of each unit's activation in training that `gstlib.network.masking` keeps (final version): (units,) float64.

    Nothing but that mean: the score of ResNet18 in the final version's Figure 2.
    """
    return activation.detach().double()
