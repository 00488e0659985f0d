"""Masks: what is removed from a layer, as conditions by which the forward pass selects.

Parameters stay what they are, under their own names: no optimiser, averaging,
initialisation or checkpoint sees anything new.  Whole units are removed by
silencing outputs: behind the layer, and wherever a 0 would not stay 0
(`gstlib.network.surroundings`), a hook puts 0 in the units' place, so that their
gradient is exactly 0 too.  Single weights are removed where the layer reads
its weight.  A mask is a buffer that is 0 where everything is present; whatever
is above 0 is removed, so that an average over buffers (which torch cannot
take of bools) can only remove.
"""

import functools
import inspect
from collections.abc import Callable, Collection

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from gstlib import scores
from gstlib.convolution import Conv2d, Linear, in_bf16
from gstlib.errors import InputError
from gstlib.network.surroundings import MASKS, Surroundings, Unit


def _silence_removed(module: nn.Module, _inputs, output: torch.Tensor) -> torch.Tensor:
    return torch.where(module.removed_units > 0, 0, output)


def _silence_output(module: nn.Module, _inputs, output: torch.Tensor) -> torch.Tensor:
    return torch.where(module.silent_units > 0, 0, output)


def _silence_input(module: nn.Module, inputs: tuple) -> tuple:
    return torch.where(module.silent_inputs > 0, 0, inputs[0]), *inputs[1:]


HOOKS = {"removed_units": _silence_removed, "silent_units": _silence_output, "silent_inputs": _silence_input}


class Weighed:
    """What a layer's class is mixed with to compute with a weight of which parts are removed, held at 0 or noised."""

    def weight_in_force(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as the forward pass sees it."""
        if self.removed_weights is not None:
            weight = torch.where(self.removed_weights > 0, 0, weight)
        if self.held_units is not None:  # an average of some that were held and some that were not is not held
            weight = torch.where(self.held_units > 0.5, 0, weight)
        return weight if self.weight_noise is None else weight + self.weight_noise

    def __reduce_ex__(self, protocol):
        return _blank, (type(self).__bases__[1],), self.__dict__


class _WeighedConv(Weighed):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, self.weight_in_force(weight), bias)


class _WeighedLinear(Weighed):
    def forward(self, x):
        return in_bf16(F.linear, x, self.weight_in_force(self.weight), self.bias)


class _WeighedTransposed(Weighed):
    def forward(self, x, output_size=None):
        n = len(self.kernel_size)
        padding = self._output_padding(x, output_size, self.stride, self.padding, self.kernel_size, n, self.dilation)
        return getattr(F, f"conv_transpose{n}d")(x, self.weight_in_force(self.weight), self.bias, self.stride, self.padding,
                                                 padding, self.groups, self.dilation)


_WEIGHED = {Linear: _WeighedLinear, nn.Linear: _WeighedLinear, nn.Conv1d: _WeighedConv, Conv2d: _WeighedConv,
            nn.Conv2d: _WeighedConv, nn.Conv3d: _WeighedConv, nn.ConvTranspose1d: _WeighedTransposed,
            nn.ConvTranspose2d: _WeighedTransposed, nn.ConvTranspose3d: _WeighedTransposed}


@functools.cache  # one class for all networks, so that code compiled for one serves the others
def _weighed(kind: type) -> type | None:
    """`kind` with `Weighed` mixed in; None for a class that has a forward pass of its own."""
    for base, mixin in _WEIGHED.items():
        if issubclass(kind, base) and all(getattr(kind, part, None) is getattr(base, part, None)
                                          for part in ("forward", "_conv_forward")):
            return type(kind.__name__, (mixin, kind), {})
    return None


def _blank(kind: type) -> nn.Module:
    weighed = _weighed(kind)
    return weighed.__new__(weighed)


def _score(name: str) -> Callable[..., torch.Tensor]:
    """The function of `gstlib.scores` that a score's name means."""
    return getattr(scores, name.replace("-", "_"))


def needs(score: str) -> Collection[str]:
    """What a score is computed from, of weight, gamma, beta and activation: its function's argument names."""
    return inspect.signature(_score(score)).parameters


def _places(module: nn.Module) -> set[tuple[int, int]]:
    """Where a module's own parameters lie, by storage, so that what is tied by .data is seen too."""
    return {(p.untyped_storage()._cdata, p.storage_offset()) for p in module._parameters.values() if p is not None}


def check_layer(around: Surroundings, name: str, structure: str, score: str, effect: str) -> Unit:
    """The surroundings of layer `name`; raises `InputError` where it cannot be scored or masked as asked for."""
    model, module = around.model, around.model.get_submodule(name)
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        raise InputError(f"the weight of layer {name!r} is computed anew in every pass (weight_norm, spectral_norm, "
                         "torch.nn.utils.prune); make it a plain parameter again first")
    if module.weight.is_complex():
        raise InputError(f"layer {name!r} has complex weights, for which no score and no mask is made")
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and module.groups > 1:
        raise InputError(f"layer {name!r} is a transposed convolution in groups, which cannot be pruned")
    sharing = [other for other, m in model.named_modules() if m is not module and _places(m) & _places(module)]
    if sharing or any(node.op == "get_attr" and node.target.startswith(f"{name}.")
                      for graph in around.graphs for node in graph.nodes):
        raise InputError(f"layer {name!r} shares its parameters with {sharing[0] if sharing else 'the forward pass'!r}, "
                         "where they would not be pruned")
    norms = around.batch_norms(name)
    if "gamma" in needs(score) and (
            not norms or any(model.get_submodule(norm).weight is None for norm in norms)):
        raise InputError(f"layer {name!r} is not followed by batch normalisation with a scale and shift, "
                         "so E[BN] is undefined there; use score 'l2' or 'l1'")
    if structure == "filter" and effect == "remove":
        return around.unit(name)
    own = "forward" in vars(module) or not isinstance(module, Weighed) and _weighed(type(module)) is None
    if own and effect != "gaussian":
        raise InputError(f"layer {name!r} is a {type(module).__name__}, whose forward pass is its own; "
                         "only whole filters can be removed from it")
    return Unit(name, norms)


def default_layers(around: Surroundings, number: int, structure: str, score: str, effect: str) -> list[str]:
    """The last `number` convolutions, or linear layers where there are none.

    Where some layers are batch-normalised only those count (others are gates and classifiers).  Layers that cannot be
    pruned by units (output heads, gates) are left alone, and of those that feed the same sum all but the one with the
    most layers before it, which leaves projection shortcuts out.
    """
    names = [name for name in around.layers if not isinstance(around.model.get_submodule(name), nn.Linear)] or around.layers
    normalised = [name for name in names if around.batch_norms(name)]
    if "gamma" in needs(score) and not normalised:
        raise InputError(f"{around.name} has no batch normalisation, so E[BN] is undefined; use score 'l2' or 'l1'")
    taken, refused = [], []
    for name in reversed(normalised or names):
        try:
            check_layer(around, name, structure, score, effect)
            sums = around.unit(name).sums
        except InputError as error:
            refused.append(str(error))
            continue
        rival = next((other for other in taken if sums & around.unit(other).sums), None)
        if rival is not None and around.depth(name) >= around.depth(rival):
            taken[taken.index(rival)] = name
        elif rival is None:
            if len(taken) == number:
                break
            taken.append(name)
    if len(taken) < number:
        left = f": {', '.join(reversed(taken))}" if taken else ""
        raise InputError(f"the schedule has {number} layers, but only {len(taken)} can be pruned by {score!r}{left}"
                         + "".join(f"; {reason}" for reason in refused[:3]))
    return sorted(taken, key=around.layers.index)


def _note_activation(module: nn.Module, _inputs, output: torch.Tensor, axis: int) -> None:
    """Every tenth training batch, bring the running mean (momentum .9) of each unit's rectified l1 norm up to date."""
    if module.training:
        module.active_batches.add_(1)
        norm = output.detach().relu().float().movedim(axis, -1).flatten(0, -2).sum(0)
        new = 0.9 * module.active_units + 0.1 * norm
        module.active_units.copy_(torch.where(module.active_batches % 10 == 0, new, module.active_units))


def unit_axis(module: nn.Module) -> int:
    """Along which axis of its weight a layer's units lie; what it reads lies along the other of the first two."""
    return 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0


def along(values: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
    """`values` (n,) in a shape that broadcasts over `weight` along `axis`."""
    return values.view([-1 if d == axis else 1 for d in range(weight.dim())])


class MaskedLayer:
    """A layer whose units can be removed, with whatever must be silent behind it.

    `structure` is "filter" (units are filters or rows) or "weight" (single
    weights); `effect`, and whether it has units `held` for a time, say which
    masks the layer needs.  All state lies in the network's buffers.
    """

    def __init__(self, model: nn.Module, unit: Unit, structure: str, score: str, effect: str = "remove", held: bool = False):
        self.name, self.structure, self.score = unit.layer, structure, score
        self.module = model.get_submodule(unit.layer)
        self.batch_norms = [model.get_submodule(norm) for norm in unit.batch_norms]
        self._axis = unit_axis(self.module)
        self._undo: list[Callable[[], object]] = []
        weight = self.module.weight
        self._gone_by = ["removed_units", "removed_weights"]  # masks that say what is gone
        if not unit.points and structure == "filter" and effect != "remove-weights":
            self._gone_by.append("targeted_units")  # another Pruner's effect that passes leaves units to be removed
        masked = any(self._mask(name) is not None for name in self._gone_by)
        self.before = self.gone if masked else 0  # by others, when these masks were made
        self._points = [(model.get_submodule(path), name, labels) for (path, name), labels in unit.points.items()]
        self._carried = [(path, model.get_submodule(path), name) for path, name in unit.points]
        for module, name, labels in self._points:
            before = module._buffers.get(name)
            shape = labels.shape if before is None else torch.broadcast_shapes(labels.shape, before.shape)
            if before is None or before.shape != shape:  # other layers' units may lie there in another shape
                self._buffer(module, name, torch.zeros(shape, device=weight.device) + (0 if before is None else before))
            if HOOKS[name] not in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                hook = HOOKS[name]
                self._undo.append((module.register_forward_pre_hook if name == "silent_inputs" else
                                   module.register_forward_hook)(hook).remove)
        if not self._points:
            weights = torch.zeros_like(weight)
            masks = {"removed_weights": weights}
            if "targeted_units" in self._gone_by:
                masks = {"targeted_units": torch.zeros(self.units, device=weight.device)}
            if effect == "gaussian-transient":
                masks["weight_noise"] = weights
            elif effect.startswith("zero") and held:
                masks["held_units"] = along(torch.zeros(self.units, device=weight.device), weight, self._axis)
            if masks.keys() != {"targeted_units"}:
                self._weigh()
            self._carried = [(self.name, self.module, name) for name in masks]
            for name, value in masks.items():
                if self._mask(name) is None:
                    self._buffer(self.module, name, value)
        if "activation" in needs(score):
            # as what comes next sees the unit: behind normalisation and, where a sum was silenced, the shortcut; not the
            # sigmoid of x * sigmoid(x)
            units, axis = torch.arange(1, self.units + 1), -len(getattr(self.module, "kernel_size", ())) - 1
            spoken = [(module, units, axis) for module in (self.module, *self.batch_norms)]
            spoken += [(module, labels.flatten(), -labels.dim())
                       for key, (module, name, labels) in zip(unit.points, self._points)
                       if name != "silent_inputs" and key not in unit.gates and labels.shape[:1] == units.shape
                       and torch.equal(labels.flatten().sort().values, units)]
            self._active, order, axis = spoken[-1]
            self._places = order.argsort()  # of each unit there
            path = next(path for path, module in model.named_modules() if module is self._active)
            self._carried.append((path, self._active, "active_units"))
            if "active_units" not in self._active._buffers:  # of two layers that feed one sum the mean is one
                self._buffer(self._active, "active_units", torch.zeros(self.units, device=weight.device))
                self._buffer(self._active, "active_batches", torch.zeros((), dtype=torch.int64, device=weight.device))
                hook = functools.partial(_note_activation, axis=axis)
                self._undo.append(self._active.register_forward_hook(hook).remove)

    def _buffer(self, module: nn.Module, name: str, value: torch.Tensor | None) -> None:
        before = dict(module._buffers)
        module.register_buffer(name, value)
        self._undo.append(lambda: (module._buffers.clear(), module._buffers.update(before)))

    def _weigh(self) -> None:
        kind = type(self.module)
        if not issubclass(kind, Weighed):
            self.module.__class__ = _weighed(kind)
            self._undo.append(lambda: setattr(self.module, "__class__", kind))
            for name in ("removed_weights", "held_units", "weight_noise"):
                self._buffer(self.module, name, None)

    def check_carried(self, model: nn.Module) -> None:
        """Raise `InputError` unless `model` still has all that the masks consist of."""
        modules = dict(model.named_modules(remove_duplicate=False))
        for path, module, name in self._carried:
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            hook = HOOKS.get(name)
            if modules.get(path) is not module or name not in module._buffers or hook and hook not in hooks:
                raise InputError(f"the masks of layer {self.name!r} are gone from {path!r}: it was replaced, "
                                 "its hooks were removed, or another Pruner has finished; make another one")

    def detach(self) -> None:
        """Take the masks off again, as if this layer had never been made."""
        while self._undo:
            self._undo.pop()()

    def keep(self) -> None:
        """Forget how to take the masks off: what stands ready for it holds old buffers and cannot be pickled."""
        self._undo.clear()

    @property
    def units(self) -> int:
        """Number of filters, rows or neurons."""
        return self.module.weight.shape[self._axis]

    @property
    def size(self) -> int:
        """Number of units that the schedule's fraction refers to."""
        return self.units if self.structure == "filter" else self.module.weight.numel()

    @property
    def parameter(self) -> torch.Tensor:
        """The stored weight, units along its first axis: what the optimiser updates."""
        return self.module.weight.detach().movedim(self._axis, 0)

    @property
    def stored(self) -> list[torch.Tensor]:
        """All that is stored of each unit, units first: weight, bias, scale, shift and running statistics."""
        rest = [getattr(module, name, None) for module in (self.module, *self.batch_norms)
                for name in ("weight", "bias", "running_mean", "running_var")][1:]
        return [self.parameter, *(tensor.detach() for tensor in rest if tensor is not None)]

    def _mask(self, name: str) -> torch.Tensor | None:
        """One of the layer's own masks, units first; None where it has none of that name."""
        mask = self.module._buffers.get(name)
        return mask.movedim(self._axis, 0) if mask is not None and mask.dim() == self.module.weight.dim() else mask

    @property
    def noise(self) -> torch.Tensor | None:
        """Noise added to the weights in the forward pass, units first; None where the layer carries none."""
        return self._mask("weight_noise")

    @property
    def held(self) -> torch.Tensor | None:
        """Above one half for each unit whose weights are held at 0 for a time; None where none ever are."""
        return None if (mask := self._mask("held_units")) is None else mask.view(-1)

    @property
    def present(self) -> torch.Tensor:
        """False for every unit that is removed or that an event has targeted (bool, one entry a unit)."""
        gone = torch.zeros(self.parameter.shape, dtype=torch.bool, device=self.parameter.device)
        for name in self._gone_by:
            if (mask := self._mask(name)) is not None:
                gone |= (mask > 0).view(mask.shape if mask.dim() == gone.dim() else (-1, *[1] * (gone.dim() - 1)))
        return ~(gone if self.structure == "weight" else gone.flatten(1).all(1))

    @torch.no_grad()
    def scores(self) -> torch.Tensor:
        """One score per unit (see `gstlib.scores`), from the parameters without noise; with several norms their mean."""
        function, needed = _score(self.score), needs(self.score)
        if "gamma" in needed:
            return torch.stack([function(norm.weight, norm.bias) for norm in self.batch_norms]).mean(0)
        if "activation" in needed:
            return function(self._active.active_units)[self._places]
        weight, removed = self.parameter, self._mask("removed_weights")
        return function(weight if removed is None else weight.where(removed <= 0, 0))

    def negative_scales(self) -> float:
        """How many of the filters present have a negative scale (gamma); nan without batch normalisation."""
        scales = [norm.weight for norm in self.batch_norms if norm.weight is not None]
        if not scales or self.structure != "filter":
            return float("nan")
        return float(sum((scale[self.present] < 0).sum() for scale in scales))

    @torch.no_grad()
    def remove(self, units: torch.Tensor) -> None:
        """Mask `units` (bool) for good: all that they say, or their weights alone, as the layer was made."""
        for module, name, labels in self._points:
            getattr(module, name).masked_fill_(chosen(labels, units), 1)
        if not self._points:
            self._mask("removed_weights")[units] = 1

    @torch.no_grad()
    def target(self, units: torch.Tensor) -> None:
        """Note that `units` (bool) have been disturbed."""
        self._mask("targeted_units")[units] = 1

    @property
    def gone(self) -> int:
        """How many units are not present."""
        return self.size - int(self.present.sum())

    def state(self) -> list[torch.Tensor]:
        """Every tensor that a strike on this layer may change."""
        own = [buffer for buffer in self.module._buffers.values() if buffer is not None]
        return [*self.stored, *own, *(getattr(module, name) for module, name, _ in self._points)]

    def parameters_removed(self) -> int:
        """How many of the layer's own parameters, its norms' included, the masks hold at 0."""
        removed, total = torch.zeros(self.parameter.shape, dtype=torch.bool, device=self.parameter.device), 0
        if self._mask("removed_units") is not None:
            units = (self._mask("removed_units") > 0).view(-1)
            removed[units] = True
            scaled = sum(norm.weight is not None for norm in self.batch_norms)
            total = int(units.sum()) * ((self.module.bias is not None) + 2 * scaled)
        if self._mask("removed_weights") is not None:
            removed |= self._mask("removed_weights") > 0
        if self.held is not None:
            removed[self.held > 0.5] = True
        return total + int(removed.sum())


def chosen(labels: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Where `labels` (from 1, 0 for nobody's) name one of `units` (bool)."""
    return torch.cat([units.new_zeros(1), units])[labels.to(units.device)]


def compile_anew() -> None:
    """Have torch forget what it compiled before there were masks: it does not look whether hooks have come.

    The passes of `gstlib.training.engine`, dear to compile, are kept: they are of copies with masks.
    """
    codes = [code() for code in torch._dynamo.convert_frame.input_codes.seen]
    if any(code is not None and code.co_name != "_pass_with" for code in codes):
        torch._dynamo.reset()


@torch.no_grad()
def unmask(model: nn.Module, zeros: dict[str, torch.Tensor]) -> None:
    """Put `zeros` into the parameters and take every mask off the network."""
    for name, where in zeros.items():
        model.get_parameter(name).masked_fill_(where.to(model.get_parameter(name).device), 0)
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items()
                        if getattr(hook, "func", hook) in (*HOOKS.values(), _note_activation)]:
                del hooks[key]
        if isinstance(module, Weighed):
            module.__class__ = type(module).__bases__[1]
        for name in MASKS:
            module._buffers.pop(name, None)
