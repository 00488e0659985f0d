"""A stand-in for CUDA graphs on a machine without CUDA: a capture that records operations, a replay that repeats them.

What a capture does to a program it does too: nothing is computed while it
lasts, every number from the host is frozen, memory stays where it was, and a
question to the device or a stream that is not joined is an error.  Not
emulated: kernels, and their order on different streams.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_QUESTIONS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::unique2"}


class Graph:
    """What `torch.cuda.CUDAGraph` is to the engine."""

    def __init__(self):
        self.calls, self.replays = [], 0

    def replay(self):
        self.replays += 1
        with torch._C._AutoDispatchBelowAutograd():  # where the operations were recorded too
            for function, args, kwargs, results, alias in self.calls:
                again = function(*args, **kwargs)
                if not alias:
                    for there, here in zip(results, tree_leaves(again)):
                        if isinstance(there, torch.Tensor):
                            there.copy_(here)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph, self.before, self.own = graph, {}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function._schema.name in _QUESTIONS:
            raise RuntimeError(f"{function} asks the device for a value while a graph is captured")
        arguments = function._schema.arguments
        given = [*zip(arguments, args), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
        for argument, value in given:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    self._keep(tensor)
        if function._schema.name == "aten::native_batch_norm" and args[5]:  # writes statistics that its schema hides
            self._keep(args[3]), self._keep(args[4])
        results = function(*args, **kwargs)
        alias = any(r.alias_info is not None for r in function._schema.returns)
        leaves = tree_leaves(results)
        if not alias:
            self.own |= {leaf.untyped_storage().data_ptr() for leaf in leaves if isinstance(leaf, torch.Tensor)}
        self.graph.calls.append((function, args, kwargs, leaves, alias))
        return results

    def _keep(self, tensor):
        if isinstance(tensor, torch.Tensor):
            place = tensor.untyped_storage().data_ptr()
            if place not in self.own and place not in self.before:
                self.before[place] = (tensor, tensor.detach().clone())


class _Stream:
    """A stream takes part in a capture from when it waits for one that does, and must be waited for before the end."""

    capture: dict["_Stream", bool] | None = None  # streams in the capture under way: whether they were waited for

    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other):
        if _Stream.capture is not None:
            if self in _Stream.capture:
                _Stream.capture[other] = True
            elif other in _Stream.capture:
                _Stream.capture[self] = False


@contextmanager
def _on(stream):
    if _Stream.capture is not None and stream not in _Stream.capture:
        raise RuntimeError("work on a stream that does not take part in the capture")
    yield


@contextmanager
def _capture(graph, pool=None, stream=None):
    recorder = _Recorder(graph)
    _Stream.capture = {stream: True}
    try:
        with recorder:
            yield
        if not all(_Stream.capture.values()):
            raise RuntimeError("unjoined work")
    finally:
        _Stream.capture = None
    with torch.no_grad():
        for tensor, value in recorder.before.values():
            tensor.copy_(value)


def install(monkeypatch) -> list[Graph]:
    """Let `torch.cuda`'s graphs and streams be these; returns the graphs made from now on."""
    made = []

    def graph():
        made.append(Graph())
        return made[-1]

    for name, stand_in in (("CUDAGraph", graph), ("graph", _capture), ("Stream", _Stream),
                           ("stream", _on), ("device", lambda _: nullcontext()),
                           ("synchronize", lambda _=None: None), ("graph_pool_handle", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return made
