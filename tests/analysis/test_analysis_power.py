import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from analysis.stats.equivalence import Published, Verdict, equivalence
from analysis.stats.paired import sign_flip_p
from analysis.stats.power import (
    detectable_difference,
    pairs_needed,
    power,
    sign_flip_detectable,
    sign_flip_pairs,
    sign_flip_power,
    spread,
)


@pytest.mark.parametrize(("num_pairs", "effect"), [(3, 3.26), (5, 1.68), (10, 1.00), (20, 0.66)])
def test_effects_that_few_seeds_detect(num_pairs: int, effect: float) -> None:
    """At 80 % power, in standard deviations of the differences."""
    assert detectable_difference(num_pairs, 1.0) == pytest.approx(effect, abs=0.005)


@pytest.mark.parametrize("num_pairs", [2, 3, 5, 10, 30])
@pytest.mark.parametrize("family_size", [1, 40])
def test_power_is_the_integral_over_the_standard_deviation(num_pairs: int, family_size: int) -> None:
    """P(mean / (s / sqrt(n)) > t), s drawn from its distribution: statsmodels' own two-sided power is NaN for some."""
    df = num_pairs - 1
    critical = stats.t.isf(0.05 / family_size / 2, df)
    for effect in (0.1, 1.0, 7.17, 20.0, 300.0):

        def density(s: float, shift: float = effect * np.sqrt(num_pairs)) -> float:
            return float(stats.norm.cdf(shift - critical * s) * stats.chi.pdf(s * np.sqrt(df), df) * np.sqrt(df))

        expected = integrate.quad(density, 0, 10, points=[0.5, 1, 2], limit=200)[0]
        assert power(num_pairs, effect, 1.0, family_size) == pytest.approx(expected, abs=1e-6)


@given(st.integers(2, 40), st.floats(0.01, 10), st.floats(0.001, 100), st.integers(1, 40))
@settings(deadline=None, max_examples=50)
def test_pairs_needed_are_the_fewest_that_have_the_power(
    num_pairs: int, effect: float, sd: float, family_size: int
) -> None:
    detectable = detectable_difference(num_pairs, sd, family_size)
    assert power(num_pairs, detectable, sd, family_size) == pytest.approx(0.8, abs=1e-6)
    needed = pairs_needed(effect * sd, sd, family_size)
    assert power(needed, effect * sd, sd, family_size) >= 0.8
    assert needed == 2 or power(needed - 1, effect * sd, sd, family_size) < 0.8


@given(st.integers(2, 30), st.floats(0, 20), st.floats(0.01, 10))
@settings(deadline=None, max_examples=50)
def test_more_pairs_and_smaller_families_have_more_power(num_pairs: int, difference: float, sd: float) -> None:
    least = power(num_pairs, difference, sd, family_size=5)
    assert least <= power(num_pairs, difference, sd) <= power(num_pairs + 1, difference, sd) + 1e-9
    assert power(num_pairs, -difference, sd, family_size=5) == least


def test_spread_is_pooled_within_groups() -> None:
    """Groups of 3, 2 and 1: sums of squares 2 and 2, 3 degrees of freedom; the mean of a group says nothing of it."""
    found = spread([[1.0, 2.0, 3.0], [10.0, 12.0], [50.0]])
    assert found.df == 3
    assert found.sd == pytest.approx(np.sqrt(4 / 3))
    assert found.sd_high == pytest.approx(found.sd * np.sqrt(3 / stats.chi2.ppf(0.2, 3)))


def test_what_cannot_be_planned_is_refused() -> None:
    for refused, message in (
        (lambda: spread([[0.1], [0.2]]), "no spread to plan with"),
        (lambda: spread([[0.1, float("nan")]]), "not finite"),
        (lambda: power(1, 0.1, 0.1), "1 pairs; a paired t test takes two or more"),
        (lambda: power(3, 0.1, 0.0), "sd 0; expected a positive spread"),
        (lambda: power(3, float("inf"), 1.0), "not finite"),
        (lambda: detectable_difference(3, 1.0, 0), "family of 0"),
        (lambda: pairs_needed(0.0, 1.0), "no number of pairs detects a difference of 0"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.902, 0.900, 0.899, 0.901], Verdict.reproduced),
        ([0.852, 0.850, 0.849, 0.851], Verdict.differs),
        ([0.952, 0.950, 0.949, 0.951], Verdict.differs),
        ([0.93, 0.87, 0.95, 0.85], Verdict.inconclusive),
        ([0.906, 0.904, 0.905, 0.9051], Verdict.inconclusive),
        ([0.90], Verdict.untestable),
        ([0.90, 0.90, 0.90], Verdict.untestable),
    ],
)
def test_runs_against_a_published_number(values: list[float], verdict: Verdict) -> None:
    found = equivalence(values, Published(0.90), margin=0.005)
    assert found.verdict is verdict
    assert found.difference == pytest.approx(np.mean(values) - 0.90)
    assert (found.low is None) == (verdict is Verdict.untestable)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8, unique=True), st.floats(0.001, 2), st.floats(-1, 1))
@settings(deadline=None, max_examples=100)
def test_the_interval_gives_the_verdict(values: list[float], margin: float, mean: float) -> None:
    found = equivalence(values, Published(mean), margin)
    if found.low is None or found.high is None or found.p_equivalent is None or found.p_different is None:
        assert np.ptp(values) < 1e-14
        return
    low, high = stats.ttest_1samp(values, mean).confidence_interval(0.95)
    inside = -margin < found.low and found.high < margin
    outside = low - mean > margin or high - mean < -margin
    if min(abs(found.p_equivalent - 0.05), abs(found.p_different - 0.05)) > 1e-9:
        assert (found.verdict is Verdict.reproduced) == inside == (found.p_equivalent <= 0.05)
        assert (found.verdict is Verdict.differs) == outside == (found.p_different <= 0.05)
    mirrored = equivalence([-value for value in values], Published(-mean), margin)
    assert mirrored.verdict is found.verdict


def test_a_published_number_of_few_runs_is_harder_to_confirm_and_to_contradict() -> None:
    near, far = [0.902, 0.900, 0.899], [0.912, 0.910, 0.909]
    exact, one_run = Published(0.90), Published(0.90, n=1)
    assert equivalence(near, exact, 0.005).verdict is Verdict.reproduced
    assert equivalence(near, one_run, 0.005).verdict is Verdict.inconclusive
    assert equivalence(far, exact, 0.005).verdict is Verdict.differs
    assert equivalence(far, one_run, 0.005).verdict is Verdict.inconclusive


@pytest.mark.parametrize(
    ("values", "published", "margin", "message"),
    [
        ([0.9, float("nan")], Published(0.9), 0.01, "1 of 2 values are not finite"),
        ([0.9, 0.8], Published(float("nan")), 0.01, "not finite"),
        ([0.9, 0.8], Published(0.9), 0.0, "margin 0; expected a positive number, declared beforehand"),
        ([0.9, 0.8], Published(0.9, sd=0.1), 0.01, "published sd 0.1 with n = None"),
        ([0.9, 0.8], Published(0.9, sd=-0.1, n=3), 0.01, "published sd -0.1 is negative"),
        ([0.9, 0.8], Published(0.9, n=0), 0.01, "published n = 0"),
        ([], Published(0.9), 0.01, "at least 1 value"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    values: list[float], published: Published, margin: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        equivalence(values, published, margin)


@pytest.mark.parametrize(("num_pairs", "family_size", "effect"), [(6, 1, 1.5), (8, 5, 1.9), (10, 1, 1.0)])
def test_power_of_the_sign_flip_test_is_the_share_of_samples_it_rejects(
    num_pairs: int, family_size: int, effect: float
) -> None:
    """At 6 and 8 pairs, the fewest of their families, Student's test promises 83 and 93 %: 13 and more too much."""
    rng = np.random.default_rng(1)
    samples = rng.standard_normal((800, num_pairs)) + effect
    rejected = np.mean([sign_flip_p(sample, rng) <= 0.05 / family_size + 1e-12 for sample in samples])
    assert sign_flip_power(num_pairs, effect * 0.3, 0.3, family_size) == pytest.approx(rejected, abs=0.045)


@pytest.mark.parametrize(("num_pairs", "family_size"), [(5, 1), (7, 5), (8, 10), (10, 40)])
def test_nothing_is_detectable_from_fewer_pairs_than_the_test_can_reject(num_pairs: int, family_size: int) -> None:
    assert sign_flip_detectable(num_pairs, 0.1, family_size) is None
    assert sign_flip_power(num_pairs, 100.0, 0.1, family_size) == 0
    found = sign_flip_detectable(num_pairs + 1, 0.1, family_size)
    assert found is not None
    assert found > detectable_difference(num_pairs + 1, 0.1, family_size)
    assert sign_flip_pairs(100.0, 0.1, family_size) == num_pairs + 1


def test_pairs_for_the_sign_flip_test_are_the_fewest_with_the_power() -> None:
    for difference, family_size in ((1.0, 1), (1.2, 5), (0.5, 10)):
        needed = sign_flip_pairs(difference, 1.0, family_size)
        assert sign_flip_power(needed, difference, 1.0, family_size) >= 0.8
        assert sign_flip_power(needed - 1, difference, 1.0, family_size) < 0.8
        detectable = sign_flip_detectable(needed, 1.0, family_size)
        assert detectable is not None
        assert detectable <= difference


def test_comparisons_that_share_a_method_count_for_fewer_degrees_of_freedom() -> None:
    """Five methods against one, three seeds: the pooled variance scatters as one of 10 / (1 + 4 / 4) = 5 degrees."""
    rng = np.random.default_rng(2)
    runs = rng.standard_normal((4000, 6, 3))
    differences = runs[:, :1] - runs[:, 1:]
    found = [spread(sample, sharing=5) for sample in differences]
    assert found[0].df == 5
    variances = np.array([own.sd**2 for own in found])
    assert 2 * variances.mean() ** 2 / variances.var() == pytest.approx(5, rel=0.1)
    assert np.mean([own.sd_high >= np.sqrt(2) for own in found]) == pytest.approx(0.8, abs=0.03)
