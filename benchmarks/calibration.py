"""Do the statistics keep their promises? Simulates data with a known truth and counts errors of tests and intervals.

    python benchmarks/calibration.py
    python benchmarks/calibration.py --simulations 2000 --part family_errors

Prints a table: each claim, the number of simulations, the measured rate, and the wanted rate (none if measured only for
the docs). Exit status: 0 if every rate is as wanted, else 1. The tests run a part of it, and check that the fast
formulas here, which treat many simulations at once, agree with the functions of `analysis`.

Every design has five baselines that share the candidate's runs, as in a real study. Axes: S simulations, N
seeds, M models, C comparisons, P sign patterns, Q methods.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import typer
from scipy import stats

from analysis.stats.equivalence import Published, Verdict, equivalence
from analysis.stats.images import two_way_interval
from analysis.stats.power import SD_CONFIDENCE, detectable
from analysis.stats.profiles import profile
from analysis.stats.ranks import critical_difference
from analysis.stats.stratified import ALPHA, CONFIDENCE, RIDGE, SignFlip

Array = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]
Statistic = Literal["studentised", "mean"]

RUNS: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "lognormal": lambda rng, shape: rng.lognormal(size=shape) / np.sqrt((np.e - 1) * np.e),
    "discrete": lambda rng, shape: rng.binomial(359, 0.97, size=shape) / np.sqrt(359 * 0.97 * 0.03),
}
"""Distributions of runs, with variance 1: symmetric; skewness 6.2; 359 test images, with many ties."""
DESIGNS = ((2, 4), (6, 3), (3, 8))
"""Models x seeds."""
NUM_BASELINES = 5
EFFECTS: dict[str, tuple[float, bool]] = {
    "none": (0.0, False),
    "unequal variances": (0.0, True),
    "effects by model of 1 sd": (1.0, False),
    "effects by model of 2 sd, unequal variances": (2.0, True),
}
"""(sd over models of the true differences, whose mean is 0; whether the models' noise varies from 0.5 to 2)."""
NUM_PATTERNS = 1000
"""Sampled sign patterns for a test with more than eleven pairs; the test is valid with any number."""
_AT_ONCE = 500


@dataclass(frozen=True)
class Rate:
    """How often an event occurred in `num` simulations, and its allowed range; `wanted` None: only measured."""

    claim: str
    num: int
    rate: float
    wanted: tuple[float, float] | None = None

    @property
    def as_wanted(self) -> bool:
        """Whether the rate is in the wanted range, if there is one."""
        return self.wanted is None or self.wanted[0] <= self.rate <= self.wanted[1]

    @property
    def near_wanted(self) -> bool:
        """Whether the rate is in the wanted range, give or take three standard errors of the simulation."""
        if self.wanted is None:
            return True
        slack = 3 * float(np.sqrt(max(abs(self.rate) * (1 - abs(self.rate)), 1 / self.num) / self.num))
        return self.wanted[0] - slack <= self.rate <= self.wanted[1] + slack


def stratified_p(x_SMN: Array, rng: np.random.Generator, statistic: Statistic = "studentised") -> Array:
    """Two-sided p of each sample's stratified sign-flip test: as `SignFlip.raw_p`, or with |T| as the statistic. [S]"""
    _, num_models, num_seeds = x_SMN.shape
    v = 1 / (num_models**2 * (num_seeds - 1)) if num_seeds > 1 else 0.0
    w = 1 / (num_models**2 * num_seeds)
    found = []
    for start in range(0, len(x_SMN), _AT_ONCE):
        part = x_SMN[start : start + _AT_ONCE]
        # New patterns for each part: with one fixed set, its sampling error would affect every simulation.
        signs_PMN = _patterns(num_models * num_seeds, rng).reshape(-1, num_models, num_seeds)
        a, aa = np.zeros((len(part), len(signs_PMN))), np.zeros((len(part), len(signs_PMN)))
        for m in range(num_models):
            own = part[:, m] @ signs_PMN[:, m].T / num_seeds
            a += own / num_models
            aa += v * own * own
        squares = (part**2).sum(axis=(1, 2))[:, None] / num_seeds
        t = a * a
        if statistic == "studentised":
            t /= np.maximum((v + RIDGE * w) * squares - aa, 1e-300)
        found.append((t >= t[:, :1] * (1 - 1e-9)).mean(axis=1))
    return np.concatenate(found)


def _patterns(n: int, rng: np.random.Generator) -> Array:
    """The data's own pattern first; all patterns up to their opposites, or NUM_PATTERNS random ones. [P, n]"""
    if 2 ** (n - 1) <= 2 * NUM_PATTERNS:
        return np.array([(1.0, *rest) for rest in itertools.product((1.0, -1.0), repeat=n - 1)])
    signs: Array = 1.0 - 2.0 * rng.integers(0, 2, size=(NUM_PATTERNS, n)).astype(np.float64)
    signs[0] = 1.0
    return signs


def holm_rejects(p_SC: Array) -> npt.NDArray[np.bool_]:
    """Which comparisons Holm's method rejects at ALPHA; each row is a family. [S, C]."""
    size = p_SC.shape[1]
    order = np.argsort(p_SC, axis=1)
    passes = np.take_along_axis(p_SC, order, axis=1) <= ALPHA / np.arange(size, 0, -1)
    rejects = np.zeros_like(passes)
    np.put_along_axis(rejects, order, np.logical_and.accumulate(passes, axis=1), axis=1)
    return rejects


def differences(
    rng: np.random.Generator, draw: Draw, num: int, design: tuple[int, int], effect: tuple[float, bool] = (0.0, False)
) -> Array:
    """Candidate minus each baseline, scaled to noise of variance 1 (times the model's variance). [S, C, M, N]"""
    num_models, num_seeds = design
    spread, is_unequal = effect
    scale_M = np.geomspace(0.5, 2, num_models) if is_unequal else np.ones(num_models)
    effect_M = np.linspace(-1, 1, num_models)
    effect_M = spread * effect_M / effect_M.std()
    runs = draw(rng, (num, NUM_BASELINES + 1, num_models, num_seeds))
    return np.asarray((runs[:, :1] - runs[:, 1:]) / np.sqrt(2) * scale_M[:, None] + effect_M[:, None])


def _p_of_all(d_SCMN: Array, rng: np.random.Generator, statistic: Statistic = "studentised") -> Array:
    return np.stack([stratified_p(d_SCMN[:, c], rng, statistic) for c in range(d_SCMN.shape[1])], axis=1)


def family_errors(rng: np.random.Generator, num: int) -> Iterator[Rate]:
    """How often the primary family rejects a true null: all means over models are 0, or two of five are not."""
    for design, (name, draw), (what, effect) in itertools.product(DESIGNS, RUNS.items(), EFFECTS.items()):
        p_SC = _p_of_all(differences(rng, draw, num, design, effect), rng)
        where = f"{design[0]} x {design[1]}, {name} runs, {what}"
        yield Rate(f"family error: primary, {where}", num, float(holm_rejects(p_SC).any(axis=1).mean()), (0, 0.055))
        if what == "none":
            shifted = differences(rng, draw, num, design)
            shifted[:, :2] += 20.0
            rejects = holm_rejects(_p_of_all(shifted, rng))[:, 2:].any(axis=1)
            yield Rate(f"family error: primary, {where}, two of five true", num, float(rejects.mean()), (0, 0.055))


def interval_coverage(rng: np.random.Generator, num: int) -> Iterator[Rate]:
    """How often the inverted 95 % interval covers the mean over models, i.e. the test of the truth does not reject."""
    for design, (name, draw), (what, effect) in itertools.product(DESIGNS, RUNS.items(), EFFECTS.items()):
        d_SMN = differences(rng, draw, num, design, effect)[:, 0]
        covered = float((stratified_p(d_SMN, rng) > 1 - CONFIDENCE).mean())
        highest = 0.97 if name != "discrete" and effect[0] == 0 else 1.0
        yield Rate(f"coverage: {design[0]} x {design[1]}, {name} runs, {what}", num, covered, (0.945, highest))
    few = max(50, num // 20)  # slow, one at a time; so few scatter by 0.7 points, and the rows above carry the bar
    for design, (what, effect) in itertools.product(DESIGNS, EFFECTS.items()):
        held = num_raised = 0
        for own in differences(rng, RUNS["normal"], few, design, effect)[:, 0]:
            test = SignFlip(list(own))
            held += 0.0 in test.interval()
            num_raised += test.p() > test.raw_p()
        where = f"{design[0]} x {design[1]}, {what}"
        highest = 0.97 if effect[0] == 0 else 1.0
        yield Rate(f"coverage: SignFlip itself, {where}", few, held / few, (0.93, highest))
        yield Rate(f"p above the test's own, {where}", few, num_raised / few)


def gatekept_errors(rng: np.random.Generator, num: int) -> Iterator[Rate]:
    """How often a difference is claimed on a model without one, while another model has one."""
    num = max(200, num // 4)
    for (num_models, num_seeds), num_true in itertools.product(((3, 8), (2, 12), (3, 12)), (0, 1, 4, 5)):
        d = differences(rng, RUNS["normal"], num, (num_models, num_seeds))
        d[:, :num_true, 0] += 5.0  # on the first model only
        gate_SC = holm_rejects(_p_of_all(d, rng))
        p_S = [stratified_p(d[:, c, m : m + 1], rng) for c in range(NUM_BASELINES) for m in range(num_models)]
        claims = holm_rejects(np.stack(p_S, axis=1)).reshape(num, NUM_BASELINES, num_models) & gate_SC[:, :, None]
        is_null = np.ones((NUM_BASELINES, num_models), dtype=bool)
        is_null[:num_true, 0] = False
        error = float((claims & is_null).any(axis=(1, 2)).mean())
        anything = (claims & is_null).any(axis=(1, 2)) | gate_SC[:, num_true:].any(axis=1)
        where = f"{num_models} x {num_seeds}, {num_true} of 5 baselines differ on one model"
        yield Rate(f"family error: by model, gatekept, {where}", num, error, (0, 0.055))
        yield Rate(f"family error: primary or by model, {where}", num, float(anything.mean()))


def power_table(rng: np.random.Generator, num: int) -> Iterator[Rate]:
    """Power to find a difference of 1 sd in a family of five; also for the mean as the statistic, for comparison."""
    num = max(200, num // 4)
    for design, (what, effect) in itertools.product(DESIGNS, EFFECTS.items()):
        d_SMN = differences(rng, RUNS["normal"], num, design, effect)[:, 0] + 1.0
        statistics: tuple[Statistic, ...] = ("studentised", "mean")
        for statistic in statistics:
            found = float((stratified_p(d_SMN, rng, statistic) <= ALPHA / NUM_BASELINES).mean())
            yield Rate(f"power: 1 sd, {design[0]} x {design[1]}, {what}, {statistic}", num, found)
    for design in DESIGNS:
        wanted = detectable(*design, 1.0, NUM_BASELINES)
        if wanted is None:
            raise ValueError(f"{design} can reject nothing in a family of {NUM_BASELINES}")
        d_SMN = differences(rng, RUNS["normal"], num, design)[:, 0] + wanted
        gap = float((stratified_p(d_SMN, rng) <= ALPHA / NUM_BASELINES).mean()) - 0.8
        yield Rate(f"power minus planned 80 %: {design[0]} x {design[1]}", num, gap, (-0.04, 0.04))


def equivalence_errors(rng: np.random.Generator, num: int) -> Iterator[Rate]:
    """How often methods that differ by exactly the margin are judged equivalent, at the first step of the family."""
    for design, (name, draw) in itertools.product(DESIGNS, RUNS.items()):
        d_SMN = differences(rng, draw, num, design)[:, 0]
        # At +margin, x - margin has a true mean of 0; the other side is 20 sd away and always rejected.
        below = d_SMN.mean(axis=(1, 2)) < 0
        one_sided = np.where(below, stratified_p(d_SMN, rng) / 2, 1.0)
        error = float((one_sided <= ALPHA).mean())
        yield Rate(f"error: equivalent, at the margin, {design[0]} x {design[1]}, {name} runs", num, error, (0, 0.055))


def image_coverage(rng: np.random.Generator, num: int) -> Iterator[Rate]:
    """How often the two-way bootstrap interval covers the difference for infinitely many images and seeds."""
    num, num_images = min(400, max(50, num // 50)), 400  # one at a time
    for num_models, num_seeds in (*DESIGNS, (3, 3), (3, 10)):
        covered = 0
        for _ in range(num):
            shared = rng.normal(0, 0.3, size=num_images)
            strata = []
            for _model in range(num_models):
                seeds = rng.normal(0, 0.02, size=(num_seeds, 1))
                p_right = np.clip(0.1 + shared / 3, 0, 0.5)
                ours = (rng.uniform(size=(num_seeds, num_images)) < p_right + seeds) * 1.0
                theirs = (rng.uniform(size=(num_seeds, num_images)) < p_right) * 1.0
                strata.append(ours - theirs)
            covered += 0.0 in two_way_interval(strata, rng)
        yield Rate(f"coverage: images and seeds, {num_models} x {num_seeds}", num, covered / num)


def profile_coverage(rng: np.random.Generator, num: int) -> Iterator[Rate]:
    """How often the interval of the interquartile mean covers it, for normal scores, whose interquartile mean is 0."""
    num = min(1000, max(50, num // 20))  # one at a time
    for num_tasks, num_runs in itertools.product((1, 2, 6), (3, 4, 10)):
        covered = 0
        for scores in rng.normal(size=(num, num_tasks, num_runs)):
            found = profile({str(task): own for task, own in enumerate(scores)}, [0.0], rng)
            covered += 0.0 in found.interval
        yield Rate(f"coverage: interquartile mean, tasks: {num_tasks}, runs of each: {num_runs}", num, covered / num)


def spread_bound(rng: np.random.Generator, num: int) -> Iterator[Rate]:
    """How often the upper bound on a standard deviation exceeds the true one."""
    for n in (3, 5, 10):
        sd = rng.normal(size=(num, n)).std(axis=1, ddof=1)
        held = sd * np.sqrt((n - 1) / stats.chi2.isf(SD_CONFIDENCE, n - 1)) >= 1
        wanted = (SD_CONFIDENCE - 0.01, SD_CONFIDENCE + 0.01)
        yield Rate(f"coverage: upper bound on sd, n={n}, normal", num, float(held.mean()), wanted)


def random_ranks(rng: np.random.Generator, num: int, num_models: int, num_methods: int) -> Array:
    """Ranks 1 to Q on each model of methods that are all alike. [S, M, Q]."""
    order_SMQ = rng.normal(size=(num, num_models, num_methods)).argsort(axis=2)
    return np.asarray(order_SMQ.argsort(axis=2) + 1, dtype=np.float64)


def friedman_of_ranks(ranks_SMQ: Array) -> tuple[Array, Array]:
    """Friedman's chi2 and Iman and Davenport's F, without ties. [S], [S]."""
    _, num_models, num_methods = ranks_SMQ.shape
    scale = 12 * num_models / (num_methods * (num_methods + 1))
    chi2_S: Array = scale * ((ranks_SMQ.mean(axis=1) - (num_methods + 1) / 2) ** 2).sum(axis=1)
    with np.errstate(divide="ignore"):
        f_S: Array = (num_models - 1) * chi2_S / (num_models * (num_methods - 1) - chi2_S)
    return chi2_S, f_S


def rank_errors(rng: np.random.Generator, num: int) -> Iterator[Rate]:
    """How often Friedman's and Nemenyi's tests reject when all six methods are alike."""
    num_methods = 6
    for num_models in (5, 8, 12, 20):
        ranks_SMQ = random_ranks(rng, num, num_models, num_methods)
        chi2_S, f_S = friedman_of_ranks(ranks_SMQ)
        df = num_methods - 1, (num_methods - 1) * (num_models - 1)
        apart_S = np.ptp(ranks_SMQ.mean(axis=1), axis=1) >= critical_difference(num_methods, num_models)
        where = f"6 methods, {num_models} models"
        yield Rate(f"error: Friedman chi2, {where}", num, float((stats.chi2.sf(chi2_S, df[0]) <= ALPHA).mean()))
        yield Rate(f"error: Iman-Davenport F, {where}", num, float((stats.f.sf(f_S, *df) <= ALPHA).mean()))
        yield Rate(f"error: Nemenyi, any pair, {where}", num, float(apart_S.mean()), (0.0, 0.055))


def verdict_errors(rng: np.random.Generator, num: int) -> Iterator[Rate]:
    """How often a method exactly at the margin is judged `reproduced` or `differs`; both are errors there."""
    num, sd, margin = min(num, 10_000), 0.5, 1.0  # one at a time
    for n, (known, num_published) in itertools.product((3, 5, 10), {"exact": 0, "one run": 1, "3 runs": 3}.items()):
        verdicts = Counter[Verdict]()
        for ours in rng.normal(margin, sd, size=(num, n)):
            theirs = rng.normal(0.0, sd, size=num_published)
            published = Published(
                mean=float(theirs.mean()) if num_published else 0.0,
                sd=float(theirs.std(ddof=1)) if num_published > 1 else None,
                n=num_published or None,
            )
            verdicts[equivalence(ours, published, margin).verdict] += 1
        for verdict in (Verdict.reproduced, Verdict.differs):
            claim = f"error: {verdict.value}, at the margin, n={n}, published {known}"
            wanted = (0.0, 0.06 if known == "3 runs" else 0.055)  # Welch's test is an approximation
            yield Rate(claim, num, verdicts[verdict] / num, wanted)


PARTS: tuple[Callable[[np.random.Generator, int], Iterator[Rate]], ...] = (
    family_errors,
    interval_coverage,
    gatekept_errors,
    power_table,
    equivalence_errors,
    image_coverage,
    profile_coverage,
    spread_bound,
    rank_errors,
    verdict_errors,
)


def main(
    simulations: Annotated[int, typer.Option(min=100, help="Simulations per claim; slow claims use fewer.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Random seed of the simulations.")] = 0,
    part: Annotated[str | None, typer.Option(help="Run only this part: family_errors, power_table, ...")] = None,
) -> None:
    """Measures how often each test and interval errs."""
    print("| claim | simulations | rate | wanted |\n| --- | --- | --- | --- |")
    start = time.perf_counter()
    wrong = 0
    for each in PARTS:
        if part not in {None, each.__name__}:
            continue
        for rate in each(np.random.default_rng(seed), simulations):
            wanted = "" if rate.wanted is None else f"{100 * rate.wanted[0]:g} to {100 * rate.wanted[1]:g} %"
            missed = "" if rate.as_wanted else " MISSED"
            print(f"| {rate.claim} | {rate.num} | {100 * rate.rate:.2f} % | {wanted}{missed} |", flush=True)
            wrong += not rate.as_wanted
    print(f"\n{wrong} rates are not as wanted; {time.perf_counter() - start:.0f} s")
    raise SystemExit(int(wrong > 0))


if __name__ == "__main__":
    typer.run(main)
