"""The paper's networks (section 3.2; ResNet20 and 56: final version), each with a width factor and any number of classes.

Inputs are (batch, 3, 32, 32).  VGGs are initialised as the authors' code
does, the others by torch's default.  Maps are pooled before ReLU, which gives
the same values and gradients to the last bit and reads and writes a quarter.
"""

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import nn

from gstlib.convolution import Conv2d, Linear, MaxPool2d
from gstlib.errors import InputError, check_choice

VGG_LAYOUT = {
    "vgg11": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "vgg19": (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4, "M"),
    "conv6-gn": (64, "M", 128, "M", 256, "M", 256, "M", 512, 512, "M"),  # ours, with group normalisation
}


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def conv4(num_classes: int, width: float) -> nn.Module:
    """Conv4: four convolutions in two pairs and two linear layers, no batch normalisation."""
    c1, c2, hidden = (_scaled(c, width) for c in (32, 64, 512))
    return nn.Sequential(OrderedDict(
        conv1=Conv2d(3, c1, 3, padding=1), relu1=nn.ReLU(inplace=True),
        conv2=Conv2d(c1, c1, 3), pool1=MaxPool2d(2), relu2=nn.ReLU(inplace=True),
        conv3=Conv2d(c1, c2, 3, padding=1), relu3=nn.ReLU(inplace=True),
        conv4=Conv2d(c2, c2, 3), pool2=MaxPool2d(2), relu4=nn.ReLU(inplace=True),
        flatten=nn.Flatten(), fc1=Linear(c2 * 36, hidden), relu5=nn.ReLU(inplace=True),
        fc2=Linear(hidden, num_classes),
    ))


def vgg(name: str, num_classes: int, width: float) -> nn.Module:
    """VGG with batch normalisation and a single linear layer; convolutions keep their biases.

    A name that ends in "-gn" has group normalisation in its place, of eight groups as far as the channels allow.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels, conv, pool = 3, 0, 0
    for entry in VGG_LAYOUT[name]:
        if entry == "M":
            pool += 1
            layers[f"pool{pool}"] = MaxPool2d(2)
            layers.move_to_end(f"relu{conv}")
            continue
        conv += 1
        out = _scaled(entry, width)
        layers[f"conv{conv}"] = Conv2d(channels, out, 3, padding=1)
        if name.endswith("-gn"):
            layers[f"gn{conv}"] = nn.GroupNorm(math.gcd(8, out), out)
        else:
            layers[f"bn{conv}"] = nn.BatchNorm2d(out)
        layers[f"relu{conv}"] = nn.ReLU(inplace=True)
        channels = out
    layers["flatten"] = nn.Flatten()
    layers["fc"] = Linear(channels, num_classes)
    # 2.45 times torch's default in the last convolutions: the same function behind batch normalisation, but not the
    # same relative step for Adam, nor the same l2 norms and noise
    for module in layers.values():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
    nn.init.normal_(layers["fc"].weight, std=0.01)
    nn.init.zeros_(layers["fc"].bias)
    return nn.Sequential(layers)


class Padding(nn.Module):
    """Shortcut without parameters (option A): every other pixel, new channels of zeros on either side of the old."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.stride, self.sides = stride, ((out - channels) // 2, (out - channels + 1) // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, *self.sides))


def projection(channels: int, out: int, stride: int) -> nn.Module:
    """Shortcut that learns (option B): a 1x1 convolution and batch normalisation."""
    return nn.Sequential(OrderedDict(conv=Conv2d(channels, out, 1, stride, bias=False), bn=nn.BatchNorm2d(out)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: the identity, or `change` where shapes change."""

    def __init__(self, channels: int, out: int, stride: int,
                 change: Callable[[int, int, int], nn.Module] = projection):
        super().__init__()
        self.conv1 = Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Identity() if (stride, channels) == (1, out) else change(channels, out, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + self.shortcut(x)
        return torch.relu(y)


def resnet(widths: Sequence[int], blocks: int, change: Callable[[int, int, int], nn.Module], num_classes: int,
           width: float) -> nn.Module:
    """A ResNet in its CIFAR form: a 3x3 stem, stages of `blocks` blocks that halve the map from the second on, pooling."""
    stages = [_scaled(c, width) for c in widths]
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=Conv2d(3, stages[0], 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(stages[0]), relu=nn.ReLU(inplace=True))
    channels = stages[0]
    for number, out in enumerate(stages, start=1):
        first = BasicBlock(channels, out, 1 if number == 1 else 2, change)
        layers[f"stage{number}"] = nn.Sequential(first, *(BasicBlock(out, out, 1, change) for _ in range(blocks - 1)))
        channels = out
    layers.update(pool=nn.AvgPool2d(64 >> len(stages)), flatten=nn.Flatten(), fc=Linear(channels, num_classes))
    return nn.Sequential(layers)


_BUILDERS = {
    "conv4": conv4,
    **{name: functools.partial(vgg, name) for name in VGG_LAYOUT},
    "resnet18": functools.partial(resnet, (64, 128, 256, 512), 2, projection),
    "resnet20": functools.partial(resnet, (16, 32, 64), 3, Padding),
    "resnet56": functools.partial(resnet, (16, 32, 64), 9, Padding),
}


def build(name: str, num_classes: int = 10, width: float = 1.0) -> nn.Module:
    """The network `name`, its weights drawn from the global generator.

    Every layer's channels are multiplied by `width` and rounded, never below
    one.  Raises `InputError` for an unknown name, fewer than two classes or a
    width that is not positive.
    """
    check_choice("model", name, _BUILDERS)
    if num_classes < 2 or not width > 0:
        raise InputError(f"a network needs at least 2 classes and a positive width, not {num_classes} and {width}")
    return _BUILDERS[name](num_classes, width)
