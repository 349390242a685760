"""The stratified sign-flip test, checked by enumeration and published numbers, and the properties of its interval."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis.stats import stratified
from analysis.stats.stratified import RIDGE, SignFlip, num_patterns, smallest_p

# Darwin's maize: heights of 15 pairs, cross- minus self-fertilised, eighths of an inch; Fisher (1935), section 21.
DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
# Wear of two soles on ten boys; Box, Hunter and Hunter (1978), section 4.3.
SHOES = [0.8, 0.6, 0.3, -0.1, 1.1, -0.2, 0.3, 0.5, 0.5, 0.3]
# Hamilton depression scores of nine patients at two visits; Hollander and Wolfe (1973), R's help of wilcox.test.
DEPRESSION_1 = [1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30]
DEPRESSION_2 = [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29]


def enumerated(strata: Sequence[Sequence[float]], shift: float) -> float:
    """P by definition, pattern by pattern."""
    arrays = [np.asarray(values) - shift for values in strata]

    def statistic(flipped: Sequence[np.ndarray]) -> float:
        estimate = np.mean([values.mean() for values in flipped])
        weights = [1 / (len(flipped) ** 2 * len(values)) for values in flipped]
        spread = sum(w * np.var(x, ddof=1) for w, x in zip(weights, flipped, strict=True) if len(x) > 1)
        scale = sum(w * np.mean(x**2) for w, x in zip(weights, flipped, strict=True))
        return float(estimate**2 / (spread + RIDGE * scale))

    signs = [list(itertools.product((1.0, -1.0), repeat=len(values))) for values in arrays]
    own = statistic(arrays)
    found = [
        statistic([np.array(s) * x for s, x in zip(pattern, arrays, strict=True)])
        for pattern in itertools.product(*signs)
    ]
    return float(np.mean(np.array(found) >= own * (1 - 1e-9)))


def test_it_is_the_enumeration_on_500_random_designs() -> None:
    rng = np.random.default_rng(0)
    num_tried = 0
    while num_tried < 500:
        sizes = rng.integers(1, 5, size=rng.integers(1, 4))
        if sizes.sum() > 9:
            continue
        strata = [rng.normal(rng.normal(), 1, size=n).tolist() for n in sizes]
        if rng.random() < 0.3:  # as with 359 test images, which gives ties
            strata = [(np.round(np.array(values) * 3) / 3).tolist() for values in strata]
        shift = float(rng.choice([0.0, 0.5, -0.25]))
        if not any(x != shift for values in strata for x in values):
            continue
        num_tried += 1
        assert SignFlip(strata).raw_p(shift) == pytest.approx(enumerated(strata, shift), abs=1e-12)


def test_fishers_count_of_darwins_maize() -> None:
    """Fisher (1935): 863 of the 32,768 sums are at least the observed one, so 1,726 in both tails: p = 0.0527."""
    test = SignFlip([DARWIN])
    assert test.p() == pytest.approx(2 * 863 / 32_768, abs=1e-12)
    assert test.p() == pytest.approx(0.0527, abs=5e-5)


def test_the_boys_shoes_of_box_hunter_and_hunter() -> None:
    """Three sums are larger and four are equal: 7 of 1,024 in one tail, ties included."""
    assert SignFlip([SHOES]).one_sided_p(0.0, above=True) == pytest.approx(7 / 1024, abs=1e-12)


def test_signed_ranks_give_the_p_that_r_prints_for_wilcoxons_exact_test() -> None:
    """R: wilcox.test(x, y, paired = TRUE, alternative = "greater"): V = 40, p-value = 0.01953; coin gives the same."""
    differences = np.subtract(DEPRESSION_1, DEPRESSION_2)
    ranks = stats.rankdata(np.abs(differences)) * np.sign(differences)
    assert SignFlip([ranks]).one_sided_p(0.0, above=True) == pytest.approx(0.01953, abs=5e-6)


def test_one_model_gives_scipys_permutation_test() -> None:
    rng = np.random.default_rng(1)
    for n in (2, 4, 7, 10):
        values = rng.normal(0.4, 1, size=n)
        theirs = stats.permutation_test(
            (values,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
        )
        assert SignFlip([values]).p() == pytest.approx(theirs.pvalue, abs=1e-12)


designs = st.lists(
    st.lists(st.floats(-2, 2).map(lambda x: round(x, 3)), min_size=1, max_size=4), min_size=1, max_size=3
)


@settings(max_examples=150, deadline=None)
@given(strata=designs, margin=st.floats(0.05, 1.5), level=st.sampled_from([0.05, 0.0125, 0.2]))
def test_p_and_interval_never_disagree(strata: list[list[float]], margin: float, level: float) -> None:
    test = SignFlip(strata, (-margin, margin))
    interval = test.interval(1 - level)
    assert interval.low <= test.estimate + 1e-12
    assert interval.high >= test.estimate - 1e-12
    for shift in (0.0, -margin, margin):
        assert (shift in interval) == (test.p(shift) > level)
        assert test.p(shift) >= test.raw_p(shift)
        assert smallest_p(test.n) <= test.p(shift) <= 1


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-2, 2).map(lambda x: round(x, 3)), min_size=1, max_size=8), by=st.floats(-3, 3))
def test_a_shift_of_one_models_data_shifts_the_interval(values: list[float], by: float) -> None:
    here = SignFlip([values]).interval(0.8)
    there = SignFlip([[x + by for x in values]]).interval(0.8)
    for end, moved in ((here.low, there.low), (here.high, there.high)):
        if np.isfinite(end) or np.isfinite(moved):
            assert moved == pytest.approx(end + by, abs=1e-4)


def test_an_interval_has_no_bound_where_the_design_can_exclude_nothing() -> None:
    interval = SignFlip([[0.1, 0.2, 0.3]]).interval()
    assert (interval.low, interval.high) == (-np.inf, np.inf)
    assert smallest_p(3) == 0.25


def test_models_that_differ_cost_no_power() -> None:
    """Effects of 2 and 12 with noise of 0.1: the test on the mean takes that for noise, but ours does not."""
    rng = np.random.default_rng(0)
    strata = [rng.normal(2, 0.1, 4), rng.normal(12, 0.1, 4)]
    assert SignFlip(strata).p() == pytest.approx(2 / 2**8)
    assert 0.0 not in SignFlip(strata).interval()


def test_eight_pairs_with_an_outlier_have_one_answer() -> None:
    """Seven differences of 0.1 and one of 4: Student's interval held 0, but the sign-flip test rejected."""
    test = SignFlip([[0.1] * 7 + [4.0]])
    assert test.p() == pytest.approx(2 / 2**8)
    assert test.interval().low == pytest.approx(0.1, abs=1e-6)


def test_equal_differences_have_an_interval_of_width_zero_and_identical_networks_one_at_zero() -> None:
    ten = SignFlip([[1.0] * 10])
    assert ten.p() == pytest.approx(2 / 2**10)
    assert (ten.interval().low, ten.interval().high) == pytest.approx((1.0, 1.0), abs=1e-6)
    none = SignFlip([[0.0] * 4, [0.0] * 4])
    assert none.p() == 1.0
    assert (none.interval().low, none.interval().high) == pytest.approx((0.0, 0.0), abs=1e-9)


def test_differences_equal_up_to_rounding_are_equal() -> None:
    rounded = SignFlip([[0.9 - 0.8, 0.8 - 0.7, 0.7 - 0.6, 0.6 - 0.5, 0.5 - 0.4, 0.4 - 0.3]])
    assert rounded.p() == pytest.approx(2 / 2**6)


def test_many_pairs_are_sampled_reproducibly_with_a_stated_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    strata = [rng.normal(0.35, 1, 10) for _ in range(2)]
    exact = SignFlip(strata)
    assert (exact.is_exact, exact.p_error(0.05)) == (True, 0.0)
    monkeypatch.setattr(stratified, "EXACT_PAIRS", 10)
    drawn = SignFlip(strata)
    assert (drawn.is_exact, num_patterns(20)) == (False, stratified.MAX_SAMPLED)
    assert drawn.p() == SignFlip(strata).p()
    assert drawn.raw_p() == pytest.approx(exact.raw_p(), abs=5 * drawn.p_error(exact.raw_p()))
    assert drawn.interval().low == pytest.approx(exact.interval().low, abs=0.02)


@pytest.mark.parametrize("strata", [[], [[]], [[1.0, float("nan")]], [[1.0], [float("inf")]]])
def test_what_is_no_design_is_refused(strata: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"stratum|expected|finite"):
        SignFlip(strata)


def test_only_announced_shifts_have_a_p() -> None:
    with pytest.raises(ValueError, match="was not announced"):
        SignFlip([[1.0, 2.0]], (0.5,)).p(0.7)
