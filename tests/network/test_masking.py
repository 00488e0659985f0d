from collections import OrderedDict

import pytest
import torch
from torch import nn

from gstlib import models
from gstlib.errors import InputError
from gstlib.models import BasicBlock
from gstlib.network import masking
from gstlib.network.masking import MaskedLayer, check_layer
from gstlib.network.proof import prove
from gstlib.network.surroundings import Surroundings


def small_net() -> nn.Sequential:
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(3, 6, 3, padding=1), bn1=nn.BatchNorm2d(6), relu1=nn.ReLU(),
        conv2=nn.Conv2d(6, 8, 3, padding=1), bn2=nn.BatchNorm2d(8), relu2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(2), flatten=nn.Flatten(),
        fc1=nn.Linear(32, 10), relu3=nn.ReLU(), fc2=nn.Linear(10, 3),
    ))


def residual_net() -> nn.Sequential:
    return nn.Sequential(OrderedDict(
        stem=nn.Conv2d(3, 4, 3, padding=1), block1=BasicBlock(4, 4, 1), block2=BasicBlock(4, 6, 2),
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(6, 3),
    ))


def bools(size: int, *chosen: int) -> torch.Tensor:
    units = torch.zeros(size, dtype=torch.bool)
    units[list(chosen)] = True
    return units


def masked(model: nn.Module, layer: str, score="l2", structure="filter", effect="remove") -> MaskedLayer:
    around = Surroundings(model)
    unit = check_layer(around, layer, structure, score, effect)
    made = MaskedLayer(model, unit, structure, score, effect)
    prove(around, [unit])
    return made


def points(model: nn.Module, layer: str) -> list[str]:
    """The modules that must be silenced behind `layer`, itself apart."""
    return [path for path, name in Surroundings(model).unit(layer).points if name != "removed_units"]


def output_of(model: nn.Module, module: str, x: torch.Tensor) -> torch.Tensor:
    kept = []
    hook = model.get_submodule(module).register_forward_hook(lambda _m, _x, y: kept.append(y.detach().clone()))
    with torch.no_grad():
        model(x)
    hook.remove()
    return kept[0]


def steps(model: nn.Module, optimiser: torch.optim.Optimizer, number: int, check=lambda: None) -> None:
    model.train()
    for _ in range(number):
        x, y = torch.randn(8, 3, 8, 8), torch.randint(0, 3, (8,))
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        check()
        optimiser.step()


OPTIMISERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam with decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
}


def test_layers_norms_and_sums_are_found_in_forward_order():
    around = Surroundings(small_net())
    assert {layer: around.batch_norms(layer) for layer in around.layers} == {
        "conv1": ("bn1",), "conv2": ("bn2",), "fc1": (), "fc2": ()}
    net = residual_net()
    assert Surroundings(net).layers == ["stem", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2",
                                        "block2.shortcut.conv", "fc"]
    assert {layer: points(net, layer) for layer in Surroundings(net).layers[:-1]} == {
        "stem": [], "block1.conv1": ["block1.bn1"], "block1.conv2": ["block1.bn2", "block1"],
        "block2.conv1": ["block2.bn1"], "block2.conv2": ["block2.bn2", "block2"],
        "block2.shortcut.conv": ["block2.shortcut.bn", "block2"]}


@pytest.mark.parametrize("name", ["conv4", "vgg11", "resnet18", "vgg19"])
def test_every_convolution_of_the_paper_has_its_own_batch_norm(name):
    around = Surroundings(models.build(name, width=1 / 16))
    for layer in around.layers:
        plain = name == "conv4" or layer.startswith("fc")
        assert around.batch_norms(layer) == (() if plain else (layer.replace("conv", "bn"),))


def test_a_norm_that_reads_two_layers_belongs_to_neither():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) * y

    assert Surroundings(Shared()).batch_norms("conv") == ()


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


class OutermostSum(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x) + x


def test_a_forward_that_branches_on_values_is_refused():
    with pytest.raises(InputError, match="Branching.*torch.fx.wrap"):
        Surroundings(Branching())


def test_a_layer_whose_units_leave_the_network_is_refused():
    with pytest.raises(InputError, match="head"):
        masked(OutermostSum(), "conv")


@pytest.mark.parametrize("addition", [
    lambda y, x: y + x, lambda y, x: x + y, torch.add, lambda y, x: y.add(x), lambda y, x: y.add_(x),
])
def test_every_way_to_add_a_shortcut_is_seen(addition):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            return addition(self.bn(self.conv(x)), x)

    model = nn.Sequential(Block(), nn.Conv2d(3, 2, 1))
    masked(model, "0.conv").remove(bools(3, 1))
    assert output_of(model, "0", torch.randn(2, 3, 4, 4)).abs().amax((0, 2, 3)).ne(0).tolist() == [True, False, True]


def test_adding_a_constant_is_no_shortcut():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(x) + 1

    model = nn.Sequential(Shifted(), nn.Flatten(), nn.Linear(48, 2))
    assert not Surroundings(model).unit("0.conv").sums
    masked(model, "0.conv").remove(bools(3, 1))
    assert output_of(model, "0", torch.randn(2, 3, 4, 4)).abs().amax((0, 2, 3)).ne(0).tolist() == [True, False, True]


@pytest.mark.parametrize("structure", ["filter", "weight"])
def test_masks_of_nothing_change_nothing(structure):
    model, x = small_net(), torch.randn(4, 3, 8, 8)
    before = model(x)
    layer = masked(model, "conv2", "l2" if structure == "filter" else "magnitude", structure)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert layer.parameters_removed() == 0 and layer.present.all()


@pytest.mark.parametrize("training", [True, False])
def test_removed_filters_are_exactly_zero_after_their_norm(training):
    model = small_net()
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    masked(model, "conv2", "ebn").remove(bools(8, 1, 4, 7))
    model.train(training)
    largest = output_of(model, "bn2", torch.randn(16, 3, 8, 8)).abs().amax((0, 2, 3))
    assert largest[[1, 4, 7]].tolist() == [0, 0, 0] and (largest[[0, 2, 3, 5, 6]] > 0).all()


def test_removed_rows_of_a_linear_layer_are_exactly_zero():
    model = small_net()
    masked(model, "fc1").remove(bools(10, 0, 9))
    largest = output_of(model, "fc1", torch.randn(16, 3, 8, 8)).abs().amax(0)
    assert largest[[0, 9]].tolist() == [0, 0] and (largest[1:9] > 0).all()


def test_a_norm_without_scale_and_shift_keeps_removed_filters_at_zero():
    norm = nn.BatchNorm2d(6, affine=False)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), norm, nn.Flatten(), nn.Linear(96, 3))
    for _ in range(5):
        model(torch.randn(8, 3, 4, 4) + 2)
    masked(model, "0").remove(bools(6, 2, 5))
    model.eval()
    largest = output_of(model, "1", torch.randn(4, 3, 4, 4)).abs().amax((0, 2, 3))
    assert largest[[2, 5]].tolist() == [0, 0]


@pytest.mark.parametrize("structure", ["filter", "weight"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_no_optimiser_revives_what_is_removed(name, structure):
    model = small_net()
    optimiser = OPTIMISERS[name](model.parameters())
    steps(model, optimiser, 5)
    layer = masked(model, "conv2", "ebn" if structure == "filter" else "magnitude", structure)
    units = bools(8, 0, 3) if structure == "filter" else torch.rand(8, 6, 3, 3) < 0.4
    layer.remove(units)
    stored = layer.parameter.detach().clone()

    def gradients_are_zero():
        gradient = layer.module.weight.grad
        assert gradient[units].abs().max() == 0 and gradient[~units].abs().max() > 0
        if structure == "filter":
            for module, attribute in (("conv2", "bias"), ("bn2", "weight"), ("bn2", "bias")):
                assert getattr(model.get_submodule(module), attribute).grad[units].abs().max() == 0

    steps(model, optimiser, 12, gradients_are_zero)
    assert not torch.equal(layer.parameter[units], stored[units]), "momentum should move what is stored"
    if structure == "weight":
        assert torch.equal(model.conv2.weight_in_force(model.conv2.weight) == 0, units)
    if structure == "filter":
        for training in (True, False):
            largest = output_of(model.train(training), "bn2", torch.randn(8, 3, 8, 8)).abs().amax((0, 2, 3))
            assert largest[units].max() == 0 and largest[~units].min() > 0


def test_what_remains_trains_as_if_removed_filters_had_never_been():
    whole, cut = small_net(), small_net()
    cut.load_state_dict(whole.state_dict())
    masked(whole, "conv2", "ebn").remove(bools(8, 2, 6))
    with torch.no_grad():
        for parameter in (cut.conv2.weight, cut.conv2.bias, cut.bn2.weight, cut.bn2.bias):
            parameter[[2, 6]] = 0
    for model in (whole, cut):
        torch.manual_seed(5)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)

        def hold(model=model):
            if model is cut:
                for parameter in (cut.conv2.weight, cut.conv2.bias, cut.bn2.weight, cut.bn2.bias):
                    parameter.grad[[2, 6]] = 0

        steps(model, optimiser, 4, hold)
    kept = [0, 1, 3, 4, 5, 7]
    torch.testing.assert_close(whole.conv2.weight[kept], cut.conv2.weight[kept])
    torch.testing.assert_close(whole.fc1.weight, cut.fc1.weight)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("block", ["block1", "block2"])
def test_removed_channels_of_a_residual_sum_are_exactly_zero(block, training):
    model = residual_net()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    steps(model, optimiser, 3)
    layer = masked(model, f"{block}.conv2", "ebn")
    units = bools(layer.units, 0, 2)
    before = output_of(model.train(training), block, torch.ones(4, 3, 8, 8).normal_()).abs().amax((0, 2, 3))
    layer.remove(units)
    steps(model, optimiser, 5)
    largest = output_of(model.train(training), block, torch.randn(8, 3, 8, 8)).abs().amax((0, 2, 3))
    assert before[units].max() > 0 and largest[units].max() == 0 and largest[~units].min() > 0


def test_the_first_convolution_of_a_block_leaves_its_shortcut_alone():
    model = residual_net()
    masked(model, "block1.conv1", "ebn").remove(bools(4, 0, 2))
    assert not hasattr(model.block1, "silent_units")
    assert output_of(model, "block1", torch.randn(8, 3, 8, 8)).abs().amax((0, 2, 3)).min() > 0


def test_single_weights_leave_the_shortcut_alone():
    model = residual_net()
    masked(model, "block1.conv2", "magnitude", "weight").remove(torch.ones(4, 4, 3, 3, dtype=torch.bool))
    assert not hasattr(model.block1, "silent_units")
    assert output_of(model, "block1", torch.randn(8, 3, 8, 8)).abs().amax((0, 2, 3)).min() > 0


def test_projection_gets_no_gradient_for_removed_channels():
    model = residual_net()
    layer = masked(model, "block2.conv2", "ebn")
    layer.remove(bools(6, 1, 5))
    model(torch.randn(8, 3, 8, 8)).square().sum().backward()
    gradient = model.block2.shortcut.conv.weight.grad.abs().amax((1, 2, 3))
    assert gradient[[1, 5]].tolist() == [0, 0] and (gradient[[0, 2, 3, 4]] > 0).all()


def test_two_layers_of_one_sum_share_its_mask():
    model = residual_net()
    masked(model, "block2.conv2").remove(bools(6, 1))
    masked(model, "block2.shortcut.conv").remove(bools(6, 4))
    largest = output_of(model, "block2", torch.randn(8, 3, 8, 8)).abs().amax((0, 2, 3))
    assert largest.eq(0).tolist() == [False, True, False, False, True, False]


def test_a_masked_network_can_be_followed_again():
    model = residual_net()
    before = Surroundings(model).unit("block2.conv2")
    masked(model, "block2.conv2", "ebn").remove(bools(6, 1))
    again = Surroundings(model).unit("block2.conv2")
    assert again.sums == before.sums and again.points.keys() == before.points.keys()


class Continued(nn.Module):
    """A block that goes on after its sum."""

    def __init__(self, out: int):
        super().__init__()
        self.conv, self.bn, self.tail = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, out, 1)

    def forward(self, x):
        return self.tail(self.bn(self.conv(x)) + x)


@pytest.mark.parametrize("out", [4, 6])
def test_a_block_that_goes_on_after_its_sum_is_masked_at_the_sum(out):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Continued(out), nn.Flatten(), nn.Linear(16 * out, 2))
    masked(model, "1.conv", "ebn").remove(bools(4, 0, 3))
    sums = []
    model[1].tail.register_forward_pre_hook(lambda _m, inputs: sums.append(inputs[0]))
    y = output_of(model, "1", torch.randn(2, 3, 4, 4))
    assert sums[0].abs().amax((0, 2, 3)).eq(0).tolist() == [True, False, False, True]
    assert y.shape[1] == out and y.abs().amax((0, 2, 3)).min() > 0


def test_weights_only_leaves_bias_norm_and_shortcut():
    model = residual_net()
    with torch.no_grad():
        model.block1.bn2.bias.fill_(0.5)
    masked(model, "block1.conv2", "ebn", effect="remove-weights").remove(bools(4, 1))
    assert torch.equal(output_of(model, "block1.bn2", torch.randn(2, 3, 8, 8))[:, 1], torch.full((2, 8, 8), 0.5))
    assert output_of(model, "block1", torch.randn(2, 3, 8, 8)).abs().amax((0, 2, 3)).min() > 0


@pytest.mark.parametrize(("layer", "number"), [("conv2", 2 * (6 * 9 + 3)), ("fc1", 2 * 33)])
def test_parameters_removed_counts_weights_bias_scale_and_shift(layer, number):
    model = small_net()
    found = masked(model, layer)
    found.remove(bools(found.units, 0, 5))
    assert found.parameters_removed() == number
    found.remove(bools(found.units, 0))
    assert found.parameters_removed() == number


def test_parameters_removed_counts_single_weights():
    layer = masked(small_net(), "conv2", "magnitude", "weight")
    layer.remove(torch.arange(8 * 6 * 9).view(8, 6, 3, 3) % 5 == 0)
    assert layer.parameters_removed() == 87 and layer.size == 432 and layer.units == 8


def test_scores_of_a_layer_are_those_of_the_parameters_in_force():
    model = small_net()
    weight, gamma, beta = model.conv2.weight.detach().clone(), model.bn2.weight, model.bn2.bias
    with torch.no_grad():
        gamma.copy_(torch.randn(8))
        beta.copy_(torch.randn(8))
    expected = masking.scores.ebn(gamma, beta)
    layer = masked(model, "conv2", "ebn")
    assert torch.equal(layer.scores(), expected)
    layer.score = "l1"
    assert torch.allclose(layer.scores(), weight.double().abs().sum((1, 2, 3)))
    layer.score = "l2"
    layer.remove(bools(8, 3))
    assert torch.allclose(layer.scores(), weight.double().square().sum((1, 2, 3)).sqrt())
    assert layer.present.tolist() == [i != 3 for i in range(8)]


def test_scores_of_single_weights():
    model = small_net()
    expected = model.conv1.weight.detach().abs().double()
    assert torch.equal(masked(model, "conv1", "magnitude", "weight").scores(), expected)


@pytest.mark.parametrize("tokens", [6, 8])
def test_a_norm_over_tokens_is_no_norm_of_units(tokens):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(tokens), nn.ReLU(), nn.Linear(8, 2))
    around = Surroundings(model, torch.randn(3, tokens, 4))
    with pytest.raises(InputError, match="'0' is not followed by batch normalisation"):
        check_layer(around, "0", "filter", "ebn", "remove")
    assert around.unit("0").batch_norms == () and ("1", "silent_units") in around.unit("0").points


@pytest.mark.parametrize("layer", ["fc1", "conv1"])
def test_ebn_without_a_norm_is_refused(layer):
    model = small_net()
    model.bn1 = nn.BatchNorm2d(6, affine=False)
    with pytest.raises(InputError, match=f"{layer}.*E\\[BN\\].*l2"):
        masked(model, layer, "ebn")
    assert not hasattr(model.get_submodule(layer), "removed_units")


class Standardised(nn.Conv2d):
    """A convolution that reads its own weight where it is given one."""

    def _conv_forward(self, x, weight, bias):
        return nn.functional.conv2d(x, self.weight - self.weight.mean(), bias, self.stride, self.padding)


@pytest.mark.parametrize("how", [("weight", "remove"), ("filter", "remove-weights"), ("filter", "zero")])
@pytest.mark.parametrize("patched", [True, False])
def test_a_layer_that_would_not_see_masked_weights_is_refused(patched, how):
    model = small_net()
    name = "fc1" if patched else "conv1"
    if patched:
        model.fc1.forward = model.fc1.forward  # as those who wrap it do, by the class that it had
    else:
        model.conv1 = Standardised(3, 6, 3, padding=1)
    with pytest.raises(InputError, match=f"'{name}'.*forward pass is its own"):
        masked(model, name, "magnitude" if how[0] == "weight" else "l2", *how)
    masked(model, name)  # whole filters


def test_complex_weights_are_refused():
    class Waves(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 1, dtype=torch.complex64), nn.Linear(8, 2)

        def forward(self, x):
            return self.fc(self.conv(x.to(torch.complex64)).abs().mean((2, 3)))

    for how in (("l2",), ("magnitude", "weight")):
        with pytest.raises(InputError, match="'conv' has complex weights"):
            masked(Waves(), "conv", *how)


def test_state_dict_carries_the_masks():
    def build():
        torch.manual_seed(1)
        model = residual_net()
        return model, masked(model, "block2.conv2", "ebn")

    model, layer = build()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    steps(model, optimiser, 2)
    layer.remove(bools(6, 0, 4))
    steps(model, optimiser, 2)
    again, _ = build()
    again.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(model.eval()(x), again.eval()(x))
    largest = output_of(again, "block2", x).abs().amax((0, 2, 3))
    assert largest.eq(0).nonzero().flatten().tolist() == [0, 4]
