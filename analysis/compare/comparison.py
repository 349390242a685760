"""A frozen `Comparison` holds a question, its answer and all statistics reported about it; `compare` computes them.

Tables, sentences, marks, figures and JSON only render a Comparison and compute nothing, so they cannot contradict each
other. Every Comparison satisfies the following, which is tested on random studies:

- better or worse: adjusted_p <= 0.05, and the interval excludes 0 on that side;
- equivalent: equivalence.adjusted_p <= 0.05, and its interval lies within the margin; the verdict is not a difference;
- not distinguishable, design too small: the interval holds 0;
- design too small: no data of this design could have given adjusted_p <= 0.05.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from analysis.stats.families import holm, is_rejected, levels, reachable, seeds_needed
from analysis.stats.stratified import Interval, SignFlip

MIN_ARCHITECTURES = 6
"""`Scope.architectures` needs at least this many models: with fewer, p cannot reach 0.05."""


class Scope(str, Enum):
    """What a comparison generalises to."""

    primary = "these models"
    model = "one model"
    architectures = "other architectures"
    reference = "full precision"


class Verdict(str, Enum):
    """Outcome of a comparison, conclusive ones first."""

    better = "better"
    worse = "worse"
    equivalent = "equivalent within the margin"
    indistinct = "not distinguishable"
    too_small = "design too small"
    estimate = "estimate only"
    no_pairs = "not compared"


@dataclass(frozen=True)
class Stratum:
    """Paired differences on one model: seed -> candidate minus baseline, fractions; and why some are missing."""

    model: str
    pairs: Mapping[int, float]
    missing: tuple[str, ...] = ()
    num_identical: int = 0

    @property
    def mean(self) -> float | None:
        """Mean difference; None if there are no pairs."""
        return float(np.mean(list(self.pairs.values()))) if self.pairs else None


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests at `margin`: Holm's p, and the interval, which lies within the margin if p <= 0.05."""

    margin: float
    adjusted_p: float
    interval: Interval


@dataclass(frozen=True)
class Comparison:
    """Is `candidate` more accurate than `baseline` on the models of `title`? Differences are fractions.

    `identical` lists further baselines whose networks equal the baseline's weight for weight; they are not compared
    separately. `interval` inverts the test at the level Holm's method used, so its confidence is at least 95 %; None if
    nothing was tested or measured. `p` is None if nothing was tested; `p_error` is its standard error when sign
    patterns were sampled. `smallest_p` is the smallest adjusted p that any data could give. `images` is the 95 %
    interval over new test images and seeds. `num_needed` is set if the design is too small: the seeds per model, or the
    architectures, that would suffice.
    """

    scope: Scope
    title: str
    label: str
    candidate: str
    baseline: str
    strata: tuple[Stratum, ...]
    verdict: Verdict
    identical: tuple[str, ...] = ()
    family_size: int = 0
    estimate: float | None = None
    interval: Interval | None = None
    p: float | None = None
    p_error: float = 0.0
    adjusted_p: float | None = None
    smallest_p: float | None = None
    equivalence: Equivalence | None = None
    images: Interval | None = None
    num_needed: int | None = None
    caveats: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        """Number of pairs measured on both sides."""
        return sum(len(stratum.pairs) for stratum in self.strata)

    @property
    def models(self) -> tuple[str, ...]:
        """Models with at least one pair."""
        return tuple(stratum.model for stratum in self.strata if stratum.pairs)

    @property
    def is_difference(self) -> bool:
        """Whether the family rejects equality of the two."""
        return self.verdict in {Verdict.better, Verdict.worse}

    @property
    def question(self) -> str:
        """The question in words."""
        where = {
            Scope.primary: f"on {_listed(stratum.model for stratum in self.strata)}",
            Scope.model: f"on {self.strata[0].model}",
            Scope.architectures: "on other architectures of this kind",
            Scope.reference: f"on {_listed(stratum.model for stratum in self.strata)}",
        }[self.scope]
        return f"Is {self.label} more accurate than {' = '.join((self.baseline, *self.identical))} {where}?"


def compare(asked: Sequence[Comparison], size: int, margin: float | None) -> list[Comparison]:
    """Answer one family of questions: `asked` with verdicts. `size` counts all declared questions, run or not.

    margin: largest difference that counts as equivalent, a fraction; None: no equivalence test.
    """
    shifts = () if margin is None else (-margin, margin)
    tests = {number: SignFlip(_arrays(question), shifts) for number, question in enumerate(asked) if question.n}
    p = {number: test.p() for number, test in tests.items()}
    adjusted, level = holm(p, size), levels(p, size)
    smallest = reachable({number: test.n for number, test in tests.items()}, size)
    equivalent = {} if margin is None else _equivalences(tests, size, margin)
    answers = []
    for number, question in enumerate(asked):
        if number not in tests:
            answers.append(replace(question, family_size=size, verdict=Verdict.no_pairs, caveats=_caveats(question)))
            continue
        test = tests[number]
        answer = replace(
            question,
            family_size=size,
            estimate=test.estimate,
            interval=test.interval(1 - level[number]),
            p=p[number],
            p_error=test.p_error(p[number]),
            adjusted_p=adjusted[number],
            smallest_p=smallest[number],
            equivalence=equivalent.get(number),
        )
        verdict = _verdict(answer)
        needed = seeds_needed(len(answer.models), size) if verdict is Verdict.too_small else None
        answer = replace(answer, verdict=verdict, num_needed=needed)
        answers.append(replace(answer, caveats=_caveats(answer, test)))
    return answers


def estimated(question: Comparison) -> Comparison:
    """The question with its estimate but no test, for orientation only."""
    means = [stratum.mean for stratum in question.strata if stratum.mean is not None]
    estimate = float(np.mean(means)) if means else None
    verdict = Verdict.no_pairs if estimate is None else Verdict.estimate
    return replace(question, estimate=estimate, verdict=verdict, caveats=_caveats(question))


def across_architectures(answer: Comparison) -> Comparison | None:
    """The question whether the answer holds on other architectures: one difference per model; None below six models."""
    pairs = {number: stratum.mean for number, stratum in enumerate(answer.strata) if stratum.mean is not None}
    if len(pairs) < MIN_ARCHITECTURES:
        return None
    return replace(unanswered(answer), scope=Scope.architectures, strata=(Stratum("models", pairs),))


def unanswered(answer: Comparison) -> Comparison:
    """The question of an answer, without the answer."""
    names = (answer.title, answer.label, answer.candidate, answer.baseline)
    return Comparison(answer.scope, *names, answer.strata, Verdict.no_pairs, answer.identical)


def _arrays(question: Comparison) -> list[list[float]]:
    return [list(stratum.pairs.values()) for stratum in question.strata if stratum.pairs]


def _equivalences(tests: Mapping[int, SignFlip], size: int, margin: float) -> dict[int, Equivalence]:
    p = {
        number: max(test.one_sided_p(-margin, above=True), test.one_sided_p(margin, above=False))
        for number, test in tests.items()
    }
    adjusted, level = holm(p, size), levels(p, size)
    return {
        number: Equivalence(margin, adjusted[number], test.interval(1 - 2 * level[number]))
        for number, test in tests.items()
    }


def _verdict(answer: Comparison) -> Verdict:
    if answer.adjusted_p is None or answer.estimate is None or answer.smallest_p is None:
        return Verdict.no_pairs
    if is_rejected(answer.adjusted_p):
        return Verdict.better if answer.estimate > 0 else Verdict.worse
    if answer.equivalence is not None and is_rejected(answer.equivalence.adjusted_p):
        return Verdict.equivalent
    return Verdict.indistinct if is_rejected(answer.smallest_p) else Verdict.too_small


def _caveats(answer: Comparison, test: SignFlip | None = None) -> tuple[str, ...]:
    found = [f"{stratum.model}: {reason}" for stratum in answer.strata for reason in stratum.missing]
    without = [stratum.model for stratum in answer.strata if not stratum.pairs]
    if without and answer.models:
        found.append(f"no pair on {_listed(without)}, so the mean is over the other models")
    num_identical = sum(stratum.num_identical for stratum in answer.strata)
    if num_identical:
        found.append(f"the two networks are identical, weight for weight, in {num_identical} of {answer.n} pairs")
    means = [stratum.mean for stratum in answer.strata if stratum.mean is not None]
    if answer.scope is Scope.primary and answer.is_difference and min(means) < 0 < max(means):
        found.append(
            "the models disagree: the mean difference is "
            + _listed(
                f"{100 * s.mean:+.2f} on {s.model}".replace("-", "−") for s in answer.strata if s.mean is not None
            )
            + " points"
        )
    if answer.equivalence is not None and answer.is_difference and is_rejected(answer.equivalence.adjusted_p):
        margin = 100 * answer.equivalence.margin
        found.append(f"the difference is within the declared margin of {margin:g} points")
    if test is not None and answer.p is not None and test.raw_p() < answer.p:
        found.append(
            f"p is not monotone in the difference, because the models differ much: at 0 it is {test.raw_p():.2g}, and "
            f"its maximum from 0 outwards, {answer.p:.2g}, is used"
        )
    return tuple(found)


def _listed(items: Iterable[str], limit: int = 8) -> str:
    texts = list(items)
    if len(texts) > limit:
        return f"{', '.join(texts[:limit])} and {len(texts) - limit} more"
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]])) if texts else "no model"
