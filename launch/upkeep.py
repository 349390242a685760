"""The commands that look after a launched grid: status, logs, sync, clean, doctor."""

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.options import Where, with_where
from launch.selection import (
    DEFAULT_DATA,
    DEFAULT_ROOT,
    DataDir,
    GridName,
    OfGrid,
    Root,
    TrackingUri,
    fail,
    grid_dir_of,
    matching,
)

if TYPE_CHECKING:  # it imports pydantic's models, which --help must not wait for
    from launch.plan import Standing

SYNC_SECONDS = 30.0


def status(
    grid: GridName = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one object per cell.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until every cell is settled.")] = False,
    root: Root = None,
) -> None:
    """Show where each cell of a grid stands, and why cells failed."""
    from rich.console import Console

    from launch import view
    from launch.start import show

    grid_dir = grid_dir_of(root, grid)
    if as_json:
        print(json.dumps(view.as_json(standings(grid_dir)), indent=2))
    elif watch:
        rows = view.watch(Console(), lambda: standings(grid_dir), grid_dir.name)
        show(Console(), grid_dir.name, rows, grid_dir)
    else:
        show(Console(), grid_dir.name, standings(grid_dir), grid_dir)


def logs(
    cell: Annotated[str, typer.Argument(help="A cell's id, or a pattern that fits one: resnet20/bnn++/s0.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing until the cell is settled.")] = False,
    grid: OfGrid = None,
    root: Root = None,
) -> None:
    """Print a cell's log, its newest attempt's."""
    from launch import follow as log
    from launch.plan import SETTLED
    from suite.run.directory import RunDir

    grid_dir = grid_dir_of(root, grid)
    rows = matching(standings(grid_dir), [cell])
    if len(rows) > 1:
        fail(f"{cell} fits {len(rows)} cells, {rows[0].cell.name} and {rows[1].cell.name} among them; name one")
    run = RunDir(grid_dir / rows[0].cell.id)
    if follow:
        log.follow(run, sys.stdout, lambda: run.state().state in SETTLED)
    elif (path := log.newest_log(run)) is not None:
        sys.stdout.write(path.read_text(encoding="utf-8", errors="replace"))
    else:
        fail(f"{rows[0].cell.name} has no log yet: it is {rows[0].state.state}")


def sync(
    grid: GridName = None,
    watch: Annotated[bool, typer.Option("--watch", help="Every 30 s, until every cell is settled.")] = False,
    root: Root = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Bring the MLflow store up to date with the run directories, or rebuild it from them."""
    from suite.run import mlflow_replica

    grid_dir = grid_dir_of(root, grid)
    uri = tracking_uri or mlflow_replica.default_uri(grid_dir.parent)
    num_changed, experiment = mlflow_replica.sync(grid_dir, uri)
    while watch and not all(row.is_settled for row in standings(grid_dir)):
        print(f"{time.strftime('%H:%M:%S')} {num_changed} runs changed", flush=True)
        time.sleep(SYNC_SECONDS)
        num_changed, experiment = mlflow_replica.sync(grid_dir, uri)
    print(f"{num_changed} runs changed; look at them: {mlflow_replica.how_to_browse(uri, experiment)}")


def clean(
    grid: GridName = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Also all checkpoints of done cells but the newest.")
    ] = False,
    orphans: Annotated[
        bool, typer.Option("--orphans", help="Also runs of earlier recipes, which the grid has no cell for any more.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    root: Root = None,
) -> None:
    """Delete what a launched grid needs no more: folders of ended jobs, old copies of the code."""
    from rich.console import Console
    from rich.table import Table

    from launch import clean as rubbish
    from launch import slurm, submissions
    from suite.run.locks import locked

    grid_dir = grid_dir_of(root, grid)
    rows, records = standings(grid_dir), submissions.read(grid_dir)
    queue = None
    if not records:
        queue = {}
    elif slurm.available():
        queue = slurm.queue()
    found = rubbish.old_jobs(grid_dir, rows, records, queue)
    if checkpoints:
        found += rubbish.old_checkpoints(grid_dir, rows)
    if orphans:
        found += rubbish.orphans(grid_dir, [row.cell.id for row in rows], records, queue)
    if not found:
        print("nothing to delete")
        return
    table = Table("what", "where", "MB")
    for each in found:
        table.add_row(each.what, str(each.path), f"{each.num_bytes / 1e6:,.1f}")
    Console().print(table)
    if not (yes or typer.confirm("delete all of it?")):
        return
    with locked(grid_dir / "launcher.lock") as mine:  # a launch might be about to use the very code
        if not mine:
            fail(f"{grid_dir}: a launcher is at work on this grid; try again when it has ended")
        print(f"{rubbish.delete(found) / 1e6:,.1f} MB deleted")


@with_where
def doctor(
    *,
    root: Root = None,
    data_dir: DataDir = None,
    tracking_uri: TrackingUri = None,
    where: Where,
) -> None:
    """Check that grids can run: SLURM, a partition and a node of it, storage, data, MLflow; each problem with its fix.

    [dim]python -m launch doctor --partition gpu[/]
    """
    from rich.console import Console

    from launch import doctor as examination
    from launch import slurm
    from launch.resources import load_profile

    profile = load_profile(where.cluster, where.resources)
    is_for_slurm = not where.local and profile.names_a_partition
    if is_for_slurm:
        with suppress(slurm.SlurmError):  # the doctor will tell
            profile = profile.on(slurm.partitions())
    resources = profile.for_cell(None) if is_for_slurm else None
    places = (root or profile.root or DEFAULT_ROOT, data_dir or profile.data_dir or DEFAULT_DATA)
    is_well = examination.doctor(*places, tracking_uri or profile.tracking_uri, resources, Console())
    raise SystemExit(0 if is_well else 1)


def standings(grid_dir: Path) -> "list[Standing]":
    """Where the grid's cells stand."""
    from launch import status

    return status.standings(grid_dir)
