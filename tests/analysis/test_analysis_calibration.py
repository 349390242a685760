"""A part of benchmarks/calibration.py: each test and interval errs as often as it says; and its formulas are ours."""

from collections.abc import Callable, Iterator

import calibration
import numpy as np
import pytest
from calibration import Rate

from analysis.stats import paired as statistics
from analysis.stats.families import friedman, holm
from analysis.stats.paired import paired_difference


def rng() -> np.random.Generator:
    return np.random.default_rng(1)


@pytest.mark.parametrize("num_pairs", [2, 3, 5, 10])
def test_the_fast_tests_give_the_p_of_ours(num_pairs: int) -> None:
    differences = rng().normal(0.3, size=(20, num_pairs))
    zeros = dict.fromkeys(range(num_pairs), 0.0)
    ours = [paired_difference(dict(enumerate(row.tolist())), zeros, rng()) for row in differences]
    assert calibration.sign_flip_p(differences) == pytest.approx([difference.p for difference in ours])
    assert calibration.t_test_p(differences) == pytest.approx([statistics.t_test_p(difference) for difference in ours])


def test_the_fast_holm_rejects_what_ours_does() -> None:
    families = rng().uniform(size=(15, 5)) ** 3
    rejects = calibration.holm_rejects(families)
    assert 0 < rejects.mean() < 1
    for row, p in zip(rejects, families.tolist(), strict=True):
        assert set(np.flatnonzero(row)) == holm(dict(enumerate(p)), 5).rejected


def test_the_fast_friedman_gives_ours() -> None:
    ranks = calibration.random_ranks(rng(), 20, 7, 6)
    chi2, f = calibration.friedman_of_ranks(ranks)
    ours = [friedman(table) for table in ranks]
    assert chi2 == pytest.approx([found.chi2 for found in ours])
    assert f == pytest.approx([found.f for found in ours])


@pytest.mark.parametrize(
    ("part", "num"),
    [
        (calibration.family_errors, 4000),
        (calibration.t_coverage, 20_000),
        (calibration.power_errors, 4000),
        (calibration.spread_bound, 20_000),
        (calibration.rank_errors, 10_000),
        (calibration.verdict_errors, 200),
    ],
)
def test_rates_are_as_wanted(part: Callable[[np.random.Generator, int], Iterator[Rate]], num: int) -> None:
    """Within what few simulations add: three standard errors."""
    rates = list(part(rng(), num))
    assert any(rate.wanted for rate in rates)
    missed = [rate for rate in rates if not rate.near_wanted]
    assert not missed
