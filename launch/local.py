"""A grid on this machine: keeps every slot busy until no cell can start, and shows how it goes."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from launch import snapshot
from launch.cluster import LocalCluster
from launch.job import stop
from launch.plan import Standing, ready
from launch.preflight import LaunchError, preflight
from launch.status import standing, standings
from launch.view import matrix, summary
from suite.recipe.cell import Cell, Execution
from suite.run.directory import RunDir, write_plan
from suite.run.locks import holder, locked
from suite.run.mlflow_replica import sync

MAX_STARTS = 10
"""How often a launch starts a cell whose job ends without a trace: it would do so for ever."""
POLL_SECONDS = 0.5
SYNC_SECONDS = 20.0


def launch(
    grid_dir: Path,
    cells: list[Cell],
    wanted: list[Cell],
    executions: Mapping[str, Execution],
    cluster: LocalCluster,
    tracking_uri: str,
    console: Console,
) -> list[Standing]:
    """Makes `cells` the grid's plan, runs the `wanted` ones, and returns where those stand at the end.

    `executions` say how, by cell id.

    Raises:
        DataError: a data set is missing.
        LaunchError: a model cannot have binary inputs, or another launcher is at work on the grid.
        KeyboardInterrupt: as it came; the grid's jobs have been stopped, what they learnt is in their checkpoints.
    """
    preflight(wanted, executions, cluster.data_dir, console)
    lock = grid_dir / "launcher.lock"
    with locked(lock) as mine:
        if not mine:
            raise LaunchError(
                f"{grid_dir}: launcher {holder(lock)} is at work on this grid; see: python -m launch status"
            )
        for cell in cells:
            RunDir.create(grid_dir / cell.id, cell)
        write_plan(grid_dir, cells, executions)
        code = snapshot.folder_of(grid_dir, snapshot.take(grid_dir, wanted))
        with _replicated(grid_dir, tracking_uri, console), _shown(grid_dir.name, console) as show:
            try:
                return _run(grid_dir, wanted, cluster, code, show)
            except KeyboardInterrupt:
                for row in standings(grid_dir, cells, queue={}):
                    if row.state.state in {"queued", "running"}:
                        stop(RunDir(grid_dir / row.cell.id), "the launcher was stopped by Ctrl-C")
                raise


def _run(
    grid_dir: Path, wanted: list[Cell], cluster: LocalCluster, code: Path, show: Callable[[list[Standing]], None]
) -> list[Standing]:
    submissions: Counter[str] = Counter()
    runs = {cell.id: RunDir(grid_dir / cell.id) for cell in wanted}
    done: dict[str, Standing] = {}
    while True:
        start = time.monotonic()
        rows = [done.get(cell.id) or standing(runs[cell.id], cell, cluster.is_alive) for cell in wanted]
        done = {row.cell.id: row for row in rows if row.state.state == "done"}  # for good: not looked at again
        num_free = cluster.max_parallel - sum(row.state.state in {"queued", "running"} for row in rows)
        startable = ready(rows)
        for cell in startable[: max(num_free, 0)]:
            run = runs[cell.id]
            if submissions[cell.id] == MAX_STARTS:
                reason = f"its job ended {MAX_STARTS} times without a result"
                run.claim().finish(state="failed", cause="error", reason=reason)
            else:
                submissions[cell.id] += 1
                cluster.submit(run, code)
        show(rows)
        if not startable and num_free == cluster.max_parallel:
            return rows
        # A twentieth of the time for looking at thousands of files: the cells need the processor more.
        time.sleep(max(POLL_SECONDS, 20 * (time.monotonic() - start)))


@contextmanager
def _replicated(grid_dir: Path, tracking_uri: str, console: Console) -> Iterator[None]:
    """Keeps MLflow up to date from a thread while the body runs, and once more after it. Never fails the body."""
    stop = Event()

    def attempt() -> None:
        try:
            sync(grid_dir, tracking_uri)
        except Exception as error:  # noqa: BLE001  (whatever a store can raise: the run directories are the truth)
            console.print(f"[yellow]MLflow at {tracking_uri} not reached, nothing lost: {str(error).splitlines()[0]}")

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
def _shown(name: str, console: Console) -> Iterator[Callable[[list[Standing]], None]]:
    """On a terminal, a live table and a bar over all epochs; elsewhere a line whenever a cell ends."""
    if not console.is_terminal:
        last = ""

        def show_line(rows: list[Standing]) -> None:
            nonlocal last
            line = f"{name}: {summary([row for row in rows if row.is_settled]) or 'started'} of {len(rows)}"
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
            total = sum(row.cell.training.epochs for row in rows)
            finished = sum(row.cell.training.epochs if row.is_settled else row.state.epoch for row in rows)
            bar.update(task, completed=finished, total=total)
            live.update(Group(matrix(rows, name), bar))

        yield show_table
