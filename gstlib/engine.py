"""How steps are executed: replicas of one shape in lockstep, eager on a CPU, captured on a GPU.

Knows tensors, not science: no score, event or effect appears here.  A step
needs nothing from the host: it gathers its batch by a counter that lives on
the device, so that on a GPU one CUDA graph holds a whole step of every
replica (gather, augmentation, forward, loss, backward, optimiser, metrics),
each replica a branch on a stream of its own.  Whatever changes between steps
(learning rate, masks, noise, the epoch's order) is rewritten in place, and
the graph stays valid.  On a CPU the same step function is simply called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn

from gstlib.data import Loader
from gstlib.spec import InputError, OptimiserSpec

_WARM_UP = 3  # uncaptured steps that let libraries choose their kernels before a capture


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


class Replica:
    """One network in training: its optimiser, its batches, its running sums.

    `precision`: "float32", "tf32" (float32 storage, TF32 products on a GPU)
    or "bf16" (autocast over float32 parameters).
    """

    def __init__(self, model: nn.Module, spec: OptimiserSpec, loader: Loader, precision: str = "float32"):
        self.model, self.spec, self.loader, self.precision = model, spec, loader, precision
        self.device = loader.device
        # a captured optimiser reads its rate from the device, where the host can change it
        lr = torch.tensor(spec.lr, device=self.device) if self.device.type == "cuda" else spec.lr
        if spec.name == "adam":
            self.optimiser = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=spec.weight_decay, fused=True,
                                              capturable=self.device.type == "cuda")
        else:
            self.optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=spec.momentum,
                                             weight_decay=spec.weight_decay, fused=True)
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)

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
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(self.learning_rate(epoch))
            else:
                group["lr"] = self.learning_rate(epoch)

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

    def begin_test(self) -> None:
        """Go to the first test image in evaluation mode and clear the sums."""
        self.model.eval()
        self.loader.begin_test()
        self.sums.zero_()

    def step(self, size: int) -> None:
        """One training step on the next `size` images."""
        self.optimiser.zero_grad(set_to_none=True)
        x, y = self.loader.next_batch(size)
        logits = self._forward(x)
        loss = nn.functional.cross_entropy(logits, y)
        loss.backward()
        self.optimiser.step()
        self.sums += _sums(loss.detach() * size, logits, y)

    @torch.no_grad()
    def test_step(self, size: int) -> None:
        """Measure the next `size` test images; changes no weight and no running statistic."""
        x, y = self.loader.next_test(size)
        logits = self._forward(x)
        self.sums += _sums(nn.functional.cross_entropy(logits, y, reduction="sum"), logits, y)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        # the cache of cast weights would be filled in one capture and read in another
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16",
                            cache_enabled=self.device.type == "cpu"):
            return self.model(x).float()

    def measured(self, n: int) -> Measured:
        """The sums since the last `begin_…` as means over `n` images; the one place where the host waits."""
        loss, right = (self.sums / n).tolist()
        return Measured(loss, right)

    def tensors(self) -> list[torch.Tensor]:
        """Everything a step changes, the optimiser's state apart."""
        return [*self.model.parameters(), *self.model.buffers(), self.sums, self.loader.position]


def _sums(loss: torch.Tensor, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.stack([loss.double(), (logits.detach().argmax(1) == y).sum().double()])


class Engine:
    """Trains and tests `replicas` in lockstep: step by step, all of them at once on a GPU, in turn on a CPU.

    A replica's rows do not depend on its company: bit for bit on a CPU; on a
    GPU as far as its kernels are deterministic.  `capture` (default: on CUDA)
    chooses CUDA graphs, `streams` a stream a replica.  Raises `InputError`
    when replicas differ in device, precision, batch size, or number of images.
    """

    def __init__(self, replicas: Sequence[Replica], capture: bool | None = None, streams: bool = True):
        self.replicas = list(replicas)
        first = self.replicas[0]
        for name, of in (("device", lambda r: r.device), ("precision", lambda r: r.precision),
                         ("batch size", lambda r: r.loader.batch_size), ("training images", lambda r: len(r.loader.y)),
                         ("test images", lambda r: len(r.loader.test_y))):
            if len({of(r) for r in self.replicas}) > 1:
                raise InputError(f"replicas in lockstep must agree in {name}, but have "
                                 f"{', '.join(str(of(r)) for r in self.replicas)}")
        self.loader, self.device = first.loader, first.device
        self.capture = self.device.type == "cuda" if capture is None else capture
        torch.set_float32_matmul_precision("high" if first.precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = first.precision == "tf32"
        self.streams = [torch.cuda.Stream(self.device) for _ in self.replicas] if streams and self.capture else None
        self._graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.capture else None

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

    def test(self, index: int = 0) -> Measured:
        """One pass of replica `index` over the test images in evaluation mode."""
        replica = self.replicas[index]
        replica.begin_test()
        for size in self.loader.test_sizes():
            self._do("test_step", size, (index,))
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
        saved = [[tensor.detach().clone() for tensor in replica.tensors()] for replica in replicas]
        fresh = [not replica.optimiser.state for replica in replicas]
        states = [[(tensor, tensor.clone()) for state in replica.optimiser.state.values()
                   for tensor in state.values() if isinstance(tensor, torch.Tensor)] for replica in replicas]
        torch.cuda.synchronize(self.device)
        for number, (replica, before) in enumerate(zip(replicas, saved)):
            # on the stream of the capture, to which autograd's accumulators then belong
            with torch.cuda.stream(self.streams[number] if self.streams else torch.cuda.Stream(self.device)):
                for _ in range(_WARM_UP):
                    replica.loader.position.copy_(before[-1])  # never past the last image
                    getattr(replica, what)(size)
        torch.cuda.synchronize(self.device)
        with torch.no_grad():
            for replica, before, moments, new in zip(replicas, saved, states, fresh):
                for tensor, old in zip(replica.tensors(), before):
                    tensor.copy_(old)
                for tensor, old in moments:
                    tensor.copy_(old)
                if new:  # the warm-up made the state; a state of zeros is that of an optimiser that has not stepped
                    for state in replica.optimiser.state.values():
                        for tensor in state.values():
                            if isinstance(tensor, torch.Tensor):
                                tensor.zero_()
        for replica in replicas:
            replica.optimiser.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        # one pool for all graphs: they never run at once, and none reads what another left there
        with torch.cuda.graph(graph, pool=self._pool):
            main = torch.cuda.current_stream(self.device)
            for number, replica in enumerate(replicas):
                branch = self.streams[number] if self.streams else None
                if branch is not None:
                    branch.wait_stream(main)
                with torch.cuda.stream(branch) if branch is not None else nullcontext():
                    getattr(replica, what)(size)
            for branch in self.streams[:len(replicas)] if self.streams else ():
                main.wait_stream(branch)
        return graph
