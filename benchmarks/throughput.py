"""Cells per hour on this machine: ours, a bare submitit array, hydra with submitit, and an earlier commit of ours.

    python benchmarks/throughput.py                               ours, submitit and, if installed, hydra
    python benchmarks/throughput.py --checkout ../before          also `launch grid --local` of another checkout
    pip install hydra-core hydra-submitit-launcher                requirements of the hydra line

Every line trains the same cells: ResNet-8 on the digits, with as many epochs as make a cell take about five seconds
in its own process, including its start. Ours is `launch grid --local`. The array is submitit's local executor, with one
process of `suite.train` per cell and one cell per core at a time; hydra starts all jobs of a sweep at once. Lines take
turns, so that other load affects all of them; the best repeat counts.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
import yaml
from machine import describe, verdict
from rich.console import Console
from rich.table import Table

sys.path.extend(str(Path(__file__).parents[1] / name) for name in ("", "tests"))
from tiny_cells import tiny_grid

from suite.recipe.grid_file import load_grid
from suite.run.directory import RunDir

BAR = 2.0
SOURCE = Path(__file__).resolve().parents[1]
HYDRA = """
import subprocess, sys
import hydra
@hydra.main(version_base=None, config_name=None)
def main(config):
    subprocess.run([sys.executable, "-m", "suite.train", config.cell, "--data-dir", config.data], check=True)
main()
"""


def cells_in(folder: Path, num_cells: int, epochs: int) -> Path:
    """Writes a grid file with num_cells cells."""
    training = {"epochs": epochs, "batch_size": 64, "optimizer": "adamw", "learning_rate": 0.003}
    grid = tiny_grid(seeds=list(range(num_cells // 2)), quantizers=["bc", "bnn++"], training=training)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(grid), encoding="utf-8")
    return path


def ours(grid: Path, root: Path, checkout: Path = SOURCE) -> None:
    """Runs `launch grid --local` once."""
    command = [sys.executable, "-m", "launch", "grid", str(grid), "--local", "--root", str(root)]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)


def _made(grid: Path, root: Path) -> list[RunDir]:
    return [RunDir.create(root / cell.id, cell) for cell in load_grid(str(grid)).cells()]


def bare_submitit(grid: Path, root: Path) -> None:
    """Runs one submitit job per cell, one per core at a time."""
    import submitit

    runs = _made(grid, root)
    executor = submitit.LocalExecutor(folder=root / "jobs")
    executor.update_parameters(timeout_min=60)
    waiting, running = list(runs), list[submitit.Job[object]]()
    while waiting or running:
        running = [job for job in running if not job.done()]
        while waiting and len(running) < len(os.sched_getaffinity(0)):
            command = [sys.executable, "-m", "suite.train", str(waiting.pop(0).cell_path), "--data-dir", "data"]
            running.append(executor.submit(submitit.helpers.CommandFunction(command, verbose=False)))
        time.sleep(0.05)
    _require_done(runs)


def hydra_submitit(grid: Path, root: Path) -> None:
    """Runs a hydra sweep over the cells with its local submitit launcher."""
    runs = _made(grid, root)
    script = root / "sweep.py"
    script.write_text(HYDRA, encoding="utf-8")
    cells = ",".join(str(run.cell_path) for run in runs)
    sweep = ["--multirun", "hydra/launcher=submitit_local", f"hydra.sweep.dir={root}/sweep"]
    command = [sys.executable, str(script), *sweep, f"+cell={cells}", "+data=data"]
    packages = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": packages, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.DEVNULL)
    _require_done(runs)


def _require_done(runs: list[RunDir]) -> None:
    if lost := [run for run in runs if run.result() is None]:
        raise RuntimeError(f"{len(lost)} cells are not done, {lost[0].path} for one")


def main(
    num_cells: Annotated[int, typer.Option("--cells", min=2, help="Cells per turn.")] = 12,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs per cell.")] = 6,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each line.")] = 2,
    checkout: Annotated[Path | None, typer.Option(help="Also measure this other checkout of the project.")] = None,
    grid: Annotated[
        str | None,
        typer.Option(help="Train this grid (without tuning) instead of the tiny cells; only ours and --checkout."),
    ] = None,
) -> None:
    """Measures cells per hour."""
    os.environ["OMP_NUM_THREADS"] = "1"
    lines: dict[str, Callable[[Path, Path], None]] = {"ours": ours}
    if grid is None:
        lines["submitit array"] = bare_submitit
        if importlib.util.find_spec("hydra_plugins"):
            lines["hydra submitit"] = hydra_submitit
    if checkout is not None:
        other = checkout.resolve()
        lines[f"ours at {checkout}"] = lambda path, root: ours(path, root, other)
    best: dict[str, float] = {}
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = Path(grid) if grid else cells_in(folder, num_cells, epochs)
        count = len(load_grid(str(file)).cells())
        for turn in range(repeats):
            for line, run in lines.items():
                root = folder / re.sub(r"\W", "_", f"{turn} {line}")
                root.mkdir()
                with console.status(f"turn {turn + 1}: {line}"):
                    start = time.perf_counter()
                    run(file, root)
                    seconds = time.perf_counter() - start
                best[line] = min(best.get(line, seconds), seconds)
    print(describe())
    table = Table("line", "seconds", "cells per hour", "ours, times as many", title=f"{count} cells, best of {repeats}")
    for line, seconds in best.items():
        table.add_row(line, f"{seconds:.1f}", f"{3600 * count / seconds:,.0f}", f"{seconds / best['ours']:.2f}")
    Console().print(table)
    for line in lines.keys() - {"ours"}:
        print(verdict(f"cells per hour over {line}", best[line] / best["ours"], BAR, at_least=True))


if __name__ == "__main__":
    typer.run(main)
