"""Are the statistics what they say? Simulations of what is known to be true, and how often each test or interval errs.

    python benchmarks/calibration.py
    python benchmarks/calibration.py --simulations 2000

Prints a table: each claim, the number of simulations, the rate measured, the rate wanted (none: measured for the docs).
Exit status: 0 every rate is as wanted, 1 one is not. The tests run a part of it, and check that the fast formulas here,
over many simulations at once, give what the functions of `analysis` give one at a time.

Axes: S simulations, N runs (seeds) or pairs, C comparisons, M models, Q methods.
"""

import itertools
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from scipy import stats

from analysis.stats.equivalence import Published, Verdict, equivalence
from analysis.stats.families import critical_difference, probability_of_improvement
from analysis.stats.paired import ALPHA, CONFIDENCE, is_underpowered
from analysis.stats.power import SD_CONFIDENCE, detectable_difference, power, sign_flip_detectable, sign_flip_power

Array = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]

RUNS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0.0),
    "lognormal": (lambda rng, shape: rng.lognormal(size=shape), float(np.exp(0.5))),
    "beta(8, 2)": (lambda rng, shape: rng.beta(8, 2, size=shape), 0.8),
}
"""Distributions and their means. Skewness: 0, 6.2, -0.8 (accuracies below a ceiling)."""
NUM_RESAMPLES = 1999
"""Of the bootstrap intervals measured here; the library's have 9999."""


@dataclass(frozen=True)
class Rate:
    """How often something happened in `num` simulations, and how often it may; `wanted` None: only measured."""

    claim: str
    num: int
    rate: float
    wanted: tuple[float, float] | None = None

    @property
    def as_wanted(self) -> bool:
        """Whether the rate is within what is wanted, if anything is."""
        return self.wanted is None or self.wanted[0] <= self.rate <= self.wanted[1]

    @property
    def near_wanted(self) -> bool:
        """Whether it is as wanted but for three standard errors of the simulation."""
        if self.wanted is None:
            return True
        slack = 3 * float(np.sqrt(max(abs(self.rate) * (1 - abs(self.rate)), 1 / self.num) / self.num))
        return self.wanted[0] - slack <= self.rate <= self.wanted[1] + slack


def sign_flip_p(differences_SN: Array) -> Array:
    """Exact two-sided p of each row: the share of sign patterns whose sum is as far from 0. [S]."""
    num_pairs = differences_SN.shape[1]
    # Half of the patterns: the other half are their mirror images.
    signs_PN = np.array([(1.0, *rest) for rest in itertools.product((1.0, -1.0), repeat=num_pairs - 1)])
    as_far = np.zeros(len(differences_SN))
    observed = np.abs(differences_SN.sum(axis=1)) * (1 - 1e-12)
    for some in np.array_split(signs_PN, max(1, len(signs_PN) // 32)):
        as_far += (np.abs(differences_SN @ some.T) >= observed[:, None]).sum(axis=1)
    return as_far / len(signs_PN)


def t_test_p(differences_SN: Array) -> Array:
    """Two-sided p of each row by Student's t. [S]."""
    return np.asarray(stats.ttest_1samp(differences_SN, 0, axis=1).pvalue)


def holm_rejects(p_SC: Array) -> npt.NDArray[np.bool_]:
    """Which comparisons Holm's method rejects at ALPHA, each row a family. [S, C]."""
    size = p_SC.shape[1]
    order = np.argsort(p_SC, axis=1)
    passes = np.take_along_axis(p_SC, order, axis=1) <= ALPHA / np.arange(size, 0, -1)
    rejects = np.zeros_like(passes)
    np.put_along_axis(rejects, order, np.logical_and.accumulate(passes, axis=1), axis=1)
    return rejects


def differences_from_one_candidate(
    rng: np.random.Generator, draw: Draw, num: int, num_pairs: int, num_baselines: int
) -> Array:
    """Candidate minus each baseline, all alike; a seed moves all of them: [S, C, N], correlated by the candidate."""
    runs_SCN = draw(rng, (num, num_baselines + 1, num_pairs)) + draw(rng, (num, 1, num_pairs))
    return runs_SCN[:, :1] - runs_SCN[:, 1:]


def family_errors(rng: np.random.Generator, num: int) -> Iterator[Rate]:
    """How often a family in which nothing, or half, is true rejects something that is not."""
    wanted = (0.0, 0.055)
    for (name, (draw, _)), num_pairs in itertools.product(RUNS.items(), (3, 5, 10)):
        for test, num_models in itertools.product((t_test_p, sign_flip_p), (1, 8)):
            size = 5 * num_models
            impossible = test is sign_flip_p and is_underpowered(num_pairs, size)
            if impossible and num_models > 1:  # it can reject nothing, at a high price
                continue
            differences = [differences_from_one_candidate(rng, draw, num, num_pairs, 5) for _ in range(num_models)]
            differences_SCN = np.concatenate(differences, axis=1)
            label = f"{test.__name__[:-2].replace('_', '-')}, {size} comparisons of {num_pairs} pairs, {name} runs"
            for num_true in (0, size // 2) if name == "normal" else (0,):
                shifted_SCN = differences_SCN.copy()
                shifted_SCN[:, :num_true] += 20.0
                p_SC = test(shifted_SCN.reshape(-1, num_pairs)).reshape(num, size)
                error = float(holm_rejects(p_SC)[:, num_true:].any(axis=1).mean())
                note = f"{num_true} of them true" + " (underpowered)" * impossible
                yield Rate(f"family error: {label}, {note}", num, error, wanted if name == "normal" else None)


def t_coverage(rng: np.random.Generator, num: int) -> Iterator[Rate]:
    """How often Student's interval holds the mean."""
    for (name, (draw, mean)), n in itertools.product(RUNS.items(), (3, 5, 10, 20, 50)):
        covered = t_test_p(draw(rng, (num, n)) - mean) > 1 - CONFIDENCE
        yield Rate(
            f"coverage: t, n={n}, {name}", num, float(covered.mean()), (0.94, 0.96) if name == "normal" else None
        )


def bootstrap_coverage(rng: np.random.Generator, num: int) -> Iterator[Rate]:
    """How often the percentile and the BCa interval hold the mean; an undefined one does not."""
    for (name, (draw, mean)), n in itertools.product(RUNS.items(), (3, 5, 10, 20, 50)):
        for method in ("percentile", "BCa"):
            covered = 0
            for _ in range(max(1, num // 100)):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # BCa of equal values
                    found = stats.bootstrap(
                        (draw(rng, (100, n)),), np.mean, axis=1, method=method, n_resamples=NUM_RESAMPLES, rng=rng
                    ).confidence_interval
                covered += int(((found.low <= mean) & (mean <= found.high)).sum())
            sims = 100 * max(1, num // 100)
            yield Rate(f"coverage: {method}, n={n}, {name}", sims, covered / sims)


def power_errors(rng: np.random.Generator, num: int) -> Iterator[Rate]:
    """Rejections with the right sign minus what power() says; those of the sign-flip test minus sign_flip_power()."""
    for n, size, target in itertools.product((3, 5, 10, 20), (1, 5), (0.3, 0.8, 0.95)):
        effect = detectable_difference(n, 1.0, size, target)
        differences_SN = rng.normal(effect, size=(num, n))
        found = (t_test_p(differences_SN) <= ALPHA / size) & (differences_SN.mean(axis=1) > 0)
        gap = float(found.mean()) - power(n, effect, 1.0, size)
        yield Rate(f"power minus power(): n={n}, {size} comparisons, planned {target:.0%}", num, gap, (-0.03, 0.03))
    for (size, n), target in itertools.product(((1, 6), (1, 8), (1, 10), (5, 8), (5, 9), (5, 12)), (0.5, 0.8)):
        detectable = sign_flip_detectable(n, 1.0, size, target)
        if detectable is None:
            raise ValueError(f"{n} pairs can reject nothing in a family of {size}")
        flips = min(num, 4000)
        rejected = sign_flip_p(rng.normal(detectable, size=(flips, n))) <= ALPHA / size * (1 + 1e-12)
        gap = float(rejected.mean()) - sign_flip_power(n, detectable, 1.0, size)
        yield Rate(
            f"power minus sign_flip_power(): n={n}, {size} comparisons, planned {target:.0%}", flips, gap, (-0.03, 0.03)
        )


def spread_bound(rng: np.random.Generator, num: int) -> Iterator[Rate]:
    """How often the upper bound on a standard deviation is one."""
    for n in (3, 5, 10):
        sd = rng.normal(size=(num, n)).std(axis=1, ddof=1)
        held = sd * np.sqrt((n - 1) / stats.chi2.isf(SD_CONFIDENCE, n - 1)) >= 1
        wanted = (SD_CONFIDENCE - 0.01, SD_CONFIDENCE + 0.01)
        yield Rate(f"coverage: upper bound on sd, n={n}, normal", num, float(held.mean()), wanted)


def random_ranks(rng: np.random.Generator, num: int, num_models: int, num_methods: int) -> Array:
    """Ranks 1 to Q of methods that are all alike, on each model. [S, M, Q]."""
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
    """How often a method at the margin's edge is said to be reproduced, and one within it to differ."""
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


def improvement_coverage(rng: np.random.Generator, num: int) -> Iterator[Rate]:
    """How often the interval of the probability of improvement holds it; an undefined one does not."""
    num, shift = min(num, 500), 0.5  # one at a time
    truth = float(stats.norm.cdf(shift / np.sqrt(2)))
    for num_tasks, n in itertools.product((1, 8), (3, 5, 10)):
        covered = 0
        for _ in range(num):
            x, y = ({str(task): rng.normal(mean, size=n) for task in range(num_tasks)} for mean in (shift, 0.0))
            found = probability_of_improvement(x, y, rng)
            covered += found.low is not None and found.high is not None and found.low <= truth <= found.high
        claim = f"coverage: probability of improvement, tasks: {num_tasks}, runs of each: {n}, normal"
        yield Rate(claim, num, covered / num)


PARTS: tuple[Callable[[np.random.Generator, int], Iterator[Rate]], ...] = (
    family_errors,
    t_coverage,
    bootstrap_coverage,
    power_errors,
    spread_bound,
    rank_errors,
    verdict_errors,
    improvement_coverage,
)


def main(
    simulations: Annotated[int, typer.Option(min=100, help="Simulations of each claim, fewer where slow.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Of the simulations.")] = 0,
) -> None:
    """Measures how often each test and interval errs."""
    print("| claim | simulations | rate | wanted |\n| --- | --- | --- | --- |")
    start = time.perf_counter()
    wrong = 0
    for part in PARTS:
        sims = simulations // 5 if part is bootstrap_coverage else simulations
        for rate in part(np.random.default_rng(seed), sims):
            wanted = "" if rate.wanted is None else f"{100 * rate.wanted[0]:g} to {100 * rate.wanted[1]:g} %"
            missed = "" if rate.as_wanted else " MISSED"
            print(f"| {rate.claim} | {rate.num} | {100 * rate.rate:.2f} % | {wanted}{missed} |", flush=True)
            wrong += not rate.as_wanted
    print(f"\n{wrong} rates are not as wanted; {time.perf_counter() - start:.0f} s")
    raise SystemExit(int(wrong > 0))


if __name__ == "__main__":
    typer.run(main)
