import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from made_up import ABOUT, DATA, SMOKE, rows
from torch import nn

from gstlib import bench, data, experiments, models
from gstlib.bench import cost
from gstlib.errors import InputError
from gstlib.spec import DataSpec
from gstlib.store import Store

ROOT = Path(__file__).parents[2]


def benchmark(path, device, seconds):
    """Store a benchmark in which a run of VGG11 takes so long, beside a row that did not fit into memory."""
    row = {"model": "vgg11", "device": device, "steps_per_s": 1.0, "train_s_per_run": 0.8 * seconds,
           "test_s_per_run": 0.15 * seconds, "events_s_per_run": 0.05 * seconds,
           "operations_per_run": cost.load(cost.paper_spec("vgg11"))[0]}
    path.mkdir(parents=True, exist_ok=True)
    both = [row, {"model": "vgg11", "device": device, "steps_per_s": None}]
    (path / f"bench-{device}.json").write_text(json.dumps({"machine": {}, "rows": both, "techniques": [], "costs": []}))


def planned(name, profile, data):
    """The specifications of an experiment's first seed."""
    return [run.spec for run in experiments.EXPERIMENTS[name].runs(profile, data, [0])]


def figure(store, profile, name="figure1-vgg11"):
    return cost.by_figure(store, profile).set_index("figure").loc[name]


# ---------------------------------------------------------------- operations

def test_one_convolution_counted_by_hand(monkeypatch):
    monkeypatch.setattr(models, "build", lambda *_: nn.Sequential(nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.Flatten(),
                                                                  nn.Linear(8 * 14 * 14, 10, bias=False)))
    counted = cost.count.__wrapped__("anything")
    assert counted.products == 14 * 14 * 8 * (5 * 5 * 3) + 1568 * 10
    assert counted.activations == 1568 + 10
    assert counted.parameters == 8 * 75 + 8 + 15680
    assert counted.operations(4) == 6 * 4 * counted.products
    assert counted.operations(4, training=False) == 2 * 4 * counted.products
    assert counted.traffic(4, "bf16") == 4 * (8 * 1578 + 3072) + 36 * counted.parameters
    full = 4 * (16 * 1578 + 3072) + 40 * counted.parameters
    assert counted.traffic(4, "float32") == counted.traffic(4, "tf32") == full
    assert counted.traffic(4, "bf16", training=False) == 4 * (4 * 1578 + 3072)


@pytest.mark.parametrize("model, products", [("conv4", 20_741_120), ("vgg11", 152_769_536), ("resnet18", 555_422_720)])
def test_operations_of_the_papers_networks(model, products):
    assert cost.count(model).products == products
    assert cost.count(model).parameters == sum(p.numel() for p in models.build(model).parameters())


def test_what_is_measured_is_the_paper_profile():
    spec = bench.paper_spec("vgg11")
    assert (spec.precision, spec.channels_last, spec.model.width, spec.optimiser.batch_size) == ("bf16", True, 1.0, 128)
    assert bench.paper_spec("conv4").data.augment and bench.paper_spec("conv4").optimiser.epochs == 55


def test_tests_of_a_run_counted_by_hand():
    spec = planned("figure1-vgg11", SMOKE, DATA)[3]
    layers = [range(start, end + 1, spec.pruning.retrain) for start, end in zip(spec.pruning.start, spec.pruning.end)]
    tested, events, strikes = replace(spec, test_every=1).tests()
    assert tested == spec.optimiser.epochs
    assert strikes == sum(map(len, layers)) and events == len({epoch for layer in layers for epoch in layer})
    assert replace(spec, pruning=None).tests() == (spec.optimiser.epochs, 0, 0)


def test_operations_and_floor_of_a_run_at_the_paper_s_scale():
    # 15.9 PFLOP and 20 s, 57.9 PFLOP and 73 s for runs without events; events add a test pass each
    size = experiments.profile("paper")
    for name, expected, seconds in (("figure1-vgg11", 15.9e15, 20), ("figure1-resnet18", 57.9e15, 73)):
        plain, pruned = experiments.EXPERIMENTS[name].runs(size, DataSpec("cifar10", "0" * 64), [0])[:2]
        counted, floor = cost.load(plain.spec)
        assert counted == pytest.approx(expected, rel=0.01)
        at_peak = counted / cost.PEAK_OPERATIONS
        assert at_peak == pytest.approx(seconds, rel=0.02)
        assert 1 <= floor / at_peak < 1.2, "memory traffic can only add to it"
        assert cost.load(pruned.spec)[0] > counted
    counted, floor = cost.load(planned("figure2", size, DataSpec("cifar10", "0" * 64))[0])
    assert floor > 1.5 * counted / cost.PEAK_OPERATIONS, "memory sets Conv4's floor"


def test_sets_of_any_size_count_their_own_steps():
    spec = planned("figure1-vgg11", experiments.profile("paper"), DataSpec("cifar10", "0" * 64))[0]
    of = {n: cost.load(replace(spec, data=replace(spec.data, train_size=n)))[0] for n in (10_000, 20_000)}
    assert of[20_000] - of[10_000] == 325 * 10_000 * 6 * cost.count("vgg11").products
    assert data.sizes(DataSpec("digits", "0" * 64)) == (1442, 355)


# ---------------------------------------------------------------- hours

def test_runs_are_counted_once_and_shared_ones_named(tmp_path):
    for profile in experiments.PROFILES:
        found = cost.by_figure(Store(tmp_path / "none"), profile).set_index("figure")
        assert list(found.index) == [*experiments.EXPERIMENTS, cost.ALL]
        total, parts = found.loc[cost.ALL], found.drop(index=cost.ALL)
        for column in ("runs", "epochs", "operations", "floor"):
            assert total[column] <= parts[column].sum()
        assert total["runs"] == (parts["runs"] - parts["shared"]).sum()
        assert found.loc["figureA2", "shared"] == found.loc["figureA2", "runs"], "Figure A2 has Figure 1's runs"
    paper = figure(Store(tmp_path / "none"), "paper")
    assert paper["runs"] == 50 and paper["epochs"] == 50 * 325


def test_hours_say_what_they_rest_on(tmp_path):
    none = Store(tmp_path / "none")
    found = figure(none, "paper")
    assert found["gpu_basis"] == "target" and pd.isna(found["cpu"]) and found["cpu_basis"] == ""
    # a test pass at each event comes on top of what the target was stated for
    assert found["gpu"] == pytest.approx(50 * cost.TARGETS["vgg11"] / 3600, rel=0.03)
    assert figure(none, "paper", "figure2")["gpu_basis"] == "floor"
    assert pd.isna(figure(none, "mini")["gpu"]), "nobody trains narrow networks on a GPU"

    measured = Store(tmp_path / "measured")
    benchmark(measured.path, "cuda", seconds=100)
    benchmark(measured.path, "cpu", seconds=50_000)
    found = figure(measured, "paper")
    assert found["gpu_basis"] == "benchmark" and found["gpu"] == pytest.approx(50 * 100 / 3600, rel=0.03)
    assert found["cpu_basis"] == "benchmark" and found["cpu"] == pytest.approx(50 * 50_000 / 3600, rel=0.03)
    assert figure(measured, "smoke")["cpu_basis"] == "at least", "narrow networks take longer than their operations say"
    assert pd.isna(figure(measured, "paper", "figure3")["cpu"]), "no ResNet18 was measured"


def test_stored_runs_tell_their_own_time(tmp_path):
    store = Store(tmp_path / "results")
    benchmark(store.path, "cpu", seconds=50_000)
    run = experiments.EXPERIMENTS["figure1-vgg11"].runs(SMOKE, DATA, [0])[0]
    store.write(run.spec, ABOUT | {"seconds": 36.0}, rows(run.spec, 0.6, 0.1))
    found = figure(store, "smoke")
    assert found["cpu_basis"] == "measured" and found["cpu"] == pytest.approx(found["runs"] * 36 / 2 / 3600)
    other = planned("figure2", SMOKE, DATA)[0]  # of another shape, and shapes have no order
    store.write(other, ABOUT | {"seconds": 7.0}, rows(other, 0.6, 0.1))
    assert figure(store, "smoke", "figure2")["cpu_basis"] == "measured"


def test_a_stored_run_of_another_set_s_size_tells_nothing(tmp_path):
    size, seconds = experiments.profile("paper"), {}
    spec = experiments.EXPERIMENTS["figure1-vgg11"].runs(size, DataSpec("cifar10-folder", "0" * 64), [0])[0].spec
    for name, images in (("CIFAR-10's", [50_000, 10_000]), ("larger", [73_257, 26_032])):
        store = Store(tmp_path / name)
        store.write(spec, ABOUT | {"seconds": 60.0, "images": images}, rows(spec, 0.6, 0.1))
        seconds[name] = cost.durations(store)(replace(spec, data=DataSpec("cifar10", "1" * 64)), "cpu")
    assert seconds["CIFAR-10's"] == (30.0, "measured") and math.isnan(seconds["larger"][0])


def test_a_damaged_benchmark_is_named(tmp_path):
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(InputError, match=r"bench\.json is no benchmark .* python -m gstlib bench --output"):
        cost.by_figure(Store(tmp_path), "smoke")


def test_the_page_states_the_targets_and_peaks_that_are_computed_with():
    cells = json.loads((ROOT / "chapters/cost.ipynb").read_text())["cells"]
    text = " ".join("".join(cells[0]["source"]).split())
    assert "{vgg11:.0f} seconds a run of VGG11".format(**cost.TARGETS) in text
    assert "{resnet18:.0f} a run of ResNet18".format(**cost.TARGETS) in text and "**not measured**" in text
    assert f"{cost.PEAK_OPERATIONS / 1e12:.0f} TFLOP/s" in text and f"{cost.PEAK_BYTES / 1e12:.0f} TB/s" in text
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert set(re.findall(r'cost\.by_figure\(store, "(\w+)"\)', code)) == set(experiments.PROFILES)


def test_the_table_s_cells_say_what_their_hours_rest_on(tmp_path):
    lines = cost.markdown(cost.by_figure(Store(tmp_path), "paper")).splitlines()
    cells = {row[0]: row for row in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}
    assert cells["figure"][1:] == ["runs", "shared", "epochs", "PFLOP", "floor", "GPU", "CPU"]
    assert cells["figure1-vgg11"][1:4] == ["50", "0", "16,250"]
    assert cells["figure1-vgg11"][6:] == ["51\u00a0min *target*", "–"]
    assert f"**{cost.ALL}**" in cells


@pytest.mark.parametrize("hours, text", [(1000.0, "1,000\u00a0h"), (2.54, "2.5\u00a0h"), (0.5, "30\u00a0min"),
                                         (0.001, "3.6\u00a0s"), (1e-6, "3.6\u00a0ms"), (float("nan"), "–")])
def test_durations_are_readable(hours, text):
    assert cost.readable(hours) == text


def test_reading_costs_needs_no_torch():
    code = "import sys; from gstlib import bench; from gstlib.bench import cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
