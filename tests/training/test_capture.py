"""Captured steps: on a GPU as CUDA graphs, everywhere as recorded ones (see `recorded`)."""

import dataclasses

import pandas as pd
import pytest
import recorded
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_leaves

from gstlib import experiments, models
from gstlib.__main__ import main
from gstlib.data import Images, Loader
from gstlib.effects import Disturbance
from gstlib.pruner import Pruner
from gstlib.pruning import Schedule
from gstlib.spec import DataSpec, ModelSpec, OptimiserSpec, PruningSpec
from gstlib.training import engine, train
from gstlib.training.engine import Engine, Replica

PRUNING = PruningSpec(("conv7", "conv8"), (0, 0), (1, 1), (0.5, 0.5), 1, target="L")
COMPANY = {
    "none": None,
    "removed": PRUNING,
    "random": dataclasses.replace(PRUNING, target="R", score="l2"),
    "weights removed": dataclasses.replace(PRUNING, effect="remove-weights"),
    "zeroed": dataclasses.replace(PRUNING, effect="zero", batches=2),
    "restored": dataclasses.replace(PRUNING, effect="zero-restore", batches=2),
    "noised": dataclasses.replace(PRUNING, effect="gaussian", batches=4),
    "noised passingly": dataclasses.replace(PRUNING, effect="gaussian-transient", batches=4),
    "noised once": dataclasses.replace(PRUNING, effect="gaussian"),
}


@pytest.fixture
def gpu(monkeypatch):
    return recorded.install(monkeypatch)


@pytest.fixture
def graphs(gpu):
    return gpu.made


@pytest.fixture
def spec(tiny_spec):
    # 72 images in batches of 32: the last one is short, and a graph of its own
    base = tiny_spec()
    return lambda **fields: dataclasses.replace(base, **{
        "data": dataclasses.replace(base.data, train_size=72), "optimiser": OptimiserSpec(epochs=3, milestones=(1, 2), batch_size=32)}
        | fields)


def rows(results, table):
    return pd.concat([pd.DataFrame(result.tables[table]) for result in results]).drop(columns="seconds", errors="ignore")


def train_captured(monkeypatch, specs, images, device="cpu", **how):
    with monkeypatch.context() as patch:
        patch.setattr(train, "Engine", lambda replicas: Engine(replicas, capture=True, **how))
        return train.train_group(specs, images, device)


@pytest.mark.parametrize("streams", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_recorded_steps_give_the_rows_of_eager_ones(digits, spec, graphs, monkeypatch, streams):
    specs = [spec(pruning=pruning, seed=seed) for seed, pruning in enumerate(COMPANY.values())]
    eager = train.train_group(specs, digits)
    captured = train_captured(monkeypatch, specs, digits, streams=streams)
    for table in ("epoch", "event"):
        pd.testing.assert_frame_equal(rows(captured, table), rows(eager, table), check_exact=True)
    # a graph of whole batches, one of the short batch, and one of each run's tests; none captured anew after an event
    assert len(graphs) == 2 + len(specs) and [graph.replays for graph in graphs[:2]] == [3 * 2, 3]


@pytest.mark.parametrize("change", [
    {"optimiser": OptimiserSpec(name="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4, epochs=3, milestones=(1, 2), batch_size=32)},
    {"model": ModelSpec("resnet18", 1 / 16), "pruning": dataclasses.replace(PRUNING, layers=("stage4.1.conv1", "stage4.1.conv2"))},
    {"model": ModelSpec("conv4", 1 / 16), "pruning": PruningSpec(("fc1",), (0,), (1,), (0.5,), 1, score="magnitude", structure="weight")},
    {"precision": "bf16", "channels_last": True}], ids=["sgd", "resnet18", "conv4", "bf16"])
def test_recorded_steps_of_other_kinds(digits, spec, graphs, monkeypatch, change):
    kind = spec(**{"pruning": PRUNING} | change)
    specs = [dataclasses.replace(kind, data=dataclasses.replace(kind.data, augment=True), seed=seed) for seed in (0, 1)]
    eager, captured = train.train_group(specs, digits), train_captured(monkeypatch, specs, digits)
    for table in ("epoch", "event"):
        pd.testing.assert_frame_equal(rows(captured, table), rows(eager, table), check_exact=True)
    assert len(graphs) == 4


def test_smoke_s_rows_are_the_same_captured_in_company_and_alone(digits, graphs, monkeypatch):
    profile = experiments.profile("smoke")
    listed = experiments.figures.figure1_vgg11(profile, experiments.data_spec(profile, "digits", digits.fingerprint), [0])
    specs = [dataclasses.replace(run.spec, optimiser=dataclasses.replace(run.spec.optimiser, epochs=8))
             for run in listed if run.label in ("none", "L r=40")]
    assert {one.precision for one in specs} == {"float32"}
    together, alone = train_captured(monkeypatch, specs, digits), [train.train(one, digits) for one in specs]
    for table in ("epoch", "event"):
        pd.testing.assert_frame_equal(rows(together, table), rows(alone, table), rtol=1e-5, atol=0)


def test_a_checkpoint_is_taken_up_before_the_capture(digits, spec, graphs, monkeypatch, tmp_path):
    from gstlib.training.checkpoint import Checkpoints

    specs = [spec(pruning=COMPANY["noised"]), spec(seed=1)]
    whole = train.train_group(specs, digits)
    checkpoints, steps = Checkpoints(tmp_path, "cpu", 1e9), iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(train, "Engine", lambda replicas: Engine(replicas, capture=True))
        with pytest.raises(train.Stopped):
            train.train_group(specs, digits, checkpoints=checkpoints, stop=lambda: next(steps) == 4)
        resumed = train.train_group(specs, digits, checkpoints=checkpoints)
    for table in ("epoch", "event"):
        pd.testing.assert_frame_equal(rows(resumed, table), rows(whole, table), check_exact=True)


def test_the_stand_in_notices_what_a_graph_cannot_hold(graphs):
    a, graph = torch.ones(2), torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="asks the device"), torch.cuda.graph(graph):
        a.sum().item()
    factor = 2.0
    with torch.cuda.graph(graph):
        b = a * factor
        a += b
    assert a.tolist() == [1, 1]
    factor = 3.0  # frozen
    graph.replay()
    assert a.tolist() == [3, 3] and b.tolist() == [2, 2]


def failing(monkeypatch, gpu, what, size, error):
    """Let the second replica's `what` of `size` images raise `error` at the end of its work, where it is captured."""
    real, seen = getattr(Replica, what), []

    def act(replica, n, *number):
        real(replica, n, *number)
        if gpu.joined is not None and n == size:
            seen.append(replica)
            if replica is not seen[0]:
                raise error

    monkeypatch.setattr(Replica, what, act)


def as_before_a_capture(gpu):
    gpu.empty_cache()  # refused while a capture allocates
    return gpu.current is gpu.default and gpu.joined is None


@pytest.mark.parametrize("what, size", [("step", 32), ("step", 8), ("test_step", 40)])
def test_what_cannot_be_captured_goes_on_eagerly(digits, spec, gpu, monkeypatch, capsys, what, size):
    # the short batch after whole ones were captured; the second run's tests, the first of two at an event
    specs = [spec(pruning=pruning, seed=seed) for seed, pruning in enumerate(list(COMPANY.values())[1:4])]
    eager = train.train_group(specs, digits)
    failing(monkeypatch, gpu, what, size, RuntimeError("operation not permitted when stream is capturing\nmore"))
    captured = train_captured(monkeypatch, specs, digits)
    for table in ("epoch", "event"):
        pd.testing.assert_frame_equal(rows(captured, table), rows(eager, table), check_exact=True)
    assert captured[0].provenance["techniques"] == ["without capture"] and as_before_a_capture(gpu)
    said = capsys.readouterr().err
    assert said.count("as a CUDA graph (operation not permitted when stream is capturing); going on without\n") == 1


def test_a_capture_that_cannot_be_ended_leaves_stream_and_allocator_in_order(digits, spec, gpu, monkeypatch):
    real = Replica.step

    def fork(replica, size):
        real(replica, size)
        if gpu.joined is not None:
            torch.cuda.Stream().wait_stream(torch.cuda.current_stream())

    specs = [spec(), spec(seed=1)]
    eager = train.train_group(specs, digits)
    monkeypatch.setattr(Replica, "step", fork)
    monkeypatch.setattr(engine, "_broken", broken := [])
    captured = train_captured(monkeypatch, specs, digits)
    pd.testing.assert_frame_equal(rows(captured, "epoch"), rows(eager, "epoch"), check_exact=True)
    assert as_before_a_capture(gpu) and len(gpu.released) == len(broken) == 1


@pytest.mark.parametrize("unended", [False, True])
def test_memory_that_runs_out_in_a_capture_is_no_reason_to_go_on_eagerly(digits, spec, gpu, monkeypatch, unended):
    failing(monkeypatch, gpu, "step", 32, torch.OutOfMemoryError("full"))
    if unended:  # what is raised then is another error, and memory its cause
        monkeypatch.setattr(recorded.Stream, "wait_stream", lambda self, _: gpu.joined is None or gpu.joined.update({self: False}))
    with pytest.raises(RuntimeError) as raised:
        train_captured(monkeypatch, [spec(), spec(seed=1)], digits)
    assert engine.ran_out(raised.value) and as_before_a_capture(gpu)


@pytest.mark.parametrize("how, fits", [({}, False), ({"streams": False}, True)])
def test_memory_is_asked_before_many_are_captured_at_once(digits, spec, gpu, monkeypatch, how, fits):
    gpu.free, gpu.step_takes = 100, 40
    specs = [spec(seed=seed) for seed in range(3)]
    if fits:  # one after the other they take up the same memory
        assert train_captured(monkeypatch, specs, digits, **how)
    else:
        with pytest.raises(torch.OutOfMemoryError, match="3 replicas at once take 120 bytes a step, 100 are free"):
            train_captured(monkeypatch, specs, digits, **how)
        assert not gpu.made and as_before_a_capture(gpu)
    assert train_captured(monkeypatch, specs[:2], digits)


def test_room_is_what_is_free_or_held_and_not_in_use_within_the_limit(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 10)
    gpu.free = 60  # of 100; 30 are ours, 20 of them not in use, 10 another's
    assert engine._room(torch.device("cpu")) == 80
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 0.5)
    assert engine._room(torch.device("cpu")) == 40


def test_a_device_that_cannot_go_on_is_not_gone_on_with(digits, spec, gpu, monkeypatch):
    failing(monkeypatch, gpu, "step", 32, RuntimeError("an illegal memory access was encountered"))

    def synchronize(_=None):
        if gpu.made:
            raise RuntimeError("an illegal memory access was encountered, again")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match="again"):
        train_captured(monkeypatch, [spec(), spec(seed=1)], digits)


def test_strictly_a_refusal_is_an_error_with_its_whole_traceback(digits, spec, gpu, monkeypatch):
    monkeypatch.setenv("GSTLIB_STRICT", "1")
    failing(monkeypatch, gpu, "step", 32, error := RuntimeError("not permitted"))
    with pytest.raises(RuntimeError) as raised:
        train_captured(monkeypatch, [spec(), spec(seed=1)], digits)
    assert raised.value is error and raised.traceback[-1].name == "act"
    monkeypatch.setattr(engine, "_compiler", lambda: lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_captured(monkeypatch, [spec()], digits, fuse=True)


@pytest.mark.parametrize("off, left", [
    ("capture", ["without capture"]), ("streams", ["CUDA graph", "without streams"]),
    ("compile", ["CUDA graph", "streams", "without compile"]), (" streams, capture,", ["without capture", "without streams"])])
def test_what_the_environment_switches_off_is_not_used_and_shown(digits, spec, gpu, monkeypatch, off, left):
    monkeypatch.setenv("GSTLIB_WITHOUT", off)
    monkeypatch.setattr(engine, "_compiler", lambda: pytest.fail("compiled"))
    eager = train.train_group([spec()], digits)
    captured = train_captured(monkeypatch, [spec()], digits, fuse="compile" in off)
    pd.testing.assert_frame_equal(rows(captured, "epoch"), rows(eager, "epoch"), check_exact=True)
    assert captured[0].provenance["techniques"] == left
    assert bool(gpu.made) == ("capture" not in off)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_without_the_fused_optimiser_steps_are_nearly_the_same(digits, spec, monkeypatch, name, channels_last):
    one = spec(channels_last=channels_last, optimiser=OptimiserSpec(name=name, momentum=0.9 * (name == "sgd"), epochs=1, milestones=(), batch_size=32))
    fused = train.train(one, digits)
    monkeypatch.setenv("GSTLIB_WITHOUT", "fused-optimiser")
    plain = train.train(one, digits)
    assert plain.provenance["techniques"] == ["without fused-optimiser"] and fused.provenance["techniques"] == []
    assert plain.tables["epoch"][0]["train_loss"] == pytest.approx(fused.tables["epoch"][0]["train_loss"], rel=1e-3)


@pytest.mark.parametrize("command", [["run", "figure2"], ["bench", "--quick"]])
def test_a_switch_that_is_none_is_refused_at_once(command, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("GSTLIB_WITHOUT", "compile")  # put back in the end
    for given in (["--without", "capture,steams"], []):
        assert main([*command, "--results", str(tmp_path / "results"), *given]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "steams, which cannot be switched off; choose from capture, streams" in said
    assert not (tmp_path / "results").exists()


def test_compiled_passes_give_the_eager_rows_and_are_shared(digits, spec, monkeypatch):
    # without code generation, which takes a minute: what is traced, and for whom, is the same
    compiled = torch.compile(engine._pass_with, fullgraph=True, dynamic=False, backend="aot_eager")
    engines = []
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(engine, "_compiler", lambda: compiled)
    monkeypatch.setattr(engine, "_skeletons", skeletons := {})
    specs = [spec(pruning=COMPANY[name], seed=seed)
             for seed, name in enumerate(("none", "noised passingly", "none", "noised passingly"))]
    eager = train.train_group(specs, digits)
    monkeypatch.setattr(train, "Engine", lambda replicas: engines.append(Engine(replicas, fuse=True)) or engines[-1])
    fused = train.train_group(specs, digits)
    for table in ("epoch", "event"):
        pd.testing.assert_frame_equal(rows(fused, table), rows(eager, table), check_exact=True)
    assert engines[0].fused and engines[0].techniques == ["compiled"]
    assert len(skeletons) == 2  # unmasked, masked with noise
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4  # of each a training and a test pass


def test_a_pass_that_cannot_be_compiled_is_said_and_left_eager(digits, spec, monkeypatch, capsys):
    def no_compiler(*_):
        raise RuntimeError("Failed to find C compiler")

    specs = [spec(pruning=PRUNING)]
    eager = train.train_group(specs, digits)
    monkeypatch.setattr(engine, "_compiler", lambda: no_compiler)
    monkeypatch.setattr(train, "Engine", lambda replicas: Engine(replicas, fuse=True))
    pd.testing.assert_frame_equal(rows(train.train_group(specs, digits), "epoch"), rows(eager, "epoch"), check_exact=True)
    assert "could not be compiled (Failed to find C compiler); going on without" in capsys.readouterr().err


def test_a_compiler_that_is_switched_off_is_no_technique(monkeypatch, digits, spec, capsys):
    monkeypatch.setattr(torch._dynamo.config, "disable", True)
    engine._compiler.cache_clear()
    group = train._Group([spec()], digits, torch.device("cpu"), lambda _: None, "")
    assert Engine([group.runs[0].replica], fuse=True).techniques == ["without compile"]
    assert "torch.compile is switched off" in capsys.readouterr().err


@pytest.mark.parametrize("what, factor", [("gradients are", 1.01), ("gradients are", float("nan")), ("test loss is", 1.01)])
def test_a_pass_with_other_results_is_not_believed(digits, spec, monkeypatch, capsys, what, factor):
    act_of = {"gradients are": engine.train_pass, "test loss is": engine.test_pass}

    def wrong(act, model, tensors, *rest):
        loss = act(lambda x: torch.func.functional_call(model, tensors, (x,)), *rest)
        return factor * loss if act is act_of[what] else loss

    monkeypatch.setattr(engine, "_compiler", lambda: wrong)
    group = train._Group([spec()], digits, torch.device("cpu"), lambda _: None, "")
    before = {name: tensor.clone() for name, tensor in group.runs[0].replica.named_tensors().items()}
    assert not Engine([group.runs[0].replica], fuse=True).fused
    assert f"its {what} off by" in capsys.readouterr().err
    assert all(torch.equal(tensor, before[name]) for name, tensor in group.runs[0].replica.named_tensors().items())


def test_memory_that_runs_out_while_compiling_is_no_reason_to_go_on_without(digits, spec, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(engine, "_compiler", lambda: full)
    group = train._Group([spec()], digits, torch.device("cpu"), lambda _: None, "")
    with pytest.raises(torch.OutOfMemoryError):
        Engine([group.runs[0].replica], fuse=True)


@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("model, layers", [("vgg11", ("conv7", "conv8")), ("resnet18", ("stage4.1.conv1", "stage4.1.conv2"))])
def test_a_step_on_a_gpu_stays_there_and_asks_nothing(monkeypatch, name, model, layers):
    # tensors without values on a device that is not there: one on another device, or a number wanted by the host, raises
    with FakeTensorMode(), torch.device("cuda"):
        network = models.build(model, 10, 1 / 16)
        pruner = Pruner(network, Schedule((0, 0), (1, 1), (0.5, 0.5), 1), layers, "l2", effect="gaussian", batches=4)
        parts = [part for n in (72, 40) for part in (torch.zeros(n, 3, 32, 32, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64))]
        images = Images(*parts, "cifar10", "", "")
        images.__dict__["statistics"] = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
        replica = Replica(network, OptimiserSpec(name=name, momentum=0.9 * (name == "sgd")),
                          Loader(images, 32, True, 0, torch.device("cuda"), True))
        assert replica.device == torch.device("cuda", 0)  # some of torch.cuda's functions want the number
        # autograd itself needs the device
        monkeypatch.setattr(torch.Tensor, "backward", lambda _: [
            setattr(parameter, "grad", torch.zeros_like(parameter)) for parameter in network.parameters()])
        # and its optimisers' kernels have no version for tensors without values
        calls = []
        monkeypatch.setattr(torch, f"_fused_{name}_", lambda *lists, **numbers: calls.append((lists, numbers)))
        for layer in pruner.layers:  # struck by hand, since to choose units asks the device
            disturbance = Disturbance.__new__(Disturbance)
            disturbance.__dict__.update(layer=layer, units=None, batches=9, sd=0.1, places=torch.arange(4))
            pruner.effect.active.append(disturbance)
        monkeypatch.setattr(pruner.effect, "generator", None)
        replica.begin_epoch(0)
        for size in replica.loader.batch_sizes():
            replica.step(size)
            pruner.batch()
        replica.begin_test()
        replica.test_step(40)
        given = [t for t in tree_leaves([lists for lists, _ in calls]) if isinstance(t, torch.Tensor)]
        assert {tensor.device for tensor in (*replica.tensors(), *given)} == {torch.device("cuda", 0)} and len(calls) == 3
        assert all(numbers["lr"].device.type == "cuda" and numbers["lr"].dtype == torch.float32 for _, numbers in calls)
        with pytest.raises(DataDependentOutputException):
            replica.measured(72)


def train_on_gpu(monkeypatch, specs, images, **how):
    with monkeypatch.context() as patch:
        patch.setattr(train, "Engine", lambda replicas: Engine(replicas, **how))
        return train.train_group(specs, images, "cuda")


def assert_near(ours, theirs):
    """The same events, and losses that differ by rounding, which a few steps of Adam on nearly tied scores make larger."""
    for table in ("epoch", "event"):
        one, two = rows(ours, table), rows(theirs, table)
        if table == "event":
            assert one["removed_total"].tolist() == two["removed_total"].tolist()
            continue
        assert one["test_loss"].tolist() == pytest.approx(two["test_loss"].tolist(), rel=1e-2)
        for first, tolerance in ((True, 1e-3), (False, 5e-2)):
            losses = [frame["train_loss"][(frame["epoch"] == 0) == first].tolist() for frame in (one, two)]
            assert losses[0] == pytest.approx(losses[1], rel=tolerance)


@pytest.mark.cuda
@pytest.mark.parametrize("how", [{}, {"streams": False}, {"fuse": False}, {"fuse": False, "autotune": False}, {"capture": False}])
def test_every_way_to_execute_a_step_on_a_gpu_trains_the_same(digits, spec, monkeypatch, how):
    specs = [spec(pruning=pruning, seed=seed) for seed, pruning in enumerate(COMPANY.values())]
    plain = train_on_gpu(monkeypatch, specs, digits, capture=False, fuse=False, autotune=False)
    assert_near(train_on_gpu(monkeypatch, specs, digits, **how), plain)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_gpu_trains_as_a_cpu_does(digits, spec, monkeypatch, name):
    # lasting noise is drawn elsewhere, so the noised run is not compared
    kinds = [pruning for name, pruning in COMPANY.items() if name != "noised"]
    optimiser = OptimiserSpec(name=name, lr=0.001, momentum=0.9 * (name == "sgd"), epochs=3, milestones=(1, 2), batch_size=32)
    specs = [spec(pruning=pruning, optimiser=optimiser, seed=seed) for seed, pruning in enumerate(kinds)]
    assert_near(train_on_gpu(monkeypatch, specs, digits), train.train_group(specs, digits))


@pytest.mark.cuda
def test_passes_are_compiled_on_a_gpu(digits, spec, capsys):
    for precision in ("float32", "tf32", "bf16"):
        result = train.train(spec(pruning=PRUNING, precision=precision, channels_last=True), digits, "cuda")
        assert result.provenance["techniques"] == ["CUDA graph", "streams", "compiled", "cuDNN autotuning"], capsys.readouterr().err


@pytest.mark.cuda
def test_company_does_not_matter_on_a_gpu(digits, spec):
    specs = [spec(pruning=pruning, seed=seed) for seed, pruning in enumerate(COMPANY.values())]
    assert_near(train.train_group(specs, digits, "cuda"), [train.train(one, digits, "cuda") for one in specs])


@pytest.mark.cuda
def test_noise_on_a_gpu_is_fresh_has_the_stated_size_and_ends(digits, spec):
    group = train._Group([spec(pruning=COMPANY["noised passingly"])], digits, torch.device("cuda", 0), lambda _: None, "")
    pruner, seen = group.runs[0].pruner, []
    pruner.epoch(0, lambda: 0.5)
    for _ in range(3):
        seen.append([(d.sd, d.layer.noise[d.places].clone()) for d in pruner.effect.active])
        pruner.batch()
    for (sd, first), (_, second) in zip(seen[0], seen[1]):
        assert not torch.equal(first, second) and float(first.std()) == pytest.approx(sd, rel=0.2)
    pruner.batch()
    assert not pruner.effect.active and all(not layer.noise.any() for layer in pruner.layers)


@pytest.mark.cuda
def test_more_replicas_than_a_gpu_holds(digits, tmp_path, capsys):
    from gstlib import bench
    from gstlib.campaign import runner
    from gstlib.experiments import Labelled
    from gstlib.store import Store

    base = dataclasses.replace(bench.paper_spec("vgg11"), data=DataSpec(*digits.known, train_size=128, test_size=40), pruning=None)
    base = dataclasses.replace(base, optimiser=OptimiserSpec(epochs=1, milestones=()))
    runs = [Labelled("none", dataclasses.replace(base, seed=seed)) for seed in range(16)]
    torch.cuda.set_per_process_memory_fraction(3 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    try:
        outcome = runner.run(Store(tmp_path), runs, "digits", "", "cuda", replicas=16, executor="local")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(outcome.trained) == 16 and "exceed the memory of cuda" in capsys.readouterr().err


@pytest.mark.cuda
def test_a_run_on_a_gpu_goes_on_from_its_checkpoint(digits, spec, tmp_path):
    from gstlib.training.checkpoint import Checkpoints

    specs = [spec(pruning=COMPANY["noised"]), spec(seed=1)]
    whole = train.train_group(specs, digits, "cuda")
    checkpoints, steps = Checkpoints(tmp_path, "cuda", 1e9), iter(range(100))
    with pytest.raises(train.Stopped):
        train.train_group(specs, digits, "cuda", checkpoints=checkpoints, stop=lambda: next(steps) == 4)
    assert_near(train.train_group(specs, digits, "cuda", checkpoints=checkpoints), whole)
