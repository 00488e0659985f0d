import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from gstlib.errors import InputError
from gstlib.scores import ebn, ebn_signed, l1, l2, magnitude


def exact_ebn(gamma: float, beta: float) -> mpmath.mpf:
    with mpmath.workdps(80):
        g, b = abs(mpmath.mpf(gamma)), mpmath.mpf(beta)
        if g == 0:
            return max(b, mpmath.mpf(0))
        return g * mpmath.npdf(b / g) + b * mpmath.ncdf(b / g)


def relative_errors(gamma, beta):
    found = ebn(gamma, beta)
    exact = [exact_ebn(g, b) for g, b in zip(gamma.tolist(), beta.tolist())]
    return [float(abs(mpmath.mpf(f) - e) / e) for f, e in zip(found.tolist(), exact)]


@pytest.mark.parametrize("z", [-3.0, -1.5, -0.5, 0.0, 0.5, 1.5, 3.0])
@pytest.mark.parametrize("gamma", [0.3, 1.0, -2.0])
def test_ebn_is_the_appendix_truncated_normal_form(gamma, z):
    g, beta = abs(gamma), z * abs(gamma)
    truncated_mean = stats.truncnorm.mean(-beta / g, np.inf, loc=beta, scale=g)
    expected = (1 - stats.norm.cdf(-beta / g)) * truncated_mean
    found = ebn(torch.tensor([gamma], dtype=torch.float64), torch.tensor([beta], dtype=torch.float64))
    assert float(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("gamma", "beta"), [
    (1.0, 0.0), (0.5, 0.7), (2.0, -1.0), (-1.5, 0.4), (-0.2, -0.3), (0.0, 0.6),
])
def test_ebn_is_the_mean_of_simulated_activations(gamma, beta):
    n = 400_000
    activations = np.maximum(gamma * np.random.default_rng(1).standard_normal(n) + beta, 0)
    found = float(ebn(torch.tensor([gamma]), torch.tensor([beta])))
    assert abs(found - activations.mean()) < 5 * activations.std() / np.sqrt(n) + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, -0.37, 1e-4, 250.0])
def test_ebn_is_accurate_far_into_the_tail(scale, dtype):
    z = torch.linspace(-30, 30, 61, dtype=torch.float64)
    gamma = torch.full_like(z, scale).to(dtype)
    beta = (z * abs(scale)).to(dtype)
    assert max(relative_errors(gamma, beta)) < 1e-9


@pytest.mark.parametrize("z", [-36.0, -30.0, -20.0, -12.5, -6.0, -1e-9, 1e-9, 6.0, 39.0, 41.0, 1e6])
def test_ebn_is_accurate_at_single_points(z):
    gamma = torch.tensor([0.7], dtype=torch.float64)
    assert relative_errors(gamma, gamma * z)[0] < 1e-9


def test_ebn_of_random_parameters():
    generator = torch.Generator().manual_seed(2)
    gamma = torch.randn(300, generator=generator)
    beta = torch.randn(300, generator=generator) * 3
    kept = (beta / gamma).abs() < 30
    assert kept.sum() > 250 and (gamma[kept] < 0).any()
    assert max(relative_errors(gamma[kept], beta[kept])) < 1e-9


def test_ebn_without_scale_is_the_rectified_shift():
    beta = torch.tensor([-2.0, 0.0, 0.25, 3.0])
    assert ebn(torch.zeros(4), beta).tolist() == [0.0, 0.0, 0.25, 3.0]


def test_ebn_ignores_the_sign_of_the_scale():
    gamma, beta = torch.rand(50), torch.randn(50)
    assert torch.equal(ebn(gamma, beta), ebn(-gamma, beta))


@pytest.mark.parametrize("gamma", [0.0, 1e-300, 1e-40, 1e-8, 1.0, 1e30])
@pytest.mark.parametrize("beta", [-1e30, -1e5, -40.0, -38.5, -1.0, 0.0, 1e-30, 1.0, 1e30])
def test_ebn_is_never_negative_and_never_nan(gamma, beta):
    found = ebn(torch.tensor([gamma, -gamma], dtype=torch.float64), torch.tensor([beta, beta], dtype=torch.float64))
    assert torch.isfinite(found).all() and (found >= max(beta, 0.0)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ebn_orders_nearly_dead_units_strictly(dtype):
    beta = torch.linspace(-36, -8, 2000, dtype=dtype)
    found = ebn(torch.ones_like(beta), beta)
    assert (found > 0).all() and (found.diff() > 0).all()


def test_ebn_orders_dead_units_of_one_shift_by_scale():
    gamma = torch.linspace(0.03, 0.1, 500, dtype=torch.float64)
    assert (ebn(gamma, torch.full_like(gamma, -1.0)).diff() > 0).all()


@pytest.mark.parametrize(("gamma", "beta"), [
    (torch.ones(3), torch.ones(4)),
    (torch.ones(1), torch.ones(4)),
    (torch.tensor(1.0), torch.tensor(1.0)),
    (torch.ones(2, 2), torch.ones(2, 2)),
])
def test_ebn_refuses_shapes(gamma, beta):
    with pytest.raises(InputError, match="one entry a unit"):
        ebn(gamma, beta)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_ebn_refuses_what_is_not_finite(bad):
    broken, fine = torch.tensor([1.0, bad]), torch.ones(2)
    for gamma, beta in ((broken, fine), (fine, broken)):
        with pytest.raises(InputError, match="finite"):
            ebn(gamma, beta)


@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3, 3), (1, 7)])
def test_norms_are_those_of_each_filter(shape):
    weight = torch.randn(shape, requires_grad=True)
    rows = weight.detach().numpy().astype(np.float64).reshape(shape[0], -1)
    np.testing.assert_allclose(l1(weight).numpy(), np.abs(rows).sum(1), rtol=1e-12)
    np.testing.assert_allclose(l2(weight).numpy(), np.sqrt((rows**2).sum(1)), rtol=1e-12)


def test_norms_of_known_filters():
    weight = torch.tensor([[3.0, -4.0], [0.0, 0.0], [-1.0, 0.0]])
    assert l1(weight).tolist() == [7.0, 0.0, 1.0]
    assert l2(weight).tolist() == [5.0, 0.0, 1.0]


def test_magnitude_keeps_the_shape():
    weight = torch.tensor([[[1.5, -2.0]], [[0.0, -0.25]]])
    assert magnitude(weight).tolist() == [[[1.5, 2.0]], [[0.0, 0.25]]]


def test_scores_are_float64_and_carry_no_gradient():
    weight = torch.randn(3, 4, requires_grad=True)
    for found in (l1(weight), l2(weight), magnitude(weight), ebn(weight[:, 0], weight[:, 1])):
        assert found.dtype == torch.float64 and not found.requires_grad


def test_norms_do_not_overflow_float32():
    weight = torch.full((2, 1000), 1e37)
    assert l1(weight).tolist() == pytest.approx([1e40] * 2, rel=1e-6)
    assert l2(weight).tolist() == pytest.approx([1e37 * 1000**0.5] * 2, rel=1e-6)


def test_signed_ebn_is_the_formula_with_gamma_s_sign():
    gamma, beta = torch.tensor([1.5, -1.5, 0.3, -0.3, 2.0]), torch.tensor([0.4, 0.4, -1.0, -1.0, 0.0])
    z = (beta.double() / gamma.double()).numpy()
    expected = gamma.double().numpy() * stats.norm.pdf(z) + beta.double().numpy() * stats.norm.cdf(z)
    assert ebn_signed(gamma, beta).numpy() == pytest.approx(expected, abs=1e-12)


def test_signed_ebn_is_ebn_for_scales_that_are_not_negative():
    gamma, beta = torch.rand(50), torch.randn(50)
    gamma[:5] = 0
    assert torch.equal(ebn_signed(gamma, beta), ebn(gamma, beta)) and (ebn_signed(-gamma[5:], beta[5:]) <= 0).all()
