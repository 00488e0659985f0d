"""How steps are executed: replicas of one shape in lockstep, eager on a CPU, captured on a GPU.

Knows tensors, not science: no score, event or effect appears here.  A step
needs nothing from the host: it gathers its batch by a counter that lives on
the device, so that on a GPU one CUDA graph holds a whole step of every
replica (gather, augmentation, forward, loss, backward, optimiser, metrics),
each replica a branch on a stream of its own.  All of it but the optimiser is
compiled there, so that masks, casts, batch normalisation and ReLU, each of
which reads and writes whole tensors, become few kernels.  Whatever changes
between steps (learning rate, masks, noise, the epoch's order) is rewritten in
place, and the graph stays valid.  On a CPU the same step function is simply
called.

What cannot be compiled or captured is said and goes on without.  Two
environment variables are for whoever looks for the cause: GSTLIB_WITHOUT
names what not to try (`switched_off`), and with GSTLIB_STRICT=1 the first
refusal is an error with its whole traceback.
"""

from __future__ import annotations

import copy
import functools
import gc
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from gstlib.data import Loader
from gstlib.errors import InputError, say
from gstlib.spec import OptimiserSpec

_WARM_UP = 3  # uncaptured steps that let libraries choose their kernels before a capture
_STRUCTURES = 256  # differently built networks that a process may compile, torch's own limit is 8
_TOLERANCE = {"float32": 1e-3, "tf32": 1e-2, "bf16": 1e-2}  # relative, of compiled gradients, see `_check_compiled`
SWITCHES = ("capture", "streams", "compile", "autotune", "fused-optimiser")


class Measured(NamedTuple):
    """Mean cross-entropy (nats) and top-1 accuracy (0 … 1) over a pass."""

    loss: float
    accuracy: float


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`: "auto" is CUDA where there is one, else the CPU.

    Raises `InputError` for an unknown name and for CUDA where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"(cpu|cuda)(:[0-9]{1,2})?", name):
        raise InputError(f"unknown device {name!r}; choose from auto, cpu, cuda, cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"device {name!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices; "
                         "use --device cpu or auto")
    return device


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def switched_off() -> frozenset[str]:
    """Those of `SWITCHES` that the environment variable GSTLIB_WITHOUT names, separated by commas.

    Raises `InputError` for a name that is none of them.
    """
    names = [name.strip() for name in os.environ.get("GSTLIB_WITHOUT", "").split(",") if name.strip()]
    if unknown := sorted({name for name in names if name not in SWITCHES}):
        raise InputError(f"GSTLIB_WITHOUT or --without names {', '.join(unknown)}, which cannot be switched off; "
                         f"choose from {', '.join(SWITCHES)}, separated by commas")
    return frozenset(names)


def switch_off(names: str | None) -> None:
    """Let GSTLIB_WITHOUT be `names` (None: what it is), here and in processes begun from here; `InputError` as above."""
    if names is not None:
        os.environ["GSTLIB_WITHOUT"] = names
    switched_off()


class Replica:
    """One network in training: its optimiser, its batches, its running sums.

    `precision`: "float32", "tf32" (float32 storage, TF32 products on a GPU)
    or "bf16" (autocast over float32 parameters).
    """

    def __init__(self, model: nn.Module, spec: OptimiserSpec, loader: Loader, precision: str = "float32"):
        self.model, self.spec, self.loader, self.precision = model, spec, loader, precision
        self.device, loader.smoothing = loader.device, spec.label_smoothing
        fused = "fused-optimiser" not in switched_off()
        # a CPU's fused step copies what is not contiguous, so of channels-last kernels it gets views that are
        self._stepped = [(p, p if p.is_contiguous() or p.dim() != 4 or self.device.type == "cuda"
                          else nn.Parameter(_by_rows(p))) for p in model.parameters()]
        stepped = [view for _, view in self._stepped]
        if spec.name == "adam":
            self.optimiser = torch.optim.Adam(stepped, lr=spec.lr, weight_decay=spec.weight_decay, fused=fused,
                                              capturable=self.device.type == "cuda")
        else:
            self.optimiser = torch.optim.SGD(stepped, lr=spec.lr, momentum=spec.momentum,
                                             weight_decay=spec.weight_decay, fused=fused)
        # a captured step reads its rate from the device, where the host can change it; CUDA's kernels take float32
        rate = torch.tensor(spec.lr, dtype=torch.float32 if self.device.type == "cuda" else torch.float64, device=self.device)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.stages = list(_stages(model))
        self._kept: list[torch.Tensor] = []  # each test batch's input to the stage that `begin_test` was told to keep
        self._since = self._keep = self._number = 0  # of the stage to begin at, of the stage kept, of the test batch
        self.compiled: dict[tuple[Callable, int], Callable] = {}  # by pass and size of its batch, see `_compiled`

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
        self.loader.position.zero_()
        self.sums.zero_()
        self._number = 0
        self._since, self._keep = self._stage(since) if self._kept else 0, self._stage(keep)
        if not self._since:
            self._kept = []

    def _stage(self, layer: str | None) -> int:
        """The place of the stage that holds `layer`; 0, at which nothing is kept or spared, for None."""
        return next((i for i, (name, _) in enumerate(self.stages) if layer and f"{layer}.".startswith(f"{name}.")), 0)

    def step(self, size: int) -> None:
        """One training step on the next `size` images."""
        self.model.zero_grad(set_to_none=True)
        self.run(train_pass, size).backward()
        for parameter, view in self._stepped:
            if view is not parameter and parameter.grad is not None:
                view.grad = _by_rows(parameter.grad)
        self.optimiser.step()

    @torch.no_grad()
    def test_step(self, size: int) -> None:
        """Measure the next `size` test images; changes no weight and no running statistic."""
        self.run(test_pass, size, self._staged if self._since or self._keep else None)

    def run(self, act: Callable, size: int, model: Callable | None = None) -> torch.Tensor:
        """The loss of `act`, `train_pass` or `test_pass`, over the next `size` images; compiled where that is possible."""
        if model is None and (act, size) in self.compiled:
            return self.compiled[act, size](self)
        return act(model or self.model, self.loader, self.sums, size, self.precision)

    def _staged(self, x: torch.Tensor) -> torch.Tensor:
        """The network's output for a test batch, from the stage on from which it can be another than last time."""
        if self._since:
            x = self._kept[self._number]
        for place, (_, stage) in enumerate(self.stages[self._since:], self._since):
            if place == self._keep > 0:
                self._kept[self._number:self._number + 1] = [x]
            x = stage(x)
        self._number += 1
        return x

    @torch.no_grad()
    def measure(self, x: torch.Tensor, y: torch.Tensor) -> Measured:
        """Loss and accuracy over uint8 images (n, 3, 32, 32) and labels (n,), wherever they lie, in evaluation mode."""
        self.model.eval()
        self.sums.zero_()
        start = 0
        for size in self.loader.test_sizes(len(y)):
            images, labels = (part[start:start + size].to(self.device) for part in (x, y))
            loss, logits = _loss(self.model, self.loader.normalise(images), labels, self.precision, "sum")
            self.sums += _sums(loss, logits, labels)
            start += size
        return self.measured(len(y))

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


def _by_rows(kernel: torch.Tensor) -> torch.Tensor:
    """A view (o, h, w, c) of a kernel (o, c, h, w)."""
    return kernel.detach().permute(0, 2, 3, 1)


def _stages(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules, by name, that a network calls one after the other: sequences within sequences are taken apart."""
    if type(model) is not nn.Sequential:
        yield prefix.removesuffix("."), model
        return
    for name, part in model.named_children():
        yield from _stages(part, f"{prefix}{name}.")


def train_pass(model: Callable, loader: Loader, sums: torch.Tensor, size: int, precision: str) -> torch.Tensor:
    """The mean loss of the next `size` training images, which is added to `sums`."""
    x, y = loader.next_batch(size)
    loss, logits = _loss(model, x, y, precision, smoothing=loader.smoothing)
    sums.add_(_sums(loss.detach() * size, logits, y))
    return loss


def test_pass(model: Callable, loader: Loader, sums: torch.Tensor, size: int, precision: str) -> torch.Tensor:
    """The summed loss of the next `size` test images, which is added to `sums`."""
    x, y = loader.next_test(size)
    loss, logits = _loss(model, x, y, precision, "sum")
    sums.add_(_sums(loss, logits, y))
    return loss


def _loss(model: Callable, x: torch.Tensor, y: torch.Tensor, precision: str, reduction: str = "mean",
          smoothing: float = 0.0):
    """Cross-entropy (nats) of a batch, its labels smoothed by so much, and its logits (n, classes) in float32."""
    # the cache of cast weights would be filled in one capture and read in another
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision == "bf16",
                        cache_enabled=x.device.type == "cpu"):
        logits = model(x).float()
    return nn.functional.cross_entropy(logits, y, reduction=reduction, label_smoothing=smoothing), logits


def _sums(loss: torch.Tensor, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.stack([loss.double(), (logits.detach().argmax(1) == y).sum().double()])


def _pass_with(act: Callable, model: nn.Module, tensors: dict[str, torch.Tensor], *rest) -> torch.Tensor:
    """`act` of `model` with `tensors` for its parameters and buffers: one compiled function serves all replicas."""
    if not torch.compiler.is_compiling():  # there are many ways to have torch run what it was to compile
        raise RuntimeError("torch.compile is switched off")
    return act(lambda x: torch.func.functional_call(model, tensors, (x,)), *rest)


@functools.cache
def _compiler() -> Callable:
    return torch.compile(_pass_with, fullgraph=True, dynamic=False)


_skeletons: dict[tuple, nn.Module] = {}  # of each structure a network without values, which the compiled code belongs to


def _skeleton(replica: Replica) -> nn.Module:
    """The one skeleton of all networks that are built like `replica`'s: tensors by name, hooks, and what they print."""
    hooks = [(name, getattr(hook, "__qualname__", repr(hook))) for name, module in replica.model.named_modules()
             for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())]
    tensors = ((name, tensor.shape, tensor.dtype) for name, tensor in replica.named_tensors().items())
    if (key := (str(replica.model), *hooks, *tensors)) not in _skeletons:
        _skeletons[key] = copy.deepcopy(replica.model).to("meta")
    return _skeletons[key]


def _compiled(act: Callable, size: int, skeleton: nn.Module) -> Callable[[Replica], torch.Tensor]:
    """What `Replica.run` calls for `act` over `size` images: the pass of the skeleton, given the replica's tensors.

    `torch.compile` would compile anew for every network; so the passes of all networks that are built alike are those
    of their skeleton.
    """
    def run(replica: Replica) -> torch.Tensor:
        skeleton.train(replica.model.training)
        with torch._dynamo.config.patch(recompile_limit=_STRUCTURES, accumulated_recompile_limit=_STRUCTURES):
            return _compiler()(act, skeleton, replica.named_tensors(), replica.loader, replica.sums, size, replica.precision)

    return run


@contextmanager
def exactly() -> Iterator[None]:
    """Products in float32, without TF32, and without timing algorithms for what runs once."""
    cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    before = cudnn.allow_tf32, cudnn.benchmark
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        cudnn.allow_tf32, cudnn.benchmark = before


def _check_compiled(replica: Replica) -> None:
    """Raise `ArithmeticError` unless the compiled passes have the gradients and the test loss of eager ones, as near to
    those in float32 as eager ones are; leaves the replica as it was."""
    parameters, training = list(replica.model.parameters()), replica.model.training
    before = [(tensor, tensor.detach().clone()) for tensor in replica.tensors()]

    def outcome(act: Callable, run: Callable) -> torch.Tensor:
        replica.loader.position.zero_()
        try:
            with torch.set_grad_enabled(act is train_pass):
                loss = run()
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) if loss.requires_grad else loss
        finally:
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)

    try:
        for (act, size), compiled in replica.compiled.items():
            replica.model.train(act is train_pass)
            eager = functools.partial(act, replica.model, replica.loader, replica.sums, size)
            with exactly():
                exact = outcome(act, lambda: eager("float32"))
            usual, ours = outcome(act, lambda: eager(replica.precision)), outcome(act, lambda: compiled(replica))
            off, usual, norm = (float(part.norm()) for part in (ours - exact, usual - exact, exact))
            if not off <= 2 * usual + _TOLERANCE[replica.precision] * norm:
                what = "gradients are" if act is train_pass else "test loss is"
                raise ArithmeticError(f"its {what} off by {off:.1e} of {norm:.1e}, eager ones by {usual:.1e}")
    finally:
        replica.model.train(training)


def ran_out(error: BaseException | None) -> bool:
    """Whether memory ran out; a capture or a compilation that is cut short may raise an error of its own on top."""
    return error is not None and (isinstance(error, torch.OutOfMemoryError) or ran_out(error.__cause__ or error.__context__))


_broken: list[torch.cuda.CUDAGraph] = []  # of captures that CUDA could not end: torch's allocators still ask them


class Engine:
    """Trains and tests `replicas` in lockstep: step by step, all of them at once on a GPU, in turn on a CPU.

    A replica's rows do not depend on its company: bit for bit on a CPU; on a
    GPU as far as its kernels are deterministic.  `capture` (default: on CUDA)
    chooses CUDA graphs, `streams` a stream a replica, `fuse` (default: on
    CUDA) compiled passes, `autotune` that cuDNN times its algorithms for each
    shape; what GSTLIB_WITHOUT names stays off.  A pass that cannot be
    compiled, or whose gradients are not the eager ones, and a step that
    cannot be captured are said and left eager.  Raises `InputError` when
    replicas differ in device, precision, batch size, or number of images, and
    `torch.OutOfMemoryError` before it captures more replicas than fit.
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
        on_gpu, off = self.device.type == "cuda", switched_off()
        self.without = [name for name in SWITCHES if name in off]  # by wish, or because it was tried in vain
        self.capture = (on_gpu if capture is None else capture) and "capture" not in off
        torch.set_float32_matmul_precision("high" if first.precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = first.precision == "tf32"
        torch.backends.cudnn.benchmark = self.autotune = on_gpu and autotune and "autotune" not in off
        self._graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.streams = None
        if self.capture:
            self._main = torch.cuda.Stream(self.device)
            if streams and "streams" not in off:
                self.streams = [torch.cuda.Stream(self.device) for _ in self.replicas]
            self._pool = torch.cuda.graph_pool_handle()
        for replica in self.replicas:
            replica.compiled = {}
        self.fused = (on_gpu if fuse is None else fuse) and "compile" not in off and self._fuse()

    @property
    def techniques(self) -> list[str]:
        """What is in use, in words, and what was switched off or given up."""
        used = (("CUDA graph", self.capture), ("streams", self.capture and self.streams), ("compiled", self.fused),
                ("cuDNN autotuning", self.autotune))
        return [name for name, there in used if there] + [f"without {name}" for name in self.without]

    def _fuse(self) -> bool:
        """Compile the replicas' passes; returns whether all of them could be, and agree with the eager ones."""
        passes = [(train_pass, self.loader.batch_sizes()[0]), (test_pass, self.loader.test_sizes()[0])]
        checked = set()
        try:
            for replica in self.replicas:
                skeleton = _skeleton(replica)
                replica.compiled = {one: _compiled(*one, skeleton) for one in passes}
                if skeleton not in checked:  # the others' code is the same
                    _check_compiled(replica)
                checked.add(skeleton)
            return True
        except Exception as error:  # a missing compiler, a kernel that does not build: torch raises many kinds
            self._give_up("compile", "the forward and backward pass could not be compiled", error)
        for replica in self.replicas:
            replica.compiled = {}
        gc.collect()  # what the failed passes left belongs to another stream than a capture's
        return False

    def _give_up(self, switch: str, what: str, error: Exception) -> None:
        """Say that it goes on without `switch`; raises `error` where memory ran out, or GSTLIB_STRICT is set."""
        if ran_out(error) or os.environ.get("GSTLIB_STRICT", "0") not in ("", "0"):
            raise error
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        say(f"{what} ({text}); going on without")
        self.without.append(switch)

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
        replica.begin_test(*(None, None) if self.capture else (since, keep))
        for size in self.loader.test_sizes():
            self._do("test_step", size, (index,))
        return replica.measured(len(self.loader.test_y))

    def _do(self, what: str, size: int, indices) -> None:
        key, replicas = (what, size, *indices), [self.replicas[index] for index in indices]
        if self.capture and key not in self._graphs:
            try:
                self._graphs[key] = self._captured(what, size, replicas)
            except Exception as error:  # whatever a library does that a capture forbids
                torch.cuda.synchronize(self.device)  # raises where the device itself cannot go on
                self._give_up("capture", f"a {what.replace('_', ' ')} could not be captured as a CUDA graph", error)
                self.capture = False
                self._graphs.clear()
                for replica in replicas:
                    replica.model.zero_grad(set_to_none=True)
        if self.capture:
            self._graphs[key].replay()
        else:
            for replica in replicas:
                getattr(replica, what)(size)

    def _captured(self, what: str, size: int, replicas: list[Replica]) -> torch.cuda.CUDAGraph:
        """A CUDA graph of one such step of `replicas`, everything left as it was before, also by one that fails."""
        branches = self.streams[:len(replicas)] if self.streams else [self._main] * len(replicas)
        if what == "step":
            gc.collect()  # an accumulator of gradients left in a cycle would bring its own stream into the capture
        with torch.cuda.device(self.device):
            needed = [self._warm_up(what, size, replica, branch) for replica, branch in zip(replicas, branches)]
            # on one stream a step takes up what the one before has left; all at once none does
            at_once = len({*branches}) * max(needed)
            if len({*branches}) > 1 and at_once > (room := _room(self.device)):
                raise torch.OutOfMemoryError(
                    f"{len(replicas)} replicas at once take {at_once} bytes a step, {room} are free")
            graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
            try:
                # one pool for all graphs: they never run at once, and none reads what another left there
                with torch.cuda.graph(graph, pool=self._pool, stream=self._main):
                    begun = []
                    try:
                        for replica, branch in zip(replicas, branches):
                            if branch is not self._main:
                                branch.wait_stream(self._main)
                                begun.append(branch)
                            with torch.cuda.stream(branch):
                                getattr(replica, what)(size)
                    finally:  # CUDA cannot end a capture that has a branch which is not joined
                        for branch in begun:
                            self._main.wait_stream(branch)
            except BaseException:
                torch.cuda.set_stream(before)  # torch does neither where the capture could not be ended
                try:
                    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
                except RuntimeError:  # it was ended
                    pass
                else:
                    torch._C._cuda_releasePool(torch.cuda.current_device(), self._pool)
                    _broken.append(graph)
                raise
        return graph

    def _warm_up(self, what: str, size: int, replica: Replica, stream: torch.cuda.Stream) -> int:
        """A few steps on the stream of the capture, to which autograd's accumulators then belong; all of them undone.

        Returns how many bytes a step takes beside what stays.
        """
        def moments() -> list[torch.Tensor]:
            return [tensor for state in replica.optimiser.state.values() for tensor in state.values()
                    if isinstance(tensor, torch.Tensor)]

        before = [(tensor, tensor.detach().clone()) for tensor in (*replica.tensors(), *moments())]
        new, start = not replica.optimiser.state, replica.loader.position.clone()
        torch.cuda.synchronize(self.device)
        try:
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    replica.model.zero_grad(set_to_none=True)
                    torch.cuda.reset_peak_memory_stats(self.device)
                    held = torch.cuda.memory_allocated(self.device)
                    replica.loader.position.copy_(start)  # never past the last image
                    getattr(replica, what)(size)
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - held
        finally:
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)
                for tensor in moments() if new else ():  # moments of zero are those of an optimiser that has not stepped
                    tensor.zero_()
            replica.model.zero_grad(set_to_none=True)


def _room(device: torch.device) -> int:
    """Bytes that a capture can still have: free on the device, as far as this process may go, or held but not in use."""
    held, (free, total) = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)
    limit = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(free, limit - held) + held - torch.cuda.memory_allocated(device)
