"""How steps are executed: replicas of one shape in lockstep, eager on a CPU, captured on a GPU.

Knows tensors, not science: no score, event or effect appears here.  A step
needs nothing from the host: it gathers its batch by a counter that lives on
the device, so that on a GPU one CUDA graph holds a whole step of every
replica (gather, augmentation, forward, loss, backward, optimiser, metrics),
each replica a branch on a stream of its own.  Forward and backward pass are
compiled there, so that masks, casts, batch normalisation and ReLU, each of
which reads and writes whole tensors, become few kernels.  Whatever changes
between steps (learning rate, masks, noise, the epoch's order) is rewritten in
place, and the graph stays valid.  On a CPU the same step function is simply
called.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from gstlib.data import Loader
from gstlib.errors import InputError
from gstlib.spec import OptimiserSpec

_WARM_UP = 3  # uncaptured steps that let libraries choose their kernels before a capture
_STRUCTURES = 256  # differently built networks that a process may compile, torch's own limit is 8
_TOLERANCE = {"float32": 1e-3, "tf32": 1e-2, "bf16": 1e-2}  # relative, of compiled gradients, see `_check_compiled`


class Measured(NamedTuple):
    """Mean cross-entropy (nats) and top-1 accuracy (0 … 1) over a pass."""

    loss: float
    accuracy: float


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`: "auto" is CUDA where there is one, else the CPU.

    Raises `InputError` for a name torch does not know and for CUDA where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}; choose from auto, cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {name!r}; choose from auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"device {name!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices; "
                         "use --device cpu or auto")
    return device


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Replica:
    """One network in training: its optimiser, its batches, its running sums.

    `precision`: "float32", "tf32" (float32 storage, TF32 products on a GPU)
    or "bf16" (autocast over float32 parameters).
    """

    def __init__(self, model: nn.Module, spec: OptimiserSpec, loader: Loader, precision: str = "float32"):
        self.model, self.spec, self.loader, self.precision = model, spec, loader, precision
        self.device = loader.device
        if spec.name == "adam":
            self.optimiser = torch.optim.Adam(model.parameters(), lr=spec.lr, weight_decay=spec.weight_decay, fused=True,
                                              capturable=self.device.type == "cuda")
        else:
            self.optimiser = torch.optim.SGD(model.parameters(), lr=spec.lr, momentum=spec.momentum,
                                             weight_decay=spec.weight_decay, fused=True)
        # a captured step reads its rate from the device, where the host can change it; CUDA's kernels take float32
        rate = torch.tensor(spec.lr, dtype=torch.float32 if self.device.type == "cuda" else torch.float64, device=self.device)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.stages = list(_stages(model))
        self._kept: list[torch.Tensor] = []  # each test batch's input to the stage that `begin_test` was told to keep
        self._since = self._keep = 0
        self.compiled: Callable | None = None  # what whole batches go through instead of `loss`, see `_compiled`

    def learning_rate(self, epoch: int) -> float:
        """The rate of `epoch` (from 0): multiplied by `decay` from each milestone on."""
        return self.spec.lr * self.spec.decay ** sum(epoch >= milestone for milestone in self.spec.milestones)

    def begin_epoch(self, epoch: int) -> None:
        """Set the rate, draw the epoch's order and clear the sums, all in place."""
        self.continue_epoch(epoch)
        self.loader.begin_epoch()
        self.sums.zero_()

    def continue_epoch(self, epoch: int) -> None:
        """Set the rate; order, place and sums stay as they are."""
        self.model.train()
        for group in self.optimiser.param_groups:
            group["lr"].fill_(self.learning_rate(epoch))

    def state_dict(self) -> dict:
        """Everything that the next step depends on; safe for `torch.load(..., weights_only=True)`."""
        return {"model": self.model.state_dict(), "moments": self.optimiser.state_dict()["state"],
                "loader": self.loader.state_dict(), "sums": self.sums}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave, before any step is captured."""
        self.model.load_state_dict(state["model"])
        # the groups stay this optimiser's own: its rate must stay a tensor on its device
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state["moments"], "param_groups": groups})
        self.loader.load_state_dict(state["loader"])
        self.sums.copy_(state["sums"])

    def begin_test(self, since: str | None = None, keep: str | None = None) -> None:
        """Go to the first test image in evaluation mode and clear the sums.

        `keep` names a layer that a strike will change: what reaches its stage
        is kept, so that a later pass `since` that layer need not repeat what
        lies before, which is the same to the last bit.
        """
        self.model.eval()
        self.loader.begin_test()
        self.sums.zero_()
        self._since, self._keep = self._stage(since), self._stage(keep)
        if not self._since:
            self._kept = []

    def _stage(self, layer: str | None) -> int:
        """The place of the stage that holds `layer`; 0, at which nothing is kept or spared, for None."""
        return next((i for i, (name, _) in enumerate(self.stages) if layer and f"{layer}.".startswith(f"{name}.")), 0)

    def step(self, size: int) -> None:
        """One training step on the next `size` images."""
        self.optimiser.zero_grad(set_to_none=True)
        x, y = self.loader.next_batch(size)
        if self.compiled is not None and size == self.loader.batch_size:
            loss, logits = self.compiled(self.named_tensors(), x, y)
        else:
            loss, logits = self.loss(x, y)
        loss.backward()
        self.optimiser.step()
        self.sums += _sums(loss.detach() * size, logits, y)

    @torch.no_grad()
    def test_step(self, size: int, number: int = 0) -> None:
        """Measure the next `size` test images, batch `number` of the pass; changes no weight and no running statistic."""
        x, y = self.loader.next_test(size)
        loss, logits = _loss(lambda x: self._staged(x, number), x, y, self.device.type, self.precision, "sum")
        self.sums += _sums(loss, logits, y)

    def _staged(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """The network's output for test batch `number`, from the stage on from which it can be another than last time."""
        if not (self._since or self._keep):
            return self.model(x)
        if self._since:
            x = self._kept[number]
        for place, (_, stage) in enumerate(self.stages[self._since:], self._since):
            if place == self._keep > 0:
                self._kept[number:number + 1] = [x]
            x = stage(x)
        return x

    @torch.no_grad()
    def measure(self, x: torch.Tensor, y: torch.Tensor) -> Measured:
        """Loss and accuracy over uint8 images (n, 3, 32, 32) and labels (n,), wherever they lie, in evaluation mode."""
        self.model.eval()
        self.sums.zero_()
        start = 0
        for size in self.loader.test_sizes(len(y)):
            images, labels = (part[start:start + size].to(self.device) for part in (x, y))
            loss, logits = self.loss(self.loader.normalise(images), labels, reduction="sum")
            self.sums += _sums(loss, logits, labels)
            start += size
        return self.measured(len(y))

    def loss(self, x: torch.Tensor, y: torch.Tensor, reduction: str = "mean") -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy (nats) of a batch, and its logits (n, classes) in float32."""
        return _loss(self.model, x, y, self.device.type, self.precision, reduction)

    def measured(self, n: int) -> Measured:
        """The sums since the last `begin_…` as means over `n` images; the one place where the host waits."""
        loss, right = (self.sums / n).tolist()
        return Measured(loss, right)

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """The network's parameters and buffers by name."""
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    def tensors(self) -> list[torch.Tensor]:
        """Everything a step changes, the optimiser's state apart."""
        return [*self.model.parameters(), *self.model.buffers(), self.sums, self.loader.position]


def _stages(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules, by name, that a network calls one after the other: sequences within sequences are taken apart."""
    if type(model) is not nn.Sequential:
        yield prefix.removesuffix("."), model
        return
    for name, part in model.named_children():
        yield from _stages(part, f"{prefix}{name}.")


def _loss(model: Callable, x: torch.Tensor, y: torch.Tensor, device: str, precision: str, reduction: str = "mean"):
    # the cache of cast weights would be filled in one capture and read in another
    with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=device == "cpu"):
        logits = model(x).float()
    return nn.functional.cross_entropy(logits, y, reduction=reduction), logits


def _loss_with(model: nn.Module, tensors: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor, device: str,
               precision: str):
    """`_loss` of `model` with `tensors` for its parameters and buffers: one compiled function serves all replicas."""
    return _loss(lambda x: torch.func.functional_call(model, tensors, (x,)), x, y, device, precision)


@functools.cache
def _compiler() -> Callable:
    compiled = torch.compile(_loss_with, fullgraph=True, dynamic=False)
    if compiled is _loss_with or torch._dynamo.config.disable:
        raise RuntimeError("torch.compile is switched off")
    return compiled


_skeletons: dict[tuple, nn.Module] = {}  # of each structure a network without values, which the compiled code belongs to


def _compiled(replica: Replica) -> Callable:
    """(tensors, x, y) -> loss, logits: the compiled pass of networks built like `replica`'s.

    `torch.compile` would compile anew for every network.  So the passes of all
    networks that are built alike are those of one skeleton, given their
    tensors.
    """
    tensors = replica.named_tensors()
    key = (str(replica.model), *((name, tensor.shape) for name, tensor in tensors.items()))
    if key not in _skeletons:
        _skeletons[key] = copy.deepcopy(replica.model).to("meta").train()
    skeleton, device, precision = _skeletons[key], replica.device.type, replica.precision

    def compiled(tensors: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor):
        with torch._dynamo.config.patch(recompile_limit=_STRUCTURES, accumulated_recompile_limit=_STRUCTURES):
            return _compiler()(skeleton, tensors, x, y, device, precision)

    return compiled


@torch.no_grad()
def _check_compiled(replica: Replica, compiled: Callable) -> None:
    """Raise `ArithmeticError` unless the compiled pass of a batch has the gradients of the eager one, as near to those
    in float32 as eager ones are; leaves the replica as it was."""
    rows = torch.arange(replica.loader.batch_size, device=replica.device) % len(replica.loader.y)
    x, y = replica.loader.normalise(replica.loader.x[rows]), replica.loader.y[rows]
    device, precision = replica.device.type, "float32" if replica.precision == "bf16" else replica.precision
    parameters, training = list(replica.model.parameters()), replica.model.training
    before = [(buffer, buffer.clone()) for buffer in replica.model.buffers()]
    replica.model.train()
    gradients = []
    for act in (lambda: _loss(replica.model, x, y, device, precision), lambda: replica.loss(x, y),
                lambda: compiled(replica.named_tensors(), x, y)):
        with torch.enable_grad():
            loss, _ = act()
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
        for buffer, value in before:
            buffer.copy_(value)
    replica.model.train(training)
    exact, eager, ours = gradients
    off, usual = (float((g - exact).norm() / exact.norm()) for g in (ours, eager))
    if not off <= 2 * usual + _TOLERANCE[replica.precision]:
        raise ArithmeticError(f"its gradients are off by {off:.1e} of their size, eager ones by {usual:.1e}")


def ran_out(error: BaseException | None) -> bool:
    """Whether memory ran out; a capture or a compilation that is cut short may raise an error of its own on top."""
    return error is not None and (isinstance(error, torch.OutOfMemoryError) or ran_out(error.__cause__ or error.__context__))


def _sums(loss: torch.Tensor, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.stack([loss.double(), (logits.detach().argmax(1) == y).sum().double()])


class Engine:
    """Trains and tests `replicas` in lockstep: step by step, all of them at once on a GPU, in turn on a CPU.

    A replica's rows do not depend on its company: bit for bit on a CPU; on a
    GPU as far as its kernels are deterministic.  `capture` (default: on CUDA)
    chooses CUDA graphs, `streams` a stream a replica, `fuse` (default: on
    CUDA) a compiled forward and backward pass, `autotune` that cuDNN times its
    algorithms for each shape.  A pass that cannot be compiled, or whose
    gradients are not the eager ones, is said and left eager.  Raises
    `InputError` when replicas differ in device, precision, batch size, or
    number of images.
    """

    def __init__(self, replicas: Sequence[Replica], capture: bool | None = None, streams: bool = True,
                 fuse: bool | None = None, autotune: bool = True):
        self.replicas = list(replicas)
        first = self.replicas[0]
        for name, of in (("device", lambda r: r.device), ("precision", lambda r: r.precision),
                         ("batch size", lambda r: r.loader.batch_size), ("training images", lambda r: len(r.loader.y)),
                         ("test images", lambda r: len(r.loader.test_y))):
            if len({of(r) for r in self.replicas}) > 1:
                raise InputError(f"replicas in lockstep must agree in {name}, but have "
                                 f"{', '.join(str(of(r)) for r in self.replicas)}")
        self.loader, self.device = first.loader, first.device
        on_gpu = self.device.type == "cuda"
        self.capture = on_gpu if capture is None else capture
        torch.set_float32_matmul_precision("high" if first.precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = first.precision == "tf32"
        torch.backends.cudnn.benchmark = self.autotune = on_gpu and autotune
        self._graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.streams = None
        if self.capture:
            self._main = torch.cuda.Stream(self.device)
            self.streams = [torch.cuda.Stream(self.device) for _ in self.replicas] if streams else None
            self._pool = torch.cuda.graph_pool_handle()
        self.fused = (on_gpu if fuse is None else fuse) and self._fuse()

    @property
    def techniques(self) -> list[str]:
        """What is in use, in words."""
        return [name for name, used in (("CUDA graph", self.capture), ("streams", self.streams), ("compiled", self.fused),
                                        ("cuDNN autotuning", self.autotune)) if used]

    def _fuse(self) -> bool:
        """Compile the replicas' passes; returns whether all of them could be, and agree with the eager ones."""
        try:
            passes = [_compiled(replica) for replica in self.replicas]
            for replica, compiled in zip(self.replicas, passes):
                _check_compiled(replica, compiled)
        except Exception as error:  # a missing compiler, a kernel that does not build: torch raises many kinds
            if ran_out(error):
                raise
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            tqdm.write(f"the forward and backward pass could not be compiled ({text}); going on without", file=sys.stderr)
            return False
        for replica, compiled in zip(self.replicas, passes):
            replica.compiled = compiled
        return True

    def train_epoch(self, epoch: int, after_batch: Sequence[Callable[[], None]] = (), done: int = 0) -> list[Measured]:
        """One pass over the training images; each of `after_batch` is called after every step.

        The results are means over the pass as it ran, each batch measured
        before its own step.  `done`: steps of this very pass that the
        replicas have behind them already.
        """
        for replica in self.replicas:
            replica.continue_epoch(epoch) if done else replica.begin_epoch(epoch)
        everyone = range(len(self.replicas))
        for size in self.loader.batch_sizes()[done:]:
            self._do("step", size, everyone)
            for call in after_batch:
                call()
        return [replica.measured(len(self.loader.y)) for replica in self.replicas]

    def test(self, index: int = 0, since: str | None = None, keep: str | None = None) -> Measured:
        """One pass of replica `index` over the test images in evaluation mode; `since`, `keep`: `Replica.begin_test`.

        A captured pass is always whole.
        """
        replica = self.replicas[index]
        sizes = self.loader.test_sizes()
        if self.capture:
            replica.begin_test()
            for size in sizes:
                self._do("test_step", size, (index,))
        else:
            replica.begin_test(since, keep)
            for number, size in enumerate(sizes):
                replica.test_step(size, number)
        return replica.measured(len(self.loader.test_y))

    def _do(self, what: str, size: int, indices) -> None:
        if not self.capture:
            for index in indices:
                getattr(self.replicas[index], what)(size)
            return
        key = (what, size, *indices)
        if key not in self._graphs:
            self._graphs[key] = self._captured(what, size, [self.replicas[index] for index in indices])
        self._graphs[key].replay()

    def _captured(self, what: str, size: int, replicas: list[Replica]) -> torch.cuda.CUDAGraph:
        """A CUDA graph of one such step of `replicas`, everything left as it was before."""
        branches = self.streams[:len(replicas)] if self.streams else [self._main] * len(replicas)
        with torch.cuda.device(self.device):
            for replica, branch in zip(replicas, branches):
                self._warm_up(what, size, replica, branch)
            graph = torch.cuda.CUDAGraph()
            # one pool for all graphs: they never run at once, and none reads what another left there
            with torch.cuda.graph(graph, pool=self._pool, stream=self._main):
                for replica, branch in zip(replicas, branches):
                    if branch is not self._main:
                        branch.wait_stream(self._main)
                    with torch.cuda.stream(branch):
                        getattr(replica, what)(size)
                for branch in branches:
                    if branch is not self._main:
                        self._main.wait_stream(branch)
        return graph

    def _warm_up(self, what: str, size: int, replica: Replica, stream: torch.cuda.Stream) -> None:
        """A few steps on the stream of the capture, to which autograd's accumulators then belong; all of them undone."""
        def moments() -> list[torch.Tensor]:
            return [tensor for state in replica.optimiser.state.values() for tensor in state.values()
                    if isinstance(tensor, torch.Tensor)]

        before = [(tensor, tensor.detach().clone()) for tensor in (*replica.tensors(), *moments())]
        new, start = not replica.optimiser.state, replica.loader.position.clone()
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                replica.loader.position.copy_(start)  # never past the last image
                getattr(replica, what)(size)
        torch.cuda.synchronize(self.device)
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
            for tensor in moments() if new else ():  # moments of zero are those of an optimiser that has not stepped
                tensor.zero_()
        replica.optimiser.zero_grad(set_to_none=True)
