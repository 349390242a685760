r"""Is one method better than another on these models? The stratified sign-flip test and the interval that inverts it.

The data are paired differences, candidate minus baseline: for each stratum (model) m = 1..M an array x_m [n_m] with one
entry per seed. Models are fixed, seeds are random. With w_m = 1 / (M^2 n_m),

    estimate   T = 1/M sum_m mean(x_m)
    spread     V = sum_m w_m var(x_m, ddof=1)       (a stratum of one pair contributes 0)
    scale      Q = sum_m w_m mean(x_m^2)
    statistic  t = T^2 / (V + RIDGE Q)

If the two methods are interchangeable on every model, i.e. their runs have one distribution (of any shape), each
difference could equally have had the opposite sign. The p of a shift d is the share of the 2^n sign patterns for which
t, computed from the flipped differences x - d, is at least the t of the unflipped x - d. For d = 0 and interchangeable
methods this test is exact: P(p <= a) <= a for any number of seeds (Fisher 1935). For other shifts, and for a mean of 0
over models that differ, it assumes that differences are symmetric about each model's mean; benchmarks/calibration.py
simulates these cases.

Why t and not |T|: the claim is about the mean over models, which can be 0 even if the models differ. Flipping T then
mistakes differences between models for noise and hardly ever rejects. V is only the noise within models, so t keeps the
level in that case and has power where T has none; docs/statistics.md gives both rates. With one model the two tests are
the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

ALPHA = 0.05
CONFIDENCE = 1 - ALPHA
EXACT_PAIRS = 20
"""Up to this many pairs all 2^n sign patterns are used; above, at most MAX_SAMPLED are sampled with a fixed seed."""
MAX_SAMPLED = 2**16
_MAX_SIGNS = 2**24  # limit per test: 10,000 patterns for 1,670 pairs
RIDGE = 1e-6
"""Weight of Q in the denominator: if there is no spread, t still grows with |T| instead of being 0 / 0."""
_TIE = 1e-9
"""Relative difference below which statistics count as tied, despite rounding. V errs by less than eps / RIDGE."""
_STEPS = np.geomspace(0.05, 100.0, 24)
"""Distances from the estimate, in standard errors, at which p is evaluated; _FURTHER: multiples of announced shifts."""
_FURTHER = np.array([1.25, 1.6, 2.0, 3.0, 5.0, 10.0, 100.0])
_BISECTIONS = 32
_AT_ONCE = 2**14
"""Patterns per matrix product, chosen to fit into the processor's cache."""


@dataclass(frozen=True)
class Interval:
    """Closed interval of shifts at level `confidence`; an end is infinite if the design cannot exclude any shift."""

    low: float
    high: float
    confidence: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def finite(values: npt.ArrayLike, at_least: int = 1) -> Array:
    """The values as a float64 vector. Raises ValueError for NaN, infinity, or fewer than `at_least` values."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < at_least:
        raise ValueError(f"shape {array.shape}; expected one axis with at least {at_least} value{'s' * (at_least > 1)}")
    num_bad = int((~np.isfinite(array)).sum())
    if num_bad:
        raise ValueError(f"{num_bad} of {len(array)} values are not finite; leave out unfinished runs")
    return array


class SignFlip:
    """The test of paired differences: `p` of a shift, `interval` of all shifts that are not rejected.

    Args:
        strata: one array of differences (candidate minus baseline) per model, with one entry per seed.
        shifts: the shifts other than 0 for which `p` will be called, such as the margins of an equivalence test.
        seed: for sampling sign patterns, if they are sampled.

    Raises:
        ValueError: no stratum, an empty one, or a value that is not finite.
    """

    def __init__(self, strata: Sequence[npt.ArrayLike], shifts: Sequence[float] = (), seed: int = 0) -> None:
        self.strata = tuple(finite(values) for values in strata)
        if not self.strata:
            raise ValueError("no stratum; expected an array of differences for each model")
        self.n = sum(map(len, self.strata))
        self.is_exact = self.n <= EXACT_PAIRS
        self.estimate = float(np.mean([values.mean() for values in self.strata]))
        self._shifts = (0.0, *shifts)
        self._seed = seed

    @property
    def standard_error(self) -> float:
        """sqrt(V), in the unit of the differences; 0 if no stratum has two pairs that differ."""
        spreads = [values.var(ddof=1) / len(values) for values in self.strata if len(values) > 1]
        return float(np.sqrt(sum(spreads))) / len(self.strata)

    def raw_p(self, shift: float = 0.0) -> float:
        """Two-sided p of this shift by itself: the share of sign patterns whose t is at least the data's."""
        return float(self._p(np.array([shift]))[0])

    def p(self, shift: float = 0.0) -> float:
        """Two-sided p of an announced shift: the largest raw_p of all shifts at least as far from the estimate.

        This makes p fall with distance from the estimate, so the shifts that are not rejected form an interval. raw_p
        need not fall if models differ a lot, because flipping all seeds of one model can undo a shift. Usually the two
        are equal; if not, p is larger and therefore still valid.
        """
        if shift not in self._shifts:
            raise ValueError(f"shift {shift:g} was not announced: {self._shifts}")
        if shift == self.estimate:
            return 1.0
        shifts, p = self._below if shift < self.estimate else self._above
        return float(p[int(np.flatnonzero(shifts == shift)[0])])

    def one_sided_p(self, shift: float, *, above: bool) -> float:
        """P of H0 that the effect is at most the announced shift (`above`), or else at least: p / 2, or 1 - p / 2."""
        on_its_side = self.estimate > shift if above else self.estimate < shift
        return self.p(shift) / 2 if on_its_side else 1.0 - self.p(shift) / 2

    def p_error(self, p: float) -> float:
        """Standard error of a p from sampled patterns, sqrt(p (1 - p) / patterns); 0 if the p is exact."""
        return 0.0 if self.is_exact else float(np.sqrt(p * (1 - p) / num_patterns(self.n)))

    def interval(self, confidence: float = CONFIDENCE) -> Interval:
        """All shifts with p > 1 - confidence. An announced shift is outside exactly if its p is not above that."""
        alpha = (1 - confidence) * (1 + _TIE)
        ends = [self._bracket(*side, alpha) for side in (self._below, self._above)]
        kept, rejected = (np.array(found) for found in zip(*ends, strict=True))
        for _ in range(_BISECTIONS if np.isfinite(kept).any() else 0):
            middle = (kept + rejected) / 2
            is_kept = self._p(middle) > alpha
            kept, rejected = np.where(is_kept, middle, kept), np.where(is_kept, rejected, middle)
        return Interval(float(kept[0]), float(kept[1]), confidence)

    def _bracket(self, shifts: Array, p: Array, alpha: float) -> tuple[float, float]:
        """(last shift kept, first shift rejected) going outwards from the estimate; infinite if all are kept."""
        num_kept = int((p > alpha).sum())
        if num_kept == len(shifts):
            end = float(np.copysign(np.inf, shifts[-1] - self.estimate))
            return end, end
        return (float(shifts[num_kept - 1]) if num_kept else self.estimate), float(shifts[num_kept])

    @cached_property
    def _below(self) -> tuple[Array, Array]:
        """Shifts below the estimate, going outwards, and the p of each."""
        return self._outwards(-1.0)

    @cached_property
    def _above(self) -> tuple[Array, Array]:
        return self._outwards(1.0)

    def _outwards(self, side: float) -> tuple[Array, Array]:
        largest = max(float(np.abs(values - self.estimate).max()) for values in self.strata)
        unit = self.standard_error or largest or max(abs(self.estimate), 1e-6)
        announced = np.array([shift for shift in self._shifts if side * (shift - self.estimate) > 0])
        far = (self.estimate + np.outer(announced - self.estimate, _FURTHER)).ravel()
        grid = self.estimate + side * unit * _STEPS
        shifts = np.unique(np.concatenate([grid, announced, far]))[:: int(side)]
        p = self._p(shifts)
        return shifts, np.maximum.accumulate(p[::-1])[::-1]

    def _p(self, shifts: Array) -> Array:
        """raw_p of each shift. [shifts] -> [shifts]."""
        # Let y = shift - estimate, N / D be a pattern's t and N_0 / D_0 the data's t_0. Then
        # t >= t_0 (1 - tie) is N D_0 >= N_0 (1 - tie) D, and N and D are quadratic in y with coefficients from `_sums`.
        usable = np.where(np.isfinite(shifts), shifts, self.estimate)
        y = usable - self.estimate
        powers = np.stack([np.ones_like(y), -2 * y, y * y], axis=1)
        constant = powers @ (self._squares @ [1.0, RIDGE])
        first = self._patterns[:, 0]
        top, bottom = powers @ first[:3], constant - powers @ first[3:]
        top = top * (1 - _TIE)
        weights = np.hstack([powers * bottom[:, None], powers * top[:, None]])
        counts = np.zeros(len(y))
        for start in range(0, self._patterns.shape[1], _AT_ONCE):
            some = weights @ self._patterns[:, start : start + _AT_ONCE]
            counts += (some >= (top * constant)[:, None]).sum(axis=1)
        return np.asarray(counts / self._patterns.shape[1])

    @cached_property
    def _squares(self) -> Array:
        """The parts of V and Q of x - shift that no sign change affects, as coefficients of `powers`. [3, 2]

        Column 0: the sums over m of v_m (mean(x'^2), mean(x'), 1), before V's squares of means are subtracted.
        Column 1: the same with w_m, for Q.
        """
        num = len(self.strata)
        centred = [values - self.estimate for values in self.strata]
        moments_M3 = np.array([[np.mean(x * x), x.mean(), 1.0] for x in centred])
        weights_M2 = np.array([[_v(x, num), 1 / (num * num * len(x))] for x in centred])
        return np.asarray(moments_M3.T @ weights_M2)

    @cached_property
    def _patterns(self) -> Array:
        """For every sign pattern, the sums that determine its t for any shift; column 0 is the unflipped data.

        With x' = x - estimate, a pattern s has a_m = mean(s x'_m) and b_m = mean(s_m); a and b are their means over m.
        Rows: a^2, a b, b^2, and the sums over m of v_m a_m^2, v_m a_m b_m, v_m b_m^2 with v_m = w_m n_m / (n_m - 1).
        Only one of two opposite patterns is kept. [6, P]
        """
        if self.is_exact:
            a, b, *squares = _all_patterns(self.strata, self.estimate)
        else:
            rng = np.random.default_rng(self._seed)
            a, b, *squares = _some_patterns(self.strata, self.estimate, num_patterns(self.n), rng)
        return np.stack([a * a, a * b, b * b, *squares])


def smallest_p(n: int) -> float:
    """Smallest two-sided p of n pairs: 2 / 2^n, or 1 / the number of sampled patterns."""
    return 2.0 ** (1 - n) if n <= EXACT_PAIRS else 1 / num_patterns(n)


def num_patterns(n: int) -> int:
    """Number of sign patterns used for n pairs, one of each opposite pair."""
    return 2 ** max(0, n - 1) if n <= EXACT_PAIRS else max(2, min(MAX_SAMPLED, _MAX_SIGNS // n))


def _v(values: Array, num_strata: int) -> float:
    return 1 / (num_strata**2 * (len(values) - 1)) if len(values) > 1 else 0.0


def _all_patterns(strata: Sequence[Array], centre: float) -> Array:
    """Sums of every pattern that keeps the first difference's sign, built up stratum by stratum: sums add up."""
    sums = np.zeros((5, 1))
    for m, values in enumerate(strata):
        signs_PN = _signs(len(values), fix_first=m == 0)
        own = _sums(signs_PN @ (values - centre), signs_PN.sum(axis=1), values, len(strata))
        sums = (sums[:, :, None] + own[:, None, :]).reshape(5, -1)
    return sums


def _signs(n: int, *, fix_first: bool) -> Array:
    """All patterns of n signs; fix_first keeps the first sign at +1. [2^n or 2^(n-1), n]."""
    count = n - 1 if fix_first else n
    bits = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
    signs = 1.0 - 2.0 * bits
    return np.asarray(np.hstack([np.ones((len(signs), 1)), signs]) if fix_first else signs)


def _some_patterns(strata: Sequence[Array], centre: float, num: int, rng: np.random.Generator) -> Array:
    """Sums of `num` patterns: the unflipped data first, then random ones."""
    sums = np.zeros((5, num))
    for values in strata:
        bits = np.unpackbits(rng.integers(0, 256, size=(num, -(-len(values) // 8)), dtype=np.uint8), axis=1)
        signs_PN = 1.0 - 2.0 * bits[:, : len(values)]
        signs_PN[0] = 1.0
        sums += _sums(signs_PN @ (values - centre), signs_PN.sum(axis=1), values, len(strata))
    return sums


def _sums(a: Array, b: Array, values: Array, num_strata: int) -> Array:
    """A stratum's part of a, b and the three sums, from the sums of its flipped differences and signs. [5, P]."""
    a, b, v = a / len(values), b / len(values), _v(values, num_strata)
    return np.stack([a / num_strata, b / num_strata, v * a * a, v * a * b, v * b * b])
