"""MLflow store -> tidy frame. No other file of this package depends on MLflow."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from analysis.runs import frame as cells
from analysis.runs.curves import Record
from analysis.runs.frame import Results, uncollected
from analysis.runs.provenance import Background, CellKey
from suite.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Run

REQUIRED_TAGS = ("cell_id", "dataset", "model", "quantizer", "seed", "task", "init", "state", "recipe_id")
OPTIONAL_TAGS = (
    "cause",
    "git_commit",
    "code_digest",
    "users_digest",
    "device",
    "num_threads",
    "num_processes",
    "weights_sha256",
    "job_id",
    "data_checksum",
)
COUNT_TAGS = ("num_binary_parameters", "num_full_precision_parameters")  # only of done runs; missing in old stores
NAN = float("nan")
_SQLITE = "sqlite:///"
_ROOT, _DECLARED = "proxbench.root", "proxbench.declared"  # tags that suite.run.mlflow_replica sets
_PAGE, _PAGE_OVER_HTTP = 1000, 200


def load(tracking_uri: str, grid: str | None = None) -> Results:
    """All cells of one grid, or of every grid in the store; accuracy is NaN for cells not yet run.

    Raises:
        UserError: no such store, unreadable store, unknown grid, or a run without a cell's tags.
    """
    _require_sqlite_file(tracking_uri)
    # Before the import, which reads the first one. With the others, a dead server fails in seconds, not four minutes.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = MlflowClient(tracking_uri)
        grids = _experiments(client, grid)
        with uncollected():
            runs = list(_all_runs(client, list(grids), _page_size(tracking_uri)))
        foreign = [str(run.info.run_name) for run in runs if "cell_id" not in run.data.tags]
        found = [_Found.of(run, grids[run.info.experiment_id]) for run in runs if _is_cell(run)]
        launches = _declared(client, grids)
    except (MlflowException, SQLAlchemyError) as error:
        raise UserError(f"cannot read {tracking_uri}: {str(error).splitlines()[0]}") from error
    if not found:
        raise UserError(f"{grid or tracking_uri}: no cells in the store; `python -m launch sync` writes them there")
    current, superseded = _split(found)
    try:
        remarks = [f"{len(foreign)} runs of others are left out ({cells.shortened(foreign)})"] if foreign else []
        return cells.results((run.row for run in current), [run.name for run in superseded], launches, remarks)
    except ValueError as error:
        raise UserError(f"{tracking_uri}: {error}") from error


def _is_cell(run: "Run") -> bool:
    """Whether the run is one of a grid's own cells rather than a tuning trial."""
    return "cell_id" in run.data.tags and run.data.tags.get("trial") != "true"


def _require_sqlite_file(tracking_uri: str) -> None:
    # MLflow would create an empty store and report no runs.
    if tracking_uri.startswith(_SQLITE):
        path = Path(unquote(tracking_uri.removeprefix(_SQLITE)))
        if not path.is_file():
            raise UserError(f"{path}: no MLflow store there; `python -m launch sync` makes it from run directories")


def _experiments(client: "MlflowClient", grid: str | None) -> dict[str, str]:
    """Experiment id -> grid name, for one grid or for all."""
    ours = [item for item in _pages(client.search_experiments) if _ROOT in item.tags]
    # The same grid from another root has that root's id in parentheses after its name.
    grids = {item.experiment_id: item.name.removesuffix(f" ({item.tags[_ROOT][:6]})") for item in ours}
    if grid is None:
        return grids
    cells.require_known("grid", grid, set(grids.values()), "the store")
    return {experiment_id: name for experiment_id, name in grids.items() if name == grid}


def _declared(client: "MlflowClient", grids: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Grid -> declarations of its first and its last launch."""
    found: dict[str, list[dict[str, Any]]] = {}
    for experiment_id, grid in grids.items():
        text = client.get_experiment(experiment_id).tags.get(_DECLARED, "")
        found.setdefault(grid, []).extend(json.loads(text) if text else [])
    return found


def _page_size(tracking_uri: str) -> int:
    """Runs per request: small over HTTP, so that the server answers before the client times out."""
    return _PAGE_OVER_HTTP if tracking_uri.startswith(("http://", "https://")) else _PAGE


def _all_runs(client: "MlflowClient", experiment_ids: list[str], page_size: int) -> Iterator["Run"]:
    """Every active run, oldest first."""
    if experiment_ids:
        order = ["attributes.start_time ASC"]
        yield from _pages(client.search_runs, experiment_ids=experiment_ids, order_by=order, max_results=page_size)


def _pages(search: Any, **query: Any) -> Iterator[Any]:  # noqa: ANN401 - MLflow's client is untyped here
    """All items of all pages; a single call would silently return only the first page."""
    token = None
    while True:
        page = search(**query, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


@dataclass(frozen=True, slots=True)
class _Found:
    """The part of a run that is kept: its row, and the tag `current`."""

    name: str
    row: dict[str, object]
    current: str  # whether the grid's last launch has the cell; "" without the tag

    @classmethod
    def of(cls, run: "Run", grid: str) -> "_Found":
        return cls(str(run.info.run_name), _row(run, grid), run.data.tags.get("current", ""))


def _split(found: list[_Found]) -> tuple[list[_Found], list[_Found]]:
    """(runs of current cells, runs of cells that their grid's last launch no longer had, as marked by the replica)."""
    launched = {run.row["grid"] for run in found if run.current == "true"}
    current: list[_Found] = []
    superseded: list[_Found] = []
    for run in found:
        (superseded if run.current == "false" and run.row["grid"] in launched else current).append(run)
    return current, superseded


def _row(run: "Run", grid: str) -> dict[str, object]:
    tags, metrics = run.data.tags, run.data.metrics
    absent = [tag for tag in REQUIRED_TAGS if tag not in tags]
    if absent:
        raise UserError(f"run {run.info.run_name} of {grid} is not a cell: no tag {', '.join(absent)}")
    # A run that died between its last record and its result has a metric but is not done.
    measured = metrics if tags["state"] == "done" else {}
    return {
        **{tag: tags[tag] for tag in REQUIRED_TAGS},
        **{tag: tags.get(tag, "") for tag in OPTIONAL_TAGS},
        "grid": grid,
        "seed": _number(run, grid, "seed"),
        "top1_hard": measured.get("test/top1_hard", NAN),
        "top1_soft": measured.get("test/top1_soft", NAN),
        **{tag: _number(run, grid, tag) if tags.get(tag) else NAN for tag in COUNT_TAGS},
        "determinism": tags.get("execution.determinism", ""),
        "device_hours": float(tags.get("device_hours") or NAN),
        "run": run.info.run_id,
    }


def _number(run: "Run", grid: str, tag: str) -> int:
    value = run.data.tags[tag]
    if not value.isdecimal():
        raise UserError(f"run {run.info.run_name} of {grid}: {tag} is '{value}', not a whole number")
    return int(value)


def histories(tracking_uri: str, frame: "pd.DataFrame", metrics: Sequence[str]) -> Iterator[Record]:
    """Metrics by epoch of the runs in a frame that `load` read from this store: one call per run and metric.

    Records are as in `analysis.runs.curves`. If an epoch was trained again, its later record follows the earlier one.

    Raises:
        UserError: the store cannot be read.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    client = MlflowClient(tracking_uri)
    for grid, cell_id, run in zip(frame["grid"], frame["cell_id"], frame["run"], strict=True):
        for metric in metrics:
            try:
                history = client.get_metric_history(run, metric)
            except (MlflowException, SQLAlchemyError) as error:
                raise UserError(f"cannot read {tracking_uri}: {str(error).splitlines()[0]}") from error
            for point in sorted(history, key=lambda point: point.timestamp):
                yield grid, cell_id, point.step, metric, point.value


def backgrounds(tracking_uri: str, frame: "pd.DataFrame") -> dict[CellKey, Background]:
    """Further facts on the runs in a frame that `load` read from this store: recipe, reason, times.

    Raises:
        UserError: the store cannot be read.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    cells_of = {run: (grid, cell_id) for run, grid, cell_id in frame[["run", "grid", "cell_id"]].to_numpy()}
    grids = set(frame["grid"])
    try:
        client = MlflowClient(tracking_uri)
        experiments = [number for number, name in _experiments(client, None).items() if name in grids]
        with uncollected():
            return {
                cells_of[run.info.run_id]: _background(run)
                for run in _all_runs(client, experiments, _page_size(tracking_uri))
                if run.info.run_id in cells_of
            }
    except (MlflowException, SQLAlchemyError) as error:
        raise UserError(f"cannot read {tracking_uri}: {str(error).splitlines()[0]}") from error


def _background(run: "Run") -> Background:
    begin, end = run.info.start_time, run.info.end_time
    is_done = run.data.tags["state"] == "done" and begin and end
    times = (begin / 1000, end / 1000) if is_done else None
    return Background(dict(run.data.params), {}, run.data.tags.get("reason", ""), times)
