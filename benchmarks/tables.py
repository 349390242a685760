"""Time that `python -m analysis tables` takes for a large grid, from run directories or an MLflow store to markdown.

python benchmarks/tables.py --cells 10000

MLflow makes the store and one run as launch sync does. SQLAlchemy then copies that run, because ten thousand runs
through MLflow's own client take minutes. Six quantizers, ten seeds, and as many models as needed. The baseline is
MLflow's own search_runs on the same store. CPU seconds are shown beside wall-clock seconds, for busy machines.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from machine import describe

from suite.recipe.cell import Cell
from suite.recipe.settings import RECORDED
from suite.run.directory import Planned, RunDir, write_plan

QUANTIZERS = ("fp", "bc", "pc", "bnn", "bnn+", "bnn++")
NUM_SEEDS, NUM_EPOCHS = 10, 3
CURVES = ("train/loss", "train/top1", "val/top1", "mu", "health/flip_rate", "health/latent_gap", "health/masked_share")
TABLES = ("runs", "tags", "params", "metrics", "latest_metrics")
CHUNK = 500
ATTEMPT = (
    "token: a88acddc14719960\nmade: 40.0\nhost: vm\nmachine: m\npid: 1\nstart: '1'\njob_id: ''\nis_jobs: true\n"
    "worker: 1\ndata_checksum: d71c\nexecution: {engine: plain, determinism: strict, num_processes: 1}\n"
)
PROCESS = {"host": "vm", "machine": "m", "pid": 1, "start": "1"}
BEAT = {"rank": 0, "process": PROCESS, "step": 3, "epoch": 1, "num_epochs": 1, "time": 390.0}
PROVENANCE = {
    "code": {"commit": "0" * 40, "diff": "", "untracked": "", "digest": "0" * 16},
    "device": "a device",
    "num_processes": 1,
    "num_threads": 1,
    "execution": {"determinism": "strict"},
    "data_checksum": "d71c",
}
PEER = """
import sys
from mlflow import MlflowClient
client, token, found = MlflowClient(sys.argv[1]), None, []
ids = [experiment.experiment_id for experiment in client.search_experiments()]
while True:
    page = client.search_runs(ids, order_by=["attributes.start_time ASC"], page_token=token)
    found, token = [*found, *page], page.token
    if not token:
        break
print(len(found))
"""


def make_store(root: Path, num_cells: int) -> None:
    """Makes ROOT/mlflow.db with an experiment `large` of num_cells done cells: tags, recipe, curves, test accuracy."""
    uri = f"sqlite:///{root}/mlflow.db"
    _one_run(uri, root)
    store = sa.create_engine(uri)
    everything = sa.MetaData()
    everything.reflect(store, only=TABLES)  # and the tables that these refer to
    tables = {name: everything.tables[name] for name in TABLES}
    rng = np.random.default_rng(0)
    with store.begin() as connection:
        first: dict[str, list[dict[str, Any]]] = {
            name: [dict(row) for row in connection.execute(sa.select(table)).mappings()]
            for name, table in tables.items()
        }
        for start in range(1, num_cells, CHUNK):
            numbers = range(start, min(start + CHUNK, num_cells))
            changes = {number: _changes(number, rng) for number in numbers}
            for name, table in tables.items():
                copies = [_copy(row, number, changes[number]) for number in numbers for row in first[name]]
                connection.execute(table.insert(), copies)


def _one_run(uri: str, root: Path) -> None:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

    client = MlflowClient(uri)
    ours = {"proxbench.root": "0" * 16}
    experiment = client.create_experiment("large", artifact_location=str(root / "artifacts"), tags=ours)
    tags = {
        **_changes(0, np.random.default_rng(0)),
        "grid": "large",
        "dataset": "synthetic",
        "init": "scratch",
        "task": "bw",
        "state": "done",
        "cause": "",
        "reason": "",
        "attempt": "1",
        "job_id": "1",
        "git_commit": "0" * 40,
        "code_digest": "0" * 16,
        "device": "a device",
        "num_threads": "1",
        "num_processes": "1",
        "execution.determinism": "strict",
        "device_hours": "0.1",
        "data_checksum": "0" * 64,
        "current": "true",
        "journal_offset": "10000",
        "num_train_images": "50000",
        "num_binary_parameters": "268336",
        "num_full_precision_parameters": "1402",
    }
    accuracies = {key: tags.pop(key) for key in ("test/top1_hard", "test/top1_soft")}
    run = client.create_run(experiment, start_time=1, run_name=tags.pop("mlflow.runName"))
    metrics = [Metric(name, 0.5, epoch, epoch) for epoch in range(1, NUM_EPOCHS + 1) for name in CURVES]
    metrics += [Metric(name, value, NUM_EPOCHS, NUM_EPOCHS) for name, value in accuracies.items()]
    params = [Param(f"training.setting_{number}", "value") for number in range(40)]
    client.log_batch(run.info.run_id, metrics, params, [RunTag(key, value) for key, value in tags.items()])
    client.set_terminated(run.info.run_id)


def _changes(number: int, rng: np.random.Generator) -> dict[str, Any]:
    """Tags and metrics of cell `number`: the seed varies fastest, then the quantizer, then the model."""
    rest, seed = divmod(number, NUM_SEEDS)
    model, quantizer = divmod(rest, len(QUANTIZERS))
    name = f"synthetic/resnet{model}/{QUANTIZERS[quantizer]}/s{seed}"
    hard = 0.9 + 0.005 * quantizer + rng.normal(0, 0.005)
    return {
        "mlflow.runName": name,
        "cell_id": f"{number:012x}",
        "model": f"resnet{model}",
        "quantizer": QUANTIZERS[quantizer],
        "seed": str(seed),
        "recipe_id": f"{model:06x}{quantizer:06x}",
        "weights_sha256": f"{number:064x}",
        "test/top1_hard": hard,
        "test/top1_soft": min(hard + 0.001, 1.0),
    }


def make_folders(root: Path, num_cells: int) -> None:
    """Makes ROOT/folders with the same cells as run directories, planned and done, each with one attempt."""
    rng, grid_dir = np.random.default_rng(0), root / "folders"
    training = {"epochs": 1, "batch_size": 128, "optimizer": "sgd", "learning_rate": 0.1}
    sharpness = {"bnn++": {"start": 2.0}, "pc": {"start": 1.0}, "bnn+": {"start": 5.0}}
    planned = []
    for number in range(num_cells):
        changes = _changes(number, rng)
        quantizer = changes["quantizer"]
        own = {"sharpness": {name: value for name, value in sharpness.items() if name == quantizer}}
        raw: dict[str, Any] = {"dataset": "digits", "data": {}, "training": training, "quantization": own}
        raw |= {"model": changes["model"], "quantizer": quantizer, "seed": int(changes["seed"])}
        cell = Cell.model_validate(raw, context=RECORDED)
        planned.append(Planned(cell))
        run = RunDir(grid_dir / cell.id)
        attempt = run.attempts / "0001"
        attempt.mkdir(parents=True)
        run.cell_path.write_text(cell.model_dump_json(), encoding="utf-8")
        (attempt / "attempt.yaml").write_text(ATTEMPT, encoding="utf-8")
        (attempt / "provenance.json").write_text(json.dumps(PROVENANCE), encoding="utf-8")
        (attempt / "heartbeat-0000.json").write_text(json.dumps(BEAT), encoding="utf-8")
        end = {"made": 40.0, "job_id": "", "state": "done", "cause": None, "reason": "", "time": 400.0}
        (attempt / "end.json").write_text(json.dumps(end), encoding="utf-8")
        result = {name.removeprefix("test/"): changes[name] for name in ("test/top1_hard", "test/top1_soft")}
        sizes = {"num_binary_parameters": 268336, "num_full_precision_parameters": 1402}
        text = json.dumps({**result, **sizes, "weights_sha256": changes["weights_sha256"]})
        run.result_path.write_text(text, encoding="utf-8")
    write_plan(grid_dir, planned)


def _copy(row: dict[str, Any], number: int, changes: dict[str, Any]) -> dict[str, Any]:
    """The first run's row, changed to describe cell `number`."""
    copy = {**row, "run_uuid": f"{number:032x}"}
    if "start_time" in row:
        copy["start_time"] = 1 + number
    elif row["key"] in changes:
        copy["value"] = changes[row["key"]]
    return copy


def _timed(name: str, command: list[str]) -> float:
    """Runs and times the command, and prints the result; returns its CPU seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{name}: {seconds:.1f} s, {cpu:.1f} s of CPU, {len(output)} characters")
    return cpu


def main() -> None:
    """Makes a store and run directories, and times the command on them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10_000)
    num_cells = parser.parse_args().cells
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        make_store(Path(folder), num_cells)
        size = (Path(folder) / "mlflow.db").stat().st_size
        print(f"store: {num_cells} cells, {size / 1e6:.0f} MB, made in {time.perf_counter() - start:.1f} s")
        make_folders(Path(folder), num_cells)
        uri = f"sqlite:///{folder}/mlflow.db"
        command = [sys.executable, "-m", "analysis", "tables"]
        peer = _timed("search_runs of MLflow alone", [sys.executable, "-c", PEER, uri])
        own = _timed("tables from sqlite", [*command, "large", "--tracking-uri", uri])
        print(f"ratio of CPU seconds: {own / peer:.2f}")
        _timed("tables from run directories", [*command, "folders", "--root", folder])
        _timed("--help", [sys.executable, "-m", "analysis", "--help"])


if __name__ == "__main__":
    main()
