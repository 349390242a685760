"""How many seeds? From the spread of the runs there are, or one that is assumed, to what more seeds would detect."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from analysis.compare.cells import Cells, cells_by_block, key_of, pairs_of
from analysis.compare.comparison import Block, comparison
from analysis.compare.verdicts import Member
from analysis.render.style import LINES, PALETTE, add_caption, house_style, new_figure
from analysis.runs.frame import Results
from analysis.stats.paired import ALPHA, fewest_pairs
from analysis.stats.power import POWER, SD_CONFIDENCE, Spread, sign_flip_detectable, sign_flip_pairs, spread
from suite.errors import UserError

NONE = "—"
TOGETHER = "all models"
"""The plan of a block's models together."""
MAX_DRAWN = 40
"""Seeds at the right end of the picture."""
_ROUNDING = 1e-9
"""Differences of fractions that spread by less are all equal."""


@dataclass(frozen=True)
class Plan:
    """Of a model, or of all of a block: seeds it has, spread of its paired differences (fractions), family to test."""

    title: str
    name: str
    num_seeds: int
    spread: Spread
    family_size: int


@dataclass(frozen=True)
class Wish:
    """What is asked of each plan: a difference (a fraction) to find with this power; what so many seeds would find."""

    difference: float
    seeds: tuple[int, ...]
    power: float = POWER


def wish(points: float, seeds: str, chance: float) -> Wish:
    """What the command line asks, `seeds` as `3,5,10`. UserError where it makes no sense."""
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


def assumed(points: float, family_size: int) -> Plan:
    """A plan before there are runs: differences of this sd, taken as known. UserError where it is not positive."""
    if not 0 < points < 100:  # noqa: PLR2004 - percent
        raise UserError(f"--sd {points:g}: expected percentage points between 0 and 100")
    return Plan("Before any run", "assumed", 0, Spread(points / 100, math.inf, points / 100), family_size)


def plans(results: Results, family_size: int | None = None) -> list[Plan]:
    """A plan for each model, and one for all of a block that has several; family_size: the block's, if not given.

    Raises:
        UserError: there is no spread: no comparison has two pairs that differ.
    """
    members = cells_by_block(results.frame)
    blocks = comparison(results.frame).blocks
    found = [plan for block in blocks for plan in _of_block(block, members[key_of(block)], family_size)]
    if not found:
        raise UserError("no comparison has two seeds that differ; run two, or assume a spread with --sd POINTS")
    return found


def _of_block(block: Block, members: Mapping[Member, Cells], family_size: int | None) -> Iterator[Plan]:
    pairs: dict[str, list[list[float]]] = {}
    for entry in block.entries:
        if entry.reference is not None:
            found = pairs_of(members, entry.reference, (entry.quantizer, entry.model))
            if len(found) > 1:
                pairs.setdefault(entry.model, []).append(list(found.values()))
    size = family_size or max(1, block.family_size)
    groups = dict(pairs)
    if len(pairs) > 1:
        groups[TOGETHER] = [group for own in pairs.values() for group in own]
    for name, own in groups.items():
        found_spread = spread(own, sharing=max(map(len, pairs.values())) if name not in pairs else len(own))
        if found_spread.sd > _ROUNDING:
            yield Plan(block.title, name, max(map(len, own)), found_spread, size)


def to_markdown(found: Sequence[Plan], wish: Wish, findings: Sequence[str] = ()) -> str:
    """A table per block, in percentage points; each range is from the observed spread to its upper bound."""
    columns = [f"{n} seeds find, points" for n in wish.seeds]
    header = [
        "model",
        "seeds now",
        "sd of differences, points",
        *columns,
        f"seeds for {100 * wish.difference:g} points",
    ]
    lines = [f"- finding: {finding}" for finding in findings]
    for title in dict.fromkeys(plan.title for plan in found):
        rows = [_row(plan, wish) for plan in found if plan.title == title]
        table = "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))
        lines += ["", f"## {title}", "", table]
    return "\n".join([*lines, "", *_notes(found, wish)]).strip() + "\n"


def _row(plan: Plan, wish: Wish) -> list[str]:
    sds = (plan.spread.sd, plan.spread.sd_high)
    found = [[sign_flip_detectable(n, sd, plan.family_size, wish.power) for sd in sds] for n in wish.seeds]
    needed = [sign_flip_pairs(wish.difference, sd, plan.family_size, wish.power) for sd in sds]
    return [
        plan.name,
        f"{plan.num_seeds or NONE}",
        _range([f"{100 * sd:.2f}" for sd in sds]),
        *(_range([NONE if value is None else f"{100 * value:.2f}" for value in values]) for values in found),
        _range([str(number) for number in needed]),
    ]


def _range(ends: Sequence[str]) -> str:
    return " to ".join(dict.fromkeys(ends))


def _notes(found: Sequence[Plan], wish: Wish) -> Iterator[str]:
    known = all(plan.spread.df == math.inf for plan in found)
    sizes = sorted({plan.family_size for plan in found})
    least = ", ".join(f"{fewest_pairs(size)} seeds for {size}" for size in sizes)
    yield (
        "- A difference is found where the sign-flip test, as in the tables, gives p ≤ "
        f"{ALPHA} after Holm's hardest step in the family ({', '.join(map(str, sizes))} comparisons), with a chance of "
        f"{wish.power:.0%}; differences are taken as normal."
    )
    if not known:
        yield (
            "- Ranges: with the spread as observed, to its upper bound, which is too low one time in "
            f"{1 / (1 - SD_CONFIDENCE):.0f}: from few seeds a spread is hardly known. The upper end is the safe plan."
        )
    yield f"- {NONE}: no data from so few seeds can reach it, whatever the difference ({least} comparisons at least)."


def draw(found: Sequence[Plan], wish: Wish) -> Figure:
    """Detectable difference in points over the number of seeds: a line per plan, a band up to the spread's bound."""
    with house_style():
        figure = new_figure(3.4)
        axes = figure.subplots()
        titles = {plan.title for plan in found}
        for number, plan in enumerate(found):
            numbers = range(fewest_pairs(plan.family_size), max(MAX_DRAWN, fewest_pairs(plan.family_size) + 10) + 1)
            lower, upper = (
                [100 * (sign_flip_detectable(n, sd, plan.family_size, wish.power) or 0.0) for n in numbers]
                for sd in (plan.spread.sd, plan.spread.sd_high)
            )
            color, line = PALETTE[number % len(PALETTE)], LINES[number % len(LINES)]
            label = plan.name if len(titles) == 1 else f"{plan.title}: {plan.name}"
            axes.plot(numbers, lower, color=color, linestyle=line, label=label)
            axes.fill_between(numbers, lower, upper, color=color, alpha=0.12, linewidth=0)
        axes.axhline(100 * wish.difference, color="0.5", linewidth=0.8)
        axes.set(xlabel="seeds", ylabel="detectable difference, points", xlim=(0, None), ylim=(0, None))
        axes.legend(frameon=False)
        add_caption(
            figure,
            f"The difference that is found with a chance of {wish.power:.0%}, by the number of seeds: sign-flip test, "
            f"Holm. Left of a line's start no data can be enough. Bands: up to the {SD_CONFIDENCE:.0%} bound of the "
            f"spread. Grey: {100 * wish.difference:g} points.",
        )
        return figure


def write(figure: Figure, path: Path) -> None:
    """As PNG or PDF, by the file's name. UserError for any other."""
    if path.suffix not in {".png", ".pdf"}:
        raise UserError(f"--plot {path}: expected a file.png or a file.pdf")
    with house_style():
        figure.savefig(path, dpi=200, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)
