"""The smaller network: removed channels cut out of a plain one, where nothing else speaks in them.

Which channels must be cut together is what torch-pruning finds.  Such a group
is cut where every layer that reads it reads a removed unit there
(`gstlib.network.surroundings`), and the cut is tried on invented numbers before it is
believed.
"""

import copy
import warnings
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from gstlib.errors import InputError
from gstlib.errors import plain as said
from gstlib.network.masking import chosen
from gstlib.network.proof import close
from gstlib.network.surroundings import Surroundings, aside


class Compact(NamedTuple):
    """A smaller network and what it saves.

    `model`: the network, in its own classes (its state dict has other shapes: keep it with `torch.save(model)`).
    `parameters`, `operations`: numbers before and after, operations those of one forward pass of the example batch
    (`torch.utils.flop_counter`).  `cut`, `left`: how many removed units were cut out, and how many stay as zeros.
    """

    model: nn.Module
    parameters: tuple[int, int]
    operations: tuple[int, int]
    cut: int
    left: int


def torch_pruning():
    """The package that finds coupled channels; raises `InputError` where it is not installed."""
    try:
        import torch_pruning as package
    except ImportError as error:
        raise InputError("a compact network needs torch-pruning; in the checkout it is installed with: "
                         "pip install -e '.[compact]'") from error
    return package


class Compaction:
    """What a masked network says of its silent channels, taken before the masks go; `of(plain)` cuts them out."""

    def __init__(self, around: Surroundings, zeros: dict[str, torch.Tensor]):
        torch_pruning()  # before anything changes
        try:
            copy.deepcopy(around.model)
        except Exception as error:
            raise InputError(f"a compact network is a copy, but {around.name} cannot be copied "
                             f"({said(error)})") from error
        self.around, self.zeros = around, zeros
        self.removed = {path: m._buffers["removed_units"].cpu().view(-1) > 0 for path, m in around.model.named_modules()
                        if "removed_units" in m._buffers}
        self.silent: dict[str, torch.Tensor] = {}  # layer -> the channels of its input that are removed units
        for layer, units in self.removed.items():
            for path, labels in around.unit(layer).readers.items():
                self.silent[path] = chosen(labels, units) | self.silent.get(path, False)

    def of(self, plain: nn.Module) -> Compact:
        """The network `plain`, which is left as it is, without the channels that can be cut."""
        with aside(plain):
            plain.eval()
            bare = copy.deepcopy(plain).cpu()  # without the owner's hooks
        trials = []
        for tensors, inputs in self.around.louder:
            network = copy.deepcopy(bare)
            with torch.no_grad():
                for name, x in (*network.named_parameters(), *network.named_buffers()):  # other zeros need not stay so
                    x.data = tensors[name].masked_fill(self.zeros.get(name, torch.tensor(False)), 0)
                trials.append((network, inputs, network(*inputs)))

        def same(layers: list[str]) -> bool:
            try:
                for network, inputs, expected in trials:
                    tried = copy.deepcopy(network)
                    self._cut(tried, layers)
                    with torch.no_grad():
                        if not close(expected, tried(*inputs), 1e-4):
                            return False
                return True
            except Exception:  # what torch-pruning cannot cut may end in any error
                return False

        layers = list(self.removed)
        if not same(layers):
            layers = []
            for layer in self.removed:
                layers += [layer] if same([*layers, layer]) else []
        small = copy.deepcopy(plain).cpu()
        small.eval()
        before, gone = self._counted(small), self._cut(small, layers) if layers else {}
        after, total = self._counted(small), sum(int(units.sum()) for units in self.removed.values())
        cut = sum(int(self.removed[path][idxs].sum()) for path, idxs in gone.items() if path in self.removed)
        for ours, theirs in zip(small.modules(), plain.modules()):  # each in its own mode: norms may be frozen
            ours.training = theirs.training
        return Compact(small.to(next(plain.parameters()).device), *zip(before, after), cut, total - cut)

    def _inputs(self, model: nn.Module) -> tuple:
        """The example in `model`'s precision."""
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        return tree_map(lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x,
                        self.around.inputs)

    def _counted(self, model: nn.Module) -> tuple[int, int]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*self._inputs(model))
        return sum(p.numel() for p in model.parameters()), counter.get_total_flops()

    def _cut(self, model: nn.Module, layers: list[str]) -> dict[str, list[int]]:
        """Cut the silent channels of `layers` out of `model`; layer -> the outputs that it lost."""
        trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        paths, cuts, gone = {module: path for path, module in model.named_modules()}, [], {}
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            graph = torch_pruning().DependencyGraph().build_dependency(
                model.requires_grad_(True), self._inputs(model), verbose=False)
            for layer in layers:
                module, units = model.get_submodule(layer), len(self.removed[layer])
                prune = graph.get_pruner_of_module(module).prune_out_channels
                removed, heard = torch.zeros(units, dtype=torch.bool), torch.zeros(units, dtype=torch.bool)
                group = list(graph.get_pruning_group(module, prune, range(units))) if layer not in gone else []
                coupled = {paths.get(item.dep.target.module) for item in group}
                for item in group:
                    path, roots = paths.get(item.dep.target.module), torch.tensor(item.root_idxs)
                    if not graph.is_out_channel_pruning_fn(item.dep.handler):
                        heard[roots[~self.silent[path][item.idxs]] if path in self.silent else slice(None)] = True
                    elif path in self.removed:
                        removed[roots[self.removed[path][item.idxs]]] = True
                        # those who read them in training alone would not be cut
                        heard |= bool(self.around.unit(path).readers.keys() - coupled)
                idxs = (removed & ~heard).nonzero().flatten().tolist()
                idxs = idxs[len(idxs) == units:]  # one must stay
                if idxs:
                    cuts.append((module, prune, idxs))
                    gone |= {paths[item.dep.target.module]: item.idxs for item in graph.get_pruning_group(module, prune, idxs)
                             if graph.is_out_channel_pruning_fn(item.dep.handler) and item.dep.target.module in paths}
            for cut in cuts:  # only now: a cut shifts the channels of what reads it
                graph.get_pruning_group(*cut).prune()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name]).grad = None
        return gone

