"""Time from the command to the first training step, and its parts; on this machine or on a real SLURM cluster.

    python benchmarks/start_up.py                  the command on this machine, and --help of every command
    python benchmarks/start_up.py --on-cluster     a job on a private cluster (like tests/cluster: root, `make setup`)

On this machine, `suite.train` repeatedly runs the first step of a digits cell. The parts are measured in a process that
performs the same steps in order. Children of the nursery do so as well; the nursery's own start is not counted. The
best repeat counts, because other load only makes a start longer. CPU seconds beside the wall-clock seconds show how
busy the machine was.

On the cluster, one worker trains small cells one after another. The moments are times of files: the one that the batch
script's first line writes, the attempt's record, provenance.json (written when data, network and optimizer are ready),
the checkpoint after the first step, and the result.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
import yaml
from machine import describe, verdict
from rich.console import Console
from rich.table import Table

from launch.worker.nursery import Nursery
from suite.recipe.grid_file import load_grid
from suite.run.directory import RunDir, run_dirs

# Also the repository root, and before tests: otherwise tests/models would be imported as `models`.
sys.path.extend(str(Path(__file__).parents[1] / name) for name in ("", "tests"))
from cluster.lab import Lab, obstacle
from tiny_cells import tiny_grid

BAR_SECONDS, BAR_WARM_SECONDS, BAR_HELP_SECONDS = 5.0, 1.0, 0.5
COMMANDS = (
    *("launch", "launch grid", "launch status", "launch doctor", "analysis", "analysis tables", "analysis figures"),
    *("quantizers", "quantizers certify", "suite.data", "suite.data prepare", "suite.export", "suite.train"),
)
PARTS = """
import gc, json, sys, time
gc.disable()
stamps = []
def done(part):
    stamps.append((part, time.time(), time.process_time()))
import suite.train
done("Python, typer, pydantic")
cell = suite.train.open_run(suite.train.Path(sys.argv[1])).cell()
import torch
done("the cell is read and checked; import of torch")
import torch._dynamo
done("import of torch._dynamo, which torch.optim and torchvision want")
import models.catalog
models.catalog._timm()
done("import of timm")
from suite.engines.process_group import Layout
from suite.training.trainer import Trainer
done("imports of ours, and of what is left")
trainer = Trainer(cell, Layout(), suite.train.Path("data"), None)
done("data, network, optimizer")
suite.train._collect_from_here()
batch = next(trainer.loaders.train.epoch(0))
done("first batch")
trainer._train_step(*batch)
done("first step")
print(json.dumps(stamps))
"""
MOMENTS = (
    "the batch script starts, or the cell before is done",
    "the worker has claimed the run",
    "data, network and optimizer are ready",
    "the first step is done and saved",
    "the result is written",
)


def timed(command: Sequence[str], folder: str) -> tuple[float, float, str]:
    """(wall-clock seconds, CPU seconds, output) of a command that runs in `folder`."""
    before, start = os.times(), time.perf_counter()
    # The packages are not in `folder`.
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    output = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    seconds, after = time.perf_counter() - start, os.times()
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, busy, output


def here(repeats: int, console: Console) -> list[str]:
    """Prints the parts of a start on this machine and the times of --help; returns the verdicts."""
    digits = next(cell for cell in load_grid("digits").untuned().cells() if cell.name == "digits/resnet8/bnn++/s0")
    with tempfile.TemporaryDirectory(prefix="start-up-") as folder, console.status("starting") as status:
        cell = Path(folder) / "cell.yaml"
        cell.write_text(yaml.safe_dump(digits.model_dump(mode="json")), encoding="utf-8")
        command = [sys.executable, "-m", "suite.train", str(cell), "--max-steps", "1"]
        whole = sorted(timed(command, folder)[:2] for _ in range(repeats))
        rows = [_parts([sys.executable, "-c", PARTS, str(cell)], folder) for _ in range(repeats)]
        warm = _warm(cell, repeats)
        helps = {}
        for name in COMMANDS:
            status.update(f"{name} --help")
            module, *rest = name.split()
            times = (timed([sys.executable, "-m", module, *rest, "--help"], folder)[:2] for _ in range(repeats))
            helps[name] = min(times)
    table = Table("part", "seconds", "of processor time", title=f"to the first step: best of {repeats}")
    for part in rows[0]:
        best = min((row[part] for row in rows), key=lambda times: times[0])
        table.add_row(part, f"{best[0]:.2f}", f"{best[1]:.2f}")
    table.add_row("the command, to its end after one step", f"{whole[0][0]:.2f}", f"{whole[0][1]:.2f}")
    table.add_row("a child of the nursery, to its end after one step", f"{warm:.2f}", "")
    console.print(table)
    table = Table("--help of", "seconds", "of processor time", title=f"best of {repeats}")
    for name, best in helps.items():
        table.add_row(f"python -m {name}", f"{best[0]:.2f}", f"{best[1]:.2f}")
    console.print(table)
    slowest = max(helps, key=lambda name: helps[name][0])
    return [
        verdict("the command, one step of a cell", whole[0][0], BAR_SECONDS, unit=" s"),
        verdict("of processor time", min(busy for _, busy in whole), BAR_SECONDS, unit=" s"),
        verdict("a child of the nursery, one step of a cell", warm, BAR_WARM_SECONDS, unit=" s"),
        verdict(f"--help, the slowest ({slowest})", helps[slowest][0], BAR_HELP_SECONDS, unit=" s"),
        verdict("of processor time", max(busy for _, busy in helps.values()), BAR_HELP_SECONDS, unit=" s"),
    ]


def _warm(cell: Path, repeats: int) -> float:
    """Seconds from requesting a child of a running nursery to the child's end after one step."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    nursery = Nursery(environment, cell.parent)
    seconds = []
    for _ in range(repeats + 1):  # the first child also waits for the nursery's start
        start = time.perf_counter()
        nursery.spawn([str(cell), "--max-steps", "1"], {}, cell.with_name("log.txt")).wait()
        seconds.append(time.perf_counter() - start)
    nursery.close()
    return min(seconds[1:])


def _parts(command: Sequence[str], folder: str) -> dict[str, tuple[float, float]]:
    """Part of a start -> (wall-clock seconds, CPU seconds); the first part begins with the command."""
    start = time.time()
    stamps = json.loads(timed(command, folder)[2])
    before = [(start, 0.0), *((clock, busy) for _, clock, busy in stamps)]
    return {
        part: (clock - clock_before, busy - busy_before)
        for (part, clock, busy), (clock_before, busy_before) in zip(stamps, before, strict=False)
    }


def moments(run: RunDir, before: float) -> list[float]:
    """Unix seconds of MOMENTS for a cell; `before` is when the worker became free."""
    attempt = run.first()
    if attempt is None:
        raise RuntimeError(f"{run.path}: never begun")
    files = [attempt.provenance_path, min(run.checkpoints.iterdir()), run.result_path]
    return [before, attempt.facts["made"], *(path.stat().st_mtime for path in files)]


def cluster(cells: int, console: Console) -> None:
    """Prints the moments of one worker's cells on a private cluster: its first cell, and medians over the others."""
    if why := obstacle():
        print(why, file=sys.stderr)
        raise SystemExit(2)
    root = Path(tempfile.mkdtemp(prefix="start-up-"))
    grid = root / "tiny.yaml"
    # Two epochs of one step each, so that the checkpoint after the first still exists at the end.
    training = {"epochs": 2, "batch_size": 1024, "optimizer": "adamw", "learning_rate": 0.003}
    grid.write_text(yaml.safe_dump(tiny_grid(seeds=list(range(cells)), quantizers=["bnn++"], training=training)))
    asked = ["--partition", "gpu", "--gpus-per-node", "0", "--cpus-per-task", "1", "--workers", "1"]
    mark = f"date +%s.%N > {root}/began"
    command = [sys.executable, "-m", "launch", "grid", str(grid), *asked, "--setup", mark, "--root", str(root)]
    with Console(stderr=True).status("running"), Lab() as lab:
        subprocess.run(command, env=lab.environment, stdout=subprocess.DEVNULL, check=True)
        while lab.run("squeue", "-h"):
            time.sleep(1)
    runs = sorted(run_dirs(root / "tiny"), key=lambda run: run.result_path.stat().st_mtime)
    free = [float((root / "began").read_text(encoding="utf-8")), *(run.result_path.stat().st_mtime for run in runs)]
    first, *others = [moments(run, before) for run, before in zip(runs, free, strict=False)]
    title = f"seconds since the worker was free: its first cell, and medians of {len(others)} others"
    table = Table("moment", "first cell", "this part", "others", "this part", title=title)
    for number, moment in enumerate(MOMENTS):
        last = max(number - 1, 0)
        since, part = (statistics.median(row[number] - row[at] for row in others) for at in (0, last))
        mine, my_part = first[number] - first[0], first[number] - first[last]
        table.add_row(moment, f"{mine:.2f}", f"{my_part:.2f}", f"{since:.2f}", f"{part:.2f}")
    console.print(table)


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Starts of each command on this machine.")] = 3,
    on_cluster: Annotated[bool, typer.Option("--on-cluster", help="Start a worker on a private cluster.")] = False,
    cells: Annotated[int, typer.Option(min=2, help="Number of cells on the cluster; shows medians.")] = 6,
) -> None:
    """Measures the cost of starting a cell."""
    print(describe())
    console = Console()
    if on_cluster:
        cluster(cells, console)
    else:
        print("\n".join(here(repeats, console)))


if __name__ == "__main__":
    typer.run(main)
