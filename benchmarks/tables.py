"""How long `python -m analysis tables` takes for a large grid, from an MLflow store in sqlite to markdown.

python benchmarks/tables.py --cells 10000

MLflow makes the store and one run as launch sync does; SQLAlchemy copies that run, because ten thousand runs
through MLflow's own client take minutes. Six quantizers, ten seeds, as many models as it takes. The peer is MLflow:
what its search_runs alone takes for the same store. CPU seconds beside those of the clock, for busy machines.
"""

import argparse
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

QUANTIZERS = ("fp", "bc", "pc", "bnn", "bnn+", "bnn++")
NUM_SEEDS, NUM_EPOCHS = 10, 3
CURVES = ("train/loss", "train/top1", "val/top1", "mu", "health/flip_rate", "health/latent_gap", "health/masked_share")
TABLES = ("runs", "tags", "params", "metrics", "latest_metrics")
CHUNK = 500
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
    """ROOT/mlflow.db with one experiment, `large`, of num_cells done cells: tags, recipe, curves and test accuracy."""
    uri = f"sqlite:///{root}/mlflow.db"
    _one_run(uri, root)
    store = sa.create_engine(uri)
    everything = sa.MetaData()
    everything.reflect(store, only=TABLES)  # and what these refer to
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
    experiment = client.create_experiment("large", artifact_location=str(root / "artifacts"))
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
    """Tags and metrics of cell `number`: seeds go round first, then quantizers, then models."""
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
        "test/top1_hard": hard,
        "test/top1_soft": min(hard + 0.001, 1.0),
    }


def _copy(row: dict[str, Any], number: int, changes: dict[str, Any]) -> dict[str, Any]:
    """The row of the first run as cell `number` has it."""
    copy = {**row, "run_uuid": f"{number:032x}"}
    if "start_time" in row:
        copy["start_time"] = 1 + number
    elif row["key"] in changes:
        copy["value"] = changes[row["key"]]
    return copy


def _timed(name: str, command: list[str]) -> float:
    """Runs and prints it; returns its CPU seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{name}: {seconds:.1f} s, {cpu:.1f} s of CPU, {len(output)} characters")
    return cpu


def main() -> None:
    """Makes a store and times the command on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10_000)
    num_cells = parser.parse_args().cells
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        make_store(Path(folder), num_cells)
        size = (Path(folder) / "mlflow.db").stat().st_size
        print(f"store: {num_cells} cells, {size / 1e6:.0f} MB, made in {time.perf_counter() - start:.1f} s")
        command = [sys.executable, "-m", "analysis", "tables", "large", "--root", folder]
        peer = _timed("search_runs of MLflow alone", [sys.executable, "-c", PEER, f"sqlite:///{folder}/mlflow.db"])
        own = _timed("tables", command)
        print(f"ratio of CPU seconds: {own / peer:.2f}")


if __name__ == "__main__":
    main()
