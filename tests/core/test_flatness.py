import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from gstlib import Pruner, Schedule, flatness, models
from gstlib.errors import InputError


def network(dtype=torch.float64, norm=True):
    """Convolution, batch normalisation with running statistics of its own, pooling, linear layer: 156 parameters."""
    torch.manual_seed(1)
    first = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)] if norm else [nn.Conv2d(1, 4, 3, padding=1)]
    model = nn.Sequential(*first, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))
    if norm:
        nn.init.uniform_(model[1].running_mean, -0.3, 0.3)
        for tensor in (model[1].running_var, model[1].weight):
            nn.init.uniform_(tensor, 0.5, 2)
    return model.to(dtype)


def sample(dtype=torch.float64, n=12):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, 1, 6, 6, generator=generator).to(dtype), torch.randint(0, 3, (n,), generator=generator)


def loss_of(model, x, y):
    """The mean loss as a function of one vector of all parameters, computed layer by layer without the network."""
    def loss(vector):
        parts = vector.split([p.numel() for p in model.parameters()])
        conv, bias, scale, shift, weight, offset = (v.view_as(p) for v, p in zip(parts, model.parameters()))
        z = nn.functional.conv2d(x, conv, bias, padding=1)
        mean, var = (s.view(1, -1, 1, 1) for s in (model[1].running_mean, model[1].running_var))
        z = (z - mean) / (var + model[1].eps).sqrt() * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        logits = nn.functional.max_pool2d(z.clamp(min=0), 2).flatten(1) @ weight.t() + offset
        return -logits.log_softmax(1)[torch.arange(len(y)), y].mean()
    return loss


def vector_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def dense(model, x, y):
    return torch.autograd.functional.hessian(loss_of(model, x, y), vector_of(model), vectorize=True).numpy()


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_products_and_leading_eigenvalues_are_those_of_the_dense_hessian(dtype, within):
    model, (x, y) = network(dtype), sample(dtype)
    exact = dense(network(), *sample())
    operator = flatness.hessian(model, x, y)
    assert operator.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    np.testing.assert_allclose(operator.matmat(np.eye(len(exact))), exact, atol=within * np.abs(exact).max())
    values, vectors = flatness.leading(operator, 6)
    expected, directions = np.linalg.eigh(exact)
    np.testing.assert_allclose(values, expected[::-1][:6], rtol=1e-4)
    np.testing.assert_allclose(np.abs((vectors * directions.T[::-1][:6]).sum(1)), 1, atol=1e-3)
    assert list(values) == sorted(values, reverse=True) and vectors.shape == (6, len(exact))


def test_products_are_those_of_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    model, (x, y) = network().eval(), sample()
    theirs = curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)])
    v = np.random.default_rng(0).standard_normal(theirs.shape[0])
    np.testing.assert_allclose(flatness.hessian(model, x, y) @ v, theirs.to_scipy() @ v, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradients_are_those_of_one_image_after_another(dtype, within):
    model, (x, y) = network(dtype), sample(dtype)
    norms, mean = flatness.gradients(model, x, y, chunk=5)
    each = []
    for i in range(len(y)):
        model.eval().zero_grad()
        nn.functional.cross_entropy(model(x[i:i + 1]), y[i:i + 1]).backward()
        each.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    each = torch.stack(each)
    torch.testing.assert_close(norms, each.square().sum(1), rtol=within, atol=0)
    torch.testing.assert_close(mean, each.mean(0), rtol=within, atol=within)
    centred = np.trace(np.cov(each.double().numpy().T, bias=True))
    assert float(norms.mean() - mean.square().sum()) == pytest.approx(centred, rel=10 * within)


def test_curvatures_of_single_images_say_how_sure_the_sum_of_eigenvalues_is():
    model, (x, y) = network(), sample(n=40)
    values, vectors = flatness.leading(flatness.hessian(model, x, y), 3)
    each = flatness.curvatures(model, x, y, vectors)
    assert float(each.mean()) == pytest.approx(values.sum(), rel=1e-6)
    # against the jackknife, which leaves out one image after the other and computes the eigenvalues anew
    single = np.array([dense(model, x[i:i + 1], y[i:i + 1]) for i in range(40)])
    assert float(each[3]) == pytest.approx(np.einsum("ki,ij,kj", vectors, single[3], vectors), rel=1e-9)
    left = [np.linalg.eigvalsh((single.sum(0) - one) / 39)[-3:].sum() for one in single]
    jackknife = (39 / 40 * np.square(left - np.mean(left)).sum()) ** 0.5
    assert float(each.std()) / 40**0.5 == pytest.approx(jackknife, rel=0.15)


def test_the_loss_along_an_eigenvector_is_that_of_a_network_moved_there_and_bends_as_the_eigenvalue_says():
    model, (x, y) = network(), sample()
    (value,), (vector,) = flatness.leading(flatness.hessian(model, x, y), 1)
    found = flatness.along(model, x, y, vector, [-0.4, 0.0, 0.3])
    for step, (loss, accuracy) in zip([-0.4, 0.0, 0.3], found):
        moved = copy.deepcopy(model).eval()
        nn.utils.vector_to_parameters(vector_of(model) + step * torch.from_numpy(vector), moved.parameters())
        logits = moved(x).detach()
        assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-12)
        assert accuracy == float((logits.argmax(1) == y).double().mean())
    (below, _), (here, _), (above, _) = flatness.along(model, x, y, vector, [-1e-4, 0.0, 1e-4])
    assert (below + above - 2 * here) / 1e-8 == pytest.approx(value, rel=1e-4)


def test_nothing_changes_the_network():
    model, (x, y) = network(), sample()
    model.train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    values, vectors = flatness.leading(flatness.hessian(model, x, y), 1)
    flatness.gradients(model, x, y)
    flatness.curvatures(model, x, y, vectors)
    flatness.along(model, x, y, vectors[0], [0.4])
    flatness.relative(model, x, y, 0.1, 2)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training and model[0].training and not model[1].training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_relative_moves_know_no_scale_of_a_layer_while_the_hessian_does():
    (x, y), model = sample(), network(norm=False)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for p in scaled[0].parameters():
            p *= 10
        scaled[4].weight /= 10
    torch.testing.assert_close(scaled(x), model(x))
    one, other = (flatness.relative(m, x, y, 0.2, 5) for m in (model, scaled))
    assert one == pytest.approx(other, rel=1e-9) and len(set(one)) == 5
    (sharp,), (flat,) = (flatness.leading(flatness.hessian(m, x, y), 1)[0] for m in (model, scaled))
    assert abs(np.log10(sharp / flat)) > 0.5


def test_relative_moves_are_as_long_as_asked_in_every_filter_and_the_same_every_time(monkeypatch):
    model, (x, y) = network(), sample()
    seen, losses = [], flatness._losses
    monkeypatch.setattr(flatness, "_losses", lambda m, p, *a: seen.append(dict(p)) or losses(m, p, *a))
    once = flatness.relative(model, x, y, 0.25, 3)
    moved = seen[1:]  # the first was for the slope
    assert once == flatness.relative(model, x, y, 0.25, 3) and len(moved) == 3
    assert not torch.equal(moved[0]["0.weight"], moved[1]["0.weight"])
    for name, p in model.named_parameters():
        for parameters in moved:
            if p.dim() > 1:
                way = (parameters[name] - p).flatten(1).norm(dim=1)
                torch.testing.assert_close(way, 0.25 * p.detach().flatten(1).norm(dim=1))
            else:
                assert torch.equal(parameters[name], p)


@pytest.mark.parametrize(("structure", "score"), [("filter", "l2"), ("weight", "magnitude")])
def test_what_is_removed_does_not_move_and_does_not_count(structure, score):
    model, (x, y) = network(torch.float32), sample(torch.float32)
    pruner = Pruner(model, Schedule(0, 0, 0.5, 1), ["0"], score=score, structure=structure)
    pruner.epoch(0, lambda: 0.5)
    (weights,) = [p for p in model.parameters() if p.dim() == 4]
    keep = pruner.layers[0].present
    gone = (~keep).view(-1, 1, 1, 1).expand_as(weights) if structure == "filter" else ~keep
    assert gone.sum() == gone.numel() // 2

    def measured():
        values, vectors = flatness.leading(flatness.hessian(model, x, y), 4)
        norms, mean = flatness.gradients(model, x, y)
        return values, vectors, norms.tolist(), mean, flatness.relative(model, x, y, 0.3, 3)

    values, vectors, norms, mean, losses = measured()
    first = next(i for i, p in enumerate(model.parameters()) if p is weights)
    start = sum(p.numel() for p in list(model.parameters())[:first])
    for vector in (*vectors, mean.numpy()):
        assert (vector[start:start + weights.numel()][gone.flatten().numpy()] == 0).all()
    assert np.abs(vectors[0]).max() > 0.05
    with torch.no_grad():  # whatever lies where something was removed
        weights[gone] = 1e4
    again = measured()
    assert again[2] == norms and again[4] == losses
    np.testing.assert_array_equal(again[0], values)


def test_a_hessian_of_low_rank_has_no_other_eigenvalues_than_zero():
    model, x = nn.Linear(4, 2).double(), torch.randn(1, 4).double()
    values, vectors = flatness.leading(flatness.hessian(model, x, torch.tensor([1])), 3)
    assert values[0] > 0.1 and values[1:] == pytest.approx([0, 0], abs=1e-9) and np.isfinite(vectors).all()


def test_images_that_a_norm_mixes_have_no_gradients_of_their_own():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 2))
    with pytest.raises(InputError, match="'1' normalises by the batch"):
        flatness.gradients(model, torch.randn(6, 4), torch.arange(6) % 2)


@pytest.mark.parametrize("scale", [math.nan, 1e30])
def test_a_loss_without_curvature_is_refused(scale):
    model, x = nn.Linear(4, 2), torch.ones(3, 4)
    with torch.no_grad():
        model.weight.copy_(scale * torch.tensor([[1.0] * 4, [-1.0] * 4]))
    with pytest.raises(InputError, match="no finite curvature"):
        flatness.leading(flatness.hessian(model, x, torch.zeros(3).long()), 1)
    with pytest.raises(InputError, match="bfloat16 a curvature is rounding"):
        flatness.hessian(model.bfloat16(), x.bfloat16(), torch.zeros(3).long())


def test_small_maps_on_a_cpu_have_a_second_derivative():
    """The network's own convolution has none in training, where it is a product of matrices."""
    torch.manual_seed(3)
    model = models.build("vgg11", 10, 1 / 16).double().eval()
    x, y = torch.randn(6, 3, 32, 32).double(), torch.arange(6)
    v = torch.from_numpy(np.random.default_rng(1).standard_normal(len(vector_of(model))))
    v /= v.norm()

    def gradient(step):
        moved = copy.deepcopy(model)
        nn.utils.vector_to_parameters(vector_of(model) + step * v, moved.parameters())
        nn.functional.cross_entropy(moved(x), y).backward()
        return torch.cat([p.grad.flatten() for p in moved.parameters()])

    expected = (gradient(1e-6) - gradient(-1e-6)) / 2e-6
    found = torch.from_numpy(flatness.hessian(model, x, y) @ v.numpy())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    norms, mean = flatness.gradients(model, x, y, chunk=4)
    torch.testing.assert_close(mean, gradient(0.0), rtol=1e-9, atol=1e-12)
    assert float(flatness.curvatures(model, x, y, v[None].numpy()).mean()) == pytest.approx(float(v @ expected), rel=1e-4)
