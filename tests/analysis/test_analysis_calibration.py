"""A part of benchmarks/calibration.py: tests and intervals err as often as claimed, and its formulas match ours."""

from collections.abc import Callable, Iterator

import calibration
import numpy as np
import pytest
from calibration import Rate

from analysis.stats.families import holm, is_rejected
from analysis.stats.ranks import friedman
from analysis.stats.stratified import SignFlip


def rng() -> np.random.Generator:
    return np.random.default_rng(1)


@pytest.mark.parametrize(("num_models", "num_seeds"), [(1, 5), (2, 4), (3, 3), (4, 1)])
def test_the_fast_test_gives_the_p_of_ours(num_models: int, num_seeds: int) -> None:
    differences = rng().normal(0.3, size=(20, num_models, num_seeds))
    ours = [SignFlip(list(sample)).raw_p() for sample in differences]
    assert calibration.stratified_p(differences, rng()) == pytest.approx(ours)


def test_the_fast_holm_rejects_what_ours_does() -> None:
    families = rng().uniform(size=(15, 5)) ** 3
    rejects = calibration.holm_rejects(families)
    assert 0 < rejects.mean() < 1
    for row, p in zip(rejects, families.tolist(), strict=True):
        adjusted = holm(dict(enumerate(p)), 5)
        assert set(np.flatnonzero(row)) == {member for member, value in adjusted.items() if is_rejected(value)}


def test_the_fast_friedman_gives_ours() -> None:
    ranks = calibration.random_ranks(rng(), 20, 7, 6)
    chi2, f = calibration.friedman_of_ranks(ranks)
    ours = [friedman(table) for table in ranks]
    assert chi2 == pytest.approx([found.chi2 for found in ours])
    assert f == pytest.approx([found.f for found in ours])


@pytest.mark.parametrize(
    ("part", "num"),
    [
        (calibration.family_errors, 400),
        (calibration.interval_coverage, 1000),
        (calibration.gatekept_errors, 800),
        (calibration.power_table, 800),
        (calibration.equivalence_errors, 1000),
        (calibration.spread_bound, 20_000),
        (calibration.rank_errors, 10_000),
        (calibration.verdict_errors, 200),
    ],
)
def test_rates_are_as_wanted(part: Callable[[np.random.Generator, int], Iterator[Rate]], num: int) -> None:
    """Within the error of few simulations: three standard errors."""
    rates = list(part(rng(), num))
    assert any(rate.wanted for rate in rates)
    missed = [rate for rate in rates if not rate.near_wanted]
    assert not missed
