"""The compact network: smaller, equal outputs, and only channels that nobody else speaks in are cut."""

import builtins
import io

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v3_small, resnet18, squeezenet1_0
from torchvision.models.resnet import BasicBlock

from gstlib import Pruner, Schedule
from gstlib.errors import InputError

pytest.importorskip("torch_pruning")


def shaken(model: nn.Module) -> nn.Module:
    """The network with norms that are nowhere 0 or 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.data.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def struck(model: nn.Module, *layers: str, fraction: float = 0.5) -> Pruner:
    n = len(layers)
    pruner = Pruner(model, Schedule((0,) * n, (0,) * n, (fraction,) * n, 1), layers, score="l2")
    pruner.epoch(0, lambda: 0.0)
    return pruner


@pytest.mark.parametrize("build", [resnet18, mobilenet_v3_small, squeezenet1_0])
def test_compact_networks_of_torchvision_are_smaller_with_equal_outputs(build):
    torch.manual_seed(0)
    model, x = shaken(build(num_classes=10)), torch.randn(2, 3, 64, 64)
    layers = {resnet18: ["layer4.0.conv1", "layer4.1.conv1", "layer4.1.conv2"],
              mobilenet_v3_small: ["features.11.block.0.0", "features.11.block.1.0", "features.12.0"],
              squeezenet1_0: ["features.12.expand1x1", "features.12.expand3x3"]}[build]
    pruner = struck(model, *layers)
    units, masked = sum(layer.gone for layer in pruner.layers), model(x)
    plain_size = sum(p.numel() for p in model.parameters())
    made = pruner.finish(compact=True)
    torch.testing.assert_close(made.model(x), masked, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x), masked, rtol=1e-4, atol=1e-5)  # the plain one, still whole
    assert made.parameters == (plain_size, sum(p.numel() for p in made.model.parameters()))
    assert made.parameters[1] < plain_size and made.operations[1] < made.operations[0]
    # in layer4.1 the shortcut carries layer4.0's channels, which others read
    assert (made.cut, made.left) == ((units - 256, 256) if build is resnet18 else (units, 0))


@pytest.mark.parametrize("alpha", [1e-4, 1e-3])
def test_nothing_is_cut_where_channels_hear_each_others_squares(alpha):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(5, alpha), nn.Conv2d(8, 8, 3), nn.ReLU(),
                          nn.Flatten(), nn.Linear(128, 5)).eval()
    made, x = struck(model, "0", "2").finish(compact=True), 100 * torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(made.model(x), model(x), rtol=1e-4, atol=1e-4)
    assert (made.cut, made.left) == (4, 4)


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_of_any_precision_is_cut_in_that(dtype, example):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    shaken(model).to(dtype)
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    pruner = Pruner(model, Schedule(0, 0, 0.5, 1), ["0"], score="l2", example=x if example else None)
    pruner.epoch(0, lambda: 0.0)
    before = model(x)
    made = pruner.finish(compact=True)
    assert made.cut == 4 and {p.dtype for p in made.model.parameters()} == {dtype}
    torch.testing.assert_close(made.model(x), before)


def test_an_example_may_hold_its_tensors_in_a_dictionary():
    class Named(nn.Sequential):
        def forward(self, batch):
            return super().forward(batch["image"])

    model = shaken(Named(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 5))).bfloat16()
    batch = {"image": torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)}
    pruner = Pruner(model, Schedule(0, 0, 0.5, 1), ["0"], score="l2", example=batch)
    pruner.epoch(0, lambda: 0.0)
    before, made = model.eval()(batch), pruner.finish(compact=True)
    assert made.cut == 4 and made.model(batch).dtype == torch.bfloat16
    torch.testing.assert_close(made.model.eval()(batch), before)


def test_a_network_that_cannot_be_copied_is_refused_and_keeps_its_masks():
    class Bound(nn.ReLU):
        def __deepcopy__(self, memo):
            raise TypeError("one of a kind")

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Bound(), nn.Flatten(), nn.Linear(288, 5))
    x = torch.randn(2, 3, 8, 8)
    pruner = struck(model, "0")
    before = model(x)
    with pytest.raises(InputError, match="cannot be copied .one of a kind."):
        pruner.finish(compact=True)
    assert pruner.layers[0].gone == 4 and torch.equal(model(x), before)
    torch.testing.assert_close(pruner.finish()(x), before)


def test_what_is_cut_is_counted_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    made = struck(shaken(model), "0").finish(compact=True)
    assert made.parameters == (8 * 27 + 16 + 8 * 36 * 5 + 5, 4 * 27 + 8 + 4 * 36 * 5 + 5)
    # two batch items, a multiplication and an addition each
    assert made.operations == (2 * 2 * (8 * 27 * 36 + 8 * 36 * 5), 2 * 2 * (4 * 27 * 36 + 4 * 36 * 5))


def test_a_channel_of_a_sum_is_cut_once_all_who_feed_it_are_silent():
    def build():
        torch.manual_seed(0)
        return shaken(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), BasicBlock(8, 8, 1), nn.Flatten(), nn.Linear(512, 2)))

    x = torch.randn(2, 3, 8, 8)
    alone = struck(build(), "2.conv2").finish(compact=True)
    assert (alone.cut, alone.left) == (0, 4) and alone.parameters[0] == alone.parameters[1]
    model = build()
    with torch.no_grad():  # the same units in the stem and behind it
        model[0].weight[:4] *= 1e-3
        model[2].conv2.weight[:4] *= 1e-3
    pruner = struck(model, "0", "2.conv2")
    before = model(x)
    both = pruner.finish(compact=True)
    assert (both.cut, both.left) == (8, 0) and both.model[2].conv2.out_channels == both.model[0].out_channels == 4
    torch.testing.assert_close(both.model(x), before)


def test_norms_over_channels_and_grouped_convolutions_keep_their_zeros():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(),
                          nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(288, 2)).eval()
    x = torch.randn(2, 3, 8, 8)
    pruner = struck(model, "0", "3")
    before = model(x)
    made = pruner.finish(compact=True)
    assert (made.cut, made.left) == (0, 8)
    torch.testing.assert_close(made.model(x), before)


def test_a_cut_that_only_the_networks_own_numbers_tell_is_left():
    class Loud(nn.Module):
        def forward(self, x):  # 0 becomes 0.7, which is nothing beside invented numbers, and half of what there is here
            return nn.functional.normalize(nn.functional.softplus(99 * x), dim=1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Loud(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(512, 2)).eval()
    with torch.no_grad():
        model[0].weight *= 1e-3
        model[0].bias *= 1e-3
    pruner, x = struck(model, "0"), torch.randn(2, 3, 8, 8)
    before = model(x)
    made = pruner.finish(compact=True)
    assert made.left == 4
    torch.testing.assert_close(made.model(x), before)


class Responses(nn.Module):
    """Global response normalisation, which begins as the identity."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(8, 1, 1))

    def forward(self, x):
        strength = x.square().mean((2, 3), keepdim=True)
        return x + self.gamma * x * strength / (strength.mean(1, keepdim=True) + 1e-6)


def test_a_cut_that_a_zero_hides_for_now_is_left():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Responses(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(512, 2)).eval()
    made, x = struck(model, "0").finish(compact=True), torch.randn(2, 3, 8, 8)
    for network in (model, made.model):
        nn.init.ones_(network[1].gamma)
    torch.testing.assert_close(made.model(x), model(x))


def test_what_a_layer_of_training_alone_reads_is_not_cut():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.aux, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x):
            x = self.conv(x).relu().mean((2, 3))
            return (self.fc(x), self.aux(x)) if self.training else self.fc(x)

    model = Auxiliary()
    made, x = struck(model, "conv").finish(compact=True), torch.randn(2, 3, 8, 8)
    assert (made.cut, made.left) == (0, 4)
    torch.testing.assert_close(made.model.train()(x), model.train()(x))


def test_one_channel_stays_where_all_are_removed():
    model = shaken(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.Flatten(), nn.Linear(384, 2)))
    pruner, x = struck(model, "0", fraction=1.0), torch.randn(2, 3, 8, 8)
    before = model(x)
    made = pruner.finish(compact=True)
    assert (made.cut, made.left) == (3, 1)
    torch.testing.assert_close(made.model(x), before)


def test_hooks_modes_and_frozen_parameters_of_the_owner_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2)).train()
    model[3].requires_grad_(False)
    model[1].eval()
    seen = []
    model[1].register_forward_hook(lambda _module, _inputs, y: seen.append(y.shape[1]))
    made = struck(model, "0").finish(compact=True)
    seen.clear()
    made.model(torch.randn(2, 3, 8, 8))
    assert seen == [2], "the owner's hook goes along, and sees what is left"
    assert [m.training for m in made.model.modules()] == [True, True, False, True, True]
    assert [p.requires_grad for p in made.model.parameters()] == [True, True, False, False]
    assert all(p.grad is None for p in made.model.parameters())


def test_both_networks_are_saved_loaded_and_exported(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    def build():
        return shaken(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), BasicBlock(8, 8, 1), nn.Flatten(), nn.Linear(288, 2)))

    model, fresh, x = build(), build(), torch.randn(2, 3, 8, 8)
    made = struck(model, "2.conv1").finish(compact=True)
    fresh.load_state_dict(model.state_dict())
    file = io.BytesIO()
    torch.save(made.model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    for net, copy in ((model, fresh), (made.model, again)):
        assert torch.equal(net(x), copy(x))
        torch.onnx.export(copy, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
        import onnx
        from onnx.reference import ReferenceEvaluator
        stored = onnx.load(tmp_path / "net.onnx")
        onnx.checker.check_model(stored)
        weights = sum(torch.Size(tensor.dims).numel() for tensor in stored.graph.initializer)
        assert abs(weights - sum(p.numel() for p in net.parameters())) < 100  # norms are folded in
        given, = ReferenceEvaluator(stored).run(None, {stored.graph.input[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(given), net(x), rtol=1e-3, atol=1e-4)


def test_without_torch_pruning_one_sentence_says_what_to_install_and_nothing_changes(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2)).eval()
    pruner, real = struck(model, "0"), builtins.__import__
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def missing(name, *rest):
        if name == "torch_pruning":
            raise ImportError(name)
        return real(name, *rest)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"pip install -e '\.\[compact\]'"):
        pruner.finish(compact=True)
    assert state.keys() == model.state_dict().keys() and all(torch.equal(state[k], v) for k, v in model.state_dict().items())
