"""The decision rules: each verdict by its own test, and how often the rules err where nothing is there."""

import math

import numpy as np
import pytest
from scipy import stats

from gstlib.claims import rules
from gstlib.claims.rules import (
    CONTRADICTED,
    INCONCLUSIVE,
    SUPPORTED,
    Part,
    adjusted,
    decide,
    differ,
    equivalent,
    every,
    no_help,
    part,
    some,
    within,
)
from gstlib.reading.interval import Estimate

SPREAD = np.array([-0.5, 0.1, 0.4, -0.2, 0.2])  # of mean 0


def near(mean, scale=1.0):
    """Five seeds about a mean."""
    return mean + scale * SPREAD


def of(right, wrong=None):
    return Part("", Estimate(1.0, 0, 2, 5, 0.5), right, 1 - right if wrong is None else wrong)


@pytest.mark.parametrize(("values", "verdict"), [
    (near(1), SUPPORTED), (near(-1), CONTRADICTED), (near(0.1), INCONCLUSIVE), (np.zeros(5), INCONCLUSIVE)])
def test_one_number_a_seed(values, verdict):
    found = part("", values)
    assert found.verdict == verdict
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95) if values.any() else (0, 0)
    assert (found.found.low, found.found.high) == pytest.approx((low, high))
    assert (found.found.low > 0) == (verdict == SUPPORTED) and (found.found.high < 0) == (verdict == CONTRADICTED)
    p = decide(found).p
    assert p == pytest.approx(stats.ttest_1samp(values, 0).pvalue if values.any() else 1)


def test_an_open_part_says_what_it_could_have_found():
    found = part("", near(0.1))
    sd = SPREAD.std(ddof=1)
    assert found.smallest == pytest.approx(1.682 * sd, rel=1e-3), "at five seeds, by tables of the noncentral t"
    power = stats.nct.sf(stats.t.ppf(0.975, found.needed - 1), found.needed - 1, 0.1 / sd * math.sqrt(found.needed))
    assert power >= 0.8 and found.needed > 50


def test_all_parts_must_hold_and_one_on_the_wrong_side_contradicts_by_holm():
    assert every(of(0.01), of(0.02)).verdict == SUPPORTED
    assert every(of(0.01), of(0.03)).verdict == INCONCLUSIVE
    assert every(of(0.98)).verdict == CONTRADICTED
    assert every(of(0.01), of(0.98)).verdict == INCONCLUSIVE, "wrong at p = .02, of two parts: .04"
    assert every(of(0.01), of(0.989)).verdict == CONTRADICTED


def test_the_part_that_decides_is_shown():
    parts = [part("sure", near(3)), part("less sure", near(1)), part("open", near(0.1))]
    assert every(*parts[:2]).name == "less sure" and every(*parts).name == "open"
    found = decide(*parts, part("wrong", near(-2)), note="and more")
    assert found.verdict == CONTRADICTED and found.part.name == "wrong" and found.note.endswith("; and more")
    assert found.p == pytest.approx(min(1, 4 * stats.ttest_1samp(near(-2), 0).pvalue))


def test_one_of_several_pays_for_the_choice():
    assert some("", of(0.02), of(0.6), of(0.7)).verdict == INCONCLUSIVE, "the best of three needs p < .0083"
    assert some("", of(0.008), of(0.6), of(0.7)).verdict == SUPPORTED
    assert some("", of(0.98), of(0.99), of(0.985)).verdict == CONTRADICTED, "all behind"
    assert some("", of(0.9), of(0.99)).verdict == INCONCLUSIVE
    assert some("named", part("a", near(1)), part("b", near(2))).found.value == pytest.approx(2)


@pytest.mark.parametrize(("difference", "effect", "verdict"), [
    (0.0, 4.0, SUPPORTED), (0.5, 4.0, SUPPORTED), (-2.0, 4.0, CONTRADICTED), (2.0, 4.0, CONTRADICTED),
    (0.9, 4.0, INCONCLUSIVE), (0.0, 0.1, INCONCLUSIVE), (0.0, -4.0, CONTRADICTED)])
def test_equivalence_within_a_quarter_of_the_effect(difference, effect, verdict):
    parts = equivalent("", near(difference), np.zeros(5), near(effect, -1))
    assert every(*parts).verdict == verdict
    lower, upper, _ = parts
    assert lower.confidence == upper.confidence == 0.9
    low = stats.ttest_1samp(near(difference) + near(effect, -1) / 4, 0).confidence_interval(0.9).low
    assert (lower.right < 0.025) == (low > 0) and lower.found.low == pytest.approx(low)


def test_within_fixed_ends():
    assert every(*within("", near(0.0, 0.1), -0.1, 0.1)).verdict == SUPPORTED
    assert every(*within("", near(0.5, 0.1), -0.1, 0.1)).verdict == CONTRADICTED


@pytest.mark.parametrize(("gain", "effect", "verdict"), [
    (-1.0, 4.0, SUPPORTED), (0.0, 8.0, SUPPORTED), (0.0, 0.0, INCONCLUSIVE), (1.0, 4.0, CONTRADICTED),
    (1.0, 40.0, CONTRADICTED)])
def test_no_help(gain, effect, verdict):
    assert decide(no_help("", near(gain), near(effect))).verdict == verdict


def test_differences_between_configurations_are_tested_within_seeds():
    blocks = 10 * SPREAD[:, None]  # seeds differ far more than configurations do
    table = blocks + [0, 1, 1.2] + 0.3 * np.random.default_rng(0).normal(size=(5, 3))
    found = differ("", table)
    assert found.verdict == SUPPORTED and found.found.value == pytest.approx(np.ptp(table.mean(0)))
    assert math.isnan(found.found.low)
    same = differ("", blocks + np.random.default_rng(0).normal(size=(5, 3)))
    assert same.verdict == INCONCLUSIVE and same.wrong == 1


def test_holm_over_all_claims_passes_over_those_without_a_test():
    found = adjusted([0.01, math.nan, 0.04, 0.03])
    assert found[[0, 2, 3]] == pytest.approx([0.03, 0.06, 0.06]) and math.isnan(found[1])


def test_a_claim_without_truth_is_supported_and_contradicted_in_one_case_of_forty_at_most(monkeypatch):
    for name in ("smallest_effect", "seeds_needed"):  # the power, which decides no verdict and takes most of the time
        monkeypatch.setattr(rules, name, lambda *_: 0)
    rng = np.random.default_rng(1)
    verdicts = {"one": [], "every": [], "some": []}
    for _ in range(2000):
        each = [part("", rng.normal(size=3) * scale) for scale in (1, 1, 5)]
        verdicts["one"].append(each[0].verdict)
        verdicts["every"].append(every(*each).verdict)
        verdicts["some"].append(some("", *each).verdict)
    for name, found in verdicts.items():
        for verdict in (SUPPORTED, CONTRADICTED):
            assert found.count(verdict) / 2000 < 0.035, (name, verdict)
    assert 0.015 < verdicts["one"].count(SUPPORTED) / 2000
