"""Runs `python -m launch` as a user of the cluster does, reads the outcome, and waits for it."""

import io
import os
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from launch import status
from launch.__main__ import app
from launch.plan import Standing
from launch.slurm import client
from suite.errors import UserError
from suite.run.directory import RunDir, read_plan

WriteGrid = Callable[..., Path]
SOURCE = Path(__file__).parents[2]
MODEST = ("--partition", "gpu", "--mem", "1G", "--time", "1h", "--cpus-per-task", "1", "--gpus-per-node", "0")


@dataclass(frozen=True)
class Answer:
    """A command's outcome."""

    returncode: int
    stdout: str
    stderr: str


def launch(*arguments: str | Path) -> Answer:
    """Runs the command in this process, which saves the seconds of its imports."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            app([str(each) for each in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except UserError as error:  # as __main__ does
            code = 2
            print(error, file=sys.stderr)
    return Answer(code, out.getvalue(), err.getvalue())


def command(*arguments: str | Path, program: str = "-m launch") -> list[str]:
    """The command line for a separate process. `program`: Python options instead of `-m launch`."""
    return [sys.executable, *program.split(" ", 1), *map(str, arguments)]


def standings(grid_dir: Path) -> dict[str, Standing]:
    """The cells' standings, by name without data set and model: `bc/s0`."""
    rows = status.standings(grid_dir, read_plan(grid_dir))
    return {row.cell.name.split("/", 2)[2]: row for row in rows}


def states(grid_dir: Path) -> dict[str, str]:
    """Cell -> its state."""
    return {name: row.state.state for name, row in standings(grid_dir).items()}


def run_of(grid_dir: Path, name: str) -> RunDir:
    """The run directory of the cell, `bc/s0`."""
    return RunDir(grid_dir / standings(grid_dir)[name].cell.id)


def until(is_true: Callable[[], object], grid_dir: Path, seconds: float = 90.0) -> None:
    """Waits until `is_true()`. On a timeout, the error has the grid's state and logs."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, told(grid_dir)
        time.sleep(0.1)


def until_queue_is_empty(grid_dir: Path, seconds: float = 120.0) -> None:
    """Waits until this user has no job left."""
    until(lambda: not client.queue(), grid_dir, seconds)


def told(grid_dir: Path) -> str:
    """A grid's states, queue and logs, for a test's error message."""
    paths = [*sorted(grid_dir.glob("jobs/*/*_log.out")), *sorted(grid_dir.glob("*/attempts/*/log*.txt"))]
    logs = [f"== {path.relative_to(grid_dir)}\n{path.read_text('utf-8', 'replace')[-3000:]}" for path in paths]
    rows = [f"{name}: {row.state}" for name, row in standings(grid_dir).items()]
    return os.linesep.join([*rows, *map(str, client.queue().values()), *logs])
