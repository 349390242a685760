"""A grid's questions and answers: the primary family, single models behind a gate, other architectures."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from analysis.compare.comparison import (
    Comparison,
    Scope,
    Stratum,
    Verdict,
    across_architectures,
    compare,
    estimated,
    unanswered,
)
from analysis.compare.groups import Group, num_identical, pairs
from analysis.runs.frame import Declared
from analysis.stats.images import two_way_interval
from suite.recipe.grid import COMPLETIONS

if TYPE_CHECKING:  # avoids an import cycle: table calls answer_all
    from analysis.compare.table import Block

FULL_PRECISION = "fp"
ROW_ORDER = ("fp", "bc", "pc", "bnn", "bnn+", "bnn++")
"""The catalogue's order; other quantizers follow alphabetically."""
Right = Callable[[str], "npt.NDArray[np.bool_] | None"]
"""Run (directory or MLflow id) -> which test images its hardened network classifies correctly; None: not known."""


@dataclass(frozen=True)
class Against:
    """The candidate for each quantizer (None: not compared) and its display name."""

    label: str
    candidate: Callable[[str], str | None]


def against(primary: str) -> Against:
    """Compares every other quantizer with `primary`, or each surrogate with its completion if it is `completions`."""
    if primary == COMPLETIONS:
        return completions()
    return Against(
        primary.upper() if primary in ROW_ORDER else primary, lambda name: None if name == primary else primary
    )


def completions() -> Against:
    """Compares each published surrogate gradient with its completion, the row that integrates it: bnn+ with bnn++."""
    from quantizers import QUANTIZERS

    found = {row.completes: row.name for row in QUANTIZERS.values() if row.completes is not None}
    return Against("its completion", found.get)


def margin_of(declared: Declared) -> float | None:
    """The declared margin as a fraction."""
    return None if declared.margin_points is None else declared.margin_points / 100


def answer_all(blocks: "Sequence[Block]", choice: Against, declared: Declared, right: Right | None) -> "list[Block]":
    """The headings of one grid with their comparisons filled in."""
    margin = margin_of(declared)
    asked = [question for block in blocks for question in _questions(block, choice)]
    primary = compare(asked, len(asked) + _num_removed(blocks, choice, declared), margin)
    wider = [question for answer in primary if (question := across_architectures(answer)) is not None]
    by_model, architectures = _gatekept(primary, margin), compare(wider, len(wider), margin)
    return [
        replace(
            block,
            primary=tuple(_with_images(answer, block, right) for answer in _under(block, primary)),
            by_model=_under(block, by_model),
            architectures=_under(block, architectures),
            reference=tuple(map(estimated, _references(block, choice))),
        )
        for block in blocks
    ]


def _under(block: "Block", answers: Iterable[Comparison]) -> tuple[Comparison, ...]:
    """The answers under this heading; titles are unique within a grid."""
    return tuple(answer for answer in answers if answer.title == block.title)


def _gatekept(primary: Sequence[Comparison], margin: float | None) -> list[Comparison]:
    """Questions about single models: tested for baselines that the primary family rejects, only estimated for others.

    The family is every baseline on every model, tested or not, so its size does not depend on the data.
    """
    asked = [replace(unanswered(answer), scope=Scope.model, strata=(s,)) for answer in primary for s in answer.strata]
    is_open = [answer.is_difference for answer in primary for _ in answer.strata]
    tested = iter(compare([one for one, is_it in zip(asked, is_open, strict=True) if is_it], len(asked), margin))
    return [next(tested) if is_it else estimated(one) for one, is_it in zip(asked, is_open, strict=True)]


def _questions(block: "Block", choice: Against) -> list[Comparison]:
    """One question per binary baseline whose candidate has cells under the heading; identical baselines are merged."""
    found: list[Comparison] = []
    for name in block.quantizers:
        candidate = choice.candidate(name)
        if name == FULL_PRECISION or candidate not in block.quantizers or candidate is None:
            continue
        twin = next(
            (
                k
                for k, one in enumerate(found)
                if one.candidate == candidate and _are_identical(block, one.baseline, name)
            ),
            None,
        )
        if twin is None:
            found.append(_question(block, choice.label, candidate, name, Scope.primary))
        else:
            found[twin] = replace(found[twin], identical=(*found[twin].identical, name))
    return found


def _question(block: "Block", label: str, candidate: str, baseline: str, scope: Scope) -> Comparison:
    strata = []
    for model in block.models:
        ours, theirs = block.groups[candidate, model], block.groups[baseline, model]
        seeds = ours.seeds | theirs.seeds
        if not (ours.seeds and theirs.seeds):
            continue  # the grid does not have both on this model
        missing = [
            f"{name}: {why}"
            for name, group in ((candidate, ours), (baseline, theirs))
            if (why := _why(group, len(seeds)))
        ]
        strata.append(Stratum(model, pairs(ours, theirs), tuple(missing), num_identical(ours, theirs)))
    return Comparison(scope, block.title, label, candidate, baseline, tuple(strata), Verdict.no_pairs)


def _why(group: Group, num_seeds: int) -> str:
    return group.conflict or ", ".join(f"{count} {reason}" for reason, count in group.missing(num_seeds))


def _are_identical(block: "Block", one: str, other: str) -> bool:
    """Whether two quantizers have the same seeds on every model and trained the same networks, weight for weight."""
    num_same = 0
    for model in block.models:
        ours, theirs = block.groups[one, model], block.groups[other, model]
        same = num_identical(ours, theirs)
        if ours.usable.keys() != theirs.usable.keys() or same != len(ours.usable):
            return False
        num_same += same
    return num_same > 0


def _num_removed(blocks: "Sequence[Block]", choice: Against, declared: Declared) -> int:
    """Number of baselines that the first launch declared but the cells lack: they stay in the family with p = 1."""
    present = {(block.dataset, block.task, block.init, name) for block in blocks for name in block.quantizers}
    first = {(dataset, task, init, name) for dataset, task, init, _, name, _ in declared.settings}
    gone = {setting for setting in first - present if setting[3] != FULL_PRECISION}
    return sum((*heading, choice.candidate(name)) in first for *heading, name in gone)


def _references(block: "Block", choice: Against) -> list[Comparison]:
    candidate = choice.candidate(FULL_PRECISION)
    if candidate is None or not {FULL_PRECISION, candidate} <= set(block.quantizers):
        return []
    return [_question(block, choice.label, candidate, FULL_PRECISION, Scope.reference)]


def _with_images(answer: Comparison, block: "Block", right: Right | None) -> Comparison:
    """Adds the interval over new test images if all pairs have predictions and each model has two seeds."""
    if right is None or answer.estimate is None:
        return answer
    strata = []
    for stratum in answer.strata:
        ours, theirs = (block.groups[name, stratum.model].runs for name in (answer.candidate, answer.baseline))
        rows = [(right(ours[seed]), right(theirs[seed])) for seed in stratum.pairs]
        if any(one is None or other is None or len(one) != len(other) for one, other in rows):
            return answer
        strata.append(np.array([np.subtract(one, other, dtype=np.int8) for one, other in rows]))  # type: ignore[arg-type]
    try:
        interval = two_way_interval([array for array in strata if len(array)], np.random.default_rng(0))
    except ValueError:  # one seed, or test sets of different sizes
        return answer
    return replace(answer, images=interval)
