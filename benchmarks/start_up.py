"""From a job's start to its first training step on a real SLURM cluster: seconds, and where they go.

    python benchmarks/start_up.py

Starts a private cluster (as tests/cluster does: root, and `make setup`) and runs small cells one after another. The
moments are times of files: what the batch script's first line writes, submitit's first message, the run's lock,
provenance.json (written when data, network and optimizer are ready), and the checkpoint after the first step.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cluster.lab import Lab, obstacle
from tiny_cells import tiny_grid

MOMENTS = (
    ("batch script starts", "SLURM's prolog, the shell"),
    ("the job's Python is up", "srun, the import of submitit and launch"),
    ("the training process has its run", "the gate; the import of torch, to check the cell"),
    ("data, network and optimizer are ready", "the import of timm, the data, the network"),
    ("the first step is done and saved", "one step, one checkpoint"),
    ("the job has ended", "the rest of the training; the processes' ends"),
)


def moments(root: Path, job: str) -> list[float]:
    """Unix seconds of MOMENTS for a job, whose run is the one that state.json says was its."""
    (log,) = root.glob(f"tiny/jobs/*/{job}_0_log.out")
    stamps = [_unix(stamp) for stamp in re.findall(r"INFO \((.*?)\)", log.read_text(encoding="utf-8"))]
    states = {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in root.glob("tiny/*/state.json")}
    (run,) = (folder for folder, state in states.items() if state["job_id"] == job)
    files = [run / "lock", run / "provenance.json", min((run / "checkpoints").iterdir())]
    began = float((root / f"began-{job}").read_text(encoding="utf-8"))
    return [began, stamps[0], *(path.stat().st_mtime for path in files), stamps[-1]]


def _unix(stamp: str) -> float:
    return datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f").astimezone().astimezone(timezone.utc).timestamp()


def main(
    cells: Annotated[int, typer.Option(min=2, help="How many jobs; medians are shown.")] = 6,
) -> None:
    """Measure what it costs to start a cell; the first job warms the file cache and is left out."""
    if why := obstacle():
        print(why, file=sys.stderr)
        raise SystemExit(2)
    root = Path(tempfile.mkdtemp(prefix="start-up-"))
    grid = root / "tiny.yaml"
    # Two epochs of one step: the checkpoint after the first is still there at the end.
    training = {"epochs": 2, "batch_size": 1024, "optimizer": "adamw", "learning_rate": 0.003}
    grid.write_text(yaml.safe_dump(tiny_grid(seeds=list(range(cells)), quantizers=["bnn++"], training=training)))
    mark = f"date +%s.%N > {root}/began-${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
    asked = ["--partition", "gpu", "--gpus-per-node", "0", "--cpus-per-task", "1", "--max-parallel", "1"]
    command = [sys.executable, "-m", "launch", "grid", str(grid), *asked, "--setup", mark, "--root", str(root)]
    with Console(stderr=True).status("running"), Lab() as lab:
        subprocess.run(command, env=lab.environment, stdout=subprocess.DEVNULL, check=True)
        while lab.run("squeue", "-h"):
            time.sleep(1)
    jobs = sorted(path.name.removeprefix("began-") for path in root.glob("began-*"))[1:]
    found = [moments(root, job) for job in jobs]
    table = Table("moment", "seconds since the start", "this part", "what it is", title=f"medians of {len(jobs)} jobs")
    for number, (moment, what) in enumerate(MOMENTS):
        since = statistics.median(row[number] - row[0] for row in found)
        part = statistics.median(row[number] - row[max(number - 1, 0)] for row in found)
        table.add_row(moment, f"{since:.2f}", f"{part:.2f}", what)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
