import pytest
import torch
from torch import nn

from gstlib import convolution
from gstlib.convolution import Conv2d, Linear, MaxPool2d


def pair(channels=5, out=4, bias=True, **settings) -> tuple[nn.Module, nn.Module]:
    ours = Conv2d(channels, out, settings.pop("kernel_size", 3), **{"padding": 1, **settings}, bias=bias).double()
    theirs = nn.Conv2d(channels, out, ours.kernel_size, **{"padding": 1, **settings}, bias=bias).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def passes(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor | None = None):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape))
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


def is_product(y: torch.Tensor) -> bool:
    return "SmallMap" in type(y.grad_fn).__name__


SMALL = [(1, 1), (2, 2), (3, 3), (4, 4), (1, 4), (4, 1), (2, 3), (3, 2), (2, 8), (16, 1), (1, 16), (5, 3)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SMALL)
def test_output_and_gradients_are_torch_s(shape, bias):
    ours, theirs = pair(bias=bias)
    x = torch.randn(3, 5, *shape, dtype=torch.float64)
    assert is_product(ours(x))
    for found, expected in zip(passes(ours, x), passes(theirs, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("channels", "out", "batch"), [(1, 1, 1), (1, 7, 2), (6, 1, 1), (16, 9, 5)])
def test_any_number_of_channels(channels, out, batch):
    ours, theirs = pair(channels, out)
    x = torch.randn(batch, channels, 3, 4, dtype=torch.float64)
    for found, expected in zip(passes(ours, x), passes(theirs, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_any_memory_format():
    ours, theirs = pair()
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    crossed = torch.randn(3, 4, 5, 4, dtype=torch.float64).transpose(1, 2)
    for given in (x, crossed):
        for found, expected in zip(passes(ours, given), passes(theirs, given), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradients_agree_with_finite_differences():
    ours, _ = pair(2, 3)
    x = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w, b: torch.func.functional_call(ours, {"weight": w, "bias": b}, x),
                                    (x, ours.weight, ours.bias))


def test_second_derivatives_are_torch_s_or_are_refused():
    def curvature(convolution):
        x = torch.randn(2, 2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        loss = (convolution(x) ** 3).sum()
        slopes = torch.autograd.grad(loss, [x, convolution.weight], create_graph=True)
        return torch.autograd.grad(sum((s**2).sum() for s in slopes), [x, convolution.weight])

    ours, theirs = pair(2, 3)
    expected = curvature(theirs)
    try:
        found = curvature(ours)
    except RuntimeError:
        return
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("settings", [
    {"stride": 2}, {"padding": 0}, {"padding": 2}, {"dilation": 2, "padding": 2}, {"kernel_size": 1, "padding": 0},
    {"kernel_size": 5, "padding": 2}, {"padding": "same"}, {"padding_mode": "circular"}, {"stride": (1, 2)},
])
def test_other_convolutions_are_torch_s(settings):
    ours, theirs = pair(4, 4, **settings)
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    assert not is_product(ours(x))
    for found, expected in zip(passes(ours, x), passes(theirs, x), strict=True):
        assert torch.equal(found, expected)


def test_grouped_convolutions_are_torch_s():
    ours, theirs = pair(4, 4, groups=4)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    assert not is_product(ours(x)) and torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(("shape", "product"), [((4, 4), True), ((4, 5), False), ((17, 1), False), ((8, 8), False)])
def test_only_small_maps_are_unfolded(shape, product):
    ours, theirs = pair()
    x = torch.randn(2, 5, *shape, dtype=torch.float64)
    assert is_product(ours(x)) == product
    torch.testing.assert_close(ours(x), theirs(x))


def test_without_gradients_it_is_torch_s():
    ours, theirs = pair()
    x = torch.randn(2, 5, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    with torch.inference_mode():
        assert torch.equal(ours(x), theirs(x))


def test_an_image_without_a_batch_works_as_in_torch():
    ours, theirs = pair()
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("bias", [True, False])
def test_autocast_computes_in_bfloat16(bias, monkeypatch):
    monkeypatch.setattr(convolution, "has_bf16", lambda: True)
    ours, theirs = (layer.float() for layer in pair(bias=bias))
    x = torch.randn(3, 5, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = ours(x), theirs(x)
        assert is_product(found) and found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    found.float().sum().backward()
    assert ours.weight.grad.dtype == torch.float32
    expected.float().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("ours, theirs, shape", [
    (Conv2d(5, 4, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1), (3, 5, 8, 8)),
    (Conv2d(5, 4, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1), (3, 5, 2, 2)),
    (Linear(6, 4), nn.Linear(6, 4), (3, 6))], ids=["large map", "small map", "linear"])
@pytest.mark.parametrize("has", [True, False])
def test_bf16_is_rounded_as_torch_rounds_it_also_without_instructions_for_it(ours, theirs, shape, has, monkeypatch):
    monkeypatch.setattr(convolution, "has_bf16", lambda: has)
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict())
    x, results = torch.randn(shape), []
    for layer in (ours, theirs):
        layer.zero_grad()
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(given)
        assert y.dtype == torch.bfloat16
        y.square().sum().backward()
        results.append([y, given.grad, layer.weight.grad, layer.bias.grad])
    for found, expected in zip(*results, strict=True):  # a unit in the last of bf16's eight binary places, and what follows
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0.03)
        assert torch.equal(found, found.bfloat16().to(found.dtype))


def test_in_another_precision_nothing_is_rounded(monkeypatch):
    monkeypatch.setattr(convolution, "has_bf16", lambda: False)
    layer, x = Linear(6, 4), torch.randn(3, 6)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), plain)
    with torch.autocast("cpu", dtype=torch.float16):
        assert layer(x).dtype == torch.float16


@pytest.mark.parametrize("shape", [(3, 5, 8, 8), (2, 4, 2, 2), (2, 3, 7, 8), (1, 1, 6, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_is_torch_s_to_the_last_bit_and_in_its_layout(shape, dtype, layout):
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    x[0, 0, 0, 0], x[-1, -1, -1, -1] = float("nan"), float("inf")
    for arguments in ((2,), (2, 1), (3, 2, 1)):
        expected = nn.MaxPool2d(*arguments)(x)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                y = MaxPool2d(*arguments)(x)
            assert torch.equal(y.nan_to_num(9), expected.nan_to_num(9)) and y.stride() == expected.stride()
