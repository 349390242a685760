"""The tidy frame that every analysis starts from, one row per cell, and what is wrong with it in one-line findings."""

import difflib
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

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
    "cause": "string",  # of a failure, else ""
    "recipe_id": "string",
    "cell_id": "string",
    "git_commit": "string",  # "" until the cell has run
    "top1_hard": "float64",  # test accuracy, a fraction, NaN until measured
    "top1_soft": "float64",
    "num_binary_parameters": "float64",  # NaN until measured
    "num_full_precision_parameters": "float64",
    "job_id": "string",  # as the launcher wrote it, "" until the cell has run
    "data_checksum": "string",  # of the data the run read, "" where not known
    "run": "string",  # where the row was read: MLflow's run id, or the run directory
}
SETTING = ["grid", "dataset", "model", "quantizer", "task", "init"]
"""Cells equal in these differ by seed only, or should."""


@dataclass(frozen=True)
class Results:
    """All cells of one grid or more: `frame`, one row per cell with columns SCHEMA, and what a reader must know first.

    Both are lines of text: `doubts` put numbers in doubt, and --strict refuses them; `remarks` do not.
    """

    frame: pd.DataFrame
    doubts: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    @property
    def findings(self) -> tuple[str, ...]:
        """What stands above every output."""
        return (*self.remarks, *self.doubts)


def results(rows: Iterable[dict[str, object]], left_out: Collection[str] = ()) -> Results:
    """The rows, from the oldest run to the newest, as results; left_out names cells of earlier launches.

    Raises:
        ValueError: the rows break the schema.
    """
    runs = validate(pd.DataFrame(list(rows), columns=list(SCHEMA)).astype(SCHEMA))
    remarks: tuple[str, ...] = ()
    if left_out:
        which = shortened(sorted(left_out, key=natural_key))
        remarks = (f"{len(left_out)} cells that the grid had before its last launch are left out ({which})",)
    return Results(one_per_cell(runs), findings(runs), remarks)


def require_known(kind: str, name: str, known: Collection[str], where: str) -> None:
    """Raises UserError where name is not known: what it may have meant, and what there is in `where`."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown {kind} {name!r}; {hint}in {where}: {shortened(sorted(known), limit=20) or 'none'}")


def validate(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame itself, if it has SCHEMA's columns and dtypes in SCHEMA's order and its accuracies are fractions.

    Raises:
        ValueError: it has not.
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
    """One row per (grid, cell_id) of runs ordered from oldest to newest: the newest done one, else the newest.

    Rows are sorted by data set, model (`resnet20` before `resnet110`), quantizer and seed.
    """
    done_last = runs.assign(done=runs["state"] == "done").sort_values("done", kind="stable").drop(columns="done")
    cells = done_last.drop_duplicates(["grid", "cell_id"], keep="last")
    order = [*SETTING, "seed", "cell_id"]
    return cells.sort_values(order, key=lambda column: column.map(natural_key)).reset_index(drop=True)


def natural_key(value: object) -> tuple[tuple[int, str], ...]:
    """Sorting key that reads digits as numbers: resnet20, resnet56, resnet110."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(value)))


def findings(runs: pd.DataFrame) -> tuple[str, ...]:
    """Everything a reader of results from these runs must know first: one line each, none if all is well."""
    cells = one_per_cell(runs)
    return (
        *_duplicate_runs(runs),
        *_mixed_recipes(cells),
        *_repeated_seeds(cells),
        *_mixed_commits(cells),
        *_not_done(cells),
        *_missing_seeds(cells),
        *_unmeasured(cells),
    )


def _duplicate_runs(runs: pd.DataFrame) -> Iterator[str]:
    for _, same in runs[runs.duplicated(["grid", "cell_id"], keep=False)].groupby(["grid", "cell_id"]):
        done = same[same["state"] == "done"]
        values = done["top1_hard"].dropna().unique()
        disagree = f" that disagree on top1_hard ({shortened(f'{value:.6g}' for value in values)})" * (len(values) > 1)
        used = "newest" if done.empty else "newest done"
        yield f"{names(same)[0]} has {len(same)} runs in the store{disagree}; the {used} one is used"


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


def _mixed_commits(cells: pd.DataFrame) -> Iterator[str]:
    for grid, done in cells[cells["state"] == "done"].groupby("grid"):
        counts = done["git_commit"].value_counts()
        if len(counts) > 1:
            shares = (f"{str(commit)[:12] or 'unknown'} ({count})" for commit, count in counts.items())
            yield f"{grid}: done cells come from {len(counts)} versions of the code: {shortened(shares)}"


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
    """The frame's rows with their `status`, as plain values."""
    return [
        {str(key): value for key, value in row.items()}
        for row in frame.assign(status=status_of(frame)).to_dict("records")
    ]


def status_of(cells: pd.DataFrame) -> pd.Series:
    """State of each row with its cause, `failed: oom`, or the state alone. Same index."""
    return cells["state"].where(cells["cause"] == "", cells["state"] + ": " + cells["cause"])


def names(cells: pd.DataFrame) -> list[str]:
    """Display names as a Cell's: `cifar10/resnet20/bnn++/s3`, then a start not scratch and a task not bw."""
    return [f"{group}/s{seed}{rest}" for (group, rest), seed in zip(_groups(cells), cells["seed"], strict=True)]


def _groups(cells: pd.DataFrame) -> list[tuple[str, str]]:
    """Of each display name what stands before and after the seed."""
    rows = zip(*(cells[key] for key in ("dataset", "model", "quantizer", "init", "task")), strict=True)
    return [
        (f"{dataset}/{model}/{quantizer}", f"/{init}" * (init != "scratch") + f"/{task}" * (task != "bw"))
        for dataset, model, quantizer, init, task in rows
    ]


def shortened(items: Iterable[object], limit: int = 5) -> str:
    """The first few, and how many more: a finding stays one line for a grid of 10,000 cells."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more
