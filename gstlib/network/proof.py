"""What masks promise, tried on invented numbers: that removed units are silent, and that a plain network is the same."""

import itertools
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from gstlib.errors import InputError
from gstlib.errors import plain as said
from gstlib.network.masking import HOOKS, Weighed, along, chosen, unit_axis
from gstlib.network.surroundings import Surroundings, Unit, aside


@torch.no_grad()
def prove(around: Surroundings, units: Sequence[Unit]) -> None:
    """Raise `InputError` unless removed units are silent in a forward pass on invented numbers and on the network's own, in
    evaluation mode and, where the batch allows it, in training mode; changes nothing."""
    if not any(unit.points for unit in units):
        return
    model = around.model
    functions = {node.target for graph in around.graphs for node in graph.nodes if node.op == "call_function"}
    wrapped = any(not (getattr(f, "__module__", None) or "torch").startswith(("torch", "_operator", "builtins", "math"))
                  for f in functions)  # may branch on how loud its values are
    modes = [(graph, training, *trial) for training in (False, True) for graph in around.graphs
             if graph.training == training or len(around.graphs) == 1
             for trial in (around.louder if wrapped else around.trials)]
    for graph, training, tensors, inputs in modes:
        with aside(model):
            model.train(training)
            try:
                functional_call(model, {name: x.clone() for name, x in tensors.items()}, inputs)
            except Exception as error:
                if training:  # a batch too small for its statistics
                    continue
                raise InputError(f"{around.name} cannot be run on trial ({said(error)}); "
                                 "give example=, a batch that it takes") from error
        tensors, failed = dict(tensors), []
        for unit in units:
            for (path, name), labels in unit.points.items():
                half = torch.arange(1, int(labels.max()) + 1) % 2 == 1
                own = tensors.get(f"{path}.{name}", torch.zeros(model.get_submodule(path)._buffers[name].shape))
                tensors[f"{path}.{name}"] = own.masked_fill(chosen(labels, half), 1)

        def check(unit, path, number, end, labels):
            count = iter(range(10**9))

            def look(_module, inputs, output=None):
                value = inputs[0] if end == "input" else output
                if next(count) == number and isinstance(value, torch.Tensor) and (
                        value.masked_select((labels % 2 == 1).expand(value.shape)) != 0).any():
                    failed.append((unit, path, end))
            module = model.get_submodule(path)
            module.register_forward_pre_hook(look) if end == "input" else module.register_forward_hook(look)

        with aside(model, keep=HOOKS.values()):
            model.train(training)
            for unit in units:
                for expected in unit.expected[graph.training]:
                    check(unit, *expected)
            functional_call(model, {name: x.clone() for name, x in tensors.items()}, inputs)
        for unit, path, end in failed[:1]:
            raise InputError(f"layer {unit.layer!r} cannot be pruned by units: "
                             f"they would not be silent in the {end} of {path!r}")


class _Zeros:
    """Which entries of a network's parameters must be 0 for it to compute without masks what it computes with them.

    Where a norm's scale and shift cannot give the silence (behind a sum, an
    activation), `joined` also zeroes the other layers that feed the sum, and
    `readers` the weights by which the next layers read the silent units.
    """

    def __init__(self, around: Surroundings, units: Sequence[Unit], joined: bool, readers: bool):
        self.model, self.entries = around.model, {}
        self.unexpressed: list[str] = []  # layers
        for path, module in self.model.named_modules():
            if isinstance(module, Weighed) and module.removed_weights is not None:
                self.mark(path, "weight", module.removed_weights > 0)
        others = []
        for name in around.layers if joined else ():
            with suppress(InputError):  # of a layer that could not be pruned nothing is silenced
                others.append(around.unit(name))
        for unit in units:
            removed = self.mask(unit.layer, "removed_units").view(-1)
            self.rows(unit, removed)
            for key, labels in unit.points.items():
                if key[1] != "removed_units" and not self.scaled(*key, chosen(labels, removed)):
                    self.unexpressed.append(unit.layer)
                    for other in others:
                        if key in other.points:
                            theirs, silent = torch.broadcast_tensors(other.points[key], self.mask(*key))
                            every = other.points[other.layer, "removed_units"].flatten()
                            self.rows(other, torch.isin(every, theirs[silent]))
            for path, labels in unit.readers.items() if readers and unit.layer in self.unexpressed else ():
                module = self.model.get_submodule(path)
                self.mark(path, "weight", along(chosen(labels, removed), module.weight, 1 - unit_axis(module)))

    def mask(self, path: str, name: str) -> torch.Tensor:
        return self.model.get_submodule(path)._buffers[name].cpu() > 0

    def mark(self, path: str, name: str, where: torch.Tensor) -> None:
        parameter = self.model.get_submodule(path)._parameters.get(name)
        if parameter is not None:
            key = f"{path}.{name}"
            self.entries[key] = self.entries.get(key, False) | where.cpu().expand(parameter.shape)

    def rows(self, unit: Unit, removed: torch.Tensor) -> None:
        """A layer's units, and theirs in the norms behind it."""
        module = self.model.get_submodule(unit.layer)
        self.mark(unit.layer, "weight", along(removed, module.weight, unit_axis(module)))
        self.mark(unit.layer, "bias", removed)
        for (path, name), labels in unit.points.items():
            if name == "silent_units":
                self.scaled(path, name, chosen(labels, removed))

    def scaled(self, path: str, name: str, silent: torch.Tensor) -> bool:
        """Zero a module's scale and shift (or its rows) where its output is `silent`; whether it has them."""
        module = self.model.get_submodule(path)
        weight = module._parameters.get("weight")
        if name != "silent_units" or weight is None:
            return False
        if silent.numel() == len(weight):  # a norm by channels, a depthwise convolution
            silent = along(silent.flatten(), weight, 0)
        elif silent.dim() > weight.dim() or any(n not in (1, m) for n, m in zip(silent.shape[::-1], weight.shape[::-1])):
            return False
        self.mark(path, "weight", silent)
        bias = module._parameters.get("bias")
        self.mark(path, "bias", silent if bias is None or bias.dim() == weight.dim() else silent.flatten())
        return True


def zeros_for_plain(around: Surroundings) -> dict[str, torch.Tensor]:
    """Parameter -> which of its entries must be 0 for the network to have the same outputs without its masks.

    Tried on invented numbers before it is believed: to the last bit, since a
    difference that is rounding here need not be among smaller numbers, or else
    within rounding.  Raises `InputError` where no zeros do it: an identity
    shortcut carries a silenced channel on into further sums.
    """
    model = around.model
    units = [around.unit(name) for name, m in model.named_modules() if "removed_units" in m._buffers]  # of either mode
    for tolerance, readers, joined in itertools.product((0.0, 1e-5), (False, True), (False, True)):
        zeros = _Zeros(around, units, joined, readers)
        if not units or _same_outputs(around, zeros, tolerance):
            break
    else:
        names = ", ".join(repr(name) for name in dict.fromkeys(zeros.unexpressed))
        raise InputError(f"no plain network has the outputs of this one: behind {names} removed channels are silenced where "
                         "no parameter could do it, in a sum whose shortcut goes on into another or before a norm across "
                         "channels; keep the masks (state_dict and copies carry them)")
    return zeros.entries


def _same_outputs(around: Surroundings, zeros: _Zeros, tolerance: float) -> bool:
    """Whether the network with these zeros has the outputs of the masked one, in evaluation and in training."""
    model = around.model
    masks = {name: buffer.cpu() for name, buffer in model.named_buffers()
             if name.split(".")[-1].startswith(("removed_", "silent_"))}
    for tensors, inputs in around.louder:
        plain = {name: tensor.masked_fill(zeros.entries[name], 0) if name in zeros.entries else tensor
                 for name, tensor in tensors.items()}
        for training in (False, True):
            outputs = []
            for values, hooks in ((tensors | masks, HOOKS.values()), (plain, ())):
                with aside(model, keep=hooks):
                    model.train(training)
                    try:
                        outputs.append(functional_call(model, {k: v.clone() for k, v in values.items()}, inputs))
                    except Exception:  # a batch too small for training's statistics
                        if not training:
                            raise
                        outputs.append(())
            if not close(*outputs, tolerance):
                return False
    return True


def close(one, other, tolerance: float) -> bool:
    """Whether two outputs are equal within this share of the largest number; what is infinite in one is so in both."""
    def alike(x: torch.Tensor, y: torch.Tensor) -> bool:
        if not x.is_floating_point():
            return torch.equal(x, y)
        sound = x.isfinite()
        apart = (x - y).abs()[sound]
        return torch.equal(sound, y.isfinite()) and (not len(apart) or bool(apart.max() <= tolerance * x[sound].abs().max()))

    leaves = [tree_leaves(one), tree_leaves(other)]
    return len(leaves[0]) == len(leaves[1]) and all(alike(x, y) for x, y in zip(*leaves) if isinstance(x, torch.Tensor))
