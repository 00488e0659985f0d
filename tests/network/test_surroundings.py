"""A removed unit is silent whatever lies behind its layer, or the layer is refused with a reason."""

import copy
import io
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.ops import FrozenBatchNorm2d, SqueezeExcitation, StochasticDepth

from gstlib import Pruner, Schedule
from gstlib.errors import InputError
from gstlib.scores import ebn
from gstlib.training import engine

HALF = Schedule(0, 0, 0.5, 1)


def shaken(model: nn.Module) -> nn.Module:
    """The same network with scales, shifts and running means that are nowhere 0 or 1."""
    for module in model.modules():
        for name in ("weight", "bias", "running_mean", "scale", "shift"):
            tensor = getattr(module, name, None)
            if isinstance(tensor, torch.Tensor) and not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                tensor.data.normal_()
    return model


def struck(model: nn.Module, layer: str, **how) -> torch.Tensor:
    """Remove half of the layer's filters; which."""
    pruner = Pruner(model, HALF, [layer], **{"score": "l2"} | how)
    pruner.epoch(0, lambda: 0.0)
    return ~pruner.layers[0].present


def outputs(model: nn.Module, x, end="output") -> dict[str, torch.Tensor]:
    """The last output (or first input) of every module, copied before anything works on it in place."""
    seen = {}

    def look(name):
        def hook(_module, inputs, output=None):
            value = output if end == "output" else inputs[0]
            if isinstance(value, torch.Tensor):
                seen[name] = value.detach().clone()
        return hook
    hooks = [m.register_forward_hook(look(name)) if end == "output" else m.register_forward_pre_hook(look(name))
             for name, m in model.named_modules()]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


def zero_channels(y: torch.Tensor) -> torch.Tensor:
    return y.transpose(0, 1).flatten(1).eq(0).all(1)


class Block(nn.Module):
    """Two convolutions of 8 channels with their norms, put together by `way(self, x)`."""

    def __init__(self, way, **parts):
        super().__init__()
        self.way = way
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.other, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.act, self.drop = nn.ReLU(), StochasticDepth(0.5, "row")
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.way(self, x)


def among(way, **parts) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Block(way, **parts), nn.Flatten(), nn.Linear(512, 3))


class Apart(nn.Module):
    """A function as a module."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, x):
        return self.way(x)


class Outermost(nn.Module):
    """The same parts in the network's own forward pass, which no hook can end early."""

    def __init__(self, way, width=8, **parts):
        super().__init__()
        self.stem, self.body, self.fc = nn.Conv2d(3, 8, 1), Block(way, **parts), nn.Linear(width, 3)
        for name, part in (*self.body.named_children(), *self.body.named_parameters(recurse=False)):
            setattr(self, name, part)
        self.way = way
        del self.body

    def forward(self, x):
        return self.fc(self.way(self, self.stem(x)).mean((2, 3)))


def in_place(s, x):
    y = s.bn(s.conv(x))
    y += x
    return F.relu(y)


SUMS = {
    "+": lambda s, x: s.bn(s.conv(x)) + x, "from the right": lambda s, x: x + s.bn(s.conv(x)), "+=": in_place,
    "add_": lambda s, x: s.bn(s.conv(x)).add_(x), "torch.add": lambda s, x: torch.add(s.bn(s.conv(x)), x, alpha=2),
    "-": lambda s, x: s.bn(s.conv(x)) - x, "- from the right": lambda s, x: x - s.bn(s.conv(x)),
    "sum": lambda s, x: sum([s.bn(s.conv(x)), x]),
    "sum of three": lambda s, x: sum([x, s.bn(s.conv(x)), s.norm(s.other(x))]),
    "stack": lambda s, x: torch.stack([s.bn(s.conv(x)), x]).sum(0),
    "mean of a stack": lambda s, x: torch.stack([x, s.bn(s.conv(x))], 1).mean(1),
    "lerp": lambda s, x: torch.lerp(s.bn(s.conv(x)), x, 0.3),
    "addcmul": lambda s, x: torch.addcmul(x, s.bn(s.conv(x)), torch.ones(1)),
    "stochastic depth": lambda s, x: s.drop(s.bn(s.conv(x))) + x,
    "dropout": lambda s, x: F.dropout(s.bn(s.conv(x)), 0.3, s.training) + x,
    "relu before and after": lambda s, x: s.act(s.act(s.bn(s.conv(x))) + x),
    "a learned scale": lambda s, x: s.scale.view(8, 1, 1) * s.bn(s.conv(x)) + x,
    "squeeze and excitation": lambda s, x: s.se(s.bn(s.conv(x))) + x,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", SUMS)
def test_a_removed_unit_takes_its_channel_out_of_whatever_sum_it_feeds(way, training):
    parts = {"scale": nn.Parameter(torch.ones(8)), "se": SqueezeExcitation(8, 2)}
    model = shaken(among(SUMS[way], **parts)).train(training)
    gone = struck(model, "2.conv")
    seen = outputs(model, torch.randn(6, 3, 8, 8))
    assert torch.equal(zero_channels(seen["2.conv"]), gone) and torch.equal(zero_channels(seen["2.bn"]), gone)
    assert zero_channels(seen["2"])[gone].all() and not zero_channels(seen["2"])[~gone].all()


@pytest.mark.parametrize("way", SUMS)
def test_a_sum_in_the_outermost_forward_is_silent_in_what_it_feeds(way):
    model = shaken(Outermost(SUMS[way], scale=nn.Parameter(torch.ones(8)), se=SqueezeExcitation(8, 2)))
    gone = struck(model, "conv")
    silent = zero_channels(outputs(model, torch.randn(6, 3, 8, 8), "input")["fc"])
    assert silent[gone].all() and not silent[~gone].all()


BEHIND = {
    "BN": [nn.BatchNorm2d(8)], "ReLU, BN": [nn.ReLU(), nn.BatchNorm2d(8)], "pool, BN": [nn.MaxPool2d(2), nn.BatchNorm2d(8)],
    "GroupNorm": [nn.GroupNorm(4, 8)], "InstanceNorm": [nn.InstanceNorm2d(8, affine=True)],
    "running InstanceNorm": [nn.InstanceNorm2d(8, track_running_stats=True)], "FrozenBN": [FrozenBatchNorm2d(8)],
    "LayerNorm": [nn.LayerNorm([8, 8, 8])], "BN without scale": [nn.BatchNorm2d(8, affine=False)],
    "dropout, pool, GELU, BN, BN": [nn.Dropout2d(0.3), nn.AvgPool2d(3, 1, 1), nn.GELU(),
                                    nn.BatchNorm2d(8), nn.BatchNorm2d(8)],
    "depthwise, BN": [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)], "sigmoid": [nn.Sigmoid()],
    "softplus, pool": [nn.Softplus(), nn.AvgPool2d(2)], "pad, BN": [nn.ZeroPad2d(1), nn.BatchNorm2d(8)],
    "ones round it": [nn.ConstantPad2d(1, 1.0)], "upsampled, GroupNorm": [nn.Upsample(scale_factor=2), nn.GroupNorm(2, 8)],
    "LocalResponseNorm": [nn.LocalResponseNorm(3), nn.ReLU()],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tail", BEHIND)
def test_no_norm_or_activation_gives_a_removed_filter_a_value_back(tail, training):
    modules = copy.deepcopy(BEHIND[tail])
    model = shaken(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *modules, nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                                 nn.Linear(128, 2)))
    plain = copy.deepcopy(model).eval()
    gone = struck(model.train(training), "0")
    x = torch.randn(4, 3, 8, 8)
    seen = outputs(model, x)
    assert all(torch.equal(zero_channels(seen[str(i)]), gone) for i in range(1 + len(modules)))
    if not training:
        assert not zero_channels(outputs(plain, x)[str(len(modules))]).any(), "without a mask all of them speak"


def by_hand(x, norm):
    """Normalisation over channels as ConvNeXt's authors write it."""
    centred = x - x.mean(1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6) * norm.weight[:, None, None] + norm.bias[:, None, None]


@pytest.mark.parametrize("way", [
    lambda s, x: F.batch_norm(s.conv(x), s.bn.running_mean, s.bn.running_var, s.bn.weight, s.bn.bias, s.training),
    lambda s, x: F.group_norm(s.conv(x), 4, s.bn.weight, s.bn.bias), lambda s, x: torch.sigmoid(s.conv(x)),
    lambda s, x: s.conv(x) + 1, lambda s, x: s.conv(x) - s.bn.bias.view(8, 1, 1),
    lambda s, x: torch.cat([s.conv(x)[:, 4:], s.conv(x)[:, :4]], 1).roll(4, 1),
    lambda s, x: torch.softmax(s.conv(x).flatten(2), 2).view(x.shape),
    # norms and choices that are written by hand, from means of the units themselves
    lambda s, x: by_hand(s.conv(x), s.bn), lambda s, x: by_hand(s.conv(x) + x, s.bn),
    lambda s, x: s.conv(x) - s.conv(x).mean(1, keepdim=True),
    # what reads NaN as if nothing were there: comparisons, rounding to few steps, a step
    lambda s, x: (s.conv(x) <= 0).float(), lambda s, x: s.conv(x).masked_fill(s.conv(x) <= 0, 0.5),
    lambda s, x: torch.fake_quantize_per_tensor_affine(s.bn(s.conv(x)), 0.1, 3, 0, 255),
    lambda s, x: torch.heaviside(s.conv(x), torch.tensor(0.5)), lambda s, x: torch.nan_to_num(s.bn(s.conv(x)), 1.0) + 1,
    # constants in a tensor's shape are no other layer's doing, nor is noise
    lambda s, x: torch.lerp(s.conv(x), torch.ones_like(s.conv(x)), 0.3), lambda s, x: 1.0 * torch.ones_like(x) - s.conv(x),
    lambda s, x: torch.logaddexp(s.conv(x), x.new_zeros(x.shape)), lambda s, x: s.conv(x) + torch.randn_like(x),
    # what no number that was tried comes near: thresholds, and choices that others make
    lambda s, x: s.bn((s.conv(x) > 3).float()), lambda s, x: s.bn(torch.where(s.conv(x) > 3, s.conv(x), 0.0)),
    lambda s, x: torch.where(s.other(x) < 0.2, s.conv(x), 0.3), lambda s, x: s.conv(x).masked_fill(x == 0, 0.5),
])
def test_functions_are_judged_as_modules_are(way):
    model = shaken(among(way))
    gone = struck(model, "2.conv")
    assert torch.equal(zero_channels(outputs(model, torch.randn(6, 3, 8, 8))["2"]), gone)


def test_a_concatenation_carries_units_to_their_place():
    model = shaken(Outermost(lambda s, x: s.big(torch.cat([x, s.conv(x), s.other(x)], 1)), 24, big=nn.BatchNorm2d(24)))
    one, two = struck(model, "conv"), struck(model, "other")
    seen = zero_channels(outputs(model, torch.randn(6, 3, 8, 8))["big"])
    assert torch.equal(seen, torch.cat([torch.zeros(8, dtype=torch.bool), one, two]))


def test_units_are_followed_through_reshaping():
    model = shaken(nn.Sequential(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.BatchNorm2d(2), nn.Flatten(),
                                 nn.BatchNorm1d(512), nn.Linear(512, 2)))
    gone = struck(model, "0")
    # PixelShuffle puts channel c * 4 + 2 i + j at row i, column j of channel c's squares
    y = outputs(model, torch.randn(6, 3, 8, 8))["4"].view(6, 2, 8, 2, 8, 2)
    assert torch.equal(y.eq(0).all(0).all(1).all(2).flatten(), gone)


def test_the_norm_behind_a_residual_sum_is_silent_too():
    pre = lambda s, x: s.other(F.relu(s.norm(s.conv(F.relu(s.bn(x)))))) + x  # noqa: E731
    model = shaken(nn.Sequential(nn.Conv2d(3, 8, 1), Block(pre), Block(pre), nn.BatchNorm2d(8), nn.Flatten(),
                                 nn.Linear(512, 2)))
    gone = struck(model, "1.other")
    seen = outputs(model, torch.randn(6, 3, 8, 8))
    assert all(torch.equal(zero_channels(seen[name]), gone) for name in ("1.other", "1", "2.bn"))
    assert not zero_channels(seen["2"]).any(), "at the next sum other layers speak in their own right"


def test_a_layer_called_twice_is_silent_behind_both_norms_and_scored_by_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.big, self.small = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, 2)

        def forward(self, x):
            a, b = self.big(self.conv(x)), self.small(self.conv(F.avg_pool2d(x, 2)))
            return self.fc(a.mean((2, 3)) + b.mean((2, 3)))

    model = shaken(Twice())
    means = (ebn(model.big.weight, model.big.bias) + ebn(model.small.weight, model.small.bias)) / 2
    gone = struck(model, "conv", score="ebn")
    assert sorted(means.argsort()[:4].tolist()) == gone.nonzero().flatten().tolist()
    seen = outputs(model, torch.randn(4, 3, 8, 8))
    assert torch.equal(zero_channels(seen["big"]), gone) and torch.equal(zero_channels(seen["small"]), gone)


class Optional(nn.Module):
    """A forward pass that branches on arguments which may be left out."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.other, self.fc = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Linear(8, 2)

    def forward(self, x, mask=None, features=False):
        x = self.bn(self.conv(x))
        if mask is not None:
            x = self.other(x * mask)
        return x if features else self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("arguments", [(), (None, False), (torch.rand(2, 1, 8, 8),)])
def test_arguments_that_may_be_left_out_are_followed_as_they_are_given(arguments):
    model, x = shaken(Optional()), torch.randn(2, 3, 8, 8)
    gone = struck(model, "conv", example=(x, *arguments) if arguments else None)
    read = []
    model.fc.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
    model(x, *arguments)
    assert torch.equal(zero_channels(read[0]), gone)
    with pytest.raises(InputError, match="head"):
        Pruner(Optional(), HALF, ["conv"], score="l2", example=(x, None, True))


def test_arguments_of_any_number_are_followed_as_none():
    class Passing(Outermost):
        def forward(self, x, *rest, **how):
            return self.fc(self.other(self.conv(self.stem(x, *rest), **how)).sigmoid().mean((2, 3)))

    struck(Passing(lambda s, x: x), "conv")
    struck(Passing(lambda s, x: x), "conv", example=torch.randn(2, 3, 8, 8))


def test_modules_that_a_forward_pass_makes_are_followed():
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 4, 1))
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(nn.ReLU()(self.parts[3:](self.parts[:3](x))).mean((2, 3)))

    model = shaken(Sliced())
    gone = struck(model, "parts.0")
    assert torch.equal(zero_channels(outputs(model, torch.randn(2, 3, 8, 8), "input")["parts.3"]), gone)


def test_a_network_is_judged_on_the_cpu_whatever_device_is_the_default():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    model(x := torch.randn(2, 3, 8, 8))
    torch.set_default_device("meta")
    try:
        pruner = Pruner(model, HALF, ["0"])
        pruner.epoch(0, lambda: 0.0)
        y = model.eval()(x)
        torch.testing.assert_close(pruner.finish()(x), y)
    finally:
        torch.set_default_device(None)


def test_a_train_method_that_returns_nothing_is_as_good():
    class Frozen(nn.BatchNorm2d):
        def train(self, mode=True):
            super().train(False)

    class Net(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)

    model = shaken(Net(nn.Conv2d(3, 8, 1), Frozen(8), nn.Flatten(), nn.Linear(512, 2)))
    gone = struck(model, "0")
    assert torch.equal(zero_channels(outputs(model, torch.randn(2, 3, 8, 8))["1"]), gone)


def test_a_forward_pass_of_one_network_alone_is_refused_and_one_that_is_wrapped_is_followed():
    model = Outermost(lambda s, x: s.other(s.conv(x).relu()))
    model.forward = torch.compile(model.forward, backend="eager")
    Pruner(model, HALF, ["conv"], score="l2")

    def louder(x):
        y = model.conv(model.stem(x))
        return model.fc((model.other(y.relu()) + model.other(y.cos())).mean((2, 3)))

    model.forward = louder
    with pytest.raises(InputError, match="in this one network"):
        Pruner(model, HALF, ["conv"], score="l2")


REFUSED = {
    "a norm for two": (lambda: Outermost(lambda s, x: torch.cat([s.bn(s.conv(x)), s.bn(s.other(x))], 1), 16), "conv",
                       "'bn' serves conv and other"),
    "an activation for two": (lambda: among(lambda s, x: s.sig(s.bn(s.conv(s.sig(s.other(x))))), sig=nn.Sigmoid()),
                              "2.other", "serves"),
    "a gate": (lambda: among(lambda s, x: x * torch.sigmoid(s.conv(x))), "2.conv", "gate"),
    "squeeze and excitation's gate": (lambda: among(lambda s, x: s.se(s.conv(x)), se=SqueezeExcitation(8, 2)),
                                      "2.se.fc2", "gate"),
    "softmax over units": (lambda: among(lambda s, x: torch.softmax(s.conv(x), 1)), "2.conv", "softmax"),
    "maximum over units": (lambda: Outermost(lambda s, x: s.conv(x).amax(1, keepdim=True), 1), "conv", "amax"),
    "an output head": (lambda: among(lambda s, x: x), "4", "head"),
    "a branch on values": (lambda: among(lambda s, x: x if x.sum() > 0 else s.conv(x)), "0", "torch.fx.wrap"),
    "no guess": (lambda: nn.Sequential(nn.Unflatten(1, (3, 77, 2)), nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(1232, 2)),
                 "1", "example="),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), "", "weight_norm"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(2)), "0", "one batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_silent_is_refused_with_a_reason_and_left_as_it_was(name):
    make, layer, reason = REFUSED[name]
    model = make()
    if name == "weight_norm":
        model, layer = nn.Sequential(model, nn.Linear(8, 2)), "0"
    before, inside = set(model.state_dict()), {m: (type(m), dict(vars(m)), dict(m._buffers)) for m in model.modules()}
    torch.manual_seed(3)
    with pytest.raises(InputError, match=reason):
        Pruner(model, HALF, [layer], score="l2")
    assert set(model.state_dict()) == before and torch.initial_seed() == 3
    assert {m: (type(m), dict(vars(m)), dict(m._buffers)) for m in model.modules()} == inside


@torch.fx.wrap
def shifted_if_loud(x):
    return x + 1 if x.abs().max() > 10 else x


def test_a_function_that_branches_on_how_loud_its_values_are_is_tried_on_loud_ones():
    with pytest.raises(InputError, match="'conv' .*not be silent in the input of 'other'"):
        Pruner(Outermost(lambda s, x: s.other(shifted_if_loud(s.conv(x)))), HALF, ["conv"], score="l2")


@torch.fx.wrap
def attended(x):
    if x.device.type == "cpu" and x.shape[-1] > 64:
        pytest.fail("ten gigabytes")
    return (x.flatten(2).transpose(1, 2) @ x.flatten(2)).softmax(2)[:, :8].reshape(-1, 8, 8, 8)


def test_large_inputs_are_guessed_without_values():
    struck(Outermost(lambda s, x: s.other(s.conv(x)) + attended(x)), "conv")


def test_an_example_serves_where_no_guess_does():
    model = REFUSED["no guess"][0]()
    Pruner(model, HALF, ["1"], score="l2", example=torch.randn(2, 462)).epoch(0, lambda: 0.0)
    assert zero_channels(outputs(model, torch.randn(5, 462))["1"]).sum() == 4


class Bare(Block):
    """What `way` gives is read by no module, so that no hook can look."""

    def __init__(self, way):
        super().__init__(way)
        self.rows = nn.Parameter(torch.randn(3, 8))

    def forward(self, x):
        return F.linear(self.way(self, x).mean((2, 3)), self.rows)


def changed(how):
    def way(s, x):
        y = s.conv(x)
        how(y, s.other(x))
        return y
    return way


@pytest.mark.parametrize(("way", "reason"), [
    (lambda s, x: torch.minimum(s.conv(x), s.other(x)), "'linear' reads"),
    (lambda s, x: torch.clamp(s.conv(x), max=s.other(x)), "'linear' reads"),
    (lambda s, x: (s.conv(x) > s.other(x)).float(), "'linear' reads"),
    (lambda s, x: torch.where(s.other(x) > -5, s.conv(x), s.other(x)), "'linear' reads"),
    (lambda s, x: torch.where(s.other(x) > 5, s.conv(x), s.other(x)), "'linear' reads"),
    (changed(lambda y, z: y.add_(z)), "'add_' changes 'conv' in place"),
    (changed(lambda y, z: y[:, :4].copy_(z[:, :4])), "'copy_' changes 'getitem' in place"),
    (changed(lambda y, z: torch.sigmoid_(y)), "'sigmoid_' changes 'conv' in place"),
])
def test_silence_that_depends_on_others_or_ends_in_place_is_no_silence(way, reason):
    model = Bare(way)
    with pytest.raises(InputError, match=reason):
        Pruner(model, HALF, ["conv"], score="l2", example=torch.randn(2, 8, 8, 8))


@pytest.mark.parametrize("way", [changed(lambda y, z: torch.relu_(y)), changed(lambda y, z: y.mul_(z)),
                                 lambda s, x: s.conv(x) * s.other(x).sigmoid(),
                                 lambda s, x: torch.where(s.other(x) > 0, s.conv(x), 0.0)])
def test_silence_that_nothing_ends_is_heard_by_no_function_either(way):
    model, x = Bare(way), torch.randn(4, 8, 8, 8)
    gone = struck(model, "conv", example=x)
    before = model(x)
    with torch.no_grad():
        model.rows[:, gone] += 1
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("spoil", ["old weight_norm", "spectral_norm", "torch's pruning"])
def test_weights_that_are_computed_are_refused_by_name(spoil):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        {"old weight_norm": nn.utils.weight_norm, "spectral_norm": nn.utils.spectral_norm,
         "torch's pruning": lambda m: nn.utils.prune.l1_unstructured(m, "weight", 0.3)}[spoil](model[0])
    before = set(model.state_dict())
    with pytest.raises(InputError, match="'0' is computed"):
        Pruner(model, HALF, ["0"], score="l2")
    assert set(model.state_dict()) == before


@pytest.mark.parametrize("by_data", [True, False])
def test_shared_weights_are_refused_by_name(by_data):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(192, 2))
    if by_data:
        model[1].weight.data = model[0].weight.data
    else:
        model[1].weight = model[0].weight
    with pytest.raises(InputError, match="'0' shares its parameters with '1'"):
        Pruner(model, HALF, ["0"], score="l2")


@pytest.mark.parametrize("training", [True, False])
def test_weights_that_one_mode_reads_by_itself_are_refused_in_either(training):
    class Tied(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return (y, F.linear(x, self[0].weight)) if self.training else y

    with pytest.raises(InputError, match="'0' shares its parameters with 'the forward pass'"):
        Pruner(Tied(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).train(training), HALF, ["0"], score="l2")


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers_are_named(wrap):
    with pytest.raises(InputError, match="give the network inside"):
        Pruner(wrap(among(SUMS["+"])), HALF, ["2.conv"], score="l2")


def test_nothing_of_the_user_s_runs_or_changes_while_a_network_is_judged():
    model, log = among(SUMS["+"]), []
    hooks = [model[2].register_forward_hook(lambda m, i, y: log.append(y.detach().mean())),
             model[2].conv.register_forward_pre_hook(lambda m, i: log.append(0)),
             nn.modules.module.register_module_forward_hook(lambda *_: log.append(1))]
    model.train()
    model[2].bn.eval()
    before, seed = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    Pruner(model, HALF, ["2.conv"])
    assert log == [] and torch.equal(torch.get_rng_state(), seed) and model[2].training and not model[2].bn.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    model(torch.randn(2, 3, 8, 8))
    assert len(log) > 2
    for hook in hooks:
        hook.remove()


def test_what_a_forward_pass_draws_and_keeps_is_as_before_once_it_has_been_judged():
    class Keeping(nn.Sequential):
        def __init__(self, *modules):
            super().__init__(*modules)
            self.register_buffer("steps", torch.zeros(3))
            self.plain, self.log, self.generator = torch.zeros(3), [torch.zeros(1)], torch.Generator()

        def forward(self, x):
            random.random(), np.random.rand(), torch.rand(1, generator=self.generator)
            self.steps += 1
            self.plain.add_(1)
            self.log[0].add_(1)
            self.log.append(x)
            return super().forward(x)

    model = Keeping(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    before = random.getstate(), repr(np.random.get_state()), model.generator.get_state().tolist()
    Pruner(model, HALF, ["0"], score="l2").finish()
    assert (random.getstate(), repr(np.random.get_state()), model.generator.get_state().tolist()) == before
    assert len(model.log) == 1 and not any(kept.any() for kept in (model.steps, model.plain, model.log[0]))


@pytest.mark.parametrize("whole", [True, False])
def test_a_script_is_refused_and_hooks_for_all_modules_can_still_be_set(whole):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), torch.jit.script(nn.ReLU()), nn.Flatten(), nn.Linear(288, 2))
    with pytest.raises(InputError, match="script of torch.jit"):
        Pruner(torch.jit.script(model) if whole else model, HALF, ["0"], score="l2")
    nn.modules.module.register_module_forward_hook(lambda *_: None).remove()


@pytest.mark.parametrize("how", [{"layers": ["conv"]}, {"layers": ["other"], "structure": "weight"}])
def test_a_sum_that_does_not_concern_the_layer_refuses_nothing(how):
    model = Outermost(lambda s, x: s.norm(s.other(F.relu(s.bn(s.conv(x))))) + x)
    Pruner(model, HALF, **how)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.fc = Block(lambda s, x: (lambda y: (y, y.relu()))(s.bn(s.conv(x)) + x)), nn.Linear(8, 2)

    def forward(self, x):
        a, b = self.block(x)
        return self.fc((a + b).mean((2, 3)))


def test_a_block_that_returns_a_pair_is_silent_in_what_it_feeds():
    model = shaken(nn.Sequential(nn.Conv2d(3, 8, 1), Pair()))
    gone = struck(model, "1.block.conv")
    assert torch.equal(zero_channels(outputs(model, torch.randn(4, 3, 8, 8), "input")["1.fc"]), gone)


@pytest.mark.parametrize("make, layer, shape", [
    (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)),
     "0", (4, 3, 8)),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 8, 2, 2), nn.BatchNorm2d(8), nn.Flatten(),
                           nn.Linear(2048, 2)), "1", (4, 3, 8, 8)),
    (lambda: nn.Sequential(nn.Conv3d(3, 8, 1), nn.BatchNorm3d(8), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
                           nn.Linear(8, 2)), "0", (4, 3, 4, 4, 4)),
    (lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2)), "0", (4, 5)),
])
@pytest.mark.parametrize("how", [{"score": "l2"}, {"structure": "weight"}, {"score": "l1", "effect": "remove-weights"},
                                 {"score": "l2", "effect": "zero", "batches": 2},
                                 {"score": "l2", "effect": "gaussian-transient", "batches": 2}])
def test_layers_of_every_dimension_can_be_struck(make, layer, shape, how):
    model, x = shaken(make()), torch.randn(*shape)
    pruner = Pruner(model, HALF, layer, target="L", **how)
    weight = model.get_submodule(layer).weight.detach()
    rows = weight.movedim(1, 0) if isinstance(model.get_submodule(layer), nn.ConvTranspose2d) else weight
    norms = rows.flatten(1).norm(dim=1) if how.get("score") == "l2" else rows.flatten(1).abs().sum(1)
    before = model(x).detach()
    pruner.epoch(0, lambda: 0.0)
    gone = ~pruner.layers[0].present
    if "structure" in how:
        largest = rows.abs().flatten().sort().values[rows.numel() // 2:]
        assert torch.equal(rows.abs()[gone].sort().values, largest)
    else:
        assert gone.nonzero().flatten().tolist() == sorted(norms.argsort()[4:].tolist())
        if how == {"score": "l2"}:
            assert torch.equal(zero_channels(outputs(model, x)[str(int(layer) + 1)]), gone)
    assert not torch.equal(model(x), before)
    for _ in range(2):
        pruner.batch()
    if how.get("effect") == "gaussian-transient":
        assert torch.equal(model(x), before)


def test_heads_and_projections_are_left_alone_by_default():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.coarse, self.fine = nn.Linear(4, 8), nn.Linear(8, 5), nn.Linear(8, 7)

        def forward(self, x):
            x = self.body(x).relu()
            return self.coarse(x), self.fine(x)

    assert [layer.name for layer in Pruner(Heads(), HALF, score="l2").layers] == ["body"]
    with pytest.raises(InputError, match="only 1 can be pruned by 'l2': body; layer 'fine'.*head"):
        Pruner(Heads(), Schedule((0, 0), (0, 0), (0.5, 0.5), 1), score="l2")
    first = Block(lambda s, x: s.norm(s.other(x)) + s.bn(s.conv(F.relu(s.inner(x)))), inner=nn.Conv2d(8, 8, 1))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), first, nn.Flatten(), nn.Linear(512, 2))
    assert [layer.name for layer in Pruner(model, HALF).layers] == ["1.conv"]
    stem = nn.Sequential(nn.Conv2d(3, 8, 1), Block(SUMS["+"]), nn.Flatten(), nn.Linear(512, 2))
    assert [layer.name for layer in Pruner(stem, HALF).layers] == ["1.conv"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_masks_keep_the_network_s_own_type(dtype):
    model = among(SUMS["+"]).to(dtype)
    struck(model, "2.conv")
    assert model(torch.randn(2, 3, 8, 8, dtype=dtype)).dtype == dtype


def test_masks_keep_autocast_s_type_and_the_memory_format():
    model = among(SUMS["+"]).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    struck(model, "2.conv")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = outputs(model, x)
    assert seen["2"].dtype == torch.bfloat16 and seen["2"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("how", [{"score": "l2"}, {"structure": "weight", "score": "magnitude"},
                                 {"score": "l2", "effect": "zero", "batches": 2}])
def test_a_pruned_network_is_compiled_and_exported_and_its_masks_go_along(how):
    model, x = among(SUMS["+"]).eval(), torch.randn(4, 3, 8, 8)
    struck(model, "2.conv", **how)
    for made in (torch.compile(model, backend="eager", fullgraph=True), torch.export.export(model, (x,)).module()):
        torch.testing.assert_close(made(x), model(x))


@pytest.mark.parametrize("how", [{"score": "l2"}, {"score": "activation"}, {"structure": "weight"}])
@pytest.mark.parametrize("within", [True, False])
def test_what_was_compiled_before_it_was_pruned_is_compiled_anew(how, within):
    active = "activation" in how.values()
    model, x = among(SUMS["+"]).train(active), torch.randn(4, 3, 8, 8)
    if within:
        compiled = model
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    compiled(x)
    pruner = Pruner(model, HALF, ["2.conv"], **how)
    compiled(x)
    assert not active or model[2].active_batches == 1
    pruner.epoch(0, lambda: 0.0)
    found = compiled(x)
    vars(model).pop("_compiled_call_impl", None)
    torch.testing.assert_close(found, model(x))


@pytest.mark.parametrize("part", ["module", "forward"])
def test_a_network_of_which_parts_are_compiled_can_be_pruned(part):
    model, x = among(SUMS["+"]), torch.randn(4, 3, 8, 8)
    if part == "module":
        model[2] = torch.compile(model[2], backend="eager")
    else:
        model[2].forward = torch.compile(model[2].forward, backend="eager")
    model(x)
    pruner = Pruner(model, HALF, ["2._orig_mod.conv" if part == "module" else "2.conv"], score="l2")
    pruner.epoch(0, lambda: 0.0)
    assert torch.equal(zero_channels(model[2](model[:2](x))), ~pruner.layers[0].present)
    found = model.eval()(x)
    torch.testing.assert_close(pruner.finish()(x), found)


def test_the_engine_s_compiled_passes_are_kept(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo, "reset", lambda: pytest.fail("forgotten"))
    torch._dynamo.convert_frame.input_codes.add(engine._pass_with.__code__)
    Pruner(among(SUMS["+"]), HALF, ["2.conv"])


def test_a_layer_of_one_filter_is_read_by_the_next_layer():
    model = shaken(nn.Sequential(nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1), nn.Conv2d(1, 4, 1), nn.Flatten(), nn.Linear(256, 2)))
    pruner = Pruner(model, Schedule(0, 0, 1.0, 1), ["0"])
    pruner.epoch(0, lambda: 0.0)
    assert zero_channels(outputs(model, torch.randn(4, 3, 8, 8))["1"]).all()
    before = model.eval()(x := torch.randn(4, 3, 8, 8))
    torch.testing.assert_close(pruner.finish()(x), before)


@pytest.mark.parametrize("way, possible", [
    # invented numbers would be infinite here, and in the second never where the norm hears the difference
    (lambda s, x: torch.exp(99 * s.conv(x)), True),
    (lambda s, x: F.normalize(F.threshold(s.bn(s.conv(x)), 0.1, 0.3), dim=1), False),
    # nor where it hears it among loud ones alone
    (lambda s, x: s.norm(s.conv(F.relu(s.first(x))) + x), False),
])
def test_a_plain_network_is_compared_on_the_networks_own_numbers(way, possible):
    model = shaken(among(way, bn=nn.BatchNorm2d(8, affine=False), first=nn.Conv2d(8, 8, 1),
                         norm=nn.LocalResponseNorm(5, 1e-5))).eval()
    pruner, x = Pruner(model, HALF, ["2.conv"], score="l2"), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        model[2].conv.weight *= 1e-2
        model[2].bn.running_mean.copy_(torch.tensor([-1.0, 1.0]).repeat(4))
    pruner.epoch(0, lambda: 0.0)
    before = model(x)
    if possible:
        torch.testing.assert_close(pruner.finish()(x), before)
    else:
        with pytest.raises(InputError, match="no plain network"):
            pruner.finish()
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("way", [lambda x: torch.sqrt(x * x + 1e-12), lambda x: x.clamp(min=1e-6).pow(3)])
def test_what_stands_for_0_in_a_plain_network_is_heard_at_no_scale(way):
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), Apart(way), nn.Conv2d(8, 8, 1, bias=False), nn.Flatten(),
                          nn.Linear(512, 3, bias=False)).eval()
    pruner, x = Pruner(model, HALF, ["0"], score="l2"), 1e-5 * torch.randn(4, 3, 8, 8)
    pruner.epoch(0, lambda: 0.0)
    before = model(x)
    torch.testing.assert_close(pruner.finish()(x), before, rtol=1e-5, atol=0)


def test_padding_that_no_example_has_is_silent_in_the_masked_and_the_plain_network():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.conv, self.other = nn.Embedding(20, 6), nn.Conv1d(6, 8, 3, padding=1), nn.Conv1d(8, 3, 1)

        def forward(self, ids):
            y = self.conv(self.words(ids).transpose(1, 2))
            return self.other(y.masked_fill((ids == 0).unsqueeze(1), 0.5)).amax(2)

    model = Words().eval()
    gone = struck(model, "conv", example=torch.randint(1, 20, (2, 9)))
    ids = torch.randint(0, 3, (4, 9))
    assert torch.equal(zero_channels(outputs(model, ids, "input")["other"]), gone)
    pruner = Pruner(model, Schedule(9, 9, 0, 1), ["conv"], score="l2", example=torch.randint(1, 20, (2, 9)))
    before = model(ids)
    torch.testing.assert_close(pruner.finish()(ids), before)


def test_a_layer_of_which_a_part_joins_the_sum_loses_that_part():
    model = shaken(among(lambda s, x: F.relu(s.bn(s.conv(x)) + s.wide(x)[:, :8]), wide=nn.Conv2d(8, 16, 1))).eval()
    pruner, x = Pruner(model, HALF, ["2.conv"], score="l2"), torch.randn(4, 3, 8, 8)
    pruner.epoch(0, lambda: 0.0)
    gone, before = ~pruner.layers[0].present, model(x)
    torch.testing.assert_close(pruner.finish()(x), before)
    rows = model[2].wide.weight.flatten(1).eq(0).all(1)
    assert torch.equal(rows[:8], gone) and not rows[8:].any()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_no_infinity_in_the_shortcut_reaches_a_removed_channel_or_its_gradient(value):
    model = among(SUMS["+"]).eval()
    gone = struck(model, "2.conv")
    x = torch.randn(2, 8, 8, 8)
    x[:, gone] = value
    x.requires_grad_()
    y = model[2](x)
    assert (y[:, gone] == 0).all()
    y[:, gone].sum().backward()
    assert (x.grad == 0).all()


def test_the_same_channels_are_silent_in_averages_with_and_without_buffers():
    for how in ({}, {"use_buffers": True}, {"use_buffers": True, "multi_avg_fn": get_ema_multi_avg_fn(0.999)}):
        model = shaken(among(SUMS["+"]))
        pruner = Pruner(model, Schedule(0, 1, 0.5, 1), ["2.conv"], score="l2")
        averaged = AveragedModel(model, **how)
        averaged.update_parameters(model)
        for n in (0, 1):
            pruner.epoch(n, lambda: 0.0)
            averaged.update_parameters(model)
        seen = outputs(averaged.module.eval(), torch.randn(4, 3, 8, 8))
        assert torch.equal(zero_channels(seen["2"]), ~pruner.layers[0].present)


def test_judging_a_network_draws_from_no_generator_and_queues_no_seed():
    model, seeds = among(SUMS["dropout"]), []
    drawn = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "manual_seed", seeds.append)  # seeds every device's generator, whose owner would notice
        Pruner(model, HALF, ["2.conv"], score="l2").finish()
    assert torch.equal(torch.get_rng_state(), drawn) and not seeds


def test_groups_made_by_module_treat_norms_alike_before_and_after():
    ends = []
    for before in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 3))
        pruner = None if before else Pruner(model, HALF, ["0"])
        norm = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters(recurse=False)]
        rest = [p for p in model.parameters() if not any(p is q for q in norm)]
        assert len(norm) == 2
        optimiser = torch.optim.SGD([{"params": rest, "weight_decay": 0.1}, {"params": norm}], lr=0.1)
        pruner = pruner or Pruner(model, HALF, ["0"])
        pruner.epoch(0, lambda: 0.0)
        torch.manual_seed(1)
        for _ in range(5):
            optimiser.zero_grad()
            F.cross_entropy(model(torch.randn(8, 3, 8, 8)), torch.randint(0, 3, (8,))).backward()
            optimiser.step()
        ends.append(model[1].weight.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("how", [{}, {"structure": "weight"}, {"effect": "zero", "batches": 3}])
def test_writes_to_a_pruned_layer_do_what_they_say(how):
    model = among(SUMS["+"])
    conv = model[2].conv
    pruner = Pruner(model, HALF, ["2.conv"], **how)
    with torch.no_grad():
        nn.init.constant_(conv.weight, 3.0)
        assert (conv.weight == 3).all()
        conv.weight.copy_(torch.ones(8, 8, 3, 3))
        assert (conv.weight == 1).all()
    conv.weight = nn.Parameter(torch.full((8, 8, 3, 3), 2.0))
    fresh = among(SUMS["+"])
    model.load_state_dict(fresh.state_dict(), strict=False)
    assert torch.equal(conv.weight, fresh[2].conv.weight)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(model.eval()(x), fresh.eval()(x))
    pruner.epoch(0, lambda: 0.0)
    assert not torch.equal(model(x), fresh(x))


@pytest.mark.parametrize("how", [{"score": "l2"}, {"structure": "weight"}, {"score": "l2", "effect": "remove-weights"}])
def test_a_pruned_network_is_copied_pickled_and_folded(how):
    model = shaken(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(512, 2))).eval()
    Pruner(model, HALF, ["0"], **how).epoch(0, lambda: 0.0)
    x, kept = torch.randn(4, 3, 8, 8), io.BytesIO()
    torch.save(model, kept)
    kept.seek(0)
    for twin in (copy.deepcopy(model), torch.load(kept, weights_only=False)):
        assert torch.equal(twin(x), model(x)) and type(twin[0]) is type(model[0])
    if how == {"score": "l2"}:
        fused = nn.utils.fuse_conv_bn_eval(model[0], model[1])
        torch.testing.assert_close(fused(x), model[1](model[0](x)))


PIECES = {
    "bn": lambda: nn.BatchNorm2d(4), "gn": lambda: nn.GroupNorm(2, 4), "in": lambda: nn.InstanceNorm2d(4, affine=True),
    "frozen": lambda: FrozenBatchNorm2d(4), "relu": nn.ReLU, "sigmoid": nn.Sigmoid, "leaky": lambda: nn.LeakyReLU(0.1),
    "drop": lambda: nn.Dropout(0.2), "pool": lambda: nn.AvgPool2d(3, 1, 1),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, 1, 1, groups=4),
    "se": lambda: SqueezeExcitation(4, 2),
}
JOINS = {"none": lambda y, x: y, "+": lambda y, x: y + x, "-": lambda y, x: x - y, "add_": lambda y, x: y.clone().add_(x),
         "sum": lambda y, x: sum([x, y]), "stack": lambda y, x: torch.stack([y, x]).sum(0)}


class Joined(nn.Module):
    def __init__(self, first, pieces, join, projected):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=first)
        self.tail = nn.Sequential(*[PIECES[piece]() for piece in pieces])
        self.projection = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) if projected else nn.Identity()
        self.join = JOINS[join]

    def forward(self, x):
        return self.join(self.tail(self.conv(x)), self.projection(x))


blocks = st.tuples(st.booleans(), st.lists(st.sampled_from(sorted(PIECES)), max_size=3), st.sampled_from(sorted(JOINS)),
                   st.booleans())


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(blocks, min_size=1, max_size=3), st.integers(0, 2), st.booleans())
def test_random_networks_are_silent_count_exactly_and_end_plain(plans, which, training):
    def build():
        torch.manual_seed(1)
        return shaken(nn.Sequential(nn.Conv2d(3, 4, 1), *[Joined(*plan) for plan in plans], nn.Flatten(), nn.Linear(144, 2)))

    model, place = build(), 1 + which % len(plans)
    pruner = Pruner(model, Schedule(0, 1, 0.5, 1), [f"{place}.conv"], score="l2")
    x = torch.randn(4, 3, 6, 6)
    model.train(training)
    for n in (0, 1):
        (row,) = pruner.epoch(n, lambda: 0.0)
        assert (row["removed"], row["removed_total"]) == (1, n + 1)
    seen, gone = outputs(model, x), ~pruner.layers[0].present
    names = [f"{place}.conv", *(f"{place}.tail.{i}" for i in range(len(plans[place - 1][1]))), str(place)]
    assert all(zero_channels(seen[name])[gone].all() for name in names)
    before = model.eval()(x)
    try:
        plain = pruner.finish()
    except InputError:
        assert len(plans) > place and torch.equal(model(x), before)
        return
    fresh = build().eval()
    fresh.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fresh(x), before)
