"""Frame of cells -> Table: for every data set, model and quantizer, accuracy and a reference's paired difference to it.

The reference is BNN++, or for a published surrogate its completion.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.compare.groups import Group, difference
from analysis.compare.published import Key as NumberKey
from analysis.compare.published import Number, Publication, Reproduction, by_key, reproduction
from analysis.compare.ranks import Ranks, ranks
from analysis.compare.verdicts import Adjusted, Member, Standing, adjusted, standings
from analysis.runs import frame as cells
from analysis.stats.paired import Difference

FULL_PRECISION = "fp"
ROW_ORDER = ("fp", "bc", "pc", "bnn", "bnn+", "bnn++")
"""The catalogue's order; other quantizers follow by name."""


Key = tuple[str, str, str, str]
"""Grid, data set, task, init."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Against:
    """What each quantizer is compared with, None if nothing; what people call it; which quantizers are shown at all."""

    label: str
    reference: Callable[[str], str | None]
    shows: Callable[[str], bool]


BNN_PLUS_PLUS = Against("BNN++", lambda quantizer: None if quantizer == "bnn++" else "bnn++", lambda _: True)


def completions() -> Against:
    """Each published surrogate gradient against its completion, the row that integrates it: bnn+ against bnn++."""
    from quantizers import QUANTIZERS

    pairs = {row.completes: row.name for row in QUANTIZERS.values() if row.completes is not None}
    return Against("completion", pairs.get, {*pairs.keys(), *pairs.values()}.__contains__)


@dataclass(frozen=True)
class Entry:
    """One quantizer on one model: accuracies are fractions, None where not measured or `conflict` forbids a mean.

    `missing` counts the seeds without a measurement by reason, `failed: oom`; `difference` is `reference` minus this
    one, `adjusted` its p among all comparisons of the block. `gap_mean` is soft minus hard accuracy. `standing` is the
    place among the binary methods of the model, None from the third on.
    """

    model: str
    quantizer: str
    num_seeds: int
    num_done: int
    missing: tuple[tuple[str, int], ...]
    conflict: str | None
    top1_hard_mean: float | None
    top1_hard_sd: float | None
    top1_soft_mean: float | None
    reference: str | None
    difference: Difference | None
    adjusted: Adjusted | None = None
    gap_mean: float | None = None
    num_bytes: float | None = None
    standing: Standing | None = None
    published: Reproduction | None = None


@dataclass(frozen=True)
class Block:
    """The entries of one grid, data set, task and init, row by row; `title` tells it from the other blocks.

    `family_size` counts its comparisons with the reference, whether or not their runs are done.
    """

    title: str
    grid: str
    dataset: str
    task: str
    init: str
    models: tuple[str, ...]
    quantizers: tuple[str, ...]
    entries: tuple[Entry, ...]
    family_size: int = 0


@dataclass(frozen=True)
class Table:
    """Blocks, what their quantizers are compared with, and what a reader must know before them.

    `ranks` compares the methods over all models, where there are enough; `publication` is what the entries' published
    numbers are of.
    """

    blocks: tuple[Block, ...]
    against: str
    findings: tuple[str, ...]
    ranks: tuple[Ranks, ...] = ()
    publication: Publication | None = None


def comparison(
    frame: pd.DataFrame,
    findings: tuple[str, ...] = (),
    against: Against = BNN_PLUS_PLUS,
    publication: Publication | None = None,
) -> Table:
    """The comparison of all quantizers in a frame with columns `cells.SCHEMA`, one row per cell.

    Raises:
        ValueError: the frame breaks the schema.
    """
    cells.validate(frame)
    rows = cells.records(frame[frame["quantizer"].map(against.shows)])
    numbers = by_key(publication)
    told_apart = {name for name in ("grid", "task", "init") if len({row[name] for row in rows}) > 1}
    blocks = tuple(_block(key, own, against, numbers, told_apart) for key, own in rows_by_block(rows).items())
    if publication and not any(entry.published for block in blocks for entry in block.entries):
        wanted = cells.shortened("/".join(key[:3]) for key in numbers)
        findings = (*findings, f"none of the published numbers is of these cells; they are of {wanted}")
    return Table(blocks, against.label, findings, tuple(_ranks(blocks)), publication)


def rows_by_block(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """Rows by (grid, data set, task, init), full precision beside the methods it is compared to.

    A full-precision cell has one task, bw, and fine-tuned cells start from one of another init. So a model's
    full-precision cells stand in every block where it has methods, those of the same init if there are any; without
    methods, in the block of their own task and init.
    """
    by_model: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        by_model.setdefault((row["grid"], row["dataset"], row["model"]), []).append(row)
    parts: dict[Key, list[Row]] = {}
    for (grid, dataset, _), own in by_model.items():
        full_precision = [row for row in own if row["quantizer"] == FULL_PRECISION]
        methods = [row for row in own if row["quantizer"] != FULL_PRECISION]
        for task, init in dict.fromkeys((row["task"], row["init"]) for row in methods or full_precision):
            same_init = [row for row in full_precision if row["init"] == init]
            here = [row for row in methods if (row["task"], row["init"]) == (task, init)]
            parts.setdefault((grid, dataset, task, init), []).extend([*(same_init or full_precision), *here])
    return parts


def _block(
    key: Key, rows: Iterable[Row], against: Against, numbers: Mapping[NumberKey, Number], told_apart: Collection[str]
) -> Block:
    grid, dataset, task, init = key
    by_member: dict[Member, list[Row]] = {}
    for row in rows:
        by_member.setdefault((row["quantizer"], row["model"]), []).append(row)
    quantizers = tuple(sorted({name for name, _ in by_member}, key=_row_position))
    models = tuple(sorted({model for _, model in by_member}, key=cells.natural_key))
    groups = {(name, model): Group.of(by_member.get((name, model), ())) for name in quantizers for model in models}
    references = {name: against.reference(name) for name in quantizers}
    differences, family_size = _family(groups, references)
    p = adjusted(differences, family_size)
    binary = [name for name in quantizers if name != FULL_PRECISION]
    places = {model: standings({name: groups[name, model] for name in binary}) for model in models}
    num_seeds = {model: len(set().union(*(groups[name, model].seeds for name in quantizers))) for model in models}
    entries = tuple(
        Entry(
            model=model,
            quantizer=name,
            num_seeds=num_seeds[model],
            num_done=len(group.hard),
            missing=group.missing(num_seeds[model]),
            conflict=group.conflict,
            top1_hard_mean=group.mean,
            top1_hard_sd=group.sd,
            top1_soft_mean=group.soft_mean,
            reference=references[name],
            difference=differences.get((name, model)),
            adjusted=p.get((name, model)),
            gap_mean=group.gap_mean,
            num_bytes=group.num_bytes,
            standing=places[model].get(name),
            published=_published(dataset, model, name, group, numbers),
        )
        for (name, model), group in groups.items()
    )
    title = ", ".join([dataset, *(f"{name} {value}" for name, value in _named(key).items() if name in told_apart)])
    return Block(title, grid, dataset, task, init, models, quantizers, entries, family_size)


def _named(key: Key) -> dict[str, str]:
    grid, _, task, init = key
    return {"grid": grid, "task": task, "init": init}


def _row_position(quantizer: str) -> tuple[int, str]:
    return (ROW_ORDER.index(quantizer) if quantizer in ROW_ORDER else len(ROW_ORDER), quantizer)


def _family(
    groups: Mapping[Member, Group], references: Mapping[str, str | None]
) -> tuple[dict[Member, Difference], int]:
    """Reference minus method for each comparison that has pairs; the size of the family, which is all that have cells.

    What failed or has not run yet counts as a member: it was declared when the grid was.
    """
    pairs: dict[Member, tuple[Group, Group]] = {}
    for (name, model), group in groups.items():
        reference = references[name]
        if reference is not None and (reference, model) in groups:
            pairs[name, model] = (groups[reference, model], group)
    declared = {member: pair for member, pair in pairs.items() if all(group.seeds for group in pair)}
    differences = {member: difference(candidate, baseline) for member, (candidate, baseline) in declared.items()}
    return {member: found for member, found in differences.items() if found is not None}, len(declared)


def _published(
    dataset: str, model: str, quantizer: str, group: Group, numbers: Mapping[NumberKey, Number]
) -> Reproduction | None:
    """What was published of these very cells: for fp, of its own task and init."""
    found = [numbers.get((dataset, model, quantizer, task, init)) for task, init in group.settings]
    return reproduction(found[0], group.usable) if len(found) == 1 and found[0] is not None else None


def _ranks(blocks: Sequence[Block]) -> Iterator[Ranks]:
    """One ranking per task and init, over the models of all data sets; none where a model would count twice."""
    for task, init in dict.fromkeys((block.task, block.init) for block in blocks):
        here = [block for block in blocks if (block.task, block.init) == (task, init)]
        models = [f"{block.dataset}/{model}" for block in here for model in block.models]
        if len(set(models)) < len(models):
            continue
        means: dict[str, dict[str, float | None]] = {model: {} for model in models}
        for block in here:
            for entry in block.entries:
                if entry.quantizer != FULL_PRECISION:
                    means[f"{block.dataset}/{entry.model}"][entry.quantizer] = entry.top1_hard_mean
        methods = sorted({name for row in means.values() for name in row}, key=_row_position)
        if found := ranks(task, init, means, methods):
            yield found
