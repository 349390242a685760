"""How many seeds would have been needed, and what the present ones can detect: plans as words for a report."""

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.compare.plans import TOGETHER, Plan, plans
from analysis.runs.frame import Results
from analysis.stats.paired import fewest_pairs
from analysis.stats.power import POWER, SD_CONFIDENCE, sign_flip_detectable, sign_flip_pairs

WANTED_POINTS = (0.5, 1.0, 2.0)
MAX_MODELS = 12
"""Plans by model up to so many; beyond, of all models together only."""
NOTHING = "none"


@dataclass(frozen=True)
class Need:
    """One plan in words: a range is from the observed spread to its upper bound."""

    title: str
    name: str
    num_seeds: int
    sd: str
    detectable: str
    seeds: tuple[str, ...]
    sentence: str


@dataclass(frozen=True)
class Needs:
    """All plans, their columns' differences in points, and what ranges and numbers mean."""

    rows: tuple[Need, ...]
    points: tuple[float, ...]
    explanation: str


def needs(results: Results) -> Needs:
    """What each model would take. Raises UserError where no two paired differences tell a spread."""
    found = plans(results)
    if len(found) > MAX_MODELS:
        found = [plan for plan in found if plan.name == TOGETHER] or found[:MAX_MODELS]
    explanation = (
        f"With a chance of {POWER:.0%}, for the test and the family of the verdicts. Ranges run from the spread of the "
        f"differences as observed to its upper bound, which is too low one time in {1 / (1 - SD_CONFIDENCE):.0f}: from "
        "few seeds a spread is hardly known, and the upper end is the safe plan. None: no data from so few seeds can "
        "be enough."
    )
    return Needs(tuple(_need(plan) for plan in found), WANTED_POINTS, explanation)


def _need(plan: Plan) -> Need:
    sds = (plan.spread.sd, plan.spread.sd_high)
    detectable = [_detectable(plan, sd) for sd in sds]
    seeds = [_range([str(sign_flip_pairs(p / 100, sd, plan.family_size)) for sd in sds]) for p in WANTED_POINTS]
    middle = WANTED_POINTS.index(1.0)
    now = _range(detectable)
    able = f"the {plan.num_seeds} there are can detect {now}"
    if now == NOTHING:
        able += f", whatever its size: the test takes {fewest_pairs(plan.family_size)} at least"
    else:
        able += " points"
    where = f"On {plan.name}" if plan.name != TOGETHER else "With one spread for all models"
    sentence = f"{where} ({plan.title}), a difference of 1 point needs {seeds[middle]} seeds; {able}."
    return Need(
        title=plan.title,
        name=plan.name,
        num_seeds=plan.num_seeds,
        sd=_range([f"{100 * sd:.2f}" for sd in sds]),
        detectable=now,
        seeds=tuple(seeds),
        sentence=sentence,
    )


def _detectable(plan: Plan, sd: float) -> str:
    found = sign_flip_detectable(plan.num_seeds, sd, plan.family_size)
    return NOTHING if found is None else f"{100 * found:.2f}"


def _range(ends: Sequence[str]) -> str:
    return " to ".join(dict.fromkeys(ends))
