"""The runs behind a table entry: traces a number to its run directories or MLflow runs."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.compare.groups import Group
from analysis.runs import frame as cells
from suite.errors import UserError

COLUMNS = (
    "seed",
    "state",
    "cause",
    "counts",
    "top1_hard",
    "top1_soft",
    "cell_id",
    "recipe_id",
    "run",
    "job_id",
    "git_commit",
    "data_checksum",
)


def render(results: cells.Results, name: str, layout: str) -> str:
    """The cells behind the entry `name` as markdown, csv or json.

    Raises:
        UserError: no such entry, or an unsupported layout.
    """
    runs = explain(results.frame, name)
    if layout == "csv":
        return _csv(runs)
    if layout == "json":
        return _json(runs, name, results.findings)
    if layout == "markdown":
        return _markdown(runs, name, results.findings)
    raise UserError(f"--explain has no format {layout!r}; choose markdown, csv or json")


def explain(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """The cells of DATASET/MODEL/QUANTIZER in a frame with columns cells.SCHEMA, by grid, task, init and seed.

    `counts`: whether the cell is in its entry's mean, i.e. done, measured, and not in conflict with the others.

    Raises:
        UserError: no cell of that name; the message suggests the closest existing one.
    """
    groups = frame["dataset"] + "/" + frame["model"] + "/" + frame["quantizer"]
    cells.require_known("entry", name, groups.unique().tolist(), "these results")
    setting = ["grid", "task", "init"]
    own = frame[groups == name].sort_values([*setting, "seed"])
    parts = []
    for _, part in own.groupby(setting, sort=False):
        usable = Group.of(cells.records(part)).usable
        parts.append(part.assign(counts=part["seed"].isin(list(usable))))
    return pd.concat(parts)[[*setting, *COLUMNS]].reset_index(drop=True)


def _markdown(runs: pd.DataFrame, name: str, findings: Sequence[str]) -> str:
    """A list with one item per cell, grouped by grid, task and init; accuracies in %."""
    lines = [f"- finding: {finding}" for finding in findings]
    for (grid, task, init), part in runs.groupby(["grid", "task", "init"], sort=False):
        lines += ["", f"## {name}: grid {grid}, task {task}, init {init}", ""]
        lines += [f"{part['counts'].sum()} of {len(part)} cells are in the mean.", ""]
        lines += [_item(cell) for cell in cells.records(part)]
    return "\n".join(lines).strip() + "\n"


def _item(cell: Mapping[str, Any]) -> str:
    parts = {
        "hard": _percent(cell["top1_hard"]),
        "soft": _percent(cell["top1_soft"]),
        "cell": cell["cell_id"],
        "run": cell["run"],
        "job": cell["job_id"],
        "commit": cell["git_commit"],
        "data": cell["data_checksum"],
        "recipe": cell["recipe_id"],
    }
    out = "" if cell["counts"] else " (not in the mean)"
    return f"- seed {cell['seed']}: {cell['status']}{out}; " + "; ".join(
        f"{key} {value}" for key, value in parts.items() if value
    )


def _percent(fraction: float) -> str:
    return "" if math.isnan(fraction) else f"{100 * fraction:.2f} %"


def _csv(runs: pd.DataFrame) -> str:
    """One line per cell, accuracies as fractions."""
    return runs.to_csv(index=False, lineterminator="\n")


def _json(runs: pd.DataFrame, name: str, findings: Sequence[str]) -> str:
    """{"entry": name, "findings": [...], "cells": [...]}; unknown values are null."""
    records = json.loads(runs.to_json(orient="records", double_precision=15))
    return (
        json.dumps({"entry": name, "findings": list(findings), "cells": records}, indent=2, ensure_ascii=False) + "\n"
    )
