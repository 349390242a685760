"""How many seeds? What more seeds would detect, from the spread of existing runs or an assumed one."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from analysis.compare.family import FULL_PRECISION
from analysis.compare.groups import pairs
from analysis.compare.table import Block, Table
from analysis.stats.families import seeds_needed
from analysis.stats.power import POWER, SD_CONFIDENCE, Spread, detectable, seeds_for, spread
from analysis.stats.stratified import ALPHA
from suite.errors import UserError

NONE = "—"
_ROUNDING = 1e-9
"""Differences (fractions) with a smaller spread count as all equal."""


@dataclass(frozen=True)
class Plan:
    """A heading's design: models, seeds per model, spread of the paired differences (fractions), size of the family."""

    title: str
    num_models: int
    num_seeds: int
    spread: Spread
    family_size: int


@dataclass(frozen=True)
class Wish:
    """The user's request for each plan: the difference (a fraction) to find seeds for, and the seeds to evaluate."""

    difference: float
    seeds: tuple[int, ...]
    power: float = POWER


def wish(points: float, seeds: str, chance: float) -> Wish:
    """Parses the command line's request, `seeds` as `3,5,10`. Raises UserError for values that make no sense."""
    try:
        numbers = tuple(int(part) for part in seeds.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 2:  # noqa: PLR2004 - one pair has no spread
        raise UserError(f"--seeds {seeds!r}: expected numbers from 2 on, as in 3,5,10")
    if not 0 < chance < 1:
        raise UserError(f"--power {chance:g}: expected a chance between 0 and 1, as 0.8")
    if not 0 < points < 100:  # noqa: PLR2004 - percent
        raise UserError(f"--difference {points:g}: expected percentage points between 0 and 100")
    return Wish(points / 100, numbers, chance)


def assumed(points: float, num_models: int, family_size: int) -> Plan:
    """A plan without runs: the differences' sd is taken as known. Raises UserError unless 0 < points < 100."""
    if not 0 < points < 100:  # noqa: PLR2004 - percent
        raise UserError(f"--sd {points:g}: expected percentage points between 0 and 100")
    return Plan("Before any run", num_models, 0, Spread(points / 100, math.inf, points / 100), family_size)


def plans(table: Table, num_models: int | None = None, family_size: int | None = None) -> list[Plan]:
    """Two one-sided tests at `margin`: Holm's p, and the interval, which lies within the margin if p <= 0.05.

    Raises:
        UserError: no spread to plan with, because no comparison has two pairs that differ.
    """
    found = [plan for block in table.blocks if (plan := _plan(block, num_models, family_size))]
    if not found:
        raise UserError("no comparison has two seeds that differ; run two, or assume a spread with --sd POINTS")
    return found


def _plan(block: Block, num_models: int | None, family_size: int | None) -> Plan | None:
    differences = [
        list(own.values())
        for answer in block.primary
        for stratum in answer.strata
        if len(
            own := pairs(block.groups[answer.candidate, stratum.model], block.groups[answer.baseline, stratum.model])
        )
        > 1
    ]
    if not differences:
        return None
    found = spread(differences, sharing=len(block.primary))
    if found.sd <= _ROUNDING:
        return None
    num_seeds = max(entry.num_seeds for entry in block.entries if entry.quantizer != FULL_PRECISION)
    models = len({stratum.model for answer in block.primary for stratum in answer.strata})
    return Plan(block.title, num_models or models, num_seeds, found, family_size or block.family_size)


def to_markdown(found: Sequence[Plan], wanted: Wish, findings: Sequence[str] = ()) -> str:
    """One row per plan, in percentage points; each range runs from the observed spread to its upper bound."""
    columns = [f"{n} seeds find, points" for n in wanted.seeds]
    header = ["heading", "models", "seeds now", "sd, points", *columns, f"seeds for {100 * wanted.difference:g} points"]
    rows = "\n".join(
        "| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *(_row(p, wanted) for p in found))
    )
    lines = [f"- finding: {finding}" for finding in findings]
    return "\n".join([*lines, "", rows, "", *(f"- {note}" for note in notes(found, wanted))]).strip() + "\n"


def _row(plan: Plan, wanted: Wish) -> list[str]:
    return [
        plan.title,
        str(plan.num_models),
        f"{plan.num_seeds or NONE}",
        sd(plan),
        *(found(plan, n, wanted.power) for n in wanted.seeds),
        needed(plan, wanted.difference, wanted.power),
    ]


def sd(plan: Plan) -> str:
    """`0.31 to 0.42`, in points."""
    return _range([f"{100 * value:.2f}" for value in _sds(plan)])


def found(plan: Plan, num_seeds: int, power: float = POWER) -> str:
    """The difference that num_seeds per model detect, in points; a dash if they can detect none."""
    values = [detectable(plan.num_models, num_seeds, value, plan.family_size, power) for value in _sds(plan)]
    return _range([NONE if value is None else f"{100 * value:.2f}" for value in values])


def needed(plan: Plan, difference: float, power: float = POWER) -> str:
    """Seeds per model that detect a difference (a fraction)."""
    numbers = [seeds_for(plan.num_models, difference, value, plan.family_size, power) for value in _sds(plan)]
    return _range(["over 200" if number is None else str(number) for number in numbers])


def _sds(plan: Plan) -> tuple[float, float]:
    return plan.spread.sd, plan.spread.sd_high


def _range(ends: Sequence[str]) -> str:
    return " to ".join(dict.fromkeys(ends))


def notes(found_plans: Sequence[Plan], wanted: Wish) -> Iterator[str]:
    """Explanations of the plans' numbers."""
    sizes = sorted({(plan.num_models, plan.family_size) for plan in found_plans})
    least = ", ".join(
        f"{seeds_needed(models, size)} for {models} model{'s' * (models > 1)} and {size} comparison{'s' * (size > 1)}"
        for models, size in sizes
    )
    yield (
        f"A difference is found if the tables' stratified sign-flip test gives p ≤ {ALPHA} at Holm's hardest step. The "
        f"chance is {wanted.power:.0%}, for normal differences with the same mean and spread on every model."
    )
    if any(plan.spread.df < math.inf for plan in found_plans):
        yield (
            f"Ranges run from the observed spread to its upper bound, which is too low one time in "
            f"{1 / (1 - SD_CONFIDENCE):.0f}: from few seeds a spread is hardly known. The upper end is the safe plan."
        )
        yield (
            "Only the spread of the runs' differences is used, never their mean. Choosing the number of seeds by this "
            "table leaves the error rate of the later test as it is, if nobody looks at results in between."
        )
    yield f"{NONE}: no data from so few seeds can be enough. Fewest seeds: {least}."
