"""MLflow, a replica of the run directories: `sync` is idempotent and incremental, and loses nothing if it never ran.

One experiment per grid, one flat run per cell (also for cells that have not run yet), metrics with step = epoch.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.recipe.cell import Cell
from suite.run import journal
from suite.run.directory import RunDir, State, read_plan, run_dirs

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

_STATUS = {"done": "FINISHED", "failed": "FAILED", "cancelled": "KILLED", "running": "RUNNING"}
_COUNTS = ("num_train_images", "num_binary_parameters", "num_full_precision_parameters")  # of result.json
_MAX_PER_BATCH = 1000  # MLflow's own limit on metrics in a batch


def default_uri(root: Path) -> str:
    """The store of a ROOT: one sqlite file in it."""
    return f"sqlite:///{root.resolve() / 'mlflow.db'}"


def sync(grid_dir: Path, uri: str) -> int:
    """Brings the grid's experiment up to date with its run directories; returns how many runs changed.

    A call that dies half-way leaves nothing wrong: metrics carry the journal's own times, so writing one twice stores
    it once, and the offset up to which a journal is stored moves only afterwards.
    """
    client = _client(uri)
    name = grid_dir.name
    experiment = client.get_experiment_by_name(name)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
    stored = {run.data.tags.get("cell_id"): run for run in _all_runs(client, experiment_id)}
    current = set(read_plan(grid_dir))
    return sum(_sync_run(client, experiment_id, stored.get(run.path.name), run, current) for run in run_dirs(grid_dir))


def _client(uri: str) -> "MlflowClient":
    # A dead server must cost seconds, not the four minutes of MLflow's defaults.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # a table is being drawn on this terminal
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _all_runs(client: "MlflowClient", experiment_id: str) -> Iterator["Run"]:
    token = None
    while True:
        page = client.search_runs([experiment_id], max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _sync_run(client: "MlflowClient", experiment_id: str, stored: "Run | None", run: RunDir, current: set[str]) -> bool:
    from mlflow.entities import Metric, Param, RunTag

    state = run.state()
    tags = _tags(run, state) | {"current": str(run.path.name in current).lower()}
    if stored is None:
        stored = client.create_run(experiment_id, _first_record_ms(run), tags, run.cell().name)
    if not stored.data.params:
        client.log_batch(stored.info.run_id, params=[Param(key, str(value)) for key, value in recipe(run.cell())])
    have = stored.data.tags
    start = int(have.get("journal_offset", "0"))
    records, end = journal.read(run.journal, start)
    metrics = [
        Metric(key, value, int(record.time * 1000), record.epoch)
        for record in records
        for key, value in record.metrics.items()
    ]
    for first in range(0, len(metrics), _MAX_PER_BATCH):
        client.log_batch(stored.info.run_id, metrics=metrics[first : first + _MAX_PER_BATCH])
    tags["journal_offset"] = str(end)
    changed = {key: value for key, value in tags.items() if have.get(key) != value}
    if changed:
        client.log_batch(stored.info.run_id, tags=[RunTag(key, value) for key, value in changed.items()])
    status = _STATUS.get(state.state, "SCHEDULED")
    if stored.info.status != status:
        if status in {"FINISHED", "FAILED", "KILLED"}:
            client.set_terminated(stored.info.run_id, status, int(state.heartbeat * 1000))
        else:
            client.update_run(stored.info.run_id, status)
    return bool(changed) or stored.info.status != status


def _first_record_ms(run: RunDir) -> int:
    """When the run began, or now where it has not: MLflow fixes a run's start when it makes it."""
    records, _ = journal.read(run.journal)
    return int(1000 * (records[0].time if records else time.time()))


def recipe(cell: Cell) -> Iterator[tuple[str, Any]]:
    """Name and value of each of the run's params: `training.epochs`, `quantization.sharpness.start`, ..."""
    sections = cell.model_dump(mode="json", include={"data", "training", "quantization"})
    # One mu at most, the cell's own; its quantizer is a tag, and "bnn++" is no name for a parameter.
    sections["quantization"]["sharpness"] = sections["quantization"]["sharpness"].get(cell.quantizer)
    return _flatten(sections)


def _tags(run: RunDir, state: State) -> dict[str, str]:
    cell, result = run.cell(), run.result() or {}
    provenance = run.provenance()
    return {
        "grid": run.path.parent.name,
        "cell_id": cell.id,
        "dataset": cell.dataset,
        "model": cell.model,
        "quantizer": cell.quantizer,
        "seed": str(cell.seed),
        "init": cell.init,
        "task": cell.task,
        "recipe_id": cell.recipe_id,
        "state": state.state,
        "cause": state.cause or "",
        "reason": state.reason,
        "attempt": str(state.attempt),
        "job_id": state.job_id,
        "git_commit": (provenance.get("code") or {}).get("commit") or "",
        "data_checksum": provenance.get("data_checksum") or "",
        # So that the store alone makes the tables, sizes included.
        **{key: str(result.get(key, "")) for key in _COUNTS},
    }


def _flatten(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flatten(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner
