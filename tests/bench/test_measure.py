import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import recorded
import torch

from gstlib.bench import cost, measure
from gstlib.errors import InputError
from gstlib.spec import ModelSpec
from gstlib.store import Store
from gstlib.training import pace
from gstlib.training.engine import Engine

CPU = torch.device("cpu")
BRIEF = measure.Effort(products=1e6, blocks=2, test_images=20)


def narrow(model, **fields):
    """What is measured of `model`, at a sixteenth of the width and with batches of 8."""
    spec = cost.paper_spec(model)
    return replace(spec, model=ModelSpec(model, 1 / 16), optimiser=replace(spec.optimiser, batch_size=8), **fields)


@pytest.fixture(scope="module")
def kept():
    """What was kept after each measurement of a brief benchmark, the last of them whole."""
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "peaks", partial(measure.peaks, repeats=1))
        patch.setattr(measure, "Effort", lambda *_: BRIEF)
        patch.setattr(cost, "paper_spec", {model: narrow(model) for model in ("conv4", "vgg11")}.get)
        measure.run(CPU, True, ["conv4", "vgg11"], [1],
                    keep=lambda result: results.append(json.dumps(result)))
    return [json.loads(text) for text in results]


def test_rows_have_their_columns_and_are_json(kept):
    result = kept[-1]
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
        epochs = {"vgg11": 325, "conv4": 55}[row["model"]]
        assert row["train_s_per_run"] == pytest.approx(epochs * row["seconds_per_epoch"])
        assert row["test_s_per_run"] > 0 and row["events_s_per_run"] > 0
    assert result["machine"]["device"] and result["machine"]["finished"] and result["machine"]["versions"]["torch"]
    of_vgg11 = {c["cost"]: c for c in result["costs"] if c["model"] == "vgg11"}
    assert of_vgg11["training step"]["training_steps"] == pytest.approx(1)
    assert "E[BN] of all pruned layers" in of_vgg11
    assert "E[BN] of all pruned layers" not in {c["cost"] for c in result["costs"] if c["model"] == "conv4"}


def test_a_new_benchmark_has_the_columns_of_the_stored_one(kept):
    there = Store(Path(__file__).parents[2] / "book/results").benchmarks("rows")
    assert {name for stored in there for name in ("rows", "techniques", "costs") if stored[name]} == {"rows", "techniques", "costs"}
    for stored in there:
        for name in ("rows", "techniques", "costs"):
            assert all(set(row) == set(kept[-1][name][0]) for row in stored[name])
        assert set(stored["machine"]) <= set(kept[-1]["machine"])


def test_only_techniques_in_use_are_left_off(kept):
    # a CPU uses no switch of the engine
    assert [(t["model"], t["technique"]) for t in kept[-1]["techniques"]] == [
        ("vgg11", "bf16 (else float32)"), ("vgg11", "channels-last")]
    assert all(t["gain"] > 0 for t in kept[-1]["techniques"])
    case = measure.Case(narrow("vgg11"))
    name, without = measure.without("fuse", case, torch.device("cuda"), ["CUDA graph", "compiled"])
    assert name == "compiled" and without.switches == {"fuse": False}
    assert measure.without("streams", case, torch.device("cuda"), ["CUDA graph", "compiled"]) is None
    assert measure.without("bf16", case, torch.device("cuda"), [])[1].spec.precision == "tf32"


def test_every_measurement_is_kept_at_once(kept):
    assert [len(result["rows"]) for result in kept] == [0, 1, 2, 2, 2, 2]
    assert [len(result["techniques"]) for result in kept] == [0, 0, 0, 1, 2, 2]
    assert all(set(result) == {"machine", "rows", "techniques", "costs"} for result in kept)


def test_the_report_prints(kept):
    text = measure.report(kept[-1])
    assert "ratio_to_plain_loop" in text and "channels-last" in text and "E[BN]" in text
    row = {"model": "vgg11", "device": "cuda", "replicas": 20, "steps_per_s": None, "note": "does not fit into memory"}
    assert "does not fit" in measure.report({**kept[-1], "rows": [row], "techniques": [], "costs": []})


def test_memory_that_runs_out_is_a_note(monkeypatch):
    def full(*_):
        try:
            raise torch.OutOfMemoryError("full")
        finally:
            raise RuntimeError("capture failed")

    monkeypatch.setattr(measure, "peaks", lambda _: {"peak_operations_per_s": 1e12, "peak_bytes_per_s": 1e10})
    monkeypatch.setattr(measure, "plain_loop", lambda *_: 1.0)
    monkeypatch.setattr(measure, "measure_all", full)
    result = measure.run(CPU, networks=["conv4"], replicas=[1, 2])
    assert [row["note"] for row in result["rows"]] == 2 * ["does not fit into memory"] and not result["techniques"]
    monkeypatch.setattr(measure, "measure_all", lambda *_: [].append(1, 2))
    with pytest.raises(TypeError):
        measure.run(CPU, networks=["conv4"])


@pytest.mark.parametrize("wrong", [{"networks": ["vgg12"]}, {"techniques": ["speed"]}, {"replicas": [0, 1]}])
def test_a_wrong_choice_is_refused_before_anything_is_measured(monkeypatch, wrong):
    monkeypatch.setattr(measure, "peaks", lambda _: pytest.fail("measured"))
    with pytest.raises(InputError, match="vgg11|capture|from 1 on"):
        measure.run(CPU, **wrong)


def test_random_images_are_reproducible_and_not_zeros():
    a, b = pace.synthetic.__wrapped__(64, 8), pace.synthetic.__wrapped__(64, 8)
    assert torch.equal(a.train_x, b.train_x) and torch.equal(a.train_y, b.train_y)
    assert a.train_x.float().std() > 70 and not torch.equal(a.train_x[:8], a.test_x)


def test_a_block_has_at_most_the_steps_of_its_own_set():
    most = measure.Effort(1e15, 1, 1)
    spec = cost.paper_spec("vgg11")
    assert most.steps(spec) == 391
    assert most.steps(replace(spec, data=replace(spec.data, train_size=300))) == 3
    assert measure.Effort(1.0, 1, 1).steps(spec) == 1


def test_measuring_leaves_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    timing = measure.measure(measure.Case(narrow("vgg11")), CPU, BRIEF)
    assert len(timing.blocks) == 2 and timing.event > 0 and timing.ebn > 0 and timing.techniques == []
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_processes_side_by_side():
    for replicas in (2, 5):
        timing = measure.measure_all(measure.Case(narrow("vgg11"), replicas), CPU, BRIEF)
        assert len(timing.blocks) == 2 and timing.step > 0


BENCH = """
import signal, sys
from functools import partial
from gstlib.__main__ import main
from gstlib.bench import measure
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where the tests are begun in the background
    measure.peaks, measure.plain_loop, measure.cores = partial(measure.peaks, repeats=1), lambda *_: 1.0, lambda: 2
    sys.exit(main(["bench", "--quick", "--device", "cpu", "--models", "conv4", "--replicas", "2", "--techniques"]))
"""


def test_an_interrupted_benchmark_leaves_no_traceback():
    """Ctrl-C reaches its processes too, while they are still importing."""
    bench = subprocess.Popen([sys.executable, "-c", BENCH], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             start_new_session=True, cwd=Path(__file__).parents[2])
    said = ""
    while "replicas: 2" not in said:
        said += bench.stderr.read(1)
    time.sleep(0.3)
    os.killpg(bench.pid, signal.SIGINT)
    out, err = bench.communicate(timeout=120)
    assert (bench.returncode, out) == (130, "") and "Traceback" not in err and "gstlib: interrupted" in err


def test_replicas_are_shared_out_to_processes(monkeypatch):
    shares = []

    class Crew:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        Manager = __enter__

        def Barrier(self, parties, timeout):
            return threading.Barrier(parties)

        def submit(self, _, case, *how):
            shares.append(case.replicas)
            return Done([float(case.replicas), 2.0])

    class Done(list):
        def result(self):
            return measure.Timing(list(self), 0.1, None, None, None, [])

    monkeypatch.setattr(measure, "ProcessPoolExecutor", Crew)
    monkeypatch.setattr(measure.multiprocessing, "get_context", Crew)
    monkeypatch.setattr(measure, "cores", lambda: 3)
    timing = measure.measure_all(measure.Case(narrow("vgg11"), replicas=20), CPU, BRIEF)
    assert shares == [7, 7, 6] and timing.blocks == [7.0, 2.0]


@pytest.mark.parametrize("left_off", ["capture", "streams", "channels-last"])
def test_what_is_left_off_on_a_gpu_changes_no_result(monkeypatch, left_off):
    # the stand-in for graphs runs these here too
    recorded.install(monkeypatch)
    case = measure.Case(narrow("conv4", precision="float32"), 2, {"capture": True, "fuse": False})
    _, without = measure.without(left_off, case, CPU, ["CUDA graph", "streams"])
    sums = []
    real = Engine.train_epoch
    monkeypatch.setattr(Engine, "train_epoch", lambda *arguments: sums.append(real(*arguments)) or sums[-1])
    for variant in (case, without._replace(switches=case.switches | without.switches)):
        assert measure.measure(variant, CPU, BRIEF).step > 0
    assert len(sums) == 6
    for whole, other in zip(sums[:3], sums[3:]):
        for one, two in zip(whole, other):
            assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["cuda:0", "cuda"])
def test_a_gpu_with_or_without_a_number_is_measured_first_of_all(name):
    timing = measure.measure(measure.Case(narrow("vgg11"), 2), torch.device(name), BRIEF)
    assert timing.memory > 0 and "CUDA graph" in timing.techniques
