"""Masks: what is removed from a layer, as buffers that the forward pass multiplies with.

The optimiser keeps the parameters it was given.  What the network computes
with is parameter x mask (+ noise), through torch's own parametrisation
mechanism, so a removed unit is exactly 0 in the output and in the gradient,
and no momentum can bring it back.  This works on any network that torch.fx
can trace; nothing is subclassed or patched.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from gstlib import scores
from gstlib.errors import InputError

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
_ELEMENTWISE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.Identity, nn.Dropout)
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}


class _Tracer(fx.Tracer):
    """Follows a forward pass without looking into layers, subclasses of torch's own included."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Conv2d, nn.Linear, *_BATCH_NORMS)) or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class Unit:
    """A prunable layer's surroundings: its batch normalisation, and the block whose sum it feeds."""

    layer: str
    batch_norm: str | None
    block: str | None


def trace(model: nn.Module) -> dict[str, Unit]:
    """Every convolution and linear layer in forward order, with what removal of a unit must reach.

    `block` is the innermost module that adds the layer's output to a
    shortcut.  Raises `InputError` when the network cannot be traced.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # fx reports untraceable code by whatever that code raised
        raise InputError(
            f"cannot follow {type(model).__name__}'s forward pass ({error}); "
            "mark the part that branches on values with torch.fx.wrap"
        ) from error
    modules = dict(model.named_modules())
    units: dict[str, Unit] = {}
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], (nn.Conv2d, nn.Linear)):
            continue
        out, batch_norm = node, None
        users = list(node.users)
        if len(users) == 1 and users[0].op == "call_module" and isinstance(modules[users[0].target], _BATCH_NORMS):
            out, batch_norm = users[0], users[0].target
        units[node.target] = Unit(node.target, batch_norm, _block_of_sum(out, modules))
    return units


def _block_of_sum(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    for user in node.users:
        if user.target in _ADDITIONS and all(isinstance(arg, fx.Node) for arg in user.args[:2]):
            stack = list(user.meta.get("nn_module_stack", {}))
            block = stack[-1] if stack else ""
            if not block or block not in modules:
                raise InputError(f"the sum that {node.target!r} feeds lies in the network's outermost forward; "
                                 "put the block into a module of its own so that its shortcut can be pruned")
            if not _ends_in(user, block, modules):
                raise InputError(f"block {block!r} goes on after the sum that {node.target!r} feeds; "
                                 "put the sum into a module of its own so that its channels can be masked there")
            return block
    return None


def _ends_in(node: fx.Node, block: str, modules: dict[str, nn.Module]) -> bool:
    """Whether nothing but elementwise operations lies between `node` and the output of `block`."""
    def elementwise(user: fx.Node) -> bool:
        if user.op == "call_module":
            return isinstance(modules[user.target], _ELEMENTWISE)
        name = user.target if isinstance(user.target, str) else user.target.__name__
        return name.rstrip("_") in ("relu", "relu6", "hardswish", "silu", "gelu", "dropout", "mul")

    inside = [user for user in node.users if block in user.meta.get("nn_module_stack", {})]
    return all(elementwise(user) and _ends_in(user, block, modules) for user in inside)


class Mask(nn.Module):
    """Parametrisation: parameter x mask, plus noise where a layer is to carry noise."""

    def __init__(self, parameter: torch.Tensor, noisy: bool = False):
        super().__init__()
        self.register_buffer("mask", torch.ones_like(parameter, requires_grad=False))
        self.register_buffer("noise", torch.zeros_like(parameter, requires_grad=False) if noisy else None)

    def forward(self, parameter: torch.Tensor) -> torch.Tensor:
        """The parameter as the network sees it."""
        masked = parameter * self.mask
        return masked if self.noise is None else masked + self.noise


def _score(name: str) -> Callable[..., torch.Tensor]:
    """The function of `gstlib.scores` that a score's name means; its argument names say what it needs."""
    return getattr(scores, name.replace("-", "_"))


def check_score(model: nn.Module, unit: Unit, score: str) -> None:
    """Raise `InputError` when `score` needs a scale and shift and no batch normalisation that has them follows the layer."""
    needs = inspect.signature(_score(score)).parameters
    if "gamma" in needs and (not unit.batch_norm or model.get_submodule(unit.batch_norm).weight is None):
        raise InputError(f"layer {unit.layer!r} is not followed by batch normalisation with a scale and shift, "
                         "so E[BN] is undefined there; use score 'l2' or 'l1'")


def _mask_maps(module: nn.Module, _inputs, output: torch.Tensor) -> torch.Tensor:
    return output * module.unit_mask.view(1, -1, 1, 1)


def _mask_features(module: nn.Module, _inputs, output: torch.Tensor) -> torch.Tensor:
    return output * module.unit_mask


def _note_activation(module: nn.Module, _inputs, output: torch.Tensor) -> None:
    """Every tenth training batch, bring the running mean (momentum .9) of each unit's rectified l1 norm up to date."""
    if module.training:
        module.activation_batches.add_(1)
        norm = output.detach().relu().float().movedim(1, -1).flatten(0, -2).sum(0)
        new = 0.9 * module.activation + 0.1 * norm
        module.activation.copy_(torch.where(module.activation_batches % 10 == 0, new, module.activation))


class MaskedLayer:
    """A layer whose units can be removed, with its batch normalisation and its block's shortcut.

    `structure` is "filter" (units are filters or rows) or "weight" (single
    weights).  `present` (bool, one entry a unit) is False for every unit that
    an event has already targeted.  Raises `InputError` where the layer
    cannot be scored by `score`.
    """

    def __init__(self, model: nn.Module, unit: Unit, structure: str, score: str, noisy: bool = False):
        check_score(model, unit, score)
        self.name, self.structure, self.score = unit.layer, structure, score
        self.module = model.get_submodule(unit.layer)
        self.batch_norm = model.get_submodule(unit.batch_norm) if unit.batch_norm else None
        # whose outputs are masked, because no parameter's mask makes them 0
        self._outputs = [model.get_submodule(unit.block)] if unit.block and structure == "filter" else []
        if self.batch_norm is not None and self.batch_norm.weight is None:
            self._outputs += [self.batch_norm] if structure == "filter" else []
            self.batch_norm = None  # no scale or shift to score or to mask
        self._masks = {"weight": self._attach(self.module, "weight", noisy)}
        if structure == "filter":
            if self.module.bias is not None:
                self._masks["bias"] = self._attach(self.module, "bias")
            if self.batch_norm is not None:
                self._masks["gamma"] = self._attach(self.batch_norm, "weight")
                self._masks["beta"] = self._attach(self.batch_norm, "bias")
            for module in self._outputs:
                if not hasattr(module, "unit_mask"):  # two layers may feed one sum
                    module.register_buffer("unit_mask", torch.ones(self.units, device=self.parameter.device))
                    module.register_forward_hook(_mask_maps if isinstance(self.module, nn.Conv2d) else _mask_features)
        if score == "activation":  # as what comes next sees the unit: behind normalisation and shortcut
            self._active = model.get_submodule(unit.block or unit.batch_norm or unit.layer)
            self._active.register_buffer("activation", torch.zeros(self.units, device=self.parameter.device))
            self._active.register_buffer("activation_batches", torch.zeros((), dtype=torch.int64, device=self.parameter.device))
            self._active.register_forward_hook(_note_activation)
        shape = (self.units,) if structure == "filter" else self.parameter.shape
        self.present = torch.ones(shape, dtype=torch.bool, device=self.parameter.device)

    @staticmethod
    def _attach(module: nn.Module, name: str, noisy: bool = False) -> Mask:
        mask = Mask(getattr(module, name), noisy)
        parametrize.register_parametrization(module, name, mask)
        return mask

    @property
    def units(self) -> int:
        """Number of filters, rows or neurons."""
        return self.parameter.shape[0]

    @property
    def size(self) -> int:
        """Number of units that the schedule's fraction refers to."""
        return self.units if self.structure == "filter" else self.parameter.numel()

    @property
    def parameter(self) -> torch.Tensor:
        """The stored weight, before masks and noise: what the optimiser updates."""
        return self.module.parametrizations.weight.original

    @property
    def weight_mask(self) -> torch.Tensor:
        """Mask of the weights, in their shape."""
        return self._masks["weight"].mask

    @property
    def noise(self) -> torch.Tensor | None:
        """Noise added to the weights in the forward pass, in their shape; None where the layer carries none."""
        return self._masks["weight"].noise

    @property
    def stored(self) -> list[torch.Tensor]:
        """All that is stored of each unit, units first: weight, bias, scale, shift and running statistics."""
        def original(module, name):
            masked = parametrize.is_parametrized(module, name)
            return module.parametrizations[name].original if masked else getattr(module, name, None)

        found = (original(module, name) for module in (self.module, self.batch_norm) if module is not None
                 for name in ("weight", "bias", "running_mean", "running_var"))
        return [tensor for tensor in found if tensor is not None]

    @torch.no_grad()
    def scores(self) -> torch.Tensor:
        """One score per unit (see `gstlib.scores`), from the parameters without noise."""
        function = _score(self.score)
        offered = {"weight": self.parameter * self.weight_mask}
        if self.score == "activation":
            offered["activation"] = self._active.activation
        if self.batch_norm is not None:
            offered |= {"gamma": self.batch_norm.weight, "beta": self.batch_norm.bias}
        return function(**{name: offered[name] for name in inspect.signature(function).parameters})

    def negative_scales(self) -> float:
        """How many of the filters present have a negative scale (gamma); nan without batch normalisation."""
        if self.batch_norm is None or self.structure != "filter":
            return float("nan")
        return float((self.batch_norm.weight[self.present] < 0).sum())

    @torch.no_grad()
    def remove(self, units: torch.Tensor, weights_only: bool = False) -> None:
        """Mask `units` (bool) for good; `weights_only` leaves bias, scale, shift and shortcut as they are."""
        masks = {"weight": self._masks["weight"]} if weights_only else self._masks
        for mask in masks.values():
            mask.mask[units] = 0
        if not weights_only:
            for module in self._outputs:
                module.unit_mask[units] = 0

    def parameters_removed(self) -> int:
        """How many of the layer's own parameters the masks hold at 0."""
        return sum(int((mask.mask == 0).sum()) for mask in self._masks.values())
