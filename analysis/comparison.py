"""Frame of cells -> Table: for every data set, model and quantizer, accuracy and a reference's paired difference to it.

The reference is BNN++, or for a published surrogate its completion.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis import cells
from analysis.statistics import Difference, paired_difference, sample_sd

FULL_PRECISION = "fp"
ROW_ORDER = ("fp", "bc", "pc", "bnn", "bnn+", "bnn++")
"""The catalogue's order; other quantizers follow by name."""


Key = tuple[str, str, str, str]
"""Grid, data set, task, init."""


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

    `missing` counts the seeds without a measurement by reason, `failed: oom`; `difference` is
    `reference` minus this one.
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


@dataclass(frozen=True)
class Block:
    """The entries of one grid, data set, task and init, row by row; `title` tells it from the other blocks."""

    title: str
    grid: str
    dataset: str
    task: str
    init: str
    models: tuple[str, ...]
    quantizers: tuple[str, ...]
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Table:
    """Blocks, what their quantizers are compared with, and what a reader must know before them."""

    blocks: tuple[Block, ...]
    against: str
    findings: tuple[str, ...]


def comparison(frame: pd.DataFrame, findings: tuple[str, ...] = (), against: Against = BNN_PLUS_PLUS) -> Table:
    """The comparison of all quantizers in a frame with columns `cells.SCHEMA`, one row per cell.

    Raises:
        ValueError: the frame breaks the schema.
    """
    cells.validate(frame)
    judged = frame.assign(
        measured=(frame["state"] == "done") & frame["top1_hard"].notna(),
        reason=cells.status_of(frame).replace("done", "done without accuracy"),  # why not measured
    )
    judged = judged[judged["quantizer"].map(against.shows)]
    references = {str(quantizer): against.reference(str(quantizer)) for quantizer in judged["quantizer"].unique()}
    blocks = tuple(_block(judged, key, rows, references) for key, rows in _rows_by_block(judged).items())
    return Table(blocks, against.label, findings)


def _rows_by_block(frame: pd.DataFrame) -> dict[Key, pd.DataFrame]:
    """Rows by (grid, data set, task, init), full precision beside the methods it is compared to.

    A full-precision cell has one task, bw, and fine-tuned cells start from one of another init. So a model's
    full-precision cells stand in every block where it has methods, those of the same init if there are any; without
    methods, in the block of their own task and init.
    """
    parts: dict[Key, list[pd.DataFrame]] = {}
    for (grid, dataset, _), rows in frame.groupby(["grid", "dataset", "model"], sort=False):
        full_precision = rows[rows["quantizer"] == FULL_PRECISION]
        methods = rows[rows["quantizer"] != FULL_PRECISION]
        settings = (full_precision if methods.empty else methods)[["task", "init"]].drop_duplicates()
        for task, init in settings.itertuples(index=False):
            same_init = full_precision[full_precision["init"] == init]
            baseline = full_precision if same_init.empty else same_init
            key = (str(grid), str(dataset), str(task), str(init))
            own = methods[(methods["task"] == task) & (methods["init"] == init)]
            parts.setdefault(key, []).extend([baseline, own])
    return {key: pd.concat(groups) for key, groups in parts.items()}


def _block(frame: pd.DataFrame, key: Key, rows: pd.DataFrame, references: dict[str, str | None]) -> Block:
    grid, dataset, task, init = key
    models = tuple(sorted(rows["model"].unique(), key=cells.natural_key))
    quantizers = tuple(sorted(rows["quantizer"].unique(), key=_row_position))
    told_apart = {"grid": grid, "task": task, "init": init}
    title = ", ".join(
        [dataset, *(f"{name} {value}" for name, value in told_apart.items() if len(frame[name].unique()) > 1)]
    )
    own = dict(iter(rows.groupby(["model", "quantizer"])))
    num_seeds = rows.groupby("model")["seed"].nunique().to_dict()  # Python's ints, for JSON
    nothing = rows.iloc[:0]
    entries = tuple(
        _entry(
            model,
            quantizer,
            own.get((model, quantizer), nothing),
            references[quantizer],
            own.get((model, references[quantizer]), nothing),
            num_seeds[model],
        )
        for quantizer in quantizers
        for model in models
    )
    return Block(title, grid, dataset, task, init, models, quantizers, entries)


def _row_position(quantizer: str) -> tuple[int, str]:
    return (ROW_ORDER.index(quantizer) if quantizer in ROW_ORDER else len(ROW_ORDER), quantizer)


def _entry(
    model: str, quantizer: str, own: pd.DataFrame, reference: str | None, reference_cells: pd.DataFrame, num_seeds: int
) -> Entry:
    """The entry of the cells `own`, beside its reference's; the model has num_seeds seeds over all its quantizers."""
    measured = own[own["measured"]]
    conflict = _conflict(own)
    usable = len(measured) > 0 and conflict is None
    soft = measured["top1_soft"].dropna()
    return Entry(
        model=model,
        quantizer=quantizer,
        num_seeds=num_seeds,
        num_done=len(measured),
        missing=_missing(own, num_seeds) if len(own) else (),
        conflict=conflict,
        top1_hard_mean=float(measured["top1_hard"].mean()) if usable else None,
        top1_hard_sd=sample_sd(measured["top1_hard"]) if usable and len(measured) > 1 else None,
        top1_soft_mean=float(soft.mean()) if usable and len(soft) else None,
        reference=reference,
        difference=_difference(reference_cells, own) if usable and reference is not None else None,
    )


def _missing(own: pd.DataFrame, num_seeds: int) -> tuple[tuple[str, int], ...]:
    """Why seeds have no measurement: their cells' status, or other quantizers have the seed and this one no cell."""
    reasons = Counter(own.loc[~own["measured"], "reason"])
    reasons["not in the store"] = num_seeds - len(own["seed"].unique())
    return tuple(sorted((reason, count) for reason, count in reasons.items() if count))


def _conflict(own: pd.DataFrame) -> str | None:
    """Why no mean may be taken over these cells, if so."""
    num_recipes = len(own["recipe_id"].unique())
    if num_recipes > 1:
        return f"{num_recipes} recipes mixed"
    return "several cells per seed" if own["seed"].duplicated().any() else None


def _difference(candidate: pd.DataFrame, baseline: pd.DataFrame) -> Difference | None:
    """Candidate minus baseline, None if they share no measured seed or the candidate's cells are in conflict."""
    ours, theirs = (_top1_hard_by_seed(rows[rows["measured"]]) for rows in (candidate, baseline))
    if _conflict(candidate) or not ours.keys() & theirs.keys():
        return None
    # A fresh generator each: an interval depends on its own pairs, not on what else is in the table.
    return paired_difference(ours, theirs, np.random.default_rng(0))


def _top1_hard_by_seed(rows: pd.DataFrame) -> dict[int, float]:
    return dict(zip(rows["seed"].tolist(), rows["top1_hard"].tolist(), strict=True))
