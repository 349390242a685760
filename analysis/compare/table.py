"""Frame of cells -> Table: for each heading, the accuracy of every quantizer on every model, and the comparisons.

A heading (`Block`) is one grid, data set, task and init. The primary family belongs to a grid: one question for each
binary baseline under each heading. Per-model questions form a second family of all declared baselines and models, but
are tested only for baselines that the primary family separates from the candidate (gatekeeping).
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from analysis.compare.comparison import Comparison
from analysis.compare.family import FULL_PRECISION, ROW_ORDER, Against, Right, against, answer_all, margin_of
from analysis.compare.groups import Group
from analysis.compare.published import Key as NumberKey
from analysis.compare.published import Number, Publication, Reproduction, by_key, reproduction
from analysis.runs import frame as cells
from analysis.runs.frame import Budget, Declared, Method
from analysis.runs.tuning import Tuned
from analysis.stats.ranks import MIN_BLOCKS, Ranking, rank_methods

MIN_METHODS = 3
"""At least this many binary methods are needed to rank them over models."""

Member = tuple[str, str]
"""Quantizer and model."""
Key = tuple[str, str, str, str]
"""Grid, data set, task, init."""
Row = Mapping[str, Any]
Recipe = Mapping[str, str]


@dataclass(frozen=True)
class Entry:
    """One quantizer on one model. Accuracies are fractions, None if not measured or if `conflict` forbids a mean.

    `missing` counts the seeds without a measurement by reason, such as `failed: oom`. `gap_mean` is soft minus hard
    accuracy. `is_best`: no binary method with all of the model's seeds has a higher mean; this is not a test. `tuned`
    is the method's tuning budget, None if it was not tuned.
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
    gap_mean: float | None = None
    num_bytes: float | None = None
    is_best: bool = False
    tuned: Budget | None = None
    published: Reproduction | None = None


@dataclass(frozen=True)
class Block:
    """One heading: its entries row by row, and its comparisons. `title` distinguishes it from other headings.

    `primary` has one Comparison per binary baseline, `by_model` one per baseline and model, `architectures` one per
    baseline if there are six models or more. `reference` compares with full precision; these are not hypotheses.
    `groups` holds the data behind the entries.
    """

    title: str
    grid: str
    dataset: str
    task: str
    init: str
    models: tuple[str, ...]
    quantizers: tuple[str, ...]
    entries: tuple[Entry, ...]
    groups: Mapping[Member, Group] = field(repr=False, compare=False, default_factory=dict)
    primary: tuple[Comparison, ...] = ()
    by_model: tuple[Comparison, ...] = ()
    architectures: tuple[Comparison, ...] = ()
    reference: tuple[Comparison, ...] = ()

    @property
    def family_size(self) -> int:
        """Comparisons in the primary family, over all headings of the grid; 0 if there are none."""
        return max((one.family_size for one in self.primary), default=0)

    def answer(self, quantizer: str) -> Comparison | None:
        """The comparison with this quantizer over all models of the heading; covers fp and identical networks, too."""
        everything = (*self.primary, *self.reference)
        return next((one for one in everything if quantizer in {one.baseline, *one.identical}), None)


@dataclass(frozen=True)
class Ranks:
    """Ranking of the methods of one task and init over `models` (data set/model).

    `incomplete` lists the methods left out because they have no mean on one of the models.
    """

    task: str
    init: str
    models: tuple[str, ...]
    incomplete: tuple[str, ...]
    ranking: Ranking


@dataclass(frozen=True)
class Table:
    """Headings, the candidates' label, and the findings to read first.

    `margin` is the declared one, a fraction; None if none is declared or if grids differ. `ranks` describes the methods
    over all models, if there are enough. `publication` is the source of the entries' published numbers. `tuning` holds
    the trials and choices, if known. `is_declared`: whether each grid declared the question before its runs.
    """

    blocks: tuple[Block, ...]
    label: str
    findings: tuple[str, ...]
    margin: float | None = None
    ranks: tuple[Ranks, ...] = ()
    publication: Publication | None = None
    tuning: tuple[Tuned, ...] = ()
    is_declared: bool = True

    @property
    def is_tuned(self) -> bool:
        """Whether any method was tuned."""
        return any(entry.tuned for block in self.blocks for entry in block.entries)

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """All comparisons of all headings."""
        return tuple(
            one
            for block in self.blocks
            for one in (*block.primary, *block.by_model, *block.architectures, *block.reference)
        )


def tabulate(
    results: cells.Results,
    wanted: Against | None = None,
    publication: Publication | None = None,
    recipes: Mapping[tuple[str, str], Recipe] | None = None,
    right: Right | None = None,
) -> Table:
    """Builds the table of all quantizers in `results`.

    wanted: what each quantizer is compared with; default: the primary method that the grid declares. recipes: by grid
    and cell id, for published numbers. right: for intervals over new test images; None: no such intervals.


    Raises:
        ValueError: the frame violates its schema.
    """
    cells.validate(results.frame)
    declared = {grid: results.declared.get(grid, Declared()) for grid in results.frame["grid"].unique()}
    own_choices = {grid: against(own.primary) for grid, own in declared.items()}
    choices = own_choices if wanted is None else dict.fromkeys(declared, wanted)
    rows = cells.records(results.frame)
    told_apart = {name for name in ("grid", "task", "init") if len({row[name] for row in rows}) > 1}
    blocks = [_block(key, own, told_apart, declared[key[0]].tuning) for key, own in rows_by_block(rows).items()]
    answered: list[Block] = []
    for grid in dict.fromkeys(block.grid for block in blocks):
        own = [block for block in blocks if block.grid == grid]
        answered += answer_all(own, choices[grid], declared[grid], right)
    findings = results.findings
    if publication is not None:
        answered = _with_published(answered, publication, {g: margin_of(d) for g, d in declared.items()}, recipes or {})
        if not any(entry.published for block in answered for entry in block.entries):
            wanted_cells = cells.shortened("/".join(key[:3]) for key in by_key(publication))
            findings = (*findings, f"none of the published numbers is of these cells; they are of {wanted_cells}")
    labels = {choice.label for choice in choices.values()}
    margins = {margin_of(own) for own in declared.values()}
    return Table(
        tuple(answered),
        labels.pop() if len(labels) == 1 else "the primary method",
        findings,
        margins.pop() if len(margins) == 1 else None,
        tuple(_ranks(answered)),
        publication,
        results.tuning,
        is_declared=all(own_choices[grid].label == choice.label for grid, choice in choices.items()),
    )


def rows_by_block(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """Rows by (grid, data set, task, init), with full precision beside the methods it is compared with.

    Full-precision cells always have task bw, and fine-tuned cells start from a cell of another init. So a model's
    full-precision cells join every block in which the model has binary methods: of the same init if there are any, else
    of all inits. Without binary methods they form the block of their own task and init. Real weights with binary
    activations (task ba) are not full precision and form their own block.
    """
    by_model: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        by_model.setdefault((row["grid"], row["dataset"], row["model"]), []).append(row)
    parts: dict[Key, list[Row]] = {}
    for (grid, dataset, _), own in by_model.items():
        for row in own:
            if row["task"] == "ba":
                parts.setdefault((grid, dataset, "ba", row["init"]), []).append(row)
        full_precision = [row for row in own if row["quantizer"] == FULL_PRECISION and row["task"] != "ba"]
        methods = [row for row in own if row["quantizer"] != FULL_PRECISION]
        for task, init in dict.fromkeys((row["task"], row["init"]) for row in methods or full_precision):
            same_init = [row for row in full_precision if row["init"] == init]
            here = [row for row in methods if (row["task"], row["init"]) == (task, init)]
            parts.setdefault((grid, dataset, task, init), []).extend([*(same_init or full_precision), *here])
    return parts


def _block(key: Key, rows: Iterable[Row], told_apart: Collection[str], tuning: Mapping[Method, Budget]) -> Block:
    """The heading with its entries but no comparisons yet."""
    grid, dataset, task, init = key
    by_member: dict[Member, list[Row]] = {}
    for row in rows:
        by_member.setdefault((row["quantizer"], row["model"]), []).append(row)
    quantizers = tuple(sorted({name for name, _ in by_member}, key=row_position))
    models = tuple(sorted({model for _, model in by_member}, key=cells.natural_key))
    groups = {(name, model): Group.of(by_member.get((name, model), ())) for name in quantizers for model in models}
    num_seeds = {model: len(set().union(*(groups[name, model].seeds for name in quantizers))) for model in models}
    best = {model: _best(groups, model, num_seeds[model]) for model in models}
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
            gap_mean=group.gap_mean,
            num_bytes=group.num_bytes,
            is_best=name in best[model],
            tuned=next((tuning[m] for m in _methods(group, dataset, model, name) if m in tuning), None),
        )
        for (name, model), group in groups.items()
    )
    named = {"grid": grid, "task": task, "init": init}
    title = ", ".join([dataset, *(f"{name} {value}" for name, value in named.items() if name in told_apart)])
    return Block(title, grid, dataset, task, init, models, quantizers, entries, groups)


def _methods(group: Group, dataset: str, model: str, quantizer: str) -> Iterator[Method]:
    """The group's cells as keys of `Declared.tuning`; full precision can have another task and init than the block."""
    for task, init in sorted(group.settings):
        yield (dataset, task, init, model, quantizer)


def row_position(quantizer: str) -> tuple[int, str]:
    """Sort key: the catalogue's order, then by name."""
    return (ROW_ORDER.index(quantizer) if quantizer in ROW_ORDER else len(ROW_ORDER), quantizer)


def _best(groups: Mapping[Member, Group], model: str, num_seeds: int) -> set[str]:
    """Binary methods with the highest mean among the methods that have every seed of the model."""
    means = {
        name: group.mean
        for (name, own), group in groups.items()
        if own == model and name != FULL_PRECISION and group.mean is not None and len(group.usable) == num_seeds
    }
    if len(means) < 2:  # noqa: PLR2004 - a single method cannot be best
        return set()
    highest = max(means.values())
    return {name for name, mean in means.items() if highest - mean <= 1e-12}  # noqa: PLR2004 - rounding


def _with_published(
    blocks: Sequence[Block],
    publication: Publication,
    margins: Mapping[str, float | None],
    recipes: Mapping[tuple[str, str], Recipe],
) -> list[Block]:
    numbers = by_key(publication)

    def compared(block: Block, entry: Entry, num_tests: int) -> Entry:
        number = _number(block, entry, numbers)
        if number is None:
            return entry
        group = block.groups[entry.quantizer, entry.model]
        recipe = next((recipes.get((block.grid, cell_id)) for cell_id in group.averaged), None)
        found = reproduction(number, publication, group.usable, margins[block.grid], recipe, num_tests)
        return replace(entry, published=found)

    # The first pass counts the tests. Which numbers can be tested depends on recipes and finished runs, not on results.
    first = [compared(block, entry, 1).published for block in blocks for entry in block.entries]
    num_tests = max(1, sum(found is not None and found.test is not None for found in first))
    return [
        replace(block, entries=tuple(compared(block, entry, num_tests) for entry in block.entries)) for block in blocks
    ]


def _number(block: Block, entry: Entry, numbers: Mapping[NumberKey, Number]) -> Number | None:
    """The published number for exactly these cells; fp is looked up by its own task and init."""
    group = block.groups[entry.quantizer, entry.model]
    found = [numbers.get((block.dataset, entry.model, entry.quantizer, task, init)) for task, init in group.settings]
    return found[0] if len(found) == 1 else None


def _ranks(blocks: Sequence[Block]) -> Iterator[Ranks]:
    """One ranking per task and init, over the models of all data sets; skipped if a model would count twice."""
    for task, init in dict.fromkeys((block.task, block.init) for block in blocks):
        here = [block for block in blocks if (block.task, block.init) == (task, init)]
        models = [f"{block.dataset}/{model}" for block in here for model in block.models]
        if len(set(models)) < len(models):
            continue
        means: dict[str, dict[str, float]] = {}
        for block in here:
            for entry in block.entries:
                if entry.quantizer != FULL_PRECISION and entry.top1_hard_mean is not None:
                    means.setdefault(f"{block.dataset}/{entry.model}", {})[entry.quantizer] = entry.top1_hard_mean
        methods = sorted({name for row in means.values() for name in row}, key=row_position)
        complete = [name for name in methods if all(name in row for row in means.values())]
        if len(means) >= MIN_BLOCKS and len(complete) >= MIN_METHODS:
            ranking = rank_methods([[row[name] for name in complete] for row in means.values()], complete)
            yield Ranks(task, init, tuple(means), tuple(name for name in methods if name not in complete), ranking)
