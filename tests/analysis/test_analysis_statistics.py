import itertools
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis.stats.paired import (
    bca_interval,
    fewest_pairs,
    is_underpowered,
    paired_difference,
    sample_sd,
    sign_flip_p,
    smallest_p,
    t_interval,
    t_test_p,
)

# Student (1908), hours of sleep gained with each of two drugs; R's `sleep`.
SLEEP_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
# Darwin's maize, crossed minus self-fertilised in eighths of an inch; Fisher (1935), Design of Experiments, section 21.
MAIZE = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]

accuracies = st.integers(0, 10_000).map(lambda correct: correct / 10_000)
pairs = st.lists(st.tuples(accuracies, accuracies), min_size=1, max_size=8)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def by_seed(values: Iterable[float]) -> dict[int, float]:
    return dict(enumerate(values))


def test_students_sleep_data_give_the_values_that_r_prints() -> None:
    difference = paired_difference(by_seed(SLEEP_1), by_seed(SLEEP_2), rng())
    assert difference.n == 10
    assert difference.mean == pytest.approx(-1.58)
    assert difference.sd == pytest.approx(1.229995, abs=1e-6)
    assert (difference.low, difference.high) == pytest.approx((-2.4598858, -0.7001142), abs=1e-7)
    assert difference.effect == pytest.approx(-4.0621 / np.sqrt(10), abs=1e-5)


def test_fishers_count_for_darwins_maize_is_found() -> None:
    """863 of the 2^15 sign patterns have a sum of at least 314."""
    assert sum(MAIZE) == 314
    assert sign_flip_p(MAIZE, rng()) == pytest.approx(2 * 863 / 2**15, rel=1e-12)


@given(pairs)
@settings(deadline=None, max_examples=50)
def test_the_interval_is_scipys_paired_t_interval(values: list[tuple[float, float]]) -> None:
    ours, theirs = zip(*values, strict=True)
    difference = paired_difference(by_seed(ours), by_seed(theirs), rng())
    if difference.low is not None:
        expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
        assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(pairs)
@settings(deadline=None, max_examples=50)
def test_exchanging_the_methods_changes_signs_only(values: list[tuple[float, float]]) -> None:
    ours, theirs = (by_seed(side) for side in zip(*values, strict=True))
    forth, back = paired_difference(ours, theirs, rng()), paired_difference(theirs, ours, rng())
    assert (forth.n, forth.mean) == (back.n, -back.mean)
    assert forth.p == pytest.approx(back.p)
    assert forth.sd == pytest.approx(back.sd)
    if forth.low is not None and back.low is not None and back.high is not None and back.effect is not None:
        assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low), abs=1e-12)
        assert forth.effect == pytest.approx(-back.effect)


@given(st.lists(st.integers(-50, 50).filter(bool), min_size=2, max_size=8))
@settings(deadline=None, max_examples=50)
def test_p_is_the_share_of_sign_patterns_as_extreme(differences: list[int]) -> None:
    """Whole numbers, so that ties are exact; two-sided as twice the smaller tail, at most 1."""
    patterns = itertools.product((1, -1), repeat=len(differences))
    sums = [sum(sign * size for sign, size in zip(signs, differences, strict=True)) for signs in patterns]
    above = sum(total >= sum(differences) for total in sums) / len(sums)
    below = sum(total <= sum(differences) for total in sums) / len(sums)
    assert sign_flip_p(differences, rng()) == pytest.approx(min(1.0, 2 * min(above, below)))


@pytest.mark.parametrize(("n", "p"), [(1, 1.0), (2, 0.5), (3, 0.25), (4, 0.125), (5, 0.0625), (6, 0.03125)])
def test_differences_of_one_sign_give_the_smallest_p(n: int, p: float) -> None:
    assert smallest_p(n) == p
    assert sign_flip_p(np.linspace(0.1, 0.9, n), rng()) == pytest.approx(p)


@pytest.mark.parametrize("n", range(1, 9))
def test_up_to_five_pairs_are_underpowered(n: int) -> None:
    assert is_underpowered(n) == (n <= 5)


@pytest.mark.parametrize(("family_size", "pairs"), [(1, 6), (2, 7), (3, 7), (5, 8), (40, 11)])
def test_larger_families_take_more_pairs(family_size: int, pairs: int) -> None:
    assert fewest_pairs(family_size) == pairs
    assert is_underpowered(pairs - 1, family_size)
    assert not is_underpowered(pairs, family_size)
    assert smallest_p(pairs, family_size) == family_size * smallest_p(pairs)


@given(pairs)
@settings(deadline=None, max_examples=50)
def test_the_t_test_says_what_its_interval_says(values: list[tuple[float, float]]) -> None:
    ours, theirs = zip(*values, strict=True)
    difference = paired_difference(by_seed(ours), by_seed(theirs), rng())
    p = t_test_p(difference)
    assert (p is None) == (difference.low is None)
    if p is not None and difference.low is not None and difference.high is not None:
        assert p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, rel=1e-6)
        if abs(p - 0.05) > 1e-9:
            assert (p < 0.05) == (difference.low > 0 or difference.high < 0)


def test_one_pair_has_a_mean_and_nothing_else() -> None:
    difference = paired_difference({4: 0.75}, {4: 0.5}, rng())
    assert (difference.n, difference.mean, difference.p) == (1, 0.25, 1.0)
    assert (difference.sd, difference.low, difference.high, difference.effect) == (None, None, None, None)


def test_differences_equal_up_to_rounding_have_no_spread_and_no_interval() -> None:
    difference = paired_difference(by_seed([0.9, 0.8, 0.7]), by_seed([0.8, 0.7, 0.6]), rng())
    assert difference.mean == pytest.approx(0.1)
    assert difference.sd == 0.0
    assert (difference.low, difference.high, difference.effect) == (None, None, None)
    assert difference.p == 0.25


def test_two_methods_that_never_differ_have_p_one() -> None:
    difference = paired_difference(by_seed([0.9, 0.8, 0.7]), by_seed([0.9, 0.8, 0.7]), rng())
    assert (difference.mean, difference.sd, difference.low, difference.p) == (0.0, 0.0, None, 1.0)


def test_pairs_are_made_by_seed_whatever_the_order() -> None:
    difference = paired_difference({0: 0.5, 1: 0.7, 9: 0.1}, {1: 0.6, 0: 0.3, 7: 0.2}, rng())
    assert difference.n == 2
    assert difference.mean == pytest.approx(0.15)


def test_from_50_pairs_on_the_interval_is_bca() -> None:
    values = np.linspace(0, 1, 50) ** 5
    expected = stats.bootstrap((values,), np.mean, method="BCa", rng=rng()).confidence_interval
    assert bca_interval(values, rng()) == (expected.low, expected.high)
    fifty = paired_difference(by_seed(values), by_seed(np.zeros(50)), rng())
    assert (fifty.low, fifty.high) == pytest.approx((expected.low, expected.high), abs=0.005)
    assert t_interval(values)[0] < expected.low - 0.008
    fewer = paired_difference(by_seed(values[:49]), by_seed(np.zeros(49)), rng())
    assert (fewer.low, fewer.high) == t_interval(values[:49])


def test_many_pairs_draw_their_sign_flips_from_the_generator() -> None:
    values = np.linspace(-0.2, 0.5, 25)
    assert sign_flip_p(values, rng()) == sign_flip_p(values, rng())
    assert sign_flip_p(values, rng()) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=0.3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    values = [0.5, bad, 0.7]
    with pytest.raises(ValueError, match="1 of 3 values are not finite"):
        paired_difference(by_seed(values), by_seed([0.1, 0.2, 0.3]), rng())
    for refuses in (sample_sd, t_interval, lambda x: bca_interval(x, rng()), lambda x: sign_flip_p(x, rng())):
        with pytest.raises(ValueError, match="not finite"):
            refuses(values)


def test_no_seed_in_common_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 value"):
        paired_difference({0: 0.5}, {1: 0.5}, rng())


@pytest.mark.parametrize("refuses", [sample_sd, t_interval])
def test_spread_of_a_single_value_is_refused(refuses: object) -> None:
    assert callable(refuses)
    with pytest.raises(ValueError, match="at least 2 values"):
        refuses([0.5])
