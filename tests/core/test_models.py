import pytest
import torch
from torch import nn

from gstlib import models
from gstlib.errors import InputError
from gstlib.network.surroundings import Surroundings
from gstlib.spec import MODELS


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "parameters"), [
    ("conv4", 1_250_858), ("vgg11", 9_231_114), ("resnet18", 11_173_962), ("vgg19", 20_040_522),
    ("resnet20", 269_722), ("resnet56", 853_018),
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


@pytest.mark.parametrize(("name", "depth"), [("resnet20", 20), ("resnet56", 56)])
def test_narrow_resnets_have_three_stages_and_shortcuts_without_parameters(name, depth):
    model = models.build(name)
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) == depth
    shapes = []
    for stage in (model.stage1, model.stage2, model.stage3, model.pool):
        stage.register_forward_hook(lambda _m, _x, y: shapes.append(tuple(y.shape[1:])))
    model(torch.randn(1, 3, 32, 32))
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8), (64, 1, 1)]
    assert not [parameter for name, parameter in model.named_parameters() if "shortcut" in name]


@pytest.mark.parametrize(("channels", "out"), [(16, 32), (3, 6), (2, 7)])
def test_option_a_keeps_every_other_pixel_and_adds_channels_of_zeros(channels, out):
    x = torch.randn(2, channels, 6, 6)
    y = models.Padding(channels, out, 2)(x)
    left = (out - channels) // 2
    assert y.shape == (2, out, 3, 3) and torch.equal(y[:, left:left + channels], x[:, :, [0, 2, 4]][..., [0, 2, 4]])
    assert y.abs().sum() == pytest.approx(float(y[:, left:left + channels].abs().sum()))


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


@pytest.mark.parametrize("name", ["conv4", "resnet18", "resnet20"])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_before_relu_changes_no_bit_also_where_pixels_tie(dtype, layout):
    for x in (torch.randint(-3, 3, (4, 8, 6, 6)), torch.randn(4, 8, 6, 6)):
        x, slope, found = x.to(dtype).contiguous(memory_format=layout), torch.randn(4, 8, 3, 3, dtype=dtype), []
        for order in ([nn.ReLU(), nn.MaxPool2d(2)], [nn.MaxPool2d(2), nn.ReLU()]):
            pixels = x.clone().requires_grad_()
            y = nn.Sequential(*order)(pixels)
            y.backward(slope)
            found.append((y.detach(), pixels.grad))
        assert all(torch.equal(one, other) for one, other in zip(*found))


def test_maps_are_pooled_before_relu_and_names_stay():
    names = [name for name, _ in models.build("vgg11", width=1 / 16).named_children()]
    assert names[:8] == ["conv1", "bn1", "pool1", "relu1", "conv2", "bn2", "pool2", "relu2"]
    assert names[8:11] == ["conv3", "bn3", "relu3"]
    assert list(models.build("conv4", width=1 / 16)._modules)[2:5] == ["conv2", "pool1", "relu2"]
