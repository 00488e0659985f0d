import pytest
import torch
from torch import nn

from gstlib import models
from gstlib.errors import InputError
from gstlib.spec import MODELS
from gstlib.surroundings import Surroundings


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "parameters"), [
    ("conv4", 1_250_858), ("vgg11", 9_231_114), ("resnet18", 11_173_962), ("vgg19", 20_040_522),
])
def test_published_parameter_counts(name, parameters):
    assert count(models.build(name)) == parameters


@pytest.mark.parametrize(("name", "layers", "percent"), [
    ("conv4", ["fc1"], 94.3),
    ("vgg11", ["conv5", "conv6", "conv7", "conv8"], 89.5),
    ("resnet18", ["stage4.0.conv1", "stage4.0.conv2", "stage4.1.conv1", "stage4.1.conv2"], 74.0),
])
def test_share_of_the_pruned_layers(name, layers, percent):
    model = models.build(name)
    inside = sum(count(model.get_submodule(layer)) for layer in layers)
    assert 100 * inside / count(model) == pytest.approx(percent, abs=0.15)


def test_every_model_of_the_specification_can_be_built():
    for name in MODELS:
        assert models.build(name, width=1 / 16)(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("classes", [2, 37])
def test_number_of_classes(name, classes):
    model = models.build(name, num_classes=classes, width=1 / 16)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, classes)
    *_, last = model.modules()
    assert last.out_features == classes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("width", [1 / 2, 1 / 8])
def test_width_scales_every_layer_but_the_last(name, width):
    full, scaled = models.build(name), models.build(name, width=width)
    for layer in Surroundings(full).layers[:-1]:
        assert scaled.get_submodule(layer).weight.shape[0] == full.get_submodule(layer).weight.shape[0] * width
    assert scaled(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_width_never_leaves_a_layer_empty():
    model = models.build("vgg11", width=0.001)
    assert model.conv1.out_channels == 1 and model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_layout_of_conv4():
    model = models.build("conv4").eval()
    shapes = []
    for layer in (model.conv1, model.conv2, model.conv3, model.conv4, model.fc1):
        layer.register_forward_hook(lambda _m, _x, y: shapes.append(tuple(y.shape[1:])))
    model(torch.randn(1, 3, 32, 32))
    assert shapes == [(32, 32, 32), (32, 30, 30), (64, 15, 15), (64, 13, 13), (512,)]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_resnet18_projects_where_shapes_change():
    model = models.build("resnet18", width=1 / 8)
    projected = [f"stage{s}.{b}" for s in range(1, 5) for b in range(2)
                 if not isinstance(model.get_submodule(f"stage{s}.{b}.shortcut"), nn.Identity)]
    assert projected == ["stage2.0", "stage3.0", "stage4.0"]


@pytest.mark.parametrize("name", ["vgg11", "vgg19"])
def test_vggs_are_initialised_as_published(name):
    """He-normal with fan-out for convolutions, N(0, .01) for the linear layer, no bias anywhere, plain normalisation."""
    model = models.build(name, width=1 / 2)
    for module in model:
        if isinstance(module, nn.Conv2d):
            expected = (2 / (9 * module.out_channels)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=5 / (2 * module.weight.numel()) ** 0.5)
            assert module.bias.abs().max() == 0
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.min() == module.weight.max() == 1 and module.bias.abs().max() == 0
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.08) and model.fc.bias.abs().max() == 0
    assert float(model.conv8.weight.std() / nn.Conv2d(*model.conv8.weight.shape[1::-1], 3).weight.std()) == pytest.approx(2.45, rel=0.02)


@pytest.mark.parametrize("name", ["conv4", "resnet18"])
def test_other_networks_are_initialised_as_torch_does(name):
    for module in models.build(name, width=1 / 2).modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            assert module.weight.abs().max() <= fan_in**-0.5
            assert module.weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_initialisation_follows_torch_s_generator(name):
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(torch.cat([p.flatten() for p in models.build(name, width=1 / 16).parameters()]))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("arguments", [
    {"name": "vgg12"}, {"name": "vgg11", "num_classes": 1}, {"name": "vgg11", "width": 0.0},
    {"name": "vgg11", "width": -1.0}, {"name": "vgg11", "width": float("nan")},
])
def test_build_refuses(arguments):
    with pytest.raises(InputError):
        models.build(**arguments)
