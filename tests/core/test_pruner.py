import copy
import io
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrize

import gstlib
from gstlib import models
from gstlib.errors import InputError
from gstlib.models import BasicBlock
from gstlib.network.surroundings import Surroundings
from gstlib.pruner import Pruner
from gstlib.pruning import Schedule

ONCE = Schedule((0, 0), (0, 0), (0.5, 0.5), 1)


def small_net() -> nn.Sequential:
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(3, 8, 3, padding=1), bn1=nn.BatchNorm2d(8), relu1=nn.ReLU(),
        conv2=nn.Conv2d(8, 10, 3, padding=1), bn2=nn.BatchNorm2d(10), relu2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(2), flatten=nn.Flatten(),
        fc1=nn.Linear(40, 12), relu3=nn.ReLU(), fc2=nn.Linear(12, 3),
    ))


def train(model: nn.Module, optimiser, batches: int, pruner: Pruner | None = None, side=8, seed=0) -> None:
    model.train()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        x = torch.randn(6, 3, side, side, generator=generator)
        y = torch.randint(0, 3, (6,), generator=generator)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
        if pruner:
            pruner.batch()


def zero_channels(model: nn.Module, module: str, side: int = 8) -> list[int]:
    kept = []
    hook = model.get_submodule(module).register_forward_hook(lambda _m, _x, y: kept.append(y.detach().clone()))
    with torch.no_grad():
        model(torch.randn(6, 3, side, side))
    hook.remove()
    y = kept[0]
    return y.abs().amax([d for d in range(y.dim()) if d != 1]).eq(0).nonzero().flatten().tolist()


def gone(layer) -> list[int]:
    return (~layer.present).nonzero().flatten().tolist()


def lost(layer) -> torch.Tensor:
    """What is 0 in the layer's weight or outputs, one entry a unit."""
    module, weight = layer.module, layer.module.weight.detach()
    if layer.structure == "weight":
        return module.weight_in_force(weight) == 0
    x = torch.randn(4, module.in_channels, 8, 8) if weight.dim() == 4 else torch.randn(4, weight.shape[1])
    with torch.no_grad():
        return module(x).transpose(0, 1).flatten(1).abs().amax(1) == 0


def test_the_package_offers_its_two_names():
    assert gstlib.Pruner is Pruner and gstlib.Schedule is Schedule
    with pytest.raises(AttributeError, match="Prunner"):
        gstlib.Prunner  # noqa: B018


@pytest.mark.parametrize("target", ["S", "R", "L", "D4", "D10"])
@pytest.mark.parametrize(("structure", "score"), [
    ("filter", "ebn"), ("filter", "l1"), ("filter", "l2"), ("weight", "magnitude"),
])
def test_counts_are_exact_at_every_event(structure, score, target):
    model = small_net()
    schedule = Schedule((0, 1), (7, 9), (0.75, 0.37), 3)
    pruner = Pruner(model, schedule, ["conv1", "conv2"], score=score, target=target, structure=structure)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    sizes = [8, 10] if structure == "filter" else [216, 720]
    rows = []
    for n in range(11):
        train(model, optimiser, 1, pruner, seed=n)
        rows += pruner.epoch(n, lambda: 0.5)
        expected = schedule.removed(sizes, n)
        assert [int((~layer.present).sum()) for layer in pruner.layers] == expected
        for layer in pruner.layers:
            assert torch.equal(lost(layer), ~layer.present)
    assert [(row["epoch"], row["layer"]) for row in rows] == [
        (0, "conv1"), (1, "conv2"), (3, "conv1"), (4, "conv2"), (6, "conv1"), (7, "conv2")]
    for layer, size, total in (("conv1", sizes[0], (6, 162)), ("conv2", sizes[1], (3, 266))):
        mine = [row for row in rows if row["layer"] == layer]
        assert np.cumsum([row["removed"] for row in mine]).tolist() == [row["removed_total"] for row in mine]
        assert mine[-1]["removed_total"] == total[structure == "weight"] and {row["units"] for row in mine} == {size}


def test_event_rows_tell_scores_deciles_and_accuracies():
    model = small_net()
    with torch.no_grad():
        model.conv2.weight.copy_(torch.arange(1.0, 11.0)[torch.randperm(10)].view(10, 1, 1, 1).expand(10, 8, 3, 3) / 72)
    pruner = Pruner(model, Schedule(2, 4, 0.4, 2), ["conv2"], score="l1", target="L")
    answers = iter([0.7, 0.4, 0.6, 0.5])
    assert pruner.epoch(0, lambda: next(answers)) == pruner.epoch(1, lambda: next(answers)) == []
    (first,), (second,) = pruner.epoch(2, lambda: next(answers)), pruner.epoch(4, lambda: next(answers))
    assert (first["t_pre"], first["t_post"], second["t_pre"], second["t_post"]) == (0.7, 0.4, 0.6, 0.5)
    assert first["mean_score"] == pytest.approx(9.5) and second["mean_score"] == pytest.approx(7.5)
    assert [first[f"decile_{k}"] for k in range(10)] == pytest.approx(list(range(1, 11)))
    # eight are left: deciles 0 and 5 hold none of them
    present = {k: value for k, value in ((k, second[f"decile_{k}"]) for k in range(10)) if value == value}
    assert present == pytest.approx({1: 1, 2: 2, 3: 3, 4: 4, 6: 5, 7: 6, 8: 7, 9: 8})


def test_layers_due_together_are_struck_and_measured_one_after_the_other():
    """By hand: conv2, named first, comes second, since it lies behind conv1; each strike has its own t_pre and t_post."""
    model, seen = small_net(), []
    pruner = Pruner(model, Schedule((3, 3), (3, 3), (0.5, 0.25), 1), ["conv2", "conv1"], score="l2", target="L")
    norms = {name: model.get_submodule(name).weight.detach().flatten(1).norm(dim=1) for name in ("conv1", "conv2")}
    biggest = {name: sorted(norms[name].argsort(descending=True)[:k].tolist()) for name, k in (("conv1", 2), ("conv2", 5))}
    answers = iter([0.75, 0.5, 0.125])

    def evaluate():
        seen.append({name: gone(layer) for name, layer in zip(("conv2", "conv1"), pruner.layers)})
        return next(answers)

    assert [(layer.name, k) for layer, k in pruner.due(3)] == [("conv1", 2), ("conv2", 5)] and pruner.due(2) == []
    rows = pruner.epoch(3, evaluate)
    assert [(row["layer"], row["t_pre"], row["t_post"], row["removed_total"]) for row in rows] == [
        ("conv1", 0.75, 0.5, 2), ("conv2", 0.5, 0.125, 5)]
    assert seen == [{"conv1": [], "conv2": []}, {"conv1": biggest["conv1"], "conv2": []}, biggest]


def test_negative_scales_are_counted_among_the_filters_present():
    model = small_net()
    with torch.no_grad():
        model.bn2.weight.copy_(torch.tensor([-1.0, -2, 3, 4, 5, -6, 7, 8, 9, 10]))
        model.bn2.bias.fill_(0.5)
    pruner = Pruner(model, Schedule(0, 1, 0.4, 1), ["conv2"], score="ebn-signed", target="S")
    (first,), (second,) = pruner.epoch(0, lambda: 0.5), pruner.epoch(1, lambda: 0.5)
    # negative scales have the smallest signed scores: -6 and -2 go first, then -1 and the smallest positive one
    assert (first["negative_scales"], second["negative_scales"]) == (3, 1) and gone(pruner.layers[0]) == [0, 1, 2, 5]
    plain = Pruner(small_net(), Schedule(0, 0, 0.5, 1), ["fc1"], score="l2")
    assert np.isnan(plain.epoch(0, lambda: 0.5)[0]["negative_scales"])


def test_nothing_is_evaluated_between_events():
    def never():
        raise AssertionError("evaluated")

    pruner = Pruner(small_net(), Schedule(5, 5, 0.5, 1), ["conv2"])
    assert all(pruner.epoch(n, never) == [] for n in (0, 1, 4))


def test_an_event_that_takes_nothing_reports_so():
    pruner = Pruner(small_net(), Schedule(0, 1, 0.1, 1), ["conv1"])
    (row,) = pruner.epoch(0, iter([0.25]).__next__)
    assert row["removed"] == row["removed_total"] == 0 and np.isnan(row["mean_score"])
    assert row["t_pre"] == row["t_post"] == 0.25 and pruner.layers[0].present.all()


@pytest.mark.parametrize(("score", "target"), [("ebn", "S"), ("ebn", "L"), ("l2", "S"), ("l1", "L")])
def test_the_units_targeted_are_those_of_the_score(score, target):
    model = small_net()
    with torch.no_grad():
        model.bn2.weight.normal_()
        model.bn2.bias.normal_()
    values = {
        "ebn": gstlib.pruner.masking.scores.ebn(model.bn2.weight, model.bn2.bias),
        "l1": model.conv2.weight.detach().abs().sum((1, 2, 3)),
        "l2": model.conv2.weight.detach().square().sum((1, 2, 3)),
    }[score]
    order = values.argsort(descending=target == "L")
    pruner = Pruner(model, Schedule(0, 0, 0.3, 1), ["conv2"], score=score, target=target)
    pruner.epoch(0, lambda: 0.0)
    assert gone(pruner.layers[0]) == sorted(order[:3].tolist())


def test_scores_of_each_event_are_of_the_units_still_present():
    model = small_net()
    pruner = Pruner(model, Schedule(0, 2, 0.9, 1), ["conv2"], score="l2", target="S")
    seen = []
    for n in range(3):
        seen += pruner.epoch(n, lambda: 0.0)
    assert seen[0]["mean_score"] < seen[1]["mean_score"] < seen[2]["mean_score"]
    assert seen[0]["decile_9"] == seen[2]["decile_9"] > 0 and len(gone(pruner.layers[0])) == 9


def test_random_targets_follow_the_seed():
    def removed(seed):
        torch.manual_seed(0)
        pruner = Pruner(small_net(), Schedule(0, 0, 0.5, 1), ["conv2"], target="R", seed=seed)
        torch.manual_seed(seed + 77)
        pruner.epoch(0, lambda: 0.0)
        return gone(pruner.layers[0])

    assert removed(3) == removed(3) and len({tuple(removed(seed)) for seed in range(6)}) > 1


@pytest.mark.parametrize("optimiser", [
    lambda p: torch.optim.Adam(p, lr=0.01), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
])
def test_the_optimiser_may_be_made_before_or_after(optimiser):
    ends = []
    for before in (True, False):
        torch.manual_seed(3)
        model = small_net()
        made = optimiser(model.parameters()) if before else None
        own = {id(p) for p in model.parameters()}
        pruner = Pruner(model, ONCE, ["conv1", "conv2"])
        assert {id(p) for p in model.parameters()} == own
        made = made or optimiser(model.parameters())
        train(model, made, 3, pruner)
        pruner.epoch(0, lambda: 0.0)
        train(model, made, 4, pruner, seed=1)
        ends.append(model.eval()(torch.ones(2, 3, 8, 8)))
    assert torch.equal(*ends)


@pytest.mark.parametrize("how", [
    {}, {"structure": "weight"}, {"score": "activation"}, {"effect": "remove-weights"},
    {"effect": "zero", "batches": 2}, {"effect": "gaussian", "batches": 2},
    {"effect": "gaussian-transient", "batches": 2}])
@pytest.mark.parametrize("training", [True, False])
def test_a_pruner_without_events_changes_no_training(training, how):
    ends = []
    for pruned in (True, False):
        torch.manual_seed(3)
        model = small_net()
        model.fc2 = nn.Sequential(nn.Dropout(0.2), model.fc2)  # goes on drawing from the seed
        schedule = Schedule((9, 9), (9, 9), (0.5, 0.5), 1)
        pruner = Pruner(model, schedule, ["conv1", "conv2"], **how) if pruned else None
        train(model, torch.optim.Adam(model.parameters(), lr=0.01), 4, pruner)
        ends.append(model.train(training)(torch.ones(2, 3, 8, 8)))
    assert torch.equal(*ends)


@pytest.mark.parametrize("effect", ["remove", "gaussian", "zero"])
def test_evaluating_changes_no_weight(effect):
    model = small_net()
    pruner = Pruner(model, ONCE, ["conv1", "conv2"], effect=effect, batches=0 if effect == "remove" else 3)
    states = []

    def evaluate():
        model.eval()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for _ in range(3):
            model(torch.randn(4, 3, 8, 8))
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        states.append(before)
        return 0.5

    pruner.epoch(0, evaluate)
    # before both strikes, between them, after both
    assert len(states) == 3
    for one, other in zip(states, states[1:]):
        assert any(not torch.equal(one[name], other[name]) for name in one)
    after = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], states[2][name]) for name in after)


class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(x) + x


@pytest.mark.parametrize(("change", "message"), [
    ({"layers": ["conv1", "conv9"]}, "conv9.*conv1, conv2"),
    ({"layers": ["conv1", "bn1"]}, "bn1"),
    ({"layers": nn.Conv2d(3, 8, 3)}, "Conv2d.3, 8.*conv1, conv2"),
    ({"layers": [small_net(), "conv1"]}, "Sequential.*conv1, conv2"),
    ({"layers": 0}, "linear layer 0; it has conv1"),
    ({"layers": ["conv1", "fc1"]}, "fc1.*E\\[BN\\]"),
    ({"layers": ["conv2"]}, "2 layers, but 1"),
    ({"layers": ["conv2", "conv2"]}, "twice"),
    ({"schedule": Schedule((0,) * 4, (1,) * 4, (0.5,) * 4, 1)}, "4 layers, but only 2"),
    ({"schedule": (0, 4, 0.5, 1)}, "gstlib.Schedule, not .0, 4"),
    ({"target": "M"}, "target"),
    ({"score": "l3"}, "score"),
    ({"score": "magnitude"}, "score"),
    ({"structure": "channel"}, "structure"),
    ({"structure": "weight", "score": "l2"}, "score"),
    ({"effect": "freeze"}, "effect"),
    ({"effect": "zero", "structure": "weight"}, "whole filters"),
    ({"effect": "remove", "batches": 3}, "batches"),
    ({"effect": "zero", "batches": -1}, "batches"),
    *(({"effect": "zero", "batches": batches}, "batches must be a whole number") for batches in (2.5, "3", None, True)),
    ({"seed": "a"}, "seed must be a whole number"), ({"seed": 1.5}, "seed must be a whole number"),
    ({"structure": ["filter"]}, "structure"),
])
def test_a_refused_network_is_left_as_it_was(change, message):
    model = small_net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    types = [type(m) for m in model.modules()]
    with pytest.raises(InputError, match=message):
        Pruner(model, **{"schedule": ONCE, **change})
    assert model.state_dict().keys() == before.keys() and [type(m) for m in model.modules()] == types
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or parametrize.is_parametrized(m) for m in model.modules())


def test_networks_that_cannot_be_pruned_are_refused():
    with pytest.raises(InputError, match="torch.nn.Module, not None"):
        Pruner(None, ONCE)
    with pytest.raises(InputError, match="head"):
        Pruner(Sums(), Schedule(0, 0, 0.5, 1), score="l2")
    with pytest.raises(InputError, match="no batch normalisation"):
        Pruner(models.build("conv4", width=1 / 16), ONCE)


@pytest.mark.parametrize(("name", "layers"), [
    ("vgg11", ["conv5", "conv6", "conv7", "conv8"]),
    ("vgg19", ["conv13", "conv14", "conv15", "conv16"]),
    ("resnet18", ["stage4.0.conv1", "stage4.0.conv2", "stage4.1.conv1", "stage4.1.conv2"]),
])
def test_the_last_four_convolutions_are_taken_unless_named(name, layers):
    pruner = Pruner(models.build(name, width=1 / 16), Schedule((0,) * 4, (0,) * 4, (0.5,) * 4, 1))
    assert [layer.name for layer in pruner.layers] == layers


def test_without_norms_or_convolutions_other_layers_are_taken():
    pruner = Pruner(models.build("conv4", width=1 / 16), ONCE, score="l2")
    assert [layer.name for layer in pruner.layers] == ["conv3", "conv4"]
    dense = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    assert [layer.name for layer in Pruner(dense, ONCE, score="l1").layers] == ["0", "2"]


def test_single_weights_are_scored_by_magnitude():
    pruner = Pruner(small_net(), ONCE, ["conv1", "fc1"], structure="weight")
    assert [layer.score for layer in pruner.layers] == ["magnitude"] * 2


def torchvision_net(name: str) -> nn.Module:
    return getattr(torchvision.models, name)(weights=None, num_classes=3)


@pytest.mark.parametrize(("structure", "score"), [("filter", "ebn"), ("filter", "l2"), ("weight", "magnitude")])
@pytest.mark.parametrize(("name", "blocks"), [
    ("resnet18", {"layer4.0.conv2": "layer4.0", "layer4.1.conv2": "layer4.1"}),
    ("mobilenet_v3_small", {"features.11.block.3.0": "features.11"}),
])
def test_torchvision_s_networks_can_be_pruned(name, blocks, structure, score):
    model = torchvision_net(name)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
    schedule = Schedule((0,) * 5, (1,) * 5, (0.25, 0.5, 0.5, 0.5, 0.25), 1)
    # two million weights a layer sort slowly; the first stage's are as good
    layers = Surroundings(model).layers[1:6] if (name, structure) == ("resnet18", "weight") else None
    pruner = Pruner(model, schedule, layers, score=score, structure=structure, target="S")
    assert layers or set(blocks) < {layer.name for layer in pruner.layers}
    for n in range(2):
        train(model, optimiser, 1, pruner, side=32, seed=n)
        pruner.epoch(n, lambda: 0.0)
        assert [int((~layer.present).sum()) for layer in pruner.layers] == schedule.removed(
            [layer.size for layer in pruner.layers], n)
    train(model, optimiser, 1, pruner, side=32, seed=9)
    for layer in pruner.layers:
        assert torch.equal(lost(layer), ~layer.present)
    if structure == "filter":
        norms = {id(m): path for path, m in model.named_modules()}
        for layer in pruner.layers:
            for training in (True, False):
                model.train(training)
                zero = zero_channels(model, norms[id(layer.batch_norms[0])], side=32)
                assert set(gone(layer)) <= set(zero) and len(zero) < layer.units
                if layer.name in blocks:
                    assert set(gone(layer)) <= set(zero_channels(model, blocks[layer.name], side=32))


def test_residual_sums_are_zero_where_a_projection_and_an_identity_feed_them():
    model = nn.Sequential(OrderedDict(
        stem=nn.Conv2d(3, 6, 3, padding=1), one=BasicBlock(6, 8, 2), two=BasicBlock(8, 8, 1),
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(8, 3)))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimiser, 3)
    pruner = Pruner(model, ONCE, ["one.conv2", "two.conv2"], target="L")
    pruner.epoch(0, lambda: 0.0)
    train(model, optimiser, 5, pruner)
    for layer, block in zip(pruner.layers, ("one", "two")):
        assert len(gone(layer)) == 4 and zero_channels(model.eval(), block) == gone(layer)


@pytest.mark.parametrize("structure", ["filter", "weight"])
def test_state_dict_round_trip(structure):
    model = small_net()
    pruner = Pruner(model, ONCE, ["conv1", "conv2"], structure=structure)
    train(model, torch.optim.Adam(model.parameters(), lr=0.01), 3, pruner)
    pruner.epoch(0, lambda: 0.0)
    again = small_net()
    Pruner(again, ONCE, ["conv1", "conv2"], structure=structure)
    again.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(again.eval()(x), model.eval()(x))
    name = "removed_units" if structure == "filter" else "removed_weights"
    assert torch.equal(getattr(again.conv2, name), getattr(model.conv2, name)) and getattr(again.conv2, name).any()


def test_a_pruned_network_can_be_copied():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BasicBlock(4, 4, 1), nn.Flatten(), nn.Linear(64, 3))
    pruner = Pruner(model, Schedule(0, 0, 0.5, 1), ["1.conv2"])
    pruner.epoch(0, lambda: 0.0)
    twin, x = copy.deepcopy(model).eval(), torch.randn(4, 3, 4, 4)
    expected = model.eval()(x)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        model[1].silent_units.fill_(1)
    assert torch.equal(twin(x), expected) and not torch.equal(model(x), expected)


def test_a_pruner_is_pickled_together_with_its_network():
    pruner = Pruner(plain_pair(), Schedule(0, 1, 0.5, 1), ["0"], score="activation")
    pruner.epoch(0, lambda: 0.5)
    kept = io.BytesIO()
    torch.save(pruner, kept)
    kept.seek(0)
    again = torch.load(kept, weights_only=False)
    assert repr(again.epoch(1, lambda: 0.5)) == repr(pruner.epoch(1, lambda: 0.5))
    assert torch.equal(again.model[0].removed_units, pruner.model[0].removed_units)


def test_a_second_pruner_keeps_what_the_first_removed():
    model = small_net()
    first = Pruner(model, Schedule(0, 0, 0.5, 1), ["conv2"])
    first.epoch(0, lambda: 0.0)
    second = Pruner(model, Schedule(0, 0, 0.5, 1), ["conv1"], score="l2")
    second.epoch(0, lambda: 0.0)
    assert zero_channels(model, "bn2") == gone(first.layers[0])
    assert zero_channels(model, "bn1") == gone(second.layers[0])


def test_noise_in_force_and_silence():
    model = small_net()
    pruner = Pruner(model, Schedule(0, 0, 0.5, 1), ["conv2"], effect="gaussian-transient", batches=2)
    x = torch.randn(2, 3, 8, 8)
    clean = model.eval()(x)
    assert not pruner.noise_in_force
    pruner.epoch(0, lambda: 0.0)
    noised = model(x)
    assert pruner.noise_in_force and not torch.equal(noised, clean)
    with pruner.silenced():
        assert torch.equal(model(x), clean)
    assert torch.equal(model(x), noised)
    pruner.batch()
    assert pruner.noise_in_force
    pruner.batch()
    assert not pruner.noise_in_force and torch.equal(model(x), clean)


def test_accuracies_around_an_event_are_of_the_network_before_and_after():
    model, x = small_net(), torch.randn(2, 3, 8, 8)
    pruner = Pruner(model, Schedule(0, 0, 0.5, 1), ["conv2"])

    def evaluate():
        return model.eval()(x)[0, 0].item()

    before = evaluate()
    (row,) = pruner.epoch(0, evaluate)
    assert row["t_pre"] == before and row["t_post"] == evaluate() != before


def test_parameters_removed_adds_the_layers_up():
    pruner = Pruner(small_net(), ONCE, ["conv1", "conv2"])
    assert pruner.parameters_removed() == 0
    pruner.epoch(0, lambda: 0.0)
    assert pruner.parameters_removed() == 4 * (27 + 3) + 5 * (72 + 3)


def plain_pair() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.Flatten(), nn.Linear(360, 2))


def test_a_second_pruner_on_a_layer_takes_of_what_is_left():
    model = plain_pair()
    Pruner(model, Schedule(0, 0, 0.5, 1), ["0"], score="l2").epoch(0, lambda: 0.5)
    second = Pruner(model, Schedule(0, 1, 0.4, 1), ["0"], score="l2")
    rows = [row for n in range(2) for row in second.epoch(n, lambda: 0.5)]
    assert [(row["removed"], row["removed_total"]) for row in rows] == [(2, 7), (2, 9)]
    assert len(zero_channels(model[:2].eval(), "1")) == 9
    before = set(model.state_dict())
    with pytest.raises(InputError, match="takes 2 of layer '0'.*only 1 are left"):
        Pruner(model, Schedule(0, 0, 0.2, 1), ["0"])
    assert set(model.state_dict()) == before and len(zero_channels(model[:2], "1")) == 9


@pytest.mark.parametrize("how", [{"score": "l2"}, {"effect": "remove-weights"}, {"structure": "weight"}])
def test_what_another_pruner_disturbed_for_a_time_can_be_removed(how):
    model = plain_pair()
    first = Pruner(model, Schedule(0, 0, 0.8, 1), ["0"], effect="zero")
    assert first.epoch(0, lambda: 0.5)[0]["removed_total"] == 8  # of those that an event has targeted
    (row,) = Pruner(model, Schedule(0, 0, 0.5, 1), ["0"], **how).epoch(0, lambda: 0.5)
    assert row["removed"] == row["removed_total"] == row["units"] // 2
    (row,) = Pruner(model, Schedule(0, 0, 0.1, 1), ["0"], effect="zero").epoch(0, lambda: 0.5)
    assert row["removed_total"] >= 9  # neither is struck again


def test_masks_that_do_nothing_any_more_are_the_reason_why_finish_refuses():
    model = plain_pair()
    pruner = Pruner(model, Schedule(0, 0, 0.5, 1), ["0"])
    pruner.epoch(0, lambda: 0.5)
    for module in model.modules():
        module._forward_hooks.clear()
    with pytest.raises(InputError, match="masks of layer '0' are gone.*hooks were removed"):
        pruner.finish()


@pytest.mark.parametrize("how", [{}, {"structure": "weight"}, {"effect": "zero", "batches": 2},
                                 {"effect": "zero", "score": "activation"}])
@pytest.mark.parametrize("gone", ["norms are converted", "hooks are cleared", "another finishes",
                                  "a layer is replaced"])
def test_masks_that_were_taken_off_are_missed_at_the_next_epoch(gone, how):
    model = plain_pair()
    pruner = Pruner(model, Schedule(0, 1, 0.5, 1), ["0"], **how)
    other = Pruner(model, Schedule(0, 0, 0.1, 1), ["0"])
    pruner.epoch(0, lambda: 0.5)
    if gone == "norms are converted":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif gone == "hooks are cleared":
        for module in model.modules():
            module._forward_hooks.clear()
    elif gone == "another finishes":
        other.finish()
    else:
        model[0] = copy.deepcopy(model[0])
    if how and gone in ("norms are converted", "hooks are cleared") and not (  # masks of weights do not need them
            "score" in how and gone == "norms are converted"):  # but the means do
        pruner.epoch(1, lambda: 0.5)
    else:
        with pytest.raises(InputError, match="masks of layer '0' are gone"):
            pruner.epoch(1, lambda: 0.5)


@pytest.mark.parametrize("n", [None, "3", 2.5, float("nan")])
def test_an_epoch_that_is_no_whole_number_is_refused(n):
    with pytest.raises(InputError, match="epoch must be a whole number"):
        Pruner(plain_pair(), Schedule(0, 4, 0.5, 1), ["0"]).epoch(n, lambda: 0.5)


def test_missed_events_are_made_up_for_and_an_epoch_told_twice_takes_nothing():
    pruner = Pruner(plain_pair(), Schedule(0, 4, 0.5, 1), ["0"])
    told = [(n, [(row["removed"], row["removed_total"]) for row in pruner.epoch(n, lambda: 0.5)])
            for n in (0, 0, 3, 2, 3, 4, 9)]
    assert told == [(0, [(1, 1)]), (0, []), (3, [(3, 4)]), (2, []), (3, []), (4, [(1, 5)]), (9, [])]


@pytest.mark.parametrize("effect", ["remove", "zero", "gaussian", "gaussian-transient", "remove-weights"])
@pytest.mark.parametrize("answer", [KeyError, None, "0.5", torch.zeros(2)])
def test_an_evaluation_that_fails_leaves_all_as_it_was(effect, answer):
    model = small_net()
    batches = 0 if effect.startswith("remove") else 2
    pruner = Pruner(model, ONCE, ["conv1", "conv2"], score="l2", target="R", effect=effect, batches=batches)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    answers = iter([0.5, 0.5, answer])

    def evaluate():
        value = next(answers)
        if value is KeyError:
            raise KeyError
        return value

    with pytest.raises(KeyError if answer is KeyError else InputError):
        pruner.epoch(0, evaluate)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()) and not pruner.effect.active
    again = Pruner(copy.deepcopy(model), ONCE, ["conv1", "conv2"], score="l2", target="R", effect=effect, batches=batches)
    assert repr(pruner.epoch(0, lambda: 0.5)) == repr(again.epoch(0, lambda: 0.5))


def test_a_resume_from_the_network_s_state_alone_goes_on_where_it_was():
    schedule = Schedule(0, 4, 0.5, 1)
    model, again = plain_pair(), plain_pair()
    first = Pruner(model, schedule, ["0"])
    for n in range(3):
        first.epoch(n, lambda: 0.5)
    second = Pruner(again, schedule, ["0"])
    again.load_state_dict(model.state_dict())
    assert gone(second.layers[0]) == gone(first.layers[0])
    rows = [row for n in (3, 4) for row in second.epoch(n, lambda: 0.5)]
    assert [row["removed_total"] for row in rows] == [4, 5]


def test_a_resume_in_the_midst_of_an_effect_needs_the_pruner_s_state_too():
    how = {"layers": ["0"], "score": "l2", "effect": "zero", "batches": 5}
    model, again = plain_pair(), plain_pair()
    first, second = Pruner(model, Schedule(0, 4, 0.5, 1), **how), Pruner(again, Schedule(0, 4, 0.5, 1), **how)
    first.epoch(0, lambda: 0.5)
    again.load_state_dict(model.state_dict())
    with pytest.raises(InputError, match="load its state"):
        second.epoch(1, lambda: 0.5)
    second.load_state_dict(first.state_dict())
    second.epoch(1, lambda: 0.5)


def finished(model: nn.Module, build, x: torch.Tensor, pruner: Pruner) -> nn.Module:
    """The plain network, held to its outputs before and to loading strictly into a fresh one."""
    before = model.eval()(x)
    plain, fresh = pruner.finish(), build().eval()
    fresh.load_state_dict(plain.state_dict())
    assert plain is model and [type(m) for m in plain.modules()] == [type(m) for m in fresh.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    torch.testing.assert_close(fresh(x), before)
    with pytest.raises(InputError, match="finished"):
        pruner.epoch(99, lambda: 0.5)
    return fresh


@pytest.mark.parametrize(("name", "layers"), [("vgg11", ["conv7", "conv8"]), ("conv4", ["conv4", "fc1"]),
                                              ("resnet18", ["stage4.0.conv2", "stage4.1.conv2"])])
@pytest.mark.parametrize("structure", ["filter", "weight"])
def test_the_paper_s_networks_end_as_plain_ones(name, layers, structure):
    model, x = models.build(name, width=1 / 16), torch.randn(4, 3, 32, 32)
    model(x)
    pruner = Pruner(model, ONCE, layers, score="l2" if structure == "filter" else "ebn", structure=structure)
    pruner.epoch(0, lambda: 0.0)
    lost = pruner.parameters_removed()
    fresh = finished(model, lambda: models.build(name, width=1 / 16), x, pruner)
    zeros = sum(int((p == 0).sum()) for layer in layers for p in fresh.get_submodule(layer).parameters())
    assert zeros >= (lost if structure == "weight" or name == "conv4" else lost // 2) > 0


class Auxiliary(nn.Module):
    """A second head that only training calls."""

    def __init__(self):
        super().__init__()
        self.conv, self.aux, self.bn, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 3)
        nn.init.normal_(self.bn.bias)

    def forward(self, x):
        y = self.conv(x).relu()
        heads = (y, self.bn(self.aux(y)).relu()) if self.training else (y,)
        return [self.fc(head.mean((2, 3))) for head in heads]


@pytest.mark.parametrize("layers", [["aux"], ["conv", "aux"]])
def test_what_only_training_calls_ends_plain_in_evaluation_mode_too(layers):
    model, x = Auxiliary(), torch.randn(4, 3, 8, 8)
    pruner = Pruner(model, Schedule(*([n] * len(layers) for n in (0, 0, 0.5)), 1), layers, score="l2")
    pruner.epoch(0, lambda: 0.0)
    before = model(x)
    model.eval()
    torch.testing.assert_close(pruner.finish().train()(x), before)


def test_behind_an_identity_shortcut_that_goes_on_no_network_is_plain():
    x = torch.randn(4, 3, 8, 8)
    stem = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 8, 1), one=BasicBlock(8, 8, 1), two=BasicBlock(8, 8, 1),
                                     pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(8, 3)))
    pruner = Pruner(stem, Schedule(0, 0, 0.5, 1), ["one.conv2"])
    pruner.epoch(0, lambda: 0.0)
    state, before = {name: value.clone() for name, value in stem.state_dict().items()}, stem.eval()(x)
    with pytest.raises(InputError, match="'one.conv2'.*goes on into another"):
        pruner.finish()
    assert torch.equal(stem(x), before) and all(torch.equal(state[k], v) for k, v in stem.state_dict().items())


@pytest.mark.parametrize("done", [0, 1, 9])
@pytest.mark.parametrize("effect", ["zero", "zero-restore", "gaussian", "gaussian-transient"])
def test_temporary_effects_end_with_a_plain_network_too(effect, done):
    model, x = small_net(), torch.randn(4, 3, 8, 8)
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    pruner = Pruner(model, ONCE, ["conv1", "conv2"], score="l2", effect=effect, batches=3)
    pruner.epoch(0, lambda: 0.0)
    for _ in range(done):
        pruner.batch()
    plain = pruner.finish()
    assert plain.state_dict().keys() == whole.keys()
    if effect in ("zero-restore", "gaussian-transient"):
        assert all(torch.equal(whole[name], value) for name, value in plain.state_dict().items())
    assert torch.isfinite(plain(x)).all()
