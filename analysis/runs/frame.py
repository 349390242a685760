"""The tidy frame behind every analysis, one row per cell, and one-line findings about its problems."""

import difflib
import gc
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pandas as pd

from analysis.runs.tuning import Tuned
from suite.errors import UserError

SCHEMA = {
    "grid": "string",
    "dataset": "string",
    "model": "string",
    "quantizer": "string",
    "seed": "int64",
    "task": "string",
    "init": "string",
    "state": "string",
    "cause": "string",  # cause of a failure, else ""
    "recipe_id": "string",
    "cell_id": "string",
    "git_commit": "string",  # "" until the cell has run
    "code_digest": "string",  # of the code that ran
    "users_digest": "string",  # of the user's own quantizers, "" if built in
    "device": "string",
    "num_threads": "string",  # of each process
    "num_processes": "string",
    "determinism": "string",
    "device_hours": "float64",  # over all attempts, NaN if not known
    "top1_hard": "float64",  # test accuracy, a fraction, NaN until measured
    "top1_soft": "float64",
    "num_binary_parameters": "float64",  # NaN until measured
    "num_full_precision_parameters": "float64",
    "weights_sha256": "string",  # of the tested network, "" until done
    "job_id": "string",  # as the launcher wrote it, "" until the cell has run
    "data_checksum": "string",  # of the data the run read, "" where not known
    "run": "string",  # the row's origin: MLflow run id or run directory
}
SETTING = ["grid", "dataset", "model", "quantizer", "task", "init"]
"""Cells that agree in these columns should differ in the seed only."""


Setting = tuple[str, str, str, str, str, int]
"""Data set, task, init, model, quantizer, seed."""
Method = tuple[str, str, str, str, str]
"""Data set, task, init, model, quantizer."""


class Budget(NamedTuple):
    """Budget for tuning a method on a model: settings tried, seeds per setting, epochs per run.

    `given`: source of the values if trials of this grid did not choose them; the numbers are then the source's, or 0.
    """

    trials: int
    seeds: int
    epochs: int | None
    given: str = ""

    def __str__(self) -> str:
        """`12 × 2 seeds`, `given`."""
        tried = f"{self.trials} × {self.seeds} seed{'s' * (self.seeds != 1)}"
        return f"given{f' ({tried})' * bool(self.trials)}" if self.given else tried


@dataclass(frozen=True)
class Declared:
    """What a launch declared before any run: the candidate, the margin of equivalence, the planned cells.

    `tuning` holds the budget of each tuned method on each model.
    """

    primary: str = "bnn++"
    margin_points: float | None = None
    settings: frozenset[Setting] = frozenset()
    tuning: Mapping[Method, Budget] = field(default_factory=dict)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "Declared":
        """Parses a record of `suite.recipe.grid.Grid.declared`."""
        settings = frozenset((*map(str, own[:5]), int(seed)) for own in raw.get("settings", ()) for seed in own[5])
        tuning = {tuple(own[:5]): Budget(*own[5:]) for own in raw.get("tuning", ())}
        return cls(raw.get("primary", "bnn++"), raw.get("margin_points"), settings, tuning)  # type: ignore[arg-type]


def first_declared(grid: str, launches: Sequence[Mapping[str, Any]]) -> tuple[Declared, tuple[str, ...]]:
    """The first launch's declaration, which the analysis uses, and a doubt for each thing that a later launch changed.

    Tuning budgets come from the last launch, because its choices trained the cells.
    """
    if not launches:
        return Declared(), ()
    first, last = Declared.of(launches[0]), Declared.of(launches[-1])
    doubts = []
    if first.primary != last.primary:
        doubts.append(
            f"{grid}: the first launch declared the comparison of {first.primary}, the last one of {last.primary}; the "
            "first is kept"
        )
    if first.margin_points != last.margin_points:
        doubts.append(
            f"{grid}: the first launch declared a margin of {first.margin_points or 'none'}, the last one of "
            f"{last.margin_points or 'none'} points; the first is kept"
        )
    for position, kind in ((3, "model"), (4, "quantizer"), (5, "seed")):
        then, now = ({setting[position] for setting in each.settings} for each in (first, last))
        if now and (gone := sorted(then - now, key=natural_key)):
            doubts.append(
                f"{grid}: the first launch declared {kind}s that the last one no longer has ({shortened(gone)}): "
                "dropped after results were seen, they bias what is left"
            )
    return replace(first, tuning=last.tuning), tuple(doubts)


@dataclass(frozen=True)
class Results:
    """All cells of one or more grids: `frame` has one row per cell and columns SCHEMA.

    Findings are lines of text: `doubts` put numbers in doubt, and --strict rejects them; `remarks` do not. `declared`
    is each grid's declaration, from its first launch. `tuning` holds trials and choices, which only run directories
    record.
    """

    frame: pd.DataFrame
    doubts: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    declared: Mapping[str, Declared] = field(default_factory=dict)
    tuning: tuple[Tuned, ...] = ()

    @property
    def findings(self) -> tuple[str, ...]:
        """All findings, shown with every output."""
        return (*self.remarks, *self.doubts)


def results(
    rows: Iterable[dict[str, object]],
    left_out: Collection[str] = (),
    launches: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    more_remarks: Iterable[str] = (),
    more_doubts: Iterable[str] = (),
    tuning: tuple[Tuned, ...] = (),
) -> Results:
    """Makes results from rows, ordered from the oldest run to the newest. `left_out` names cells of earlier launches.

    launches: grid -> each launch's declaration, oldest first.

    Raises:
        ValueError: the rows violate the schema.
    """
    runs = validate(pd.DataFrame(list(rows), columns=list(SCHEMA)).astype(SCHEMA))
    remarks: tuple[str, ...] = tuple(more_remarks)
    if left_out:
        which = shortened(sorted(left_out, key=natural_key))
        remarks += (f"{len(left_out)} cells that the grid had before its last launch are left out ({which})",)
    declared: dict[str, Declared] = {}
    doubts: list[str] = list(more_doubts)
    for grid in runs["grid"].unique():
        declared[str(grid)], changed = first_declared(str(grid), (launches or {}).get(str(grid), ()))
        doubts += changed
    cells = one_per_cell(runs)
    doubts += _unequal_budgets(cells, declared)
    return Results(cells, (*doubts, *_findings(runs, cells)), (*remarks, *_mixed_machines(cells)), declared, tuning)


@contextmanager
def uncollected() -> Iterator[None]:
    """Disables garbage collection, which would scan millions of objects again and again while they are being read.

    Reading 10,000 runs from MLflow takes 10 s instead of 22 s.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def require_known(kind: str, name: str, known: Collection[str], where: str) -> None:
    """Raises UserError if `name` is unknown; the message suggests the closest match and lists what `where` has."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown {kind} {name!r}; {hint}in {where}: {shortened(sorted(known), limit=20) or 'none'}")


def validate(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns the frame if it has SCHEMA's columns, order and dtypes and its accuracies are fractions.

    Raises:
        ValueError: it does not.
    """
    if list(frame.columns) != list(SCHEMA):
        raise ValueError(f"columns are {', '.join(frame.columns)}; the schema has {', '.join(SCHEMA)}")
    for column, dtype in SCHEMA.items():
        if frame[column].dtype != dtype:
            raise ValueError(f"column {column} is {frame[column].dtype}; the schema says {dtype}")
    for column in ("top1_hard", "top1_soft"):
        measured = frame[frame[column].notna()]
        wrong = measured[~measured[column].between(0, 1)]
        if len(wrong):
            raise ValueError(
                f"{column} of {names(wrong)[0]} is {wrong[column].iloc[0]:g}; accuracies are fractions in [0, 1]"
            )
    return frame


def one_per_cell(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per (grid, cell_id), from runs ordered from oldest to newest: the newest done run, else the newest run.

    Rows are sorted by data set, model (`resnet20` before `resnet110`), quantizer and seed.
    """
    done_last = runs.assign(done=runs["state"] == "done").sort_values("done", kind="stable").drop(columns="done")
    cells = done_last.drop_duplicates(["grid", "cell_id"], keep="last")
    keys = {value: natural_key(value) for column in SETTING for value in cells[column].unique()}
    rows = zip(*(cells[column] for column in SETTING), cells["seed"], cells["cell_id"], strict=True)
    order = sorted(range(len(cells)), key=[(*map(keys.get, row[:-2]), *row[-2:]) for row in rows].__getitem__)
    return cells.iloc[order].reset_index(drop=True)


def natural_key(value: object) -> tuple[tuple[int, str], ...]:
    """Sort key that compares digits as numbers: resnet20, resnet56, resnet110."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(value)))


def findings(runs: pd.DataFrame) -> tuple[str, ...]:
    """Everything to know before reading results from these runs: one line per finding, none if all is well."""
    return _findings(runs, one_per_cell(runs))


def _findings(runs: pd.DataFrame, cells: pd.DataFrame) -> tuple[str, ...]:
    return (
        *_duplicate_runs(runs),
        *_mixed_recipes(cells),
        *_repeated_seeds(cells),
        *_mixed_code(cells),
        *_mixed_users_code(cells),
        *_not_done(cells),
        *_missing_seeds(cells),
        *_unmeasured(cells),
    )


def _unequal_budgets(cells: pd.DataFrame, declared: Mapping[str, Declared]) -> Iterator[str]:
    """Binary methods that are compared on a model but were tuned with different budgets."""
    names = ["grid", "dataset", "task", "init", "model", "quantizer"]
    compared: dict[str, list[Method]] = {}
    for grid, *method in cells[cells["quantizer"] != "fp"][names].drop_duplicates().itertuples(index=False, name=None):
        compared.setdefault(grid, []).append(tuple(method))
    for grid, methods in compared.items():
        tuning = declared[grid].tuning
        by_model: dict[tuple[str, ...], dict[str, list[str]]] = {}
        for *place, model, quantizer in methods if tuning else ():
            own = tuning.get((*place, model, quantizer))  # type: ignore[arg-type]
            words = "not tuned" if own is None else f"{own}{f', {own.epochs} epochs' * bool(own.epochs)}"
            by_model.setdefault((*place, model), {}).setdefault(words, []).append(quantizer)
        where: dict[str, list[str]] = {}
        for (dataset, *_, model), budgets in by_model.items():
            if len(budgets) > 1:
                told = "; ".join(f"{', '.join(quantizers)}: {words}" for words, quantizers in budgets.items())
                where.setdefault(told, []).append(f"{dataset}/{model}")
        for told, places in where.items():
            yield f"{grid}: methods were tuned with different budgets on {shortened(places)} ({told})"


def _duplicate_runs(runs: pd.DataFrame) -> Iterator[str]:
    """Cells with several differing results. Extra runs without a result or with the same result are not findings."""
    done = runs[(runs["state"] == "done") & runs["top1_hard"].notna()]
    for _, same in done[done.duplicated(["grid", "cell_id"], keep=False)].groupby(["grid", "cell_id"]):
        values = same["top1_hard"].unique()
        if len(values) > 1:
            shown = shortened(f"{value:.6g}" for value in values)
            yield (
                f"{names(same)[0]} has {len(same)} done runs that disagree on top1_hard ({shown}); "
                f"{same['top1_hard'].iloc[-1]:.6g} is used"
            )


def _mixed_recipes(cells: pd.DataFrame) -> Iterator[str]:
    for _, group in cells.groupby(SETTING, sort=False):
        recipes = group["recipe_id"].unique()
        if len(recipes) > 1:
            yield (
                f"cells of {len(recipes)} recipes ({shortened(recipes)}) instead of one, so no mean is shown: "
                f"{shortened(names(group))}; give an edited grid a new name, or remove the old cells"
            )


def _repeated_seeds(cells: pd.DataFrame) -> Iterator[str]:
    again = cells[cells.duplicated([*SETTING, "seed", "recipe_id"])]
    if len(again):
        yield f"several cells of the same recipe and seed, so no mean is shown: {shortened(names(again))}"


def _mixed_code(cells: pd.DataFrame) -> Iterator[str]:
    """Compares digests of the code that ran: a commit to the README changes no number, but an uncommitted edit may."""
    for grid, done in cells[cells["state"] == "done"].groupby("grid"):
        counts = done["code_digest"].value_counts()
        if len(counts) > 1:
            commits = {digest: done[done["code_digest"] == digest]["git_commit"].unique() for digest in counts.index}
            shares = (
                f"{digest or 'unknown'} ({count} cells, commit "
                f"{shortened((c[:12] or 'unknown' for c in commits[digest]), 2)})"
                for digest, count in counts.items()
            )
            yield f"{grid}: done cells come from {len(counts)} versions of the code: {shortened(shares)}"


def _mixed_users_code(cells: pd.DataFrame) -> Iterator[str]:
    for (grid, quantizer), done in cells[cells["state"] == "done"].groupby(["grid", "quantizer"]):
        if (num := done["users_digest"].nunique()) > 1:
            yield f"{grid}: done cells of {quantizer} come from {num} versions of the user's own module"


def _mixed_machines(cells: pd.DataFrame) -> Iterator[str]:
    """Differences that change floating-point rounding, and so the last digits of a result."""
    kinds = {
        "device": "kinds of device",
        "num_threads": "numbers of threads",
        "num_processes": "numbers of processes",
        "determinism": "settings of determinism",
    }
    for grid, done in cells[cells["state"] == "done"].groupby("grid"):
        for column, kind in kinds.items():
            counts = done[column].value_counts()
            if len(counts) > 1:
                shares = (f"{value or 'unknown'} ({count} cells)" for value, count in counts.items())
                yield f"{grid}: done cells ran with {len(counts)} {kind}: {shortened(shares)}"


def _not_done(cells: pd.DataFrame) -> Iterator[str]:
    for status, group in cells[cells["state"] != "done"].groupby(status_of(cells)):
        yield f"{len(group)} of {len(cells)} cells {status} ({shortened(names(group))})"


def _missing_seeds(cells: pd.DataFrame) -> Iterator[str]:
    for _, same_model in cells.groupby(["grid", "dataset", "model", "task", "init"], sort=False):
        seeds = set(same_model["seed"])
        for _, own in same_model.groupby("quantizer", sort=False):
            if missing := sorted(seeds - set(own["seed"])):
                group = "".join(_groups(own.iloc[:1])[0])
                yield f"{group} has no cell for {len(missing)} of {len(seeds)} seeds ({shortened(missing)})"


def _unmeasured(cells: pd.DataFrame) -> Iterator[str]:
    unmeasured = cells[(cells["state"] == "done") & cells["top1_hard"].isna()]
    if len(unmeasured):
        yield f"done without test/top1_hard in the store: {shortened(names(unmeasured))}"


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The frame's rows as plain dictionaries, with a `status` field."""
    return [
        {str(key): value for key, value in row.items()}
        for row in frame.assign(status=status_of(frame)).to_dict("records")
    ]


def status_of(cells: pd.DataFrame) -> pd.Series:
    """State of each row, with the cause if there is one: `failed: oom`. Same index as `cells`."""
    return cells["state"].where(cells["cause"] == "", cells["state"] + ": " + cells["cause"])


def names(cells: pd.DataFrame) -> list[str]:
    """Names as in Cell.name: `cifar10/resnet20/bnn++/s3`, then the init unless scratch and the task unless bw."""
    return [f"{group}/s{seed}{rest}" for (group, rest), seed in zip(_groups(cells), cells["seed"], strict=True)]


def _groups(cells: pd.DataFrame) -> list[tuple[str, str]]:
    """The parts of each display name before and after the seed."""
    rows = zip(*(cells[key] for key in ("dataset", "model", "quantizer", "init", "task")), strict=True)
    return [
        (f"{dataset}/{model}/{quantizer}", f"/{init}" * (init != "scratch") + f"/{task}" * (task != "bw"))
        for dataset, model, quantizer, init, task in rows
    ]


def shortened(items: Iterable[object], limit: int = 5) -> str:
    """The first few items and the number of others: keeps a finding on one line for a grid of 10,000 cells."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more
