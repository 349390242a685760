"""Runs a grid on this machine: one worker in this process, a live table, and MLflow kept up to date."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Event, Thread

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from launch.plan import Standing
from launch.status import later
from launch.view import matrix, summary
from launch.worker.slots import Slot
from launch.worker.spec import Place, WorkerSpec
from launch.worker.worker import Outcome, Worker
from suite.run.mlflow_replica import sync

SYNC_SECONDS = 20.0


def work_here(
    spec: WorkerSpec, slots: Sequence[Slot], tracking_uri: str | None, console: Console, *, stays: bool
) -> tuple[Outcome, str]:
    """Trains the spec's cells; returns how the worker ended, and why. `tracking_uri` None: MLflow is not updated."""
    grid_dir = spec.grid_dir
    replicated = _replicated(grid_dir, tracking_uri, console) if tracking_uri else nullcontext()
    with replicated, _shown(grid_dir, spec.cells, console) as show:
        worker = Worker(spec, Place(), slots, stays=stays, shown=show)
        return worker.work(), worker.reason


@contextmanager
def _replicated(grid_dir: Path, tracking_uri: str, console: Console) -> Iterator[None]:
    """Keeps MLflow up to date from a thread while the body runs, and once more after it. Never fails the body."""
    stop = Event()

    def attempt() -> None:
        try:
            sync(grid_dir, tracking_uri)
        except Exception as error:  # noqa: BLE001  (a store can raise anything; run directories are the source)
            console.print(f"[yellow]cannot reach MLflow at {tracking_uri}; no data lost: {str(error).splitlines()[0]}")

    def keep_up() -> None:
        attempt()
        while not stop.wait(SYNC_SECONDS):
            attempt()

    thread = Thread(target=keep_up, name="mlflow-sync")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        attempt()


@contextmanager
def _shown(grid_dir: Path, cells: Sequence[str] | None, console: Console) -> Iterator[Callable[[list[Standing]], None]]:
    """Shows a live table and a progress bar over all epochs on a terminal; else prints a line whenever a cell ends."""

    def chosen(rows: list[Standing]) -> list[Standing]:
        return rows if cells is None else [row for row in rows if row.cell.id in cells or row.planned.is_later]

    if not console.is_terminal:
        last = ""

        def show_line(rows: list[Standing]) -> None:
            nonlocal last
            rows = chosen(rows)
            to_come = later(grid_dir, rows).num_cells
            ended = summary([row for row in rows if row.is_settled]) or "0 done"
            line = f"{grid_dir.name}: {ended} of {len(rows)}{f', {to_come} more follow' if to_come else ''}"
            if line != last:
                console.print(line, highlight=False)
                last = line

        yield show_line
        return
    bar = Progress(
        TextColumn("epochs"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    task = bar.add_task("epochs")
    with Live(console=console, refresh_per_second=4) as live:

        def show_table(rows: list[Standing]) -> None:
            rows = chosen(rows)
            total = sum(row.cell.training.epochs for row in rows) + later(grid_dir, rows).num_epochs
            finished = sum(row.cell.training.epochs if row.is_settled else row.state.epoch for row in rows)
            bar.update(task, completed=finished, total=total)
            live.update(Group(matrix(rows, grid_dir.name), bar))

        yield show_table
