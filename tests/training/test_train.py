import dataclasses
import math
import os
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import gstlib
from gstlib import flatness, models
from gstlib.data import Images, Loader
from gstlib.errors import InputError
from gstlib.pruner import Pruner
from gstlib.pruning import Schedule
from gstlib.spec import DataSpec, FlatnessSpec, ModelSpec, OptimiserSpec, PruningSpec
from gstlib.training import provenance, train
from gstlib.training.engine import Engine, Replica, pick_device
from gstlib.training.measures import bn_histogram, measure_flatness

CPU = torch.device("cpu")


def pruning(**fields) -> PruningSpec:
    return PruningSpec(("conv7", "conv8"), (0, 1), (2, 3), (0.3, 0.9), 2, **fields)


def without_seconds(result: train.Result) -> dict:
    # NaN is not equal to itself, its text is
    return {name: [{k: repr(v) for k, v in row.items() if k != "seconds"} for row in rows]
            for name, rows in result.tables.items()}


def four_epochs(lr: float = 0.001, **fields) -> OptimiserSpec:
    return OptimiserSpec(epochs=4, batch_size=32, milestones=(2, 3), lr=lr, **fields)


HOW = FlatnessSpec(20, 16, 3, 2, step=0.2)

RUNS = {
    "unpruned": {},
    "random filters": {"pruning": pruning(target="R")},
    "gaussian noise": {"pruning": pruning(target="L", score="l2", effect="gaussian", batches=3)},
    "passing noise": {"pruning": pruning(target="L", score="l2", effect="gaussian-transient", batches=3)},
    "single weights": {"pruning": pruning(structure="weight", score="magnitude", target="D4")},
    "bf16": {"pruning": pruning(), "precision": "bf16", "channels_last": True},
    "resnet18 by sgd": {"model": ModelSpec("resnet18", 1 / 16),
                        "optimiser": OptimiserSpec("sgd", 0.01, 0.9, 1e-4, batch_size=32, epochs=2)},
    "resnet20, activations": {"model": ModelSpec("resnet20", 1 / 2), "pruning": PruningSpec(
        ("stage3.2.conv1", "stage3.2.conv2"), (0, 1), (1, 2), (0.3, 0.5), 1, score="activation")},
    "before training": {"pruning": pruning(score="l2", scratch=True)},
    "zeroed and restored": {"pruning": pruning(target="L", score="l2", effect="zero-cumulative", batches=3)},
    "flatness": {"pruning": pruning(), "measures": ("flatness",), "measured_at": 1, "flatness": HOW},
    "conv4": {"model": ModelSpec("conv4", 1 / 8), "pruning": PruningSpec(("fc1",), (0,), (3,), (0.5,), 1, score="l2")},
}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_specification_gives_the_same_rows(name, digits, tiny_spec):
    spec = tiny_spec(**{"optimiser": OptimiserSpec(epochs=3, batch_size=32, milestones=(2,)), **RUNS[name]})
    first = without_seconds(train.train(spec, digits))
    torch.manual_seed(99)
    torch.set_num_threads(2)
    try:
        again = without_seconds(train.train(spec, digits))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert first == again and len(first["epoch"]) == spec.optimiser.epochs
    other = without_seconds(train.train(dataclasses.replace(spec, seed=1), digits))
    for a, b in zip(first["epoch"], other["epoch"], strict=True):
        assert a["train_loss"] != b["train_loss"]


def test_the_seeds_behind_a_run_are_pinned(tiny_spec):
    """Another seed for one of them would give other rows under the same id."""
    drawn = [train._seed(tiny_spec(seed=seed), purpose) for seed in (0, 1) for purpose in ("model", "order", "pruning")]
    assert drawn == [2968811710, 3964924996, 3141116543, 1835504127, 1189033389, 1596810411]


def test_augmentation_and_order_follow_the_seed_too(digits, tiny_spec):
    spec = tiny_spec(data=DataSpec(*digits.known, train_size=64, test_size=40, augment=True))
    first, again = (without_seconds(train.train(spec, digits)) for _ in range(2))
    plain = without_seconds(train.train(tiny_spec(), digits))
    assert first == again and first["epoch"][0]["train_loss"] != plain["epoch"][0]["train_loss"]


def test_runs_agree_until_their_first_difference(digits, tiny_spec):
    spec = tiny_spec(optimiser=four_epochs())
    later = PruningSpec(("conv8",), (1,), (1,), (0.9,), 1, target="L")
    plain = without_seconds(train.train(spec, digits))["epoch"]
    pruned = without_seconds(train.train(dataclasses.replace(spec, pruning=later), digits))["epoch"]
    assert plain[0] == pruned[0]
    assert all(plain[1][k] == pruned[1][k] for k in plain[1] if k != "parameters")
    assert plain[2]["train_loss"] != pruned[2]["train_loss"]


def test_epoch_rows(digits, tiny_spec):
    spec = tiny_spec(optimiser=four_epochs())
    result = train.train(spec, digits)
    rows = result.tables["epoch"]
    assert all(set(row) == {"epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
                            "test_accuracy_clean", "parameters", "seconds"} for row in rows)
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-5], rel=1e-12)
    count = sum(p.numel() for p in models.build("vgg11", width=1 / 16).parameters())
    assert [row["parameters"] for row in rows] == [count] * 4
    for row in rows:
        assert row["test_accuracy"] == row["test_accuracy_clean"] and 0 <= row["test_accuracy"] <= 1
        assert row["test_accuracy"] * 40 == pytest.approx(round(row["test_accuracy"] * 40))
        assert row["train_accuracy"] * 64 == pytest.approx(round(row["train_accuracy"] * 64))
        assert row["train_loss"] > 0 and row["test_loss"] > 0 and row["seconds"] > 0
    assert rows[3]["train_loss"] < rows[0]["train_loss"]
    assert result.tables["event"] == result.tables["histogram"] == []


def test_event_rows_of_a_pruned_run(digits, tiny_spec):
    spec = tiny_spec(optimiser=four_epochs(lr=0.01), pruning=pruning(target="L"))
    result = train.train(spec, digits)
    events, epochs = result.tables["event"], result.tables["epoch"]
    assert [(row["epoch"], row["layer"], row["units"], row["removed"], row["removed_total"]) for row in events] == [
        (0, "conv7", 32, 4, 4), (1, "conv8", 32, 14, 14), (2, "conv7", 32, 5, 9), (3, "conv8", 32, 14, 28)]
    for row in events:
        assert set(row) == {"epoch", "layer", "units", "removed", "removed_total", "mean_score", "t_pre", "t_post",
                            "negative_scales", *(f"decile_{k}" for k in range(10))}
        assert row["t_pre"] == epochs[row["epoch"]]["test_accuracy"]
        deciles = [row[f"decile_{k}"] for k in range(10) if not math.isnan(row[f"decile_{k}"])]
        assert deciles == sorted(deciles) and row["mean_score"] <= deciles[-1] + 1e-12
    # a filter of conv7 or conv8 has 32 * 9 weights, a bias, a scale and a shift
    whole = epochs[0]["parameters"] + 4 * 291
    assert [row["parameters"] for row in epochs] == [whole - 291 * n for n in (4, 18, 23, 37)]


def test_filters_are_removed_before_the_first_step(digits, tiny_spec):
    spec = tiny_spec(pruning=pruning(score="l2", scratch=True), optimiser=four_epochs())
    torch.manual_seed(train._seed(spec, "model"))
    model = models.build("vgg11", 10, 1 / 16)
    result = train.train(spec, digits)
    rows = result.tables["event"]
    assert [(row["epoch"], row["layer"], row["removed"], row["removed_total"]) for row in rows] == [
        (-1, "conv7", 9, 9), (-1, "conv8", 28, 28)]
    smallest = model.conv8.weight.detach().double().flatten(1).norm(dim=1).sort().values[:28]
    assert rows[1]["mean_score"] == pytest.approx(float(smallest.mean()))
    assert rows[0]["t_post"] == rows[1]["t_pre"] and 0 <= rows[0]["t_pre"] < 0.5, "the network knows nothing yet"
    # of each filter its 9 weights a channel before it, bias, scale and shift
    gone = 9 * (9 * 32 + 3) + 28 * (9 * 32 + 3)
    assert {row["parameters"] for row in result.tables["epoch"]} == {sum(p.numel() for p in model.parameters()) - gone}


def test_t_post_is_the_accuracy_that_the_next_epoch_starts_from(digits, tiny_spec):
    everything = PruningSpec(("conv7", "conv8"), (2, 2), (2, 2), (1.0, 1.0), 1)
    more = DataSpec(*digits.known, train_size=400, test_size=200)
    spec = tiny_spec(data=more, optimiser=four_epochs(lr=0.005), pruning=everything)
    result = train.train(spec, digits)
    event = result.tables["event"][0]
    # without its last convolutions the network gives every image the same class
    assert event["t_pre"] > 0.15 and event["t_post"] == 0.1
    assert result.tables["epoch"][3]["test_accuracy"] == 0.1


@pytest.mark.parametrize(("test_every", "events", "tested"), [
    (1, False, [0, 1, 2, 3]), (2, False, [1, 3]), (3, False, [2, 3]), (9, False, [3]), (9, True, [1, 2, 3]),
])
def test_only_the_epochs_asked_for_are_tested(test_every, events, tested, digits, tiny_spec, monkeypatch):
    passes = []
    test = Engine.test
    monkeypatch.setattr(Engine, "test", lambda self, *index, **part: (passes.append(1), test(self, *index, **part))[1])
    once = PruningSpec(("conv8",), (1,), (1,), (0.5,), 1) if events else None
    rows = train.train(tiny_spec(optimiser=four_epochs(), test_every=test_every, pruning=once), digits).tables["epoch"]
    for column in ("test_loss", "test_accuracy", "test_accuracy_clean"):
        assert [row["epoch"] for row in rows if column in row] == tested
    assert len(passes) == len(tested) + events


def test_less_testing_changes_no_training(digits, tiny_spec):
    often, seldom = (train.train(tiny_spec(optimiser=four_epochs(), pruning=pruning(target="R"), test_every=k), digits)
                     for k in (1, 4))
    assert [r["train_loss"] for r in often.tables["epoch"]] == [r["train_loss"] for r in seldom.tables["epoch"]]
    assert without_seconds(often)["event"] == without_seconds(seldom)["event"]


def test_accuracy_under_noise_and_without(digits, tiny_spec):
    noise = PruningSpec(("conv5", "conv6"), (1, 1), (1, 1), (1.0, 1.0), 1, score="l2", effect="gaussian-transient", batches=30)
    spec = tiny_spec(data=DataSpec(*digits.known, train_size=320, test_size=200), optimiser=four_epochs(lr=0.005), pruning=noise)
    rows = train.train(spec, digits).tables["epoch"]
    differ = [row["epoch"] for row in rows if row["test_accuracy"] != row["test_accuracy_clean"]]
    # ten batches an epoch: the noise struck after epoch 1 is in force at the end of 2 and 3
    assert differ == [2, 3]


def test_zeros_are_held_across_epochs(digits, tiny_spec):
    held = PruningSpec(("conv8",), (0,), (0,), (0.5,), 1, effect="zero", batches=3)
    rows = train.train(tiny_spec(optimiser=four_epochs(), pruning=held), digits).tables["epoch"]
    whole = rows[3]["parameters"]
    # two batches an epoch: held through epoch 1 and the first batch of epoch 2
    assert [row["parameters"] - whole for row in rows] == [-16 * 288, -16 * 288, 0, 0]


def test_progress_is_told_after_every_epoch(digits, tiny_spec):
    told = []
    spec = tiny_spec(optimiser=four_epochs(), test_every=2)
    rows = train.train(spec, digits, progress=told.append).tables["epoch"]
    assert [(p.run_id, p.epoch, p.epochs) for p in told] == [(spec.id, epoch, 4) for epoch in range(4)]
    assert math.isnan(told[0].test_accuracy)
    assert [p.test_accuracy for p in told[1:]] == [rows[1]["test_accuracy"]] * 2 + [rows[3]["test_accuracy"]]


def test_histograms_before_and_after_training(digits, tiny_spec):
    rows = train.train(tiny_spec(measures=("bn-histogram",)), digits).tables["histogram"]
    layers = [f"bn{k}" for k in range(1, 9)]
    assert [(row["epoch"], row["layer"]) for row in rows[::80]] == [(e, layer) for e in (-1, 1) for layer in layers]
    assert [row["layer_index"] for row in rows[::80]] == [*range(8)] * 2
    sides = {"bn1": 32, "bn2": 16, "bn3": 8, "bn4": 8, "bn5": 4, "bn6": 4, "bn7": 2, "bn8": 2}
    channels = dict(zip(layers, (4, 8, 16, 16, 32, 32, 32, 32)))
    for begin in range(0, len(rows), 80):
        part = rows[begin:begin + 80]
        layer = part[0]["layer"]
        assert sum(row["count"] for row in part) == 64 * channels[layer] * sides[layer] ** 2
        assert len({(row["ks"], row["layer"], row["epoch"]) for row in part}) == 1 and 0 < part[0]["ks"] < 1
        np.testing.assert_allclose([row["left"] for row in part], np.linspace(-5, 4.875, 80))
        np.testing.assert_allclose([row["right"] for row in part], np.linspace(-4.875, 5, 80))


def test_histograms_leave_a_pruners_running_activations_alone(digits):
    model = models.build("resnet18", width=1 / 16)
    Pruner(model, Schedule((0, 0), (0, 0), (0.5, 0.5), 1), ["stage4.0.conv1", "stage4.1.conv2"], score="activation")
    loader = Loader(digits, 32, augment=False, seed=0, device=CPU, channels_last=False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    bn_histogram(model, loader, epoch=-1, images=40)
    assert [name for name, value in model.state_dict().items() if not torch.equal(state[name], value)] == []


def test_histogram_and_ks_agree_with_scipy(digits):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 3), nn.BatchNorm2d(2))
    loader = Loader(digits, 32, augment=False, seed=0, device=CPU, channels_last=False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rows = bn_histogram(model, loader, epoch=7, images=40)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    seen = []
    hook = model[0].register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    assert bn_histogram(model, loader, epoch=7, images=40) == rows  # the same images every time
    hook.remove()
    assert not torch.equal(seen[0], loader.normalise(digits.train_x[:40]))  # and never the first ones
    with torch.no_grad():
        x = model[0](seen[0])
        inputs = {"1": x, "4": model[3](model[2](model.train()[1](x)))}  # as in training: by the batch's statistics
    for layer, x in inputs.items():
        part = [row for row in rows if row["layer"] == layer]
        x = x.double()
        z = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        assert part[0]["ks"] == pytest.approx(stats.kstest(z.flatten().numpy(), "norm").statistic, abs=1e-5)
        assert part[0]["sd"] == pytest.approx(float(z.std()), abs=1e-4)
        expected, _ = np.histogram(z.clamp(-5, 5).numpy(), np.linspace(-5, 5, 81))
        assert np.abs(np.array([row["count"] for row in part]) - expected).sum() <= 4
        assert {row["epoch"] for row in part} == {7} and sum(row["count"] for row in part) == z.numel()


def test_flatness_is_measured_at_its_epoch_before_the_event_and_changes_nothing(digits, tiny_spec):
    """An event strikes at epoch 1, where both are measured: the pruned network is still the other."""
    late = PruningSpec(("conv7", "conv8"), (1, 1), (3, 3), (0.3, 0.9), 2)
    measured = {"measures": ("flatness",), "measured_at": 1, "flatness": HOW, "optimiser": four_epochs()}
    plain, pruned = (without_seconds(train.train(tiny_spec(**measured, pruning=p), digits)) for p in (None, late))
    for name, rows in (("flatness", 1), ("eigenvalue", 3), ("direction", 10)):
        assert plain[name] == pruned[name] and len(plain[name]) == rows
    unmeasured = without_seconds(train.train(tiny_spec(optimiser=four_epochs(), pruning=late), digits))
    for name in ("epoch", "event", "final"):
        assert pruned[name] == unmeasured[name]
    last = without_seconds(train.train(tiny_spec(**measured | {"measured_at": None}), digits))
    assert last["flatness"] != plain["flatness"] and last["flatness"][0]["epoch"] == "3"


def test_flatness_rows_are_those_of_images_of_all_classes_measured_by_hand(digits, tiny_spec):
    order = digits.test_y.argsort()  # as a folder comes, class by class
    ordered = dataclasses.replace(digits, test_x=digits.test_x[order], test_y=digits.test_y[order])
    loader = Loader(ordered, 32, augment=False, seed=0, device=CPU, channels_last=True)
    model = models.build("vgg11", 10, 1 / 16).to(memory_format=torch.channels_last)
    tables = measure_flatness(model, loader, 7, HOW)
    (row,), values = tables["flatness"], [each["eigenvalue"] for each in tables["eigenvalue"]]
    chosen = torch.randperm(355, generator=torch.Generator().manual_seed(0))[:20]
    x, y = loader.normalise(ordered.test_x[chosen]), ordered.test_y[chosen]
    assert len(set(y.tolist())) > 5 and model.training and row["epoch"] == 7
    with torch.no_grad():
        logits = model.eval()(x)
    assert row["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-5)
    assert row["accuracy"] == float((logits.argmax(1) == y).double().mean())
    norms, mean = flatness.gradients(model, x, y)
    assert row["trace"] == pytest.approx(float(norms.mean()), rel=1e-5)
    assert row["trace_error"] == pytest.approx(np.std(norms.numpy(), ddof=1) / 20**0.5, rel=1e-5)
    assert row["trace_centred"] == pytest.approx(float(norms.mean() - mean.square().sum()), rel=1e-4)
    assert values == pytest.approx(flatness.leading(flatness.hessian(model, x[:16], y[:16]), 3)[0].tolist(), rel=1e-3)
    assert row["curvature_other"] < sum(values) and row["relative_mean"] <= row["relative_worst"]
    assert [(each["number"], each["step"]) for each in tables["direction"]] == [(n, step) for n in (1, 2) for step in HOW.steps]
    assert tables["direction"][2]["loss"] == row["loss"]


def test_too_few_test_images_for_flatness_are_said_before_training(digits, tiny_spec):
    with pytest.raises(InputError, match="on 512 test images, .* but there are 40"):
        train.train(tiny_spec(measures=("flatness",)), digits, progress=pytest.fail)


def test_activations_of_an_untrained_vgg19_are_normalised_and_near_normal():
    """In evaluation mode an untrained network normalises nothing: deviations of .5 to .7, distances of .12."""
    images = torch.randint(0, 256, (600, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(600) % 10
    loader = Loader(Images(images, labels, images[:10], labels[:10], "digits", "f" * 64, "noise"), 32, augment=False, seed=0,
                    device=CPU, channels_last=True)
    rows = bn_histogram(models.build("vgg19", width=1 / 8), loader, -1)
    layers = {row["layer"]: row for row in rows}
    assert len(layers) == 16 and all(abs(row["sd"] - 1) < 0.02 for row in layers.values())
    assert np.mean([row["ks"] for row in layers.values()]) < 0.03


def test_the_end_is_measured_on_every_image_that_was_not_trained_on(digits, tiny_spec):
    spec = tiny_spec()
    (row,) = train.train(spec, digits).tables["final"]
    x, y = digits.unseen(spec.data)
    assert row["images"] == len(y) == len(digits.train_y) + len(digits.test_y) - 64
    kept = digits.subset(spec.data)
    everything = torch.cat([x, kept.train_x]).flatten(1)
    whole = torch.cat([digits.train_x, digits.test_x]).flatten(1)
    assert torch.equal(everything.double().sum(0), whole.double().sum(0))
    group = train._Group([spec], digits, CPU, lambda _: None, "")
    group.train()
    replica = group.runs[0].replica
    replica.model.eval()
    with torch.no_grad():
        logits = torch.cat([replica.model(replica.loader.normalise(part)) for part in x.split(100)])
        trained = replica.model(replica.loader.normalise(kept.train_x))
    assert row["accuracy"] == pytest.approx(float((logits.argmax(1) == y).double().mean()))
    assert row["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-5)
    assert row["train_accuracy"] == pytest.approx(float((trained.argmax(1) == kept.train_y).double().mean()))


@pytest.mark.parametrize(("model", "layers"), [
    ("vgg11", ("conv5", "conv7", "conv8")), ("resnet18", ("stage4.0.conv1", "stage4.0.conv2", "stage4.1.conv2")),
    ("conv4", ("conv1", "conv3", "fc1"))])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_pass_after_a_strike_need_not_repeat_what_lies_before_it(digits, tiny_spec, monkeypatch, model, layers, precision):
    """Rows are the same, to the last bit, whether or not what a strike cannot change is computed again."""
    struck = PruningSpec(layers, (0, 0, 1), (2, 2, 2), (0.5, 0.5, 0.5), 1, score="l2")
    spec = tiny_spec(model=ModelSpec(model, 1 / 16), pruning=struck, precision=precision,
                     optimiser=four_epochs(lr=0.01), data=DataSpec(*digits.known, train_size=64, test_size=300))
    spared = train.train(spec, digits)
    begin = Replica.begin_test
    monkeypatch.setattr(Replica, "begin_test", lambda self, since=None, keep=None: begin(self))
    assert without_seconds(spared) == without_seconds(train.train(spec, digits)) and len(spared.tables["event"]) == 8


def test_normal_activations_have_a_small_distance_and_others_a_large_one(digits):
    model = nn.Sequential(nn.Identity(), nn.BatchNorm2d(3))
    loader = Loader(digits, 32, augment=False, seed=0, device=CPU, channels_last=False)
    model[0].register_forward_hook(lambda *_: torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert bn_histogram(model, loader, 0)[0]["ks"] < 0.01
    model[0].register_forward_hook(lambda _m, _x, y: y.abs())
    assert bn_histogram(model, loader, 0)[0]["ks"] > 0.05


def test_a_diverged_run_is_told(digits, tiny_spec):
    spec = tiny_spec(optimiser=OptimiserSpec("sgd", lr=1e30, epochs=2, batch_size=32))
    with pytest.raises(InputError, match=f"{spec.id}.*no longer finite after epoch 0"):
        train.train(spec, digits)


def test_other_data_are_refused(digits, tiny_spec):
    spec = tiny_spec(data=dataclasses.replace(DataSpec(*digits.known), fingerprint="0" * 64))
    with pytest.raises(InputError, match="fingerprint"):
        train.train(spec, digits)


@pytest.mark.parametrize(("fields", "message"), [
    ({"pruning": PruningSpec(("conv9",), (0,), (0,), (0.5,), 1)}, "conv9"),
    ({"pruning": PruningSpec(("conv8", "conv8"), (0, 0), (0, 0), (0.5, 0.5), 1)}, "twice"),
    ({"pruning": PruningSpec(("fc1",), (0,), (0,), (0.5,), 1), "model": ModelSpec("conv4", 1 / 8)}, "fc1"),
])
def test_what_cannot_be_trained_is_refused_beforehand(fields, message, tiny_spec):
    with pytest.raises(InputError, match=message):
        train.check(tiny_spec(**fields))


def test_check_draws_nothing_and_accepts_what_trains(tiny_spec):
    state = torch.random.get_rng_state()
    train.check(tiny_spec(pruning=pruning()))
    assert torch.equal(state, torch.random.get_rng_state())


def test_provenance_names_data_and_versions_but_no_place(digits, tiny_spec, monkeypatch):
    monkeypatch.setenv("GSTLIB_COMMIT", "abc123")
    about = train.train(tiny_spec(), digits, profile="trial").provenance
    assert about["images"] == [64, 40]
    assert about["fingerprint"] == digits.fingerprint and about["data_title"] == "scikit-learn digits"
    assert (about["profile"], about["commit"], about["device_type"], about["threads"]) == ("trial", "abc123", "cpu", 1)
    assert about["versions"]["torch"] == version("torch") and about["seconds"] > 0
    for place in (socket.gethostname(), os.getcwd(), str(Path.home()), str(Path(gstlib.__file__).parent)):
        assert place not in repr(about)


def test_the_commit_of_a_repository_that_gstlib_is_merely_installed_in_is_not_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("GSTLIB_COMMIT", raising=False)
    place = tmp_path / "env" / "gstlib" / "training" / "provenance.py"
    place.parent.mkdir(parents=True)
    place.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(place))
    for words in (["init"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "other"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)
    assert provenance.commit() == "unknown"


def replica(digits, tiny_spec, name="vgg11", **fields) -> Replica:
    spec = tiny_spec(**fields)
    torch.manual_seed(1)
    loader = Loader(digits.subset(spec.data), 32, augment=False, seed=3, device=CPU, channels_last=False)
    return Replica(models.build(name, width=1 / 16), spec.optimiser, loader)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(state: dict[str, torch.Tensor], model: nn.Module) -> bool:
    now = model.state_dict()
    return state.keys() == now.keys() and all(torch.equal(state[name], now[name]) for name in now)


def test_testing_under_masks_and_noise_changes_nothing(digits, tiny_spec):
    spec = tiny_spec()
    model = models.build("vgg11", width=1 / 16)
    pruner = Pruner(model, Schedule(0, 0, 0.5, 1), ["conv8"], effect="gaussian", batches=9)
    loader = Loader(digits.subset(spec.data), 32, augment=False, seed=3, device=CPU, channels_last=False)
    engine = Engine([Replica(model, spec.optimiser, loader)])
    engine.train_epoch(0, [pruner.batch])
    pruner.epoch(0, lambda: engine.test().accuracy)
    state = state_of(model)
    engine.test()
    assert [d.batches for d in pruner.effect.active] == [9] and same(state, model)


def test_testing_in_between_changes_no_training(digits, tiny_spec):
    ends = []
    for tests in (0, 3):
        made = replica(digits, tiny_spec)
        engine = Engine([made])
        for epoch in range(2):
            engine.train_epoch(epoch)
            for _ in range(tests):
                engine.test()
        ends.append(made.model)
    assert same(state_of(ends[0]), ends[1])


def test_test_results_are_means_over_all_images(digits, tiny_spec):
    made = replica(digits, tiny_spec, data=DataSpec(*digits.known, train_size=64))
    engine = Engine([made])
    engine.train_epoch(0)
    measured = engine.test()
    made.model.eval()
    with torch.no_grad():
        logits = made.model(made.loader.normalise(digits.test_x))
    assert len(digits.test_y) == 355 and measured.accuracy == (logits.argmax(1) == digits.test_y).double().mean()
    assert measured.loss == pytest.approx(nn.functional.cross_entropy(logits, digits.test_y).item(), rel=1e-5)


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:x", "tpu", "meta", ""])
def test_unknown_devices_are_refused(name):
    with pytest.raises(InputError, match="choose from auto, cpu, cuda"):
        pick_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_missing_gpu_is_told(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="0 CUDA devices; use --device cpu"):
        pick_device(name)
    assert pick_device("auto") == pick_device("cpu") == CPU
