"""What seeds and models can detect: the power of the stratified sign-flip test."""

import numpy as np
import pytest
from scipy import stats

from analysis.stats.families import seeds_needed
from analysis.stats.power import detectable, power, seeds_for, spread
from analysis.stats.stratified import SignFlip


@pytest.mark.parametrize(("num_models", "num_seeds", "size"), [(1, 8, 1), (2, 4, 5), (3, 4, 2), (6, 3, 5)])
def test_power_is_the_share_of_samples_that_the_test_rejects(num_models: int, num_seeds: int, size: int) -> None:
    difference = detectable(num_models, num_seeds, 2.0, size)
    assert difference is not None
    rng = np.random.default_rng(7)
    samples = rng.normal(difference, 2.0, size=(400, num_models, num_seeds))
    found = [SignFlip(list(sample)).raw_p() <= 0.05 / size for sample in samples]
    assert power(num_models, num_seeds, difference, 2.0, size) == pytest.approx(0.8, abs=0.03)
    assert np.mean(found) == pytest.approx(0.8, abs=4 * 0.02 + 0.02)  # four standard errors, and power()'s own


def test_more_models_count_like_more_seeds() -> None:
    by_models, by_seeds = detectable(6, 4, 1.0, 5), detectable(2, 12, 1.0, 5)
    assert by_models == pytest.approx(by_seeds, rel=0.08)
    assert detectable(6, 8, 1.0, 5) < detectable(6, 4, 1.0, 5)  # type: ignore[operator]


@pytest.mark.parametrize(("num_models", "size"), [(1, 1), (1, 5), (2, 5), (6, 4)])
def test_nothing_is_detectable_from_fewer_seeds_than_the_test_can_reject(num_models: int, size: int) -> None:
    least = seeds_needed(num_models, size)
    assert detectable(num_models, least, 1.0, size) is not None
    if least > 1:
        assert detectable(num_models, least - 1, 1.0, size) is None
        assert power(num_models, least - 1, 100.0, 1.0, size) == 0.0


def test_seeds_for_a_difference_are_the_fewest_with_the_power() -> None:
    needed = seeds_for(2, 1.0, 1.0, 5)
    assert needed is not None
    assert power(2, needed, 1.0, 1.0, 5) >= 0.8 > power(2, needed - 1, 1.0, 1.0, 5)
    assert seeds_for(2, 0.5, 0.5, 5) == needed
    assert seeds_for(1, 0.001, 1.0) is None


def test_spread_is_pooled_within_groups() -> None:
    """Groups of 3, 2 and 1: sums of squares 2 and 2, 3 degrees of freedom; group means do not affect the spread."""
    found = spread([[1.0, 2.0, 3.0], [10.0, 12.0], [50.0]])
    assert found.df == 3
    assert found.sd == pytest.approx(np.sqrt(4 / 3))
    assert found.sd_high == pytest.approx(found.sd * np.sqrt(3 / stats.chi2.ppf(0.2, 3)))


def test_what_cannot_be_planned_is_refused() -> None:
    for refused, message in (
        (lambda: spread([[0.1], [0.2]]), "no spread to plan with"),
        (lambda: spread([[0.1, float("nan")]]), "not finite"),
        (lambda: power(0, 3, 0.1, 0.1), "0 models x 3 seeds"),
        (lambda: power(1, 3, 0.1, 0.0), "sd 0; expected a positive spread"),
        (lambda: power(1, 3, float("inf"), 1.0), "not finite"),
        (lambda: detectable(1, 3, 1.0, 0), "family of 0"),
        (lambda: seeds_for(1, 0.0, 1.0), "no number of seeds detects a difference of 0"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


def test_comparisons_that_share_a_method_count_for_fewer_degrees_of_freedom() -> None:
    """Five methods against one, three seeds: the pooled variance scatters as with 10 / (1 + 4 / 4) = 5 degrees."""
    rng = np.random.default_rng(2)
    runs = rng.standard_normal((4000, 6, 3))
    differences = runs[:, :1] - runs[:, 1:]
    found = [spread(sample, sharing=5) for sample in differences]
    assert found[0].df == 5
    variances = np.array([own.sd**2 for own in found])
    assert 2 * variances.mean() ** 2 / variances.var() == pytest.approx(5, rel=0.1)
    assert np.mean([own.sd_high >= np.sqrt(2) for own in found]) == pytest.approx(0.8, abs=0.03)
