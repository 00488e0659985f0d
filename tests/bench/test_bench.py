import json
from dataclasses import replace
from functools import partial

import pytest
import recorded
import torch
from torch import nn

from gstlib import models
from gstlib.bench import measure as bench
from gstlib.spec import PruningSpec
from gstlib.training import train
from gstlib.training.engine import Engine

CPU = torch.device("cpu")
TINY = bench.Size((1,), work=1e6, blocks=2, test_images=20, techniques=("vgg11",), models=("conv4", "vgg11"),
                  width=1 / 16, batch_size=8)


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "peaks", partial(bench.peaks, repeats=1))
        return bench.run(CPU, quick=True, progress=False, size=TINY)


def test_one_convolution_counted_by_hand(monkeypatch):
    monkeypatch.setattr(models, "build", lambda *_: nn.Sequential(nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.Flatten(),
                                                                  nn.Linear(8 * 14 * 14, 10, bias=False)))
    counted = bench.count.__wrapped__("anything")
    assert counted.products == 14 * 14 * 8 * (5 * 5 * 3) + 1568 * 10
    assert counted.activations == 1568 + 10
    assert counted.parameters == 8 * 75 + 8 + 15680
    assert counted.operations(4) == 6 * 4 * counted.products
    assert counted.operations(4, training=False) == 2 * 4 * counted.products
    assert counted.traffic(4, "bf16") == 4 * (8 * 1578 + 3072) + 36 * counted.parameters
    assert counted.traffic(4, "float32") == counted.traffic(4, "tf32") == 4 * (16 * 1578 + 3072) + 40 * counted.parameters


@pytest.mark.parametrize("model, products, petaflop", [
    ("vgg11", 152_769_536, 15.9), ("resnet18", 555_422_720, 57.8), ("conv4", 20_741_120, 0.365)])
def test_operations_of_the_papers_networks(model, products, petaflop):
    assert bench.count(model).products == products
    assert bench.count(model).parameters == sum(p.numel() for p in models.build(model).parameters())
    assert bench.operations_per_run(bench.model_spec(model)) / 1e15 == pytest.approx(petaflop, rel=5e-3)


def test_what_is_measured_is_the_paper_profile():
    spec = bench.model_spec("vgg11")
    assert (spec.precision, spec.channels_last, spec.model.width, spec.optimiser.batch_size) == ("bf16", True, 1.0, 128)
    assert bench.model_spec("conv4").data.augment and bench.model_spec("conv4").optimiser.epochs == 55
    assert bench.default_size(torch.device("cuda"), quick=False).steps("conv4") == 391
    assert all(bench.default_size(torch.device(kind), quick=False).replicas == (1, 2, 5, 10, 20) for kind in ("cuda", "cpu"))


def test_random_images_are_reproducible_and_not_zeros():
    a, b = bench.synthetic.__wrapped__(64, 8), bench.synthetic.__wrapped__(64, 8)
    assert torch.equal(a.train_x, b.train_x) and torch.equal(a.train_y, b.train_y)
    assert a.train_x.float().std() > 70 and not torch.equal(a.train_x[:8], a.test_x)


def test_rows_have_their_columns_and_are_json(result):
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert [(row["model"], row["device"], row["replicas"]) for row in result["rows"]] == [
        ("conv4", "cpu", 1), ("vgg11", "cpu", 1)]
    for row in result["rows"]:
        assert row["ratio_to_plain_loop"] == pytest.approx(row["steps_per_s"] / row["plain_steps_per_s"])
        assert row["images_per_s"] == pytest.approx(8 * row["steps_per_s"])
        assert row["seconds_per_epoch"] == pytest.approx(50_000 / row["images_per_s"])
        assert row["gap"] * max(row["compute_floor_ms"], row["memory_floor_ms"]) == pytest.approx(row["ms_per_step"])
        seconds = row["ms_per_step"] / 1000
        assert row["share_of_peak"] == pytest.approx(
            row["operations_per_step"] / (seconds * result["machine"]["peak_operations_per_s"]))
        assert row["train_s_per_run"] == pytest.approx((325 if row["model"] == "vgg11" else 55) * row["seconds_per_epoch"])
        assert row["test_s_per_run"] > 0 and row["events_s_per_run"] > 0
        assert row["peak_memory_bytes"] > 50e6
    assert result["machine"]["device"] and result["machine"]["finished"] and result["machine"]["versions"]["torch"]
    assert {t["technique"].split(" (")[0] for t in result["techniques"]} == {
        "bf16", "channels-last", "small-map convolution", "a thread a run", "fused optimiser"}
    assert all(t["model"] == "vgg11" and t["gain"] > 0 for t in result["techniques"])
    of_vgg11 = {c["cost"]: c for c in result["costs"] if c["model"] == "vgg11"}
    assert of_vgg11["training step"]["training_steps"] == pytest.approx(1)
    assert "E[BN] of all pruned layers" in of_vgg11
    assert "E[BN] of all pruned layers" not in {c["cost"] for c in result["costs"] if c["model"] == "conv4"}


def test_the_table_prints(result):
    text = bench.table(result)
    assert "ratio_to_plain_loop" in text and "channels-last" in text and "E[BN]" in text
    row = {"model": "vgg11", "device": "cuda", "replicas": 20, "steps_per_s": None, "ratio_to_plain_loop": None,
           "note": "does not fit into memory"}
    assert "does not fit" in bench.table({**result, "rows": [*result["rows"], row]})
    assert "does not fit" in bench.table({**result, "rows": [row], "techniques": [], "costs": []})


def test_memory_that_runs_out_is_a_note(monkeypatch):
    def full(case, *_):
        try:
            raise torch.OutOfMemoryError("full")
        finally:
            raise RuntimeError("capture failed")

    monkeypatch.setattr(bench, "peaks", lambda _: {"peak_operations_per_s": 1e12, "peak_bytes_per_s": 1e10})
    monkeypatch.setattr(bench, "plain_loop", lambda *_: 1.0)
    monkeypatch.setattr(bench, "_cost", full)
    result = bench.run(CPU, progress=False, size=TINY._replace(models=("conv4",)))
    assert result["rows"][0]["note"] == "does not fit into memory" and not result["techniques"]
    monkeypatch.setattr(bench, "_cost", lambda *_: [].append(1, 2))
    with pytest.raises(TypeError):
        bench.run(CPU, progress=False, size=TINY._replace(models=("conv4",)))


def test_batches_from_the_host_are_those_of_the_device():
    images = bench.synthetic(40, 8)
    trained = []
    for fed in (False, True):
        spec = replace(bench.model_spec("conv4", 1 / 16, 16), precision="float32")
        run = train._Run(spec, images, CPU)
        after = [bench.feed_from_host(run.replica, images)] if fed else []
        engine = Engine([run.replica])
        trained.append([engine.train_epoch(epoch, after) for epoch in range(2)])
    assert trained[0] == trained[1]


def test_measuring_leaves_threads_and_convolution_as_they_were():
    case = bench.Case(bench.model_spec("vgg11", 1 / 16, 8), one_thread=False, small_maps=False)
    before = torch.get_num_threads(), bench.convolution._SMALL
    assert len(bench.measure(case, CPU, steps=1, blocks=3, test_images=8).blocks) == 3
    assert (torch.get_num_threads(), bench.convolution._SMALL) == before


def test_a_runs_estimate_follows_its_size(tiny_spec):
    spec = tiny_spec()
    seconds = bench.seconds_per_run(spec, CPU)
    assert 0.001 < seconds < 60
    longer = replace(spec, optimiser=replace(spec.optimiser, epochs=20), seed=3)
    assert bench.seconds_per_run(longer, CPU) == pytest.approx(10 * seconds)
    pruned = replace(longer, pruning=PruningSpec(("conv8",), (0,), (10,), (0.5,), 2))
    assert bench.seconds_per_run(longer, CPU) < bench.seconds_per_run(pruned, CPU) < 2 * 10 * seconds
    assert bench.seconds_per_run(replace(spec, data=replace(spec.data, train_size=None, test_size=None)), CPU) > 3 * seconds


@pytest.mark.slow
def test_processes_side_by_side():
    spec = bench.model_spec("vgg11", 1 / 16, 8)
    two, five = (bench.measure_together(2, bench.Case(spec, replicas=n), CPU, 1, 3, 8) for n in (2, 5))
    for cost in (two, five):
        assert len(cost.blocks) == 3 and cost.step > 0 and cost.memory > 200e6


def test_replicas_are_shared_out_to_processes(monkeypatch):
    shares, cost = [], bench.Cost([1.0, 2.0], 0.1, None, None, 7)

    class Crew:
        def submit(self, _, case, *how):
            shares.append(case.replicas)
            return self

        def result(self):
            return cost._replace(blocks=[float(shares[-1]), 2.0])

    monkeypatch.setattr(bench, "_crew", lambda processes: Crew())
    monkeypatch.setattr(bench, "cores", lambda: 3)
    assert bench._cost(bench.Case(bench.model_spec("vgg11"), replicas=20), CPU, 1, 2, 8).memory == 21
    assert shares == [7, 7, 6]


@pytest.mark.parametrize("left_off", bench._without_on_gpu(bench.Case(bench.model_spec("conv4"))))
def test_what_is_left_off_on_a_gpu_changes_no_result(monkeypatch, left_off):
    # the stand-in for graphs runs these here too
    recorded.install(monkeypatch)
    case = bench.Case(replace(bench.model_spec("conv4", 1 / 16, 16), precision="float32"), 2, capture=True, fuse=False)
    sums = []
    real = Engine.train_epoch
    monkeypatch.setattr(Engine, "train_epoch", lambda *arguments: sums.append(real(*arguments)) or sums[-1])
    for variant in (case, bench._without_on_gpu(case)[left_off]):
        if left_off.startswith(("bf16", "compiled")):
            variant = variant._replace(spec=case.spec, fuse=False)
        if left_off == "fused optimiser":  # which asks for its number of steps where the parameters are not on a GPU
            variant = variant._replace(capture=False)
        assert bench.measure(variant, CPU, steps=2, blocks=2, test_images=8).step > 0
    for whole, without in zip(sums[:3], sums[3:]):
        for one, other in zip(whole, without):
            assert other == pytest.approx(one, rel=1e-5)


def test_a_pace_is_measured_with_as_many_replicas_as_memory_holds(monkeypatch, tiny_spec):
    tried = []

    def measure(case, device, *_):
        tried.append(case.replicas)
        if case.replicas > 3:
            raise torch.OutOfMemoryError("full")
        return bench.Cost([0.5], 0.0, None, None, 0)

    monkeypatch.setattr(bench, "measure", measure)
    bench._pace.cache_clear()
    assert bench._pace(tiny_spec(), CPU, 10) == (0.25, 0.0) and tried == [10, 5, 2]
    monkeypatch.setattr(bench, "measure", lambda *_: [][0])
    with pytest.raises(IndexError):
        bench._pace(tiny_spec(), CPU, 1)
    bench._pace.cache_clear()


def test_stored_runs_are_listed_and_loaded():
    took = bench.stored_runs(35)
    assert set(took) == {"list", "status", "about, first", "about", "figure"} and all(0 < s < 600 for s in took.values())
