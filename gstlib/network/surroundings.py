"""What lies behind a layer: where the network must be silenced so that a removed unit is 0 until other layers read it.

The forward pass is traced and followed from the layer on.  Every value on the
way carries *labels*: for each of its entries the unit (from 1) that it belongs
to, 0 for none.  What an operation does to labels and to zeros is not looked
up but tried, on invented numbers: NaN in a unit's entries shows where the
unit goes, 0 there shows whether silence lasts.  So any norm, activation, sum
or reshaping is judged by what it does, and one that blurs units is refused by
name.
"""

import inspect
import itertools
import operator
import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import fx, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from gstlib.errors import InputError, plain

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# each entry of the output is still its unit's, though others' statistics enter
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d,
          F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm, F.rms_norm, F.local_response_norm, F.normalize,
          torch.batch_norm, torch.instance_norm, torch.group_norm, torch.layer_norm, torch.rms_norm)
# read units by a linear map first, in which 0 says nothing, and go on in ways of their own
_READERS = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear, F.scaled_dot_product_attention, F.bilinear,
            F.multi_head_attention_forward)
# buffers that masks are, above 0 where something is removed or disturbed, and what scores keep (`gstlib.network.masking`)
MASKS = ("removed_units", "silent_units", "silent_inputs", "removed_weights", "targeted_units", "held_units", "weight_noise",
         "active_units", "active_batches")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(name for name in vars(torch_module) if name.startswith("_global_") and name.endswith("_hooks"))
_SIZES = dict.fromkeys((32, 28, 64, 224, 16, 8, *range(1, 65), 96, 128, 192, 256, 299))
_SEEDED = torch.Generator().manual_seed(0).get_state()


@contextmanager
def seeded() -> Iterator[None]:
    """Context in which the CPU's generator draws the same numbers every time; no other generator is touched."""
    before = torch.get_rng_state()
    torch.set_rng_state(_SEEDED)
    try:
        yield
    finally:
        torch.set_rng_state(before)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Context (or decorator) in which new tensors lie where networks are judged, whatever device is the default."""
    with torch.device("cpu"):
        yield


def _own(value, known: dict):
    """A copy of what a forward pass may change in place: tensor, generator, collection and what is in it."""
    if id(value) not in known:
        known[id(value)] = value
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            known[id(value)] = value.clone()
        elif isinstance(value, torch.Generator):
            known[id(value)] = value.clone_state()
        elif type(value) in (list, set, dict, OrderedDict):
            twin = known[id(value)] = value.copy()
            for key in {list: range(len(value)), set: ()}.get(type(value), value):
                twin[key] = _own(value[key], known)
    return known[id(value)]


@contextmanager
def aside(model: nn.Module, keep=()) -> Iterator[None]:
    """Context in which no hooks run but `keep` and torch's own (weight_norm), nothing is compiled, the
    global generators of torch, NumPy and Python may be used, and whatever a module has but parameters may be
    changed: all of it is put back."""
    before, known = [(m, dict(vars(m))) for m in model.modules()], {}
    hooks = {name: getattr(torch_module, name) for name in _GLOBAL_HOOKS}
    states = random.getstate(), np.random.get_state()
    try:
        for name, value in hooks.items():
            setattr(torch_module, name, type(value)())
        random.seed(0)
        np.random.seed(0)
        with seeded(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for m, attributes in before:
                vars(m).update((name, _own(value, known)) for name, value in attributes.items())
                vars(m)["_compiled_call_impl"] = None
                for name in _HOOKS:
                    ours = {key: hook for key, hook in attributes[name].items()
                            if hook in keep or type(hook).__module__.startswith("torch.nn.utils")}
                    vars(m)[name] = type(attributes[name])(ours)
            yield
    finally:
        for name, value in hooks.items():
            setattr(torch_module, name, value)
        for m, attributes in before:
            vars(m).clear()
            vars(m).update(attributes)
        random.setstate(states[0])
        np.random.set_state(states[1])


@dataclass
class Call:
    """A module call of a traced forward pass: its first argument, what it returns, and who reads these inside it."""

    path: str
    taken: fx.Node | None
    readers: list[fx.Node]
    given: fx.Node | None
    inside: list[fx.Node]


class _Tracer(fx.Tracer):
    """Follows a forward pass without looking into layers, subclasses of torch's own included, and notes module calls."""

    def __init__(self, example: tuple | None):
        super().__init__()
        self.calls: list[Call] = []
        self._given = iter(example or ())

    def proxy(self, node):
        """An argument that is given as no tensor, or left at such a default, is that: a forward pass branches on it."""
        if node.op == "placeholder":
            none = (node, (), {})[node.target.count("*")]  # *args and **kwargs are empty
            value = next(self._given, node.args[0] if node.args else none)
            if value is None or isinstance(value, (bool, int, float, str, tuple, list, dict)) and not _tensors(value):
                return value
        return super().proxy(node)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*LAYERS, *BATCH_NORMS, nn.MaxPool2d)) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m, forward, args, kwargs):
        if isinstance(m, torch._dynamo.OptimizedModule):
            return m._orig_mod(*args, **kwargs)
        if all(m is not known for known in self.root.modules()):  # made on the way: a slice of a sequence, nn.ReLU()(x)
            return forward(*args, **kwargs)
        first = args[0].node if args and isinstance(args[0], fx.Proxy) else None
        others: list = []
        fx.node.map_aggregate((args[1:], kwargs), others.append)
        if any(isinstance(other, fx.Proxy) and other.node is first for other in others):
            first = None
        before = set(first.users) if first else set()
        out = super().call_module(m, forward, args, kwargs)
        given = out.node if isinstance(out, fx.Proxy) else None
        self.calls.append(Call(self.path_of_module(m), first, [u for u in first.users if u not in before] if first else [],
                               given, list(given.users) if given else []))
        return out


@dataclass
class Unit:
    """A prunable layer's surroundings.

    `batch_norms`: those directly behind its calls.  `points`: module and
    buffer -> the labels of the entries to silence, in a shape that broadcasts
    over the module's output ("silent_units") or first input
    ("silent_inputs").  `gates`: those of the points that silence what the
    units themselves go past.  `sums`: the sums that it feeds.  `readers`: the layers
    that read its units -> the labels of their inputs.
    """

    layer: str
    batch_norms: tuple[str, ...] = ()
    points: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    gates: set[tuple[str, str]] = field(default_factory=set)
    sums: frozenset = frozenset()
    readers: dict[str, torch.Tensor] = field(default_factory=dict)
    # for the proof: in each traced mode, module calls and what must be 0 in their output or input
    expected: dict[bool, list[tuple[str, int, str, torch.Tensor]]] = field(default_factory=dict)


class _Graph:
    """A traced forward pass in one mode, training or evaluation."""

    def __init__(self, model: nn.Module, training: bool, example: tuple | None):
        tracer = _Tracer(example)
        with aside(model), torch._dynamo.config.patch(error_on_nested_fx_trace=False):  # also what is compiled
            model.train(training)
            graph = tracer.trace(model)
            self.nodes, self.text = list(graph.nodes), str(graph)
            self.attributes = {node: operator.attrgetter(node.target)(model) for node in self.nodes if node.op == "get_attr"}
        self.training, self.calls = training, tracer.calls
        self.modules = dict(model.named_modules())
        self.data: set[fx.Node] = set()  # what depends on the network's input, once values are known

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[node.target] if node.op == "call_module" else None

    def is_a(self, node: fx.Node, kinds: tuple) -> bool:
        """Whether `node` calls one of the functions in `kinds`, or a module of one of the classes in it."""
        return any(kind in kinds for kind in (node.target, *type(self.module(node)).__mro__))

    def called(self, layer: str) -> list[fx.Node]:
        return [node for node in self.nodes if node.op == "call_module" and node.target == layer]

    def behind(self, nodes) -> set[fx.Node]:
        """All nodes that depend on `nodes`."""
        found = set(nodes)
        for node in self.nodes:
            if found & set(node.all_input_nodes):
                found.add(node)
        return found


class Surroundings:
    """A network's layers in forward order, each with what removal of its units must reach.

    `example`: a batch that the network takes, or a tuple of its arguments;
    None tries what its first layers would take.  Raises `InputError` for a
    wrapper, and for a network that cannot be traced.
    """

    def __init__(self, model: nn.Module, example=None):
        self.model, self.name = model, type(model).__name__
        for inside, wrappers in (("module", (nn.DataParallel, nn.parallel.DistributedDataParallel)),
                                 ("_orig_mod", torch._dynamo.OptimizedModule)):
            if isinstance(model, wrappers):
                raise InputError(f"{self.name} wraps a network; give the network inside: model.{inside}")
        if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            raise InputError(f"{self.name} is a script of torch.jit, or has one in it; "
                             "prune the network that it was made of")
        own = inspect.unwrap(vars(model).get("forward", type(model).forward))  # fx follows the class's
        if getattr(own, "__func__", own) is not inspect.unwrap(type(model).forward):
            raise InputError(f"the forward pass of {self.name} was replaced in this one network (model.forward = …), "
                             "where it cannot be followed; put it into a class")
        tensors = (*model.named_parameters(), *model.named_buffers())
        lazy = [name for name, tensor in tensors if is_lazy(tensor)]
        if lazy:
            raise InputError(f"{lazy[0]!r} has no values yet; run one batch through the network before it is pruned")
        self._example = example if isinstance(example, tuple) or example is None else (example,)
        try:
            self.graphs = [_Graph(model, training, self._example) for training in (model.training, not model.training)]
            if self.graphs[0].text == self.graphs[1].text:
                self.graphs = self.graphs[:1]
        except Exception as error:  # fx reports untraceable code by whatever that code raised
            raise InputError(f"cannot follow {self.name}'s forward pass ({plain(error)}); "
                             "mark the part that branches on values with torch.fx.wrap") from error
        self.layers = list(dict.fromkeys(node.target for node in self.graphs[0].nodes
                                         if isinstance(self.graphs[0].module(node), LAYERS)))
        self.known: dict[str, Unit | InputError] = {}

    def batch_norms(self, layer: str) -> tuple[str, ...]:
        """The batch normalisations of the layer's units directly behind its calls; none where a call has none."""
        graph, found = self.graphs[0], []
        for node in graph.called(layer):
            users = list(node.users)
            if len(users) != 1 or not isinstance(graph.module(users[0]), BATCH_NORMS):
                return ()
            found.append(users[0].target)
        if found and isinstance(graph.modules[layer], nn.Linear):  # behind rows of tokens these normalise each token
            with suppress(InputError), aside(self.model):
                self.model.eval()
                values = _Walk(self, graph, Unit(layer)).values()
                found = [] if any(values[node].dim() > 2 for node in graph.called(layer)) else found
        return tuple(dict.fromkeys(found))

    def unit(self, layer: str) -> Unit:
        """The surroundings of `layer`; raises `InputError` with the reason where a removed unit could not be silent."""
        if layer not in self.known:
            try:
                unit = Unit(layer, self.batch_norms(layer))
                with aside(self.model):
                    self.model.eval()
                    for graph in self.graphs:
                        _Walk(self, graph, unit).go()
                self.known[layer] = unit
            except InputError as error:
                self.known[layer] = error
        if isinstance(self.known[layer], InputError):
            raise self.known[layer]
        return self.known[layer]

    def depth(self, layer: str) -> int:
        """How many layers lie before `layer`: a projection shortcut has fewer than the branch that it joins."""
        graph = self.graphs[0]
        nodes = set(graph.called(layer))
        for node in reversed(graph.nodes):
            if nodes & set(node.users):
                nodes.add(node)
        return sum(isinstance(graph.module(node), LAYERS) for node in nodes)

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Invented parameters and running statistics on the CPU: 0 there would be chance, and none is."""
        with torch.device("cpu"):
            return {name: torch.zeros(tensor.shape) if name.split(".")[-1] in MASKS else _invented(tensor)
                    for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers())}

    def part(self, path: str) -> dict[str, torch.Tensor]:
        """The invented values of one module's parameters and buffers, by their names in it."""
        return {name.removeprefix(f"{path}."): tensor.clone() for name, tensor in self.tensors.items()
                if name.startswith(f"{path}.")}

    @cached_property
    def inputs(self) -> tuple:
        """Arguments that the network takes; call within `aside`."""
        if self._example is not None:
            return tree_map(lambda x: _usual(x) if isinstance(x, torch.Tensor) else x, self._example)
        meta = {name: tensor.to("meta") for name, tensor in self.tensors.items()}
        holders = [node for node in self.graphs[0].nodes
                   if node.op == "placeholder" and not node.args and not node.target.startswith("*")]
        # without values large networks are tried faster, small ones slower; large inputs may not fit (attention)
        ways = [("meta", meta, _SIZES), ("cpu", self.tensors, _SIZES)]
        small = [("cpu", self.tensors, [size for size in _SIZES if size <= 64])]
        for device, tensors, sizes in ways if sum(map(torch.numel, meta.values())) > 1e6 else small + ways:
            for size in sizes:
                guess = [self._guess(holder, size) for holder in holders]
                try:
                    for graph in self.graphs[::-1] if len(self.graphs) > 1 else ():  # auxiliary heads may want larger ones
                        self.model.train(graph.training)
                        functional_call(self.model, {name: x.clone() for name, x in tensors.items()},
                                        tuple(x.to(device) for x in guess))
                    self.model.eval()  # what it returns is not used: a user's own train() may return nothing
                    functional_call(self.model, tensors, tuple(x.to(device) for x in guess))
                except Exception:  # a wrong guess may end in any error
                    continue
                return tuple(guess)
        raise InputError(f"cannot tell what {self.name} takes; give example=, a batch (or a tuple of arguments) for it")

    @cached_property
    def trials(self) -> list[tuple[dict[str, torch.Tensor], tuple]]:
        """Parameters, buffers (no masks) and inputs, on the CPU, on which to compare the network with another: invented
        ones, and its own with the example or with normal numbers."""
        with aside(self.model):
            named = dict((*self.model.named_parameters(), *self.model.named_buffers()))
            kept = {name for name, x in named.items()
                    if name.split(".")[-1] in MASKS or not x.is_floating_point() or x.is_meta}
            own = {name: invented if name in kept else _usual(named[name]).clone()
                   for name, invented in self.tensors.items()}
            inputs = self.inputs
            usual = tuple(torch.randn_like(x) if self._example is None and x.is_floating_point() else x for x in inputs)
        return [(self.tensors, inputs), (own, usual)]

    @cached_property
    def louder(self) -> list[tuple[dict[str, torch.Tensor], tuple]]:
        """`trials` and loud and quiet inputs: what channels tell each other through sums of squares (LocalResponseNorm)
        is lost in rounding among small numbers, what stands for 0 (a clamp at 1e-6) among usual ones; what padding does
        where an example has none."""
        tensors, inputs = self.trials[-1]
        trials = list(self.trials)
        for factor in (30, 1e-3):
            varied = tree_map(lambda x, factor=factor: _varied(x, factor), inputs)
            with suppress(Exception), aside(self.model):  # lengths of 0, say, it may not take
                self.model.eval()
                functional_call(self.model, {name: x.clone() for name, x in tensors.items()}, varied)
                trials.append((tensors, varied))
        return trials

    def _guess(self, holder: fx.Node, size: int) -> torch.Tensor:
        graph = self.graphs[0]
        for node in graph.nodes:
            module = graph.module(node)
            if node in graph.behind([holder]) and module is not None:
                if isinstance(module, nn.modules.conv._ConvNd):
                    return torch.rand(2, module.in_channels, *[size] * len(module.kernel_size)) + 0.5
                if isinstance(module, nn.Embedding):
                    return torch.randint(module.num_embeddings, (2, size))
                if isinstance(module, nn.Linear):
                    n = module.in_features
                    straight = holder in node.all_input_nodes or n % size**2
                    return torch.rand((2, n) if straight else (2, n // size**2, size, size)) + 0.5
                if isinstance(module, nn.RNNBase):
                    return torch.rand(2, size, module.input_size) + 0.5
                if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                    return torch.rand(2, getattr(module, "num_features", None) or module.num_channels, size, size) + 0.5
        return torch.rand(2, 3, size, size) + 0.5


def _usual(tensor: torch.Tensor) -> torch.Tensor:
    """The values on the CPU and, of whatever precision they are, in that of invented numbers."""
    return tensor.detach().cpu().to(torch.get_default_dtype() if tensor.is_floating_point() else tensor.dtype)


def _varied(x, factor: float):
    """A multiple of numbers; of a tensor of others every second entry as 0, or as its opposite."""
    if not isinstance(x, torch.Tensor) or x.is_floating_point():
        return factor * x if isinstance(x, torch.Tensor) else x
    return torch.where(torch.arange(x.numel()).view(x.shape) % 2 == 0, x, ~x if x.dtype == torch.bool else 0)


def _invented(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        meta = tensor.device.type == "meta"
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if meta else tensor.detach().cpu().clone()
    return (torch.rand(tensor.shape) + 0.5) / max(1, tensor[0].numel() if tensor.dim() > 1 and len(tensor) else 1)


def _unlike(values: torch.Tensor, where: torch.Tensor, other: float = float("nan")) -> torch.Tensor:
    """A copy with other values `where` told: `other`, or where its type is no float what that has."""
    if values.is_floating_point() or values.is_complex():
        return values.masked_fill(where, other)
    return torch.where(where, ~values if values.dtype == torch.bool else values + 1, values)


def _opposite(values: torch.Tensor) -> torch.Tensor:
    if values.dtype == torch.bool:
        return ~values
    return -values if values.is_floating_point() else values.clone()


def _places(tree) -> set[int]:
    """Where the tensors' numbers lie: views, and what is changed in place, lie where it was."""
    return {tensor.untyped_storage().data_ptr() for tensor in _tensors(tree)}


def _tensors(tree) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    fx.node.map_aggregate(tree, lambda leaf: found.append(leaf) if isinstance(leaf, torch.Tensor) else None)
    return found


def compressed(labels: torch.Tensor) -> torch.Tensor:
    """`labels` in the smallest shape that broadcasts to theirs, leading ones left out."""
    for axis in range(labels.dim()):
        first = labels.narrow(axis, 0, 1)
        labels = first if (labels == first).all() else labels
    while labels.dim() and len(labels) == 1:
        labels = labels[0]
    return labels


class _Walk:
    """One layer's units followed through one graph."""

    def __init__(self, around: Surroundings, graph: _Graph, unit: Unit):
        self.around, self.graph, self.unit = around, graph, unit
        self.labels: dict[fx.Node, object] = {}  # a tensor, or a tuple of tensors where the value is one
        self.needs: set[fx.Node] = set()  # not 0 although the unit's entries before it are
        self.summed: set[fx.Node] = set()  # the sum has been passed
        self.sums: set[fx.Node] = set()
        self.lit: set[fx.Node] = set()  # an activation that is not 0 at 0 has been passed
        self.loose: set[fx.Node] = set()  # silenced only further on
        self.early: set[int] = set()  # calls that return a value before the module that silences it does

    def go(self) -> None:
        layer, graph = self.unit.layer, self.graph
        sources = graph.called(layer)
        self.behind = graph.behind(sources)
        values = self.values()
        for node in graph.nodes:
            if node in sources:
                y = values[node]
                axis = y.dim() - len(getattr(graph.module(node), "kernel_size", ())) - 1
                units = torch.arange(1, y.shape[axis] + 1).view(-1, *[1] * (y.dim() - axis - 1))
                self.labels[node] = units.expand(y.shape)
                self.unit.points[layer, "removed_units"] = units
            elif any(source in self.labels for source in node.all_input_nodes):
                self.step(node, values)
        for node in graph.nodes:
            if node in self.needs:
                known = set(self.unit.points)
                self.place(node, list(node.users))
                if node not in self.sums and not graph.is_a(node, _NORMS) and any(
                        len(s.users) > 1 for s in node.all_input_nodes if s in self.labels):
                    self.unit.gates |= self.unit.points.keys() - known
        self.unit.sums |= frozenset((graph.training, node.name) for node in self.sums)
        self.expect()

    def values(self) -> dict[fx.Node, object]:
        """A value for every node, computed once a graph."""
        graph, around = self.graph, self.around
        if not hasattr(graph, "values"):
            values, inputs = {}, iter(around.inputs)
            for node in graph.nodes:
                if node.op == "placeholder":
                    values[node] = next(inputs, node.args[0] if node.args else None)
                elif node.op == "get_attr":
                    values[node] = around.tensors.get(node.target, graph.attributes[node])
                elif node.op != "output":
                    values[node] = self.run(node, *fx.node.map_arg((node.args, node.kwargs), values.__getitem__))
                if node.op == "placeholder" or self.told(node, values):
                    graph.data.add(node)
            graph.values = values
        return graph.values

    def told(self, node: fx.Node, values) -> bool:
        """Whether `node`'s value changes with the network's input, and is not `ones_like` or the like of it."""
        sources = self.graph.data & set(node.all_input_nodes)
        # what a comparison says of these numbers, and of NaN, it need not say of others
        if not sources or node.op == "call_module" or any(t.dtype == torch.bool for t in _tensors(values.get(node))):
            return bool(sources)

        def other(s: fx.Node):
            return fx.node.map_aggregate(values[s], lambda v: _unlike(v, torch.tensor(s in sources)) if isinstance(
                v, torch.Tensor) else v)
        try:
            now = _tensors(self.run(node, *fx.node.map_arg((node.args, node.kwargs), other)))
        except InputError:  # an index, say
            return True
        return any((one != two).any() for one, two in zip(now, _tensors(values[node])))

    def run(self, node: fx.Node, args, kwargs, training: bool = False):
        try:
            with seeded():
                if node.op == "call_module":
                    module = self.graph.modules[node.target]
                    module.train(training)
                    return functional_call(module, self.around.part(node.target), tuple(args), dict(kwargs))
                if node.op == "call_method":
                    return getattr(args[0], node.target)(*args[1:], **kwargs)
                return node.target(*args, **kwargs)
        except Exception as error:
            raise InputError(f"cannot follow layer {self.unit.layer!r} through {self.named(node)} ({plain(error)}); "
                             "give example=, a batch that the network takes") from error

    def named(self, node: fx.Node) -> str:
        return repr(getattr(node.target, "__name__", str(node.target)))

    def refuse(self, why: str):
        raise InputError(f"layer {self.unit.layer!r} cannot be pruned by units: {why}")

    def step(self, node: fx.Node, values) -> None:
        """Labels of what `node` gives, whether it keeps silence, and how it joins units with others."""
        graph, module = self.graph, self.graph.module(node)
        if node.op == "output":
            self.refuse("it is an output head, its units leave the network")
        source = next((s for s in node.all_input_nodes if s in self.labels), None)
        if isinstance(module, LAYERS) and getattr(module, "groups", 1) == 1:
            labels = compressed(self.labels[source])
            axis = len(getattr(module, "kernel_size", ())) + 1
            if not labels.dim() or labels.dim() == axis and labels.numel() == len(labels):  # a layer of one unit, or more
                self.unit.readers[node.target] = labels.flatten()
                return
        if graph.is_a(node, _READERS) or not _tensors(values[node]):
            return
        self.node, self.fresh = node, {}
        for s in node.all_input_nodes:
            self.fresh[s] = fx.node.map_aggregate(values[s], lambda v: torch.rand(v.shape) + 0.5 if isinstance(
                v, torch.Tensor) and v.is_floating_point() else v)
        norm = graph.is_a(node, _NORMS)
        others, touched = self.probe_others()
        labels = self.labels[source] if norm else self.probe(others, touched)
        quiet = self.quiet(_tensors(labels), values)
        if not any(label.any() for label in _tensors(labels)):
            return
        joined = any((t & (label > 0)).any() for t, label in zip(touched, _tensors(labels))) and not norm
        before = [s for s in node.all_input_nodes if s in self.labels]
        if joined and not quiet and (others := self.company(node) - self.own()):
            chain = all(s not in self.summed or (s in self.sums and len(s.users) == 1) for s in before)
            if self.behind & others or not chain:
                return  # other layers speak here in their own right
            self.sums.add(node)
        if joined and quiet and self.lit & set(before) and self.company(node) - self.behind:
            self.refuse(f"it is a gate: {self.named(node)} multiplies others' channels by it")
        if not quiet:
            self.needs.add(node)
            if not joined and not norm:
                self.lit.add(node)
        for kept in (self.summed, self.lit):
            if kept & set(before):
                kept.add(node)
        if node in self.sums:
            self.summed.add(node)
        self.labels[node] = labels

    def quiet(self, labels: list[torch.Tensor], values) -> bool:
        """Whether 0 stays 0, whatever others' sign; refuses what ends it under a name that is read again."""
        quiet, nodes = True, self.graph.nodes
        for training, beside in itertools.product((False, True), (torch.clone, _opposite)):
            given = []

            def hushed(v, l, key, beside=beside, given=given):
                given.append((key[0], beside(v).masked_fill(l > 0, 0.0), l))
                return given[-1][1]
            for y, label in zip(_tensors(self.evaluate(hushed, training, beside)), labels):
                heard = (y != 0) & ((y == y) | (beside is torch.clone))  # no root, say, of what is negative
                quiet &= not heard[label > 0].any()
            for s in {s for s, v, l in given if (v[l > 0] != 0).any()}:
                names = [other for other in self.labels if _places(values[other]) & _places(values[s])]
                if any(nodes.index(use) > nodes.index(self.node) for other in names for use in other.users):
                    self.refuse(f"{self.named(self.node)} changes {self.named(s)} in place, "
                                "which is read again; go on with what it returns")
        return quiet

    def company(self, node: fx.Node) -> set[fx.Node]:
        """The values that `node` joins with the units: its own arguments, and what was stacked beside them."""
        found = {s for s in node.all_input_nodes if s in self.graph.data and s not in self.labels}
        for s in node.all_input_nodes:
            if s in self.labels and any((label == 0).any() for label in _tensors(self.labels[s])):
                found |= self.company(s)
        return found

    def own(self) -> set[fx.Node]:
        """What is made of the units by no other layer: means over channels, say, of which a norm is written."""
        read = [node for node in self.behind - self.labels.keys() if any(s.op == "get_attr" for s in node.all_input_nodes)
                or self.graph.is_a(node, _READERS) or node.op == "call_module" and list(self.graph.module(node).parameters())]
        return self.behind - self.graph.behind(read)

    def rejoins(self, node: fx.Node) -> bool:
        """Whether `node` is made of the units alone, for nobody but them."""
        return node in self.own() and all(use in self.labels or self.rejoins(use) for use in node.users)

    def evaluate(self, mark, training: bool = False, beside=torch.clone):
        """`node`'s value when `mark(value, labels, key)` is done to labelled arguments and `beside(value)` to other data."""
        def argument(s: fx.Node):
            labels = enumerate(_tensors(self.labels[s])) if s in self.labels else None

            def leaf(v):
                if not isinstance(v, torch.Tensor):
                    return v
                if labels is not None:
                    i, label = next(labels)
                    return mark(v, label, (s, i))
                return beside(v) if s in self.graph.data else v.clone()
            return fx.node.map_aggregate(self.fresh[s], leaf)
        return self.run(self.node, *fx.node.map_arg((self.node.args, self.node.kwargs), argument), training)

    def probe_others(self):
        """Which entries of the output depend on what belongs to no unit."""
        y = self.evaluate(lambda v, l, _: _unlike(v, l == 0),
                          beside=lambda v: v * float("nan") if v.is_floating_point() else v.clone())
        return y, [t.isnan() for t in _tensors(y)]

    def probe(self, others, touched):
        """Labels of the output, by the binary digits of the units whose NaN, or else another extreme, changes it."""
        before = [label for s in self.fresh if s in self.labels for label in _tensors(self.labels[s])]
        digits = max(int(label.max()) for label in before).bit_length()
        units = torch.cat([label[label > 0] for label in before]).unique()

        def changed(tries, bases, digit, bit):
            """Which entries any of `tries` changes when it is done to the units with this binary digit."""
            found = [[(y != x) & ((y == y) | (x == x)) for x, y in zip(base, _tensors(self.evaluate(
                lambda v, l, _: _unlike(v, (l > 0) & ((l >> digit & 1) == bit), other), beside=beside)))]
                for base, (other, beside) in zip(bases, tries)]
            return [torch.stack(each).any(0) for each in zip(*found)]

        # comparisons take no notice of NaN, nor all of them of 0, and a choice none of what others do not choose
        for tries in ([(float("nan"), torch.clone)],
                      [*itertools.product(map(float, ("nan", "0", "inf", "-inf")), (torch.clone, _opposite))]):
            bases = [_tensors(self.evaluate(lambda v, l, _: v.clone(), beside=beside)) for _, beside in tries]
            labels = [torch.zeros(y.shape, dtype=torch.int64) for y in bases[0]]
            single = [torch.ones(y.shape, dtype=torch.bool) for y in bases[0]]
            reached = [torch.zeros(y.shape, dtype=torch.bool) for y in bases[0]]
            for digit in range(digits):
                on, off = (changed(tries, bases, digit, bit) for bit in (1, 0))
                for i in range(len(labels)):
                    labels[i] |= on[i].long() << digit
                    single[i] &= on[i] != off[i]
                    reached[i] |= on[i] | off[i]
            if all(r.all() for r in reached) or any((r & ~s).any() for r, s in zip(reached, single)) or torch.isin(
                    units, torch.cat([label[s] for label, s in zip(labels, single)])).all():
                break
        blurred = [r & ~s for r, s in zip(reached, single)]
        if any(b.any() for b in blurred):
            self.check_affine(blurred)
        for i, label in enumerate(labels):
            label *= single[i]
            labels[i] = _filled(label, ~(reached[i] | touched[i]))
        found = iter(labels)
        return fx.node.map_aggregate(others, lambda v: next(found) if isinstance(v, torch.Tensor) else v)

    def check_affine(self, blurred) -> None:
        """Refuse an operation that mixes units in another way than a weighted sum, in which 0 says nothing."""
        def at(*parts: dict) -> list[torch.Tensor]:
            def mark(v, l, key):
                return torch.where(l > 0, sum(p.setdefault(key, torch.rand(l.shape) + 0.5) for p in parts), v)
            return _tensors(self.evaluate(mark))

        a, b = {}, {}
        for none, one, other, both, where in zip(at(), at(a), at(b), at(a, b), blurred):
            if not torch.allclose((both + none)[where], (one + other)[where], rtol=1e-3, atol=1e-4):
                self.refuse(f"{self.named(self.node)} mixes its units in a way in which a removed one still has a say")

    def place(self, node: fx.Node, uses: list[fx.Node]) -> None:
        """Find modules behind or before which `node`'s units can be silenced, for all `uses` of it."""
        for call in self.graph.calls:  # the innermost module that returns it comes first
            if call.given is node and self.fits(call, "given"):
                self.point(call.path, "silent_units", node)
                self.early |= {id(other) for other in self.graph.calls[:self.graph.calls.index(call)] if other.given is node}
                uses = [use for use in uses if use in call.inside]
                break
        else:
            others = [call for call in self.graph.calls if node.op == "call_module" and call.path == node.target]
            if len(others) > 1:
                served = dict.fromkeys(str(call.taken.target) for call in others if call.taken)
                self.refuse(f"{node.target!r} serves {' and '.join(served)}; give each its own")
            self.loose.add(node)
        for call in reversed(self.graph.calls):  # the outermost module that takes it
            if call.taken is node and set(call.readers) & set(uses) and self.fits(call, "taken"):
                self.point(call.path, "silent_inputs", node)
                uses = [use for use in uses if use not in call.readers]
        for use in uses:
            if use in self.needs and not self.graph.is_a(use, _NORMS) or use not in self.labels and self.rejoins(use):
                continue  # silenced behind that
            if use not in self.labels or use in self.needs:
                self.refuse(f"{self.named(use)} reads what {self.named(node)} gives before it can be silenced; "
                            f"put the part up to {self.named(node)} into a module of its own")
            self.place(use, list(use.users))

    def fits(self, call: Call, end: str) -> bool:
        """Whether all calls of the module have the same units there, and a sequence's own call is not needed."""
        same = [getattr(other, end) for other in self.graph.calls if other.path == call.path]
        if not call.path or type(self.graph.modules[call.path]) is nn.Sequential or any(n not in self.labels for n in same):
            return False
        labels = [compressed(self.labels[n]) if isinstance(self.labels[n], torch.Tensor) else None for n in same]
        return all(label is not None and torch.equal(label, labels[0]) for label in labels)

    def point(self, path: str, name: str, node: fx.Node) -> None:
        labels = compressed(self.labels[node])
        known = self.unit.points.setdefault((path, name), labels)
        if not torch.equal(known, labels):
            self.refuse(f"{path!r} has its units in other places in training than in evaluation")
        if labels.dim() == self.labels[node].dim():
            self.refuse(f"its units lie along the batch behind {path!r}")

    def expect(self) -> None:
        """Note for the proof what must be 0: outputs of module calls, and what the next layers are given."""
        seen: dict[str, int] = {}
        expected = self.unit.expected.setdefault(self.graph.training, [])
        for call in self.graph.calls:
            number = seen[call.path] = seen.get(call.path, -1) + 1
            for end, node, name in (("output", call.given, "silent_units"), ("input", call.taken, "silent_inputs")):
                if isinstance(self.labels.get(node), torch.Tensor) and (
                        node not in self.loose or (call.path, name) in self.unit.points) and not (
                        end == "output" and id(call) in self.early):
                    labels = compressed(self.labels[node])
                    if labels.dim() < self.labels[node].dim():
                        expected.append((call.path, number, end, labels))


def _filled(labels: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    """`labels` where a slice's entries that belong to nobody (borders that padding gives) go to the slice's one unit."""
    for axis in (1, -1):
        if labels.dim() > 1 and (free & (labels == 0)).any():
            rest = [d for d in range(labels.dim()) if d != axis % labels.dim()]
            unit = labels.amax(rest, keepdim=True)
            alone = ((labels == unit) | free).all(dim=rest[0], keepdim=True) if len(rest) == 1 else (
                ((labels == unit) | free).movedim(axis, 0).flatten(1).all(1).view(unit.shape))
            labels = torch.where(alone & free, unit, labels)
    return labels
