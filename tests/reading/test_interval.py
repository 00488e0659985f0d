"""The interval and its company against independent computation, and the rules' level and coverage by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from gstlib.reading import interval
from gstlib.reading.interval import holm, p_above, p_blocks, power, seeds_needed, slopes, smallest_effect, t_interval

VALUES = [0.3, 1.1, -0.2, 0.8, 0.5]


def test_interval_and_p_are_scipys():
    for confidence in (0.9, 0.95):
        found = t_interval(VALUES, confidence)
        theirs = stats.ttest_1samp(VALUES, 0)
        assert (found.value, found.p, found.n) == (pytest.approx(0.5), pytest.approx(theirs.pvalue), 5)
        assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval(confidence)))
    assert p_above(VALUES) == pytest.approx(stats.ttest_1samp(VALUES, 0, alternative="greater").pvalue)
    assert p_above(VALUES) + p_above([-v for v in VALUES]) == pytest.approx(1)


def test_too_few_values_have_no_bounds_and_equal_ones_are_a_point():
    assert [math.isnan(v) for v in t_interval([0.5])] == [False, True, True, False, True]
    assert math.isnan(t_interval([]).value) and t_interval([]).n == 0
    assert t_interval([0.1 + 0.2 - 0.3] * 3) == (0, 0, 0, 3, 1), "rounding is no effect"
    assert t_interval([0.4] * 3) == pytest.approx((0.4, 0.4, 0.4, 3, 0)) and p_above([-0.4] * 3) == pytest.approx(1)
    assert f"{t_interval([0.5]):.1f}" == "0.5" and f"{t_interval([0.4] * 2):.1f}" == "0.4 [0.4, 0.4]"


def test_f_test_with_blocks_by_comparing_two_regressions():
    rng = np.random.default_rng(1)
    table = rng.normal(size=(4, 3)) + 5 * rng.normal(size=(4, 1)) + [0, 1, 2]
    seeds, columns = (np.kron(np.eye(4), np.ones((3, 1))), np.tile(np.eye(3), (4, 1)))

    def residual(design):
        fitted = design @ np.linalg.lstsq(design, table.ravel(), rcond=None)[0]
        return ((table.ravel() - fitted) ** 2).sum()

    without, both = residual(seeds), residual(np.hstack([seeds, columns]))
    assert p_blocks(table) == pytest.approx(stats.f.sf((without - both) / 2 / (both / 6), 2, 6))
    pair = table[:, :2]  # with two columns it is the paired t test
    assert p_blocks(pair) == pytest.approx(stats.ttest_rel(*pair.T).pvalue)
    assert p_blocks(np.ones((3, 2))) == 1 and p_blocks([[1, 2], [3, 4]]) == 0


def test_holm_against_its_definition():
    p = np.array([0.01, 0.04, 0.03, 0.2])
    assert holm(p) == pytest.approx([0.04, 0.09, 0.09, 0.2])
    assert holm([0.6, 0.7]) == pytest.approx([1, 1]) and holm([0.02]) == pytest.approx([0.02])
    for level in (0.045, 0.095):  # sorted, each against level over the number that is left; the first failure ends it
        passed = np.cumprod(np.sort(p) <= level / np.arange(4, 0, -1)).astype(bool)
        assert (np.sort(holm(p)) <= level).tolist() == passed.tolist()


@pytest.mark.parametrize("n", [3, 5, 10])
def test_power_is_what_a_simulation_finds(n):
    effect = smallest_effect(2.0, n)
    drawn = np.random.default_rng(n).normal(effect, 2.0, (200_000, n))
    low = drawn.mean(1) - interval.half_width(drawn.std(1, ddof=1), n)
    assert (low > 0).mean() == pytest.approx(0.8, abs=0.005)
    assert power(0, n) == pytest.approx(0.025), "the level where there is no effect"
    assert seeds_needed(effect, 2.0) == n and seeds_needed(-effect * 0.99, 2.0) == n + 1
    assert math.isinf(seeds_needed(0, 1)) and math.isnan(smallest_effect(0.0, n))


def test_slopes_are_polyfits():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(3, 5)), rng.normal(size=(3, 5))
    assert slopes(x, y) == pytest.approx([np.polyfit(a, b, 1)[0] for a, b in zip(x, y)])
    assert slopes(x[:1], y) == pytest.approx([np.polyfit(x[0], b, 1)[0] for b in y])
    assert slopes(np.ones((1, 3)), y[:1, :3]) == 0


def test_correlation_over_configurations():
    rng = np.random.default_rng(3)
    x = rng.normal(size=20)
    y = x + rng.normal(size=20)
    found, theirs = interval.correlation(x, y), stats.pearsonr(x, y)
    assert found.value == pytest.approx(theirs.statistic)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    noise = rng.normal(size=20)
    test = stats.permutation_test((noise,), lambda n: abs(stats.pearsonr(x, n).statistic), n_resamples=9_999, rng=rng,
                                  permutation_type="pairings", alternative="greater")
    assert interval.correlation(x, noise).p == pytest.approx(test.pvalue, abs=0.02)
    assert np.isnan(interval.correlation(x, np.ones(20)).value) and interval.correlation(x, x).low > 0.99


# Differences of two configurations: runs of one seed as alike as may be, and variances as unequal as may be.
@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize(("ratio", "together"), [(1, 0), (5, 0), (1, 0.8), (5, 0.8), (1, -0.5)])
def test_level_and_coverage(n, ratio, together):
    rng = np.random.default_rng(n)
    first, other = rng.normal(size=(2, 60_000, n))
    a, b = first, ratio * (together * first + math.sqrt(1 - together**2) * other)
    each = a - b
    half = interval.half_width(each.std(1, ddof=1), n)
    assert (each.mean(1) - half > 0).mean() == pytest.approx(0.025, abs=0.01)
    assert (abs(each.mean(1)) <= half).mean() == pytest.approx(0.95, abs=0.01)
    one = t_interval(each[0])
    assert (one.low, one.high) == pytest.approx((each[0].mean() - half[0], each[0].mean() + half[0]))
