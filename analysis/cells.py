"""The tidy frame that every analysis starts from, one row per cell, and what is wrong with it in one-line findings."""

import re
from collections.abc import Iterable, Iterator

import pandas as pd

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
}
SETTING = ["grid", "dataset", "model", "quantizer", "task", "init"]
"""Cells equal in these differ by seed only, or should."""


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
                f"{column} of {_names(wrong)[0]} is {wrong[column].iloc[0]:g}; accuracies are fractions in [0, 1]"
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


def natural_key(value: str | int) -> tuple[tuple[int, str], ...]:
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
        *_unmeasured(cells),
    )


def _duplicate_runs(runs: pd.DataFrame) -> Iterator[str]:
    for _, same in runs[runs.duplicated(["grid", "cell_id"], keep=False)].groupby(["grid", "cell_id"]):
        done = same[same["state"] == "done"]
        values = done["top1_hard"].dropna().unique()
        disagree = f" that disagree on top1_hard ({shortened(f'{value:.6g}' for value in values)})" * (len(values) > 1)
        used = "newest" if done.empty else "newest done"
        yield f"{_names(same)[0]} has {len(same)} runs in the store{disagree}; the {used} one is used"


def _mixed_recipes(cells: pd.DataFrame) -> Iterator[str]:
    for _, group in cells.groupby(SETTING, sort=False):
        recipes = group["recipe_id"].unique()
        if len(recipes) > 1:
            yield (
                f"cells of {len(recipes)} recipes ({shortened(recipes)}) instead of one, so no mean is shown: "
                f"{shortened(_names(group))}; give an edited grid a new name, or remove the old cells"
            )


def _repeated_seeds(cells: pd.DataFrame) -> Iterator[str]:
    again = cells[cells.duplicated([*SETTING, "seed", "recipe_id"])]
    if len(again):
        yield f"several cells of the same recipe and seed, so no mean is shown: {shortened(_names(again))}"


def _mixed_commits(cells: pd.DataFrame) -> Iterator[str]:
    for grid, done in cells[cells["state"] == "done"].groupby("grid"):
        counts = done["git_commit"].value_counts()
        if len(counts) > 1:
            shares = (f"{str(commit)[:12] or 'unknown'} ({count})" for commit, count in counts.items())
            yield f"{grid}: done cells come from {len(counts)} versions of the code: {shortened(shares)}"


def _not_done(cells: pd.DataFrame) -> Iterator[str]:
    for status, group in cells[cells["state"] != "done"].groupby(status_of(cells)):
        yield f"{len(group)} of {len(cells)} cells {status} ({shortened(_names(group))})"


def _unmeasured(cells: pd.DataFrame) -> Iterator[str]:
    unmeasured = cells[(cells["state"] == "done") & cells["top1_hard"].isna()]
    if len(unmeasured):
        yield f"done without test/top1_hard in the store: {shortened(_names(unmeasured))}"


def status_of(cells: pd.DataFrame) -> pd.Series:
    """State of each row with its cause, `failed: oom`, or the state alone. Same index."""
    return cells["state"].where(cells["cause"] == "", cells["state"] + ": " + cells["cause"])


def _names(cells: pd.DataFrame) -> list[str]:
    """Display names as suite.config.Cell's: `cifar10/resnet20/bnn++/s3`, then a start not scratch and a task not bw."""
    rows = zip(*(cells[key] for key in ("dataset", "model", "quantizer", "seed", "init", "task")), strict=True)
    return [
        f"{dataset}/{model}/{quantizer}/s{seed}" + f"/{init}" * (init != "scratch") + f"/{task}" * (task != "bw")
        for dataset, model, quantizer, seed, init, task in rows
    ]


def shortened(items: Iterable[object], limit: int = 5) -> str:
    """The first few, and how many more: a finding stays one line for a grid of 10,000 cells."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more
