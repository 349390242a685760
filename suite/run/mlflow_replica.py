"""Replicates the run directories to MLflow. `sync` is idempotent and incremental; nothing is lost if it never runs.

There is one experiment per grid of a ROOT, one flat run per cell (even if it has not run yet), and metrics have step =
epoch. A stored run is identified by (root id, cell, token of the journal), so a deleted and retrained folder is a new
run, and so is another user's run of the same grid on the same server.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from suite.recipe.cell import Cell
from suite.run import journal
from suite.run.directory import RunDir, State, declared_at, planned_ids, root_id, run_dirs
from suite.run.locks import locked

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run
    from mlflow.tracking import MlflowClient

ROOT, TOKEN, MARK, REPLACED = "proxbench.root", "proxbench.token", "proxbench.mark", "proxbench.replaced"
"""Tags: the run's ROOT; its token; the state of its files at the last sync; a mark on runs that sync deleted."""
DECLARED = "proxbench.declared"
"""Tag of an experiment: the launches' declarations (see `suite.run.directory.declared_at`), as JSON."""
_SQLITE = "sqlite:///"
_STATUS = {"done": "FINISHED", "failed": "FAILED", "cancelled": "KILLED", "running": "RUNNING"}
_COUNTS = ("num_train_images", "num_binary_parameters", "num_full_precision_parameters")  # of result.json
_MAX_TAG = 5000  # characters of an experiment's tag
_MAX_PER_BATCH = 1000  # MLflow's limit on metrics per batch
_PATIENCE_SECONDS = 120.0


def default_uri(root: Path) -> str:
    """URI of a ROOT's store, a sqlite file in it; the path may contain any characters."""
    path = str(root.resolve() / "mlflow.db")
    return f"{_SQLITE}{path.replace('%', '%25').replace('?', '%3F')}"


def how_to_browse(uri: str, experiment_id: str) -> str:
    """Link to the grid's runs, preceded by the command to start a server if the store is a file."""
    page = f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    if uri.startswith(("http://", "https://")):
        return f"{uri.rstrip('/')}/{page}"
    return f"mlflow ui --backend-store-uri '{uri}', then http://127.0.0.1:5000/{page}"


def browse(grid_dir: Path, uri: str) -> str:
    """`how_to_browse` for the grid's experiment, or a message if the store cannot be reached."""
    try:
        experiment = _experiment(_client(uri), grid_dir, root_id(grid_dir.parent))
    except Exception as error:  # noqa: BLE001  (a store can raise anything)
        return f"MLflow at {uri} not reached ({str(error).splitlines()[0]}); python -m launch sync tries again"
    return how_to_browse(uri, experiment.experiment_id)


def sync(grid_dir: Path, uri: str) -> tuple[int, str]:
    """Brings the grid's experiment up to date with its run directories.

    Interrupting a call does no damage: metrics have the journal's times, so writing one twice stores it once, and the
    stored offset into the journal advances only afterwards. Two concurrent calls create no duplicates.

    Returns:
        The number of changed runs, and the experiment's id.
    """
    client = _client(uri)
    with _alone(grid_dir):
        root = root_id(grid_dir.parent)
        experiment = _experiment(client, grid_dir, root)
        replica = _Replica(client, experiment.experiment_id, root)
        text = _declared(grid_dir)
        if text and experiment.tags.get(DECLARED) != text:
            client.set_experiment_tag(experiment.experiment_id, DECLARED, text)
        current = set(planned_ids(grid_dir))
        num_changed = sum(replica.update(run, is_current=run.path.name in current) for run in run_dirs(grid_dir))
        return num_changed + replica.retire(), experiment.experiment_id


def _client(uri: str) -> "MlflowClient":
    # With a dead server, fail within seconds instead of the four minutes of MLflow's defaults.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # log lines would disturb the table on this terminal
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    if uri.startswith(_SQLITE) and unquote(uri) != uri:
        client.search_experiments(max_results=1)  # creates an unused folder at the still-quoted path
        with suppress(OSError):
            Path(uri.removeprefix(_SQLITE)).parent.rmdir()
    return client


@contextmanager
def _alone(grid_dir: Path) -> Iterator[None]:
    """Allows one sync at a time, if the file system has locks; otherwise `_Replica._create` handles conflicts."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        with locked(grid_dir / "mlflow.lock") as mine:
            if mine or time.monotonic() > deadline:
                yield
                return
        time.sleep(0.2)


def _experiment(client: "MlflowClient", grid_dir: Path, root: str) -> "Experiment":
    """The grid's experiment, named after the grid, followed by our id in parentheses if another ROOT has that name."""
    from mlflow.exceptions import MlflowException

    for name in (grid_dir.name, f"{grid_dir.name} ({root[:6]})"):
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                client.create_experiment(name, tags={ROOT: root, "mlflow.note.content": _note(grid_dir)})
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = client.get_experiment_by_name(name)
        if found is not None and found.tags.get(ROOT) == root:
            if found.lifecycle_stage == "deleted":
                client.restore_experiment(found.experiment_id)
            return found
    raise AssertionError(f"two roots with the id {root}")


def _note(grid_dir: Path) -> str:
    return (
        f"Grid **{grid_dir.name}**, run directories in `{grid_dir}`.\n\n"
        "Which quantizer is better on these models, and by how much? The answer, with intervals and tests:\n"
        f"`python -m analysis report {grid_dir.name} --root {grid_dir.parent}`, which writes "
        f"`{grid_dir / 'report.html'}`.\n\n"
        "One run is one cell: (model, quantizer, seed). `test/top1_hard` is measured on truly binary weights."
    )


def _declared(grid_dir: Path) -> str:
    """The first and last launches' declarations; without settings if those do not fit in a tag."""
    found = declared_at([grid_dir])
    ends = found[:1] + found[1:][-1:]
    text = json.dumps(ends) if ends else ""
    if len(text) > _MAX_TAG:
        text = json.dumps([{**declared, "settings": []} for declared in ends])
    if len(text) > _MAX_TAG:
        text = json.dumps([{**declared, "settings": [], "tuning": []} for declared in ends])
    return text


class _Replica:
    """An experiment's runs by (cell id, token), with the operations that bring them up to date."""

    def __init__(self, client: "MlflowClient", experiment_id: str, root: str) -> None:
        self.client, self.experiment_id, self.root = client, experiment_id, root
        self._stored: dict[tuple[str, str], Run] = {}
        self._deleted: set[tuple[str, str]] = set()
        for run in self._search():
            tags = run.data.tags
            key = (tags.get("cell_id", ""), tags.get(TOKEN, ""))
            if tags.get(ROOT) != root or REPLACED in tags:
                continue
            if run.info.lifecycle_stage == "deleted":  # in MLflow's UI: do not restore it
                self._deleted.add(key)
            else:
                self._stored[key] = run
        self._seen: set[tuple[str, str]] = set()

    def _search(self, query: str = "") -> Iterator["Run"]:
        from mlflow.entities import ViewType

        token = None
        while True:
            page = self.client.search_runs([self.experiment_id], query, ViewType.ALL, 1000, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def update(self, run: RunDir, *, is_current: bool) -> bool:
        """Updates one run; returns whether anything changed."""
        from mlflow.exceptions import MlflowException

        key = (run.path.name, journal.token(run.journal))
        if run.newest() is None and run.cell().trial:
            return False  # hundreds of runs with nothing to show
        self._seen.add(key)
        if key in self._deleted and key not in self._stored:
            return False
        stored = self._stored.get(key)
        state = run.state()
        mark = _mark(run, state, is_current=is_current)
        if stored is not None and stored.data.tags.get(MARK) == mark:
            return False
        if stored is None:
            stored = self._create(run, key[1])
        try:
            self._fill(run, stored, state, {"current": str(is_current).lower(), MARK: mark})
        except MlflowException:
            # Deleted meanwhile, in the UI or by a concurrent sync as a duplicate: the next sync handles it.
            if self.client.get_run(stored.info.run_id).info.lifecycle_stage != "deleted":
                raise
            return False
        return True

    def retire(self) -> int:
        """Marks runs of deleted folders as not current, deletes placeholders of begun runs; returns their number."""
        num_changed = 0
        begun = {cell_id for cell_id, token in self._seen if token}
        for (cell_id, token), run in self._stored.items():
            if (cell_id, token) in self._seen:
                continue
            if not token and cell_id in begun:
                self._replace(run)
                num_changed += 1
            elif run.data.tags.get("current") != "false":
                self.client.set_tag(run.info.run_id, "current", "false")
                num_changed += 1
        return num_changed

    def _create(self, run: RunDir, token: str) -> "Run":
        """Creates a run; if two unlocked syncs create one at the same time, returns the other's."""
        cell, first = run.cell(), run.first()
        tags = {ROOT: self.root, TOKEN: token, "cell_id": cell.id, "grid": run.path.parent.name}
        # MLflow fixes a run's start time on creation.
        start_ms = int(1000 * (first.facts.get("made", time.time()) if first is not None else time.time()))
        mine = self.client.create_run(self.experiment_id, start_ms, tags, cell.name)
        query = f"tags.`{ROOT}` = '{self.root}' and tags.cell_id = '{cell.id}' and tags.`{TOKEN}` = '{token}'"
        others = [
            other
            for other in self._search(query)
            if other.info.run_id != mine.info.run_id
            and other.info.lifecycle_stage != "deleted"
            and REPLACED not in other.data.tags
        ]
        if not others:
            return mine
        self._replace(mine)
        return min(others, key=lambda other: str(other.info.run_id))

    def _replace(self, run: "Run") -> None:
        self.client.set_tag(run.info.run_id, REPLACED, "true")
        self.client.delete_run(run.info.run_id)

    def _fill(self, run: RunDir, stored: "Run", state: State, more: dict[str, str]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        client, run_id = self.client, stored.info.run_id
        if not stored.data.params:
            client.log_batch(run_id, params=[Param(key, str(value)) for key, value in recipe(run.cell())])
        have = stored.data.tags
        start = int(have.get("journal_offset", "0"))
        records, end = journal.read(run.journal, start)
        metrics = [
            Metric(key, value, int(record.time * 1000), record.epoch)
            for record in records
            for key, value in record.metrics.items()
        ]
        for first in range(0, len(metrics), _MAX_PER_BATCH):
            client.log_batch(run_id, metrics=metrics[first : first + _MAX_PER_BATCH])
        tags = _tags(run, state) | {"journal_offset": str(end)} | more
        if tags["data_checksum"] and not have.get("data_checksum"):
            self._log_dataset(run_id, run.cell().dataset, tags["data_checksum"])
        changed = {key: value for key, value in tags.items() if have.get(key) != value}
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in changed.items()])
        status = _STATUS.get(state.state, "SCHEDULED")
        if stored.info.status == status:
            return
        if status in {"FINISHED", "FAILED", "KILLED"}:
            client.set_terminated(run_id, status, int(state.heartbeat * 1000))
        else:
            client.update_run(run_id, status)

    def _log_dataset(self, run_id: str, name: str, checksum: str) -> None:
        from mlflow.entities import Dataset, DatasetInput

        source = json.dumps({"name": name})
        dataset = Dataset(name=name, digest=checksum[:36], source_type="local", source=source)
        self.client.log_inputs(run_id, datasets=[DatasetInput(dataset)])


def _mark(run: RunDir, state: State, *, is_current: bool) -> str:
    """Fingerprint of a run: if it is unchanged, there is nothing new to store.

    Includes the state, because a failed attempt becomes final when its job ends, without any change to files.
    """
    return " ".join([run.appearance(), state.state, *(["current"] if is_current else [])])


def recipe(cell: Cell) -> Iterator[tuple[str, Any]]:
    """Name and value of each of the run's params: `training.epochs`, `quantization.sharpness.start`, ..."""
    sections = cell.model_dump(mode="json", include={"data", "training", "quantization"})
    # Keep only the cell's own mu; its quantizer is a tag, and "bnn++" is not a valid parameter name.
    sections["quantization"]["sharpness"] = sections["quantization"]["sharpness"].get(cell.quantizer)
    sections["quantization"]["full_precision"] = ", ".join(cell.quantization.full_precision) or "none"
    if cell.distillation is not None:
        sections["distillation"] = cell.distillation.model_dump(mode="json")
    return _flatten(sections)


def _tags(run: RunDir, state: State) -> dict[str, str]:
    cell, result, provenance = run.cell(), run.result() or {}, run.provenance()
    code = provenance.get("code") or {}
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
        "trial": str(cell.trial).lower(),
        "state": state.state,
        "cause": state.cause or "",
        "reason": state.reason,
        "attempt": str(state.attempt),
        "job_id": state.job_id,
        "git_commit": code.get("commit") or "",
        "data_checksum": provenance.get("data_checksum") or "",
        "code_digest": code.get("digest") or "",
        "users_digest": code.get("users_digest") or "",
        "device": provenance.get("device") or "",
        "num_threads": str(provenance.get("num_threads") or ""),
        "num_processes": str(provenance.get("num_processes") or ""),
        "device_hours": str(run.device_hours() or ""),
        "weights_sha256": result.get("weights_sha256", ""),
        # The names that MLflow's own columns use.
        "mlflow.source.name": str(run.path),
        "mlflow.source.type": "JOB" if state.job_id else "LOCAL",
        "mlflow.source.git.commit": code.get("commit") or "",
        "attempts_differ_in": ", ".join(_differences(run)),
        **{f"execution.{key}": str(value) for key, value in (provenance.get("execution") or {}).items()},
        # Analysis makes its tables, including sizes, from these.
        **{key: str(result.get(key, "")) for key in _COUNTS},
    }


def _differences(run: RunDir) -> list[str]:
    """Names of things that affect the numbers and differ between the run's attempts: code, data, device."""
    found = [provenance for attempt in run.all_attempts() if (provenance := attempt.provenance())]
    return [
        name
        for name, key in (("code", "code"), ("data", "data_checksum"), ("device", "device"))
        if len({json.dumps(provenance.get(key), sort_keys=True) for provenance in found}) > 1
    ]


def _flatten(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flatten(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner
