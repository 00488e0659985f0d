"""A stand-in for CUDA graphs on a machine without CUDA: a capture that records operations, a replay that repeats them.

What a capture does to a program it does too: nothing is computed while it
lasts, every number from the host is frozen, memory stays where it was, and a
question to the device or a stream that is not joined is an error, after which
stream and allocator stay as torch leaves them then.  Not emulated: kernels,
and their order on different streams.
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


class Device:
    """What a GPU and torch's allocator remember: the stream in use, the capture under way, and what they then refuse."""

    def __init__(self):
        self.default = self.current = Stream()
        self.joined: dict[Stream, bool] | None = None  # streams in the capture under way: whether they were waited for
        self.allocating, self.released = [], []  # pools that a capture allocates to, pools given back by hand
        self.made: list[Graph] = []
        self.free, self.step_takes = 100, 0  # bytes

    def graph(self):
        self.made.append(Graph())
        return self.made[-1]

    def set_stream(self, stream):
        self.current = stream

    @contextmanager
    def stream(self, stream):
        if self.joined is not None and stream not in self.joined:
            raise RuntimeError("work on a stream that does not take part in the capture")
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def end_allocating(self, _, pool):
        if pool not in self.allocating:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.allocating.remove(pool)

    def empty_cache(self):
        if self.allocating:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def capture(self, graph, pool=None, stream=None):
        return Capture(self, graph, pool, stream)


class Capture:
    """What `torch.cuda.graph` is: where it cannot be ended, stream and allocator stay as they were in it."""

    def __init__(self, device, graph, pool, stream):
        self.device, self.pool, self.stream = device, pool, stream
        self.recorder = _Recorder(graph)

    def __enter__(self):
        self.device.empty_cache()
        self.before, self.device.current = self.device.current, self.stream
        self.device.allocating.append(self.pool)
        self.device.joined = {self.stream: True}
        self.recorder.__enter__()

    def __exit__(self, *error):
        self.recorder.__exit__(*error)
        joined, self.device.joined = self.device.joined, None
        with torch.no_grad():
            for tensor, value in self.recorder.before.values():
                tensor.copy_(value)
        if not all(joined.values()):
            raise RuntimeError("unjoined work")
        self.device.end_allocating(None, self.pool)
        self.device.current = self.before


class Stream:
    """A stream takes part in a capture from when it waits for one that does, and must be waited for before the end."""

    device: Device

    def __init__(self, _=None):
        pass

    def wait_stream(self, other):
        joined = self.device.joined
        if joined is not None:
            if self in joined:
                joined[other] = True
            elif other in joined:
                joined[self] = False


def install(monkeypatch) -> Device:
    """Let `torch.cuda`'s graphs, streams and memory be those of the device that is returned."""
    there = Device()
    monkeypatch.setattr(Stream, "device", there, raising=False)
    for name, stand_in in (
            ("CUDAGraph", there.graph), ("graph", there.capture), ("Stream", Stream), ("stream", there.stream),
            ("set_stream", there.set_stream), ("current_stream", lambda _=None: there.current),
            ("device", lambda _: nullcontext()), ("current_device", lambda: 0), ("synchronize", lambda _=None: None),
            ("graph_pool_handle", object), ("empty_cache", there.empty_cache),
            ("reset_peak_memory_stats", lambda _=None: None), ("memory_allocated", lambda _=None: 0),
            ("max_memory_allocated", lambda _=None: there.step_takes), ("memory_reserved", lambda _=None: 0),
            ("mem_get_info", lambda _=None: (there.free, 100)), ("get_per_process_memory_fraction", lambda _=None: 1.0)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", there.end_allocating)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda _, pool: there.released.append(pool), raising=False)
    return there
