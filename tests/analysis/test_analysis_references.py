"""The statistics against numbers from other software or papers, to the digits given there."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.anova import AnovaRM

from analysis.stats import ranks
from analysis.stats.equivalence import Published, Verdict, equivalence
from analysis.stats.families import holm, is_rejected
from analysis.stats.ranks import critical_difference, friedman

# Demsar (2006), JMLR 7, table 6: AUC of C4.5 without and with tuning of m and cf, on 14 data sets.
C45 = ("C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf")
C45_AUC = np.array(
    [
        [0.763, 0.599, 0.954, 0.628, 0.882, 0.936, 0.661, 0.583, 0.775, 1.0, 0.940, 0.619, 0.972, 0.957],
        [0.768, 0.591, 0.971, 0.661, 0.888, 0.931, 0.668, 0.583, 0.838, 1.0, 0.962, 0.666, 0.981, 0.978],
        [0.771, 0.590, 0.968, 0.654, 0.886, 0.916, 0.609, 0.563, 0.866, 1.0, 0.965, 0.614, 0.975, 0.946],
        [0.798, 0.569, 0.967, 0.657, 0.898, 0.931, 0.685, 0.625, 0.875, 1.0, 0.962, 0.669, 0.975, 0.970],
    ]
).T
# Hollander and Wolfe (1973), p. 140: 22 players' times to second base, rounding first base in three ways.
ROUNDING_TIMES = np.reshape(
    [
        *(5.40, 5.50, 5.55, 5.85, 5.70, 5.75, 5.20, 5.60, 5.50, 5.55, 5.50, 5.40, 5.90, 5.85, 5.70, 5.45, 5.55, 5.60),
        *(5.40, 5.40, 5.35, 5.45, 5.50, 5.35, 5.25, 5.15, 5.00, 5.85, 5.80, 5.70, 5.25, 5.20, 5.10, 5.65, 5.55, 5.45),
        *(5.60, 5.35, 5.45, 5.05, 5.00, 4.95, 5.50, 5.50, 5.40, 5.45, 5.55, 5.50, 5.55, 5.55, 5.35, 5.45, 5.50, 5.55),
        *(5.50, 5.45, 5.25, 5.65, 5.60, 5.40, 5.70, 5.65, 5.55, 6.30, 6.30, 6.25),
    ],
    (22, 3),
)
# Student (1908), hours of sleep gained with each of two drugs; R's `sleep`.
SLEEP_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
# The data set `clinic` of statsmodels' test_tost.py: variables 1 and 2 in two groups of 15.
CLINIC_1 = (
    [2.84, 2.51, 2.41, 2.95, 3.14, 3.79, 4.14, 3.85, 3.02, 3.45, 5.37, 3.81, 4.19, 3.16, 3.84],
    [2.60, 2.82, 2.18, 3.46, 4.01, 3.04, 3.47, 4.06, 2.91, 3.59, 4.51, 3.16, 3.86, 3.31, 3.02],
)
CLINIC_2 = (
    [4.00, 3.26, 4.14, 3.42, 3.25, 4.34, 4.97, 4.31, 3.11, 3.41, 5.02, 4.21, 4.59, 5.30, 4.32],
    [3.76, 3.66, 3.65, 3.60, 3.48, 2.87, 3.24, 3.92, 3.99, 4.21, 4.21, 3.31, 3.61, 2.97, 2.73],
)


def summary(values: Sequence[float]) -> Published:
    return Published(float(np.mean(values)), float(np.std(values, ddof=1)), len(values))


def test_friedman_of_the_rounding_times_is_what_r_prints() -> None:
    """R's help of friedman.test: chi-squared = 11.143, df = 2, p-value = 0.003805."""
    found = friedman(ROUNDING_TIMES)
    assert (found.num_blocks, found.num_methods) == (22, 3)
    assert found.chi2 == pytest.approx(11.143, abs=5e-4)
    assert found.chi2_p == pytest.approx(0.003805, abs=5e-7)


def test_friedman_of_demsars_table_corrected_for_ties_is_matlabs_and_rs() -> None:
    """In scipy's test_stats.py, "verified with matlab and R"; there C4.5+cf has 0.9751 on the thirteenth data set."""
    table = C45_AUC.copy()
    table[12, 2] = 0.9751
    found = friedman(table)
    assert (found.chi2, found.chi2_p) == pytest.approx((10.2283464566929, 0.0167215803284414), rel=1e-9)


def test_demsars_ranks_and_f_are_found() -> None:
    """Demsar (2006), p. 14, without correction for ties: ranks 3.143, 2.000, 2.893, 1.964, chi2 9.28, F 3.69."""
    table = C45_AUC.copy()
    table[12, 2] = 0.9751  # the paper ranked more digits than it printed, so there was no tie
    ranking = ranks.rank_methods(table, C45)
    average = dict(zip(ranking.methods, ranking.average_ranks, strict=True))
    assert [average[name] for name in C45] == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=5e-4)
    chi2 = 12 * 14 / (4 * 5) * (sum(rank**2 for rank in average.values()) - 4 * 5**2 / 4)
    assert chi2 == pytest.approx(9.28, abs=5e-3)
    assert 13 * chi2 / (14 * 3 - chi2) == pytest.approx(3.69, abs=5e-3)


@pytest.mark.parametrize(
    ("columns", "chi2", "p"),
    [
        (
            [
                [7.0, 9.9, 8.5, 5.1, 10.3],
                [5.3, 5.7, 4.7, 3.5, 7.7],
                [4.9, 7.6, 5.5, 2.8, 8.4],
                [8.8, 8.9, 8.1, 3.3, 9.1],
            ],
            10.68,
            0.0135882729582176,
        ),
        (
            [
                [4, 3, 5, 3, 5, 3, 2, 5, 4, 4, 4, 3],
                [2, 2, 1, 2, 3, 1, 2, 3, 2, 1, 1, 3],
                [2, 4, 3, 3, 4, 3, 3, 4, 4, 1, 2, 1],
                [3, 5, 4, 3, 4, 4, 3, 3, 3, 4, 4, 4],
            ],
            18.9428571428571,
            0.000280938375189499,
        ),
        (
            [[4, 6, 3, 4, 3, 2, 2, 7, 6, 5], [5, 6, 8, 7, 7, 8, 4, 6, 4, 5], [2, 4, 4, 3, 2, 2, 1, 4, 3, 2]],
            13.351351351351344,
            0.0012612201221243592,
        ),
    ],
    ids=["Zar, example 12.6", "Bioestadistica (scipy's tests)", "Julia's HypothesisTests"],
)
def test_friedman_is_what_others_found(columns: list[list[float]], chi2: float, p: float) -> None:
    found = friedman(np.array(columns).T)
    assert (found.chi2, found.chi2_p) == pytest.approx((chi2, p), rel=1e-9)


@pytest.mark.parametrize("table", [C45_AUC, ROUNDING_TIMES], ids=["C4.5", "rounding times"])
def test_f_is_the_analysis_of_variance_of_the_ranks(table: np.ndarray) -> None:
    """From statsmodels 0.15's AnovaRM; with ties as well, as in PMCMRplus's friedmanTest(dist = "FDist")."""
    rows = [
        {"block": block, "method": method, "rank": rank}
        for block, ranks in enumerate(stats.rankdata(table, axis=1))
        for method, rank in enumerate(ranks)
    ]
    expected = AnovaRM(pd.DataFrame(rows), "rank", "block", within=["method"]).fit().anova_table
    found = friedman(table)
    assert (found.f, found.f_p) == pytest.approx(tuple(expected[["F Value", "Pr > F"]].iloc[0]), rel=1e-9)


@pytest.mark.parametrize(
    ("num_methods", "alpha", "q_alpha"),
    [
        *((2, 0.05, 1.960), (3, 0.05, 2.343), (4, 0.05, 2.569), (10, 0.05, 3.164)),
        *((2, 0.10, 1.645), (4, 0.10, 2.291), (10, 0.10, 2.920)),
    ],
)
def test_critical_values_are_demsars(num_methods: int, alpha: float, q_alpha: float) -> None:
    """Demsar (2006), table 5a, whose digits are truncated."""
    found = critical_difference(num_methods, 14, alpha) / np.sqrt(num_methods * (num_methods + 1) / (6 * 14))
    assert q_alpha - 5e-4 <= found < q_alpha + 1e-3


def test_groups_are_those_of_demsars_diagram() -> None:
    """Demsar (2006), p. 15 and figure 1a: CD 1.25 at 5 %, nothing separable; 1.12 at 10 %, C4.5 worse than two."""
    strict, loose = (ranks.rank_methods(C45_AUC, C45, alpha) for alpha in (0.05, 0.10))
    assert strict.critical_difference == pytest.approx(1.25, abs=5e-3)
    assert strict.groups == (("C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5"),)
    assert loose.critical_difference == pytest.approx(1.12, abs=5e-3)
    assert loose.groups == (("C4.5+m+cf", "C4.5+m", "C4.5+cf"), ("C4.5+cf", "C4.5"))


def test_nemenyis_p_is_that_of_rs_pmcmrplus(monkeypatch: pytest.MonkeyPatch) -> None:
    """From R, in scikit-posthocs' test_posthocs.py: three blocks, seven groups."""
    monkeypatch.setattr(ranks, "MIN_BLOCKS", 3)
    table = [[4, 3, 4, 4, 5, 6, 3], [1, 2, 3, 5, 6, 7, 7], [1, 2, 6, 4, 1, 5, 1]]
    expected = {"ba": 0.9999999, "ca": 0.8414506, "da": 0.9177741, "fa": 0.2147827, "fb": 0.2597539, "fc": 0.9449086}
    expected |= {"ga": 0.9976902, "gb": 0.9991770, "gc": 0.9888953, "gf": 0.5511935, "dc": 0.9999962, "fd": 0.8833015}
    ranking = ranks.rank_methods(table, tuple("abcdefg"), higher_is_better=False)
    place = {name: position for position, name in enumerate(ranking.methods)}
    found = {pair: ranking.pairwise_p[place[pair[0]]][place[pair[1]]] for pair in expected}
    assert found == pytest.approx(expected, abs=5e-6)


def test_holms_p_are_those_of_rs_multtest() -> None:
    """In statsmodels' test_multi.py, from R's package multtest, to 17 digits."""
    p = [0.838541367553, 0.642193923795, 0.680845947633, 0.967833824309, 0.71626938238]
    p += [0.177096952723, 5.23656777208e-5, 0.0202732688798, 0.00028140506198, 0.0149877310796]
    family = holm(dict(zip("abcdefghij", p, strict=True)), 10)
    expected = {"g": 5.23656777208e-4, "i": 2.53264555782e-3, "j": 0.1199018486368, "h": 0.1419128821586}
    assert family == pytest.approx({**dict.fromkeys("abcdef", 1.0), **expected}, rel=1e-9)
    assert {name for name, adjusted in family.items() if is_rejected(adjusted)} == {"g", "i"}


def test_holms_p_are_those_of_stdlibs_padjust() -> None:
    """Documentation of @stdlib/stats/padjust: 0.957, 0.804, -, 0.957, 0.565."""
    family = holm(dict(enumerate([0.319, 0.201, 0.4, 0.374, 0.113])), 5)
    assert [family[key] for key in (0, 1, 3, 4)] == pytest.approx([0.957, 0.804, 0.957, 0.565], abs=5e-4)


@pytest.mark.parametrize(
    ("groups", "p", "low", "high", "verdict"),
    [
        (CLINIC_1, 0.003166881489265175, -0.0744336620516462, 0.4037669953849797, Verdict.reproduced),
        (CLINIC_2, 0.4412034046017588, 0.1261653305099018, 0.999168002823431, Verdict.inconclusive),
    ],
    ids=["variable 1", "variable 2"],
)
def test_equivalence_is_that_of_rs_package_equivalence(
    groups: tuple[list[float], list[float]], p: float, low: float, high: float, verdict: Verdict
) -> None:
    """In statsmodels' test_tost.py, from R: tost(differences, eps=0.6)."""
    found = equivalence(np.subtract(*groups), Published(0.0), margin=0.6)
    assert (found.p_equivalent, found.low, found.high) == pytest.approx((p, low, high), rel=1e-9)
    assert found.verdict is verdict


@pytest.mark.parametrize(
    ("groups", "p", "low", "high"),
    [
        (CLINIC_1, 0.04853083976236974, -0.2666862980722534, 0.596019631405587),
        (CLINIC_2, 0.4317936812594803, 0.194916250699966, 0.930417082633366),
    ],
    ids=["variable 1", "variable 2"],
)
def test_equivalence_with_published_runs_is_welchs_of_rs_package_equivalence(
    groups: tuple[list[float], list[float]], p: float, low: float, high: float
) -> None:
    """In statsmodels' test_tost.py, from R: tost(x, y, eps=0.6)."""
    found = equivalence(groups[0], summary(groups[1]), margin=0.6)
    assert (found.p_equivalent, found.low, found.high) == pytest.approx((p, low, high), rel=1e-9)


def test_equivalence_of_the_sleep_data_is_what_toster_prints() -> None:
    """R's TOSTER, t_TOST(extra ~ group, data = sleep, low_eqbound = -1, high_eqbound = 1): TOST Lower 0.748319811."""
    found = equivalence(SLEEP_1, summary(SLEEP_2), margin=1.0)
    assert found.p_equivalent == pytest.approx(0.748319811, abs=5e-10)
    assert found.verdict is Verdict.inconclusive


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 24])
def test_equivalence_at_another_level_has_that_levels_interval(alpha: float) -> None:
    """The one-sample interval of scipy at level 1 - 2 alpha, and the verdict that it implies."""
    found = equivalence(SLEEP_1, Published(0.0), margin=2.2, alpha=alpha)
    expected = stats.ttest_1samp(SLEEP_1, 0.0).confidence_interval(1 - 2 * alpha)
    assert (found.low, found.high, found.confidence) == pytest.approx((*expected, 1 - 2 * alpha), rel=1e-9)
    assert (found.verdict is Verdict.reproduced) == (expected.low > -2.2 and expected.high < 2.2) == (alpha == 0.05)


@pytest.mark.parametrize("alpha", [0.0, 0.5, float("nan")])
def test_a_level_of_equivalence_is_between_zero_and_a_half(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"expected a level between 0 and 0\.5"):
        equivalence(SLEEP_1, Published(0.0), margin=1.0, alpha=alpha)
