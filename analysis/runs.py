"""MLflow store -> tidy frame. The only file of this package that knows MLflow."""

import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis import cells
from analysis.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

REQUIRED_TAGS = ("cell_id", "dataset", "model", "quantizer", "seed", "task", "init", "state", "recipe_id")
_SQLITE = "sqlite:///"
_DEFAULT_EXPERIMENT = "Default"  # MLflow makes it in every store


@dataclass(frozen=True)
class Results:
    """What a store holds: `frame`, one row per cell with columns `cells.SCHEMA`, and `findings`, one line each."""

    frame: pd.DataFrame
    findings: tuple[str, ...]


def load(tracking_uri: str, grid: str | None = None) -> Results:
    """All cells of one grid, or of every grid in the store; cells not yet run have accuracy NaN.

    Raises:
        UserError: no such store, unreadable store, unknown grid, or a run whose tags are not a cell's.
    """
    _require_sqlite_file(tracking_uri)
    # Before the import: MLflow reads the first of them there. A dead server answers in seconds, not in four minutes.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = MlflowClient(tracking_uri)
        grids = _experiments(client, grid)
        found = list(_all_runs(client, list(grids)))
    except (MlflowException, SQLAlchemyError) as error:
        raise UserError(f"cannot read {tracking_uri}: {str(error).splitlines()[0]}") from error
    if not found:
        raise UserError(f"{grid or tracking_uri}: no cells in the store; `python -m launch sync` writes them there")
    current, superseded = _split(found)
    try:
        rows = [_row(run, grids[run.info.experiment_id]) for run in current]
        runs = cells.validate(_frame(rows))
    except ValueError as error:
        raise UserError(f"{tracking_uri}: {error}") from error
    return Results(cells.one_per_cell(runs), (*_left_out(superseded), *cells.findings(runs)))


def _require_sqlite_file(tracking_uri: str) -> None:
    # MLflow would create an empty store and report no runs.
    if tracking_uri.startswith(_SQLITE):
        path = Path(tracking_uri.removeprefix(_SQLITE))
        if not path.is_file():
            raise UserError(f"{path}: no MLflow store there; `python -m launch sync` makes it from run directories")


def _experiments(client: "MlflowClient", grid: str | None) -> dict[str, str]:
    """Experiment id -> grid name: of the one asked for, or of all."""
    found = _pages(client.search_experiments)
    grids = {item.experiment_id: item.name for item in found if item.name != _DEFAULT_EXPERIMENT}
    if grid is None:
        return grids
    if grid not in grids.values():
        near = difflib.get_close_matches(grid, grids.values(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown grid {grid!r}; {hint}in the store: {', '.join(sorted(grids.values())) or 'none'}")
    return {experiment_id: name for experiment_id, name in grids.items() if name == grid}


def _all_runs(client: "MlflowClient", experiment_ids: list[str]) -> Iterator["Run"]:
    """Every active run, oldest first."""
    if experiment_ids:
        yield from _pages(client.search_runs, experiment_ids=experiment_ids, order_by=["attributes.start_time ASC"])


def _pages(search: Any, **query: Any) -> Iterator[Any]:  # noqa: ANN401 - MLflow's client is untyped here
    """All items of all pages: a single call stops at 1,000 silently."""
    token = None
    while True:
        page = search(**query, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _split(found: list["Run"]) -> tuple[list["Run"], list["Run"]]:
    """Runs of current cells; runs of cells that their grid's last launch no longer had (suite.tracking marks them)."""
    launched = {run.info.experiment_id for run in found if run.data.tags.get("current") == "true"}
    current: list[Run] = []
    superseded: list[Run] = []
    for run in found:
        old = run.data.tags.get("current") == "false" and run.info.experiment_id in launched
        (superseded if old else current).append(run)
    return current, superseded


def _left_out(superseded: list["Run"]) -> Iterator[str]:
    if superseded:
        names = cells.shortened(run.info.run_name for run in superseded)
        yield f"{len(superseded)} cells that the grid had before its last launch are left out ({names})"


def _row(run: "Run", grid: str) -> dict[str, object]:
    tags, metrics = run.data.tags, run.data.metrics
    absent = [tag for tag in REQUIRED_TAGS if tag not in tags]
    if absent:
        raise UserError(f"run {run.info.run_name} of {grid} is not a cell: no tag {', '.join(absent)}")
    if not tags["seed"].isdecimal():
        raise UserError(f"run {run.info.run_name} of {grid}: seed is '{tags['seed']}', not a whole number")
    return {
        **{tag: tags[tag] for tag in REQUIRED_TAGS},
        "grid": grid,
        "seed": int(tags["seed"]),
        "cause": tags.get("cause", ""),
        "git_commit": tags.get("git_commit", ""),
        "top1_hard": metrics.get("test/top1_hard", float("nan")),
        "top1_soft": metrics.get("test/top1_soft", float("nan")),
    }


def _frame(rows: list[dict[str, object]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(cells.SCHEMA)).astype(cells.SCHEMA)
