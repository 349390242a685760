"""The commands that maintain a launched grid: status, logs, cancel, scale, sync, adopt, clean, doctor."""

import json
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.options import Where, with_where
from launch.selection import (
    DEFAULT_DATA,
    DEFAULT_ROOT,
    Cells,
    DataDir,
    GridName,
    OfGrid,
    Root,
    TrackingUri,
    Yes,
    fail,
    grid_dir_of,
    launched,
    matching,
)

if TYPE_CHECKING:  # it imports pydantic's models, which --help must not wait for
    from launch.plan import Standing

SYNC_SECONDS = 30.0


def status(
    grid: GridName = None,
    cell: Annotated[
        str | None, typer.Argument(help="A cell's id or pattern: show its attempts.", metavar="[CELL]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one object per cell.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every 30 s until the grid has ended.")] = False,
    root: Root = None,
) -> None:
    """Show the state of each cell of a grid, why cells failed or wait, its workers, and its cost.

    [bold]python -m launch status digits[/]
    [bold]python -m launch status digits resnet8/bnn++/s0[/]
    """
    from rich.console import Console

    from launch import view
    from launch.start import show

    if cell is None and grid not in {None, *(found := launched(root))} and len(found) == 1:
        grid, cell = None, grid
    grid_dir = grid_dir_of(root, grid)
    console = Console()
    if cell is not None:
        for row in matching(standings(grid_dir), [cell]):
            console.print(view.attempts(row, grid_dir))
    elif as_json:
        print(json.dumps(view.as_json(standings(grid_dir)), indent=2))
    elif watch:
        rows = view.watch(
            console, lambda: standings(grid_dir), lambda rows: view.overview(grid_dir, rows), grid_dir.name
        )
        show(console, grid_dir.name, rows, grid_dir)
    else:
        rows = standings(grid_dir)
        show(console, f"{grid_dir.name} in {grid_dir.parent}", rows, grid_dir)
        for line in view.overview(grid_dir, rows):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def logs(
    cell: Annotated[str, typer.Argument(help="A cell's id, or a pattern that matches one: resnet20/bnn++/s0.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the cell has ended.")] = False,
    lines: Annotated[int | None, typer.Option("--lines", "-n", min=1, help="Only the last N non-blank lines.")] = None,
    grid: OfGrid = None,
    root: Root = None,
) -> None:
    """Print the log of a cell's newest attempt; before its first attempt, the log of the grid's last worker.

    [bold]python -m launch logs resnet8/bnn++/s0 -f[/]
    """
    from launch import logs as log
    from launch.plan import SETTLED
    from suite.run.directory import RunDir

    grid_dir = grid_dir_of(root, grid)
    rows = matching(standings(grid_dir), [cell])
    if len(rows) > 1:
        fail(f"{cell} matches {len(rows)} cells, such as {rows[0].cell.name} and {rows[1].cell.name}; name one")
    run = RunDir(grid_dir / rows[0].cell.id)
    path = log.newest_log(run)
    if follow:
        log.follow(run, sys.stdout, lambda: run.state().state in SETTLED)
    elif path is not None:
        with path.open(encoding="utf-8", errors="replace") as file:
            sys.stdout.writelines(file if lines is None else deque(filter(str.strip, file), lines))
    elif (path := log.worker_log(grid_dir)) is not None:
        print(f"{rows[0].cell.name} is {rows[0].state.state}; the last worker's log, {path}:", file=sys.stderr)
        sys.stdout.write(path.read_text(encoding="utf-8", errors="replace"))
    else:
        fail(f"{rows[0].cell.name} has no log yet: it is {rows[0].state.state}")


def cancel(cells: Cells = None, yes: Yes = False, grid: OfGrid = None, root: Root = None) -> None:
    """Stop unfinished cells; their checkpoints are kept for a retry.

    [bold]python -m launch cancel 'vit*' --grid imagenet[/]

    Workers stop them within seconds, on any machine; jobs that have nothing left
    to train end.
    """
    from launch.plan import is_over
    from launch.supply import withdraw
    from suite.run.directory import RunDir

    grid_dir = grid_dir_of(root, grid)
    rows = standings(grid_dir)
    chosen = [row for row in matching(rows, cells) if not row.is_settled and row.state.state != "planned"]
    if not chosen:
        fail("nothing to cancel: no matching cell is running or waiting")
    if not cells and not yes:
        if not sys.stdin.isatty():
            fail(f"this cancels all {len(chosen)} unfinished cells of {grid_dir.name}: give --yes, or name cells")
        if not typer.confirm(f"cancel all {len(chosen)} unfinished cells of {grid_dir.name}?"):
            return
    for row in reversed(chosen):  # waiting cells before running ones, or they would start in between
        RunDir(grid_dir / row.cell.id).cancel("cancelled by hand")
    print(f"{len(chosen)} cancelled")
    if is_over(standings(grid_dir)):
        withdraw(grid_dir, 0)


def scale(
    workers: Annotated[int, typer.Argument(min=0, help="Maximum number of workers at a time.", metavar="N")],
    grid: OfGrid = None,
    root: Root = None,
) -> None:
    """Change the number of workers of a live grid: surplus workers save and exit, missing ones are submitted.

    [bold]python -m launch scale 8 --grid imagenet[/]
    """
    from launch.supply import supply, withdraw
    from launch.view import plural
    from launch.worker import registry

    grid_dir = grid_dir_of(root, grid)
    before = registry.limit(grid_dir)
    registry.set_limit(grid_dir, workers)
    withdraw(grid_dir, workers)
    made = supply(grid_dir, is_asked=True)
    was = "no limit" if before is None else str(before)
    print(f"at most {plural(workers, 'worker')} (before: {was}); {made.num_workers} submitted")


def sync(
    grid: GridName = None,
    watch: Annotated[bool, typer.Option("--watch", help="Repeat every 30 s until the grid has ended.")] = False,
    tensorboard: Annotated[
        Path | None,
        typer.Option(help="Also write TensorBoard events to DIR; view: tensorboard --logdir DIR.", metavar="DIR"),
    ] = None,
    wandb: Annotated[
        str | None, typer.Option(help="Also send the metrics to this Weights & Biases project.", metavar="PROJECT")
    ] = None,
    root: Root = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Bring the MLflow store up to date with the run directories, or rebuild it from them.

    [bold]python -m launch sync digits --tensorboard events[/]
    """
    from launch import launches
    from launch.plan import is_over
    from suite.run import mlflow_replica

    grid_dir = grid_dir_of(root, grid)
    last = launches.last(grid_dir)
    uri = tracking_uri or (last.tracking_uri if last else mlflow_replica.default_uri(grid_dir.parent))
    num_changed, experiment = mlflow_replica.sync(grid_dir, uri)
    _copy(grid_dir, tensorboard, wandb)
    while watch and not is_over(standings(grid_dir)):
        print(f"{time.strftime('%H:%M:%S')} {num_changed} runs changed", flush=True)
        time.sleep(SYNC_SECONDS)
        try:
            num_changed, experiment = mlflow_replica.sync(grid_dir, uri)
            _copy(grid_dir, tensorboard, wandb)
        except Exception as error:  # noqa: BLE001  (the server may be down for a while; the next pass catches up)
            num_changed = 0
            print(f"cannot reach {uri}; no data lost: {str(error).splitlines()[0]}", file=sys.stderr)
    print(f"{num_changed} runs changed; view: {mlflow_replica.how_to_browse(uri, experiment)}")


def _copy(grid_dir: Path, tensorboard: Path | None, wandb: str | None) -> None:
    """Updates the TensorBoard and Weights & Biases replicas, if requested."""
    if tensorboard is not None:
        from suite.run import tensorboard_replica

        num = tensorboard_replica.sync(grid_dir, tensorboard)
        print(f"{num} runs changed; view: tensorboard --logdir {tensorboard}")
    if wandb is not None:
        from suite.run import wandb_replica

        print(f"{wandb_replica.sync(grid_dir, wandb)} runs changed in Weights & Biases project {wandb}")


def adopt(
    source: Annotated[Path, typer.Argument(help="A grid's folder in another ROOT.", metavar="DIR")],
    grid: OfGrid = None,
    root: Root = None,
) -> None:
    """Copy finished runs from another ROOT or cluster into a grid, after checking their ids and checksums.

    [bold]python -m launch adopt /mnt/other/runs/digits --grid digits[/]
    """
    from launch.adopt import adopt as take

    grid_dir = grid_dir_of(root, grid)
    found = take(grid_dir, source)
    for each in found:
        if each.refusal:
            print(f"{each.name}: not adopted: {each.refusal}")
    print(f"{sum(not each.refusal for each in found)} of {len(found)} runs adopted")


def clean(
    grid: GridName = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Also delete all but the newest checkpoint of each done cell.")
    ] = False,
    orphans: Annotated[
        bool, typer.Option("--orphans", help="Also delete runs of former recipes: cells no longer in the grid.")
    ] = False,
    yes: Yes = False,
    root: Root = None,
) -> None:
    """Delete what a launched grid no longer needs: folders of ended jobs, old copies of the code.

    [bold]python -m launch clean digits --checkpoints[/]
    """
    from rich.console import Console
    from rich.table import Table

    from launch import clean as rubbish
    from launch import launches
    from launch.slurm import client
    from launch.supply import jobs
    from launch.worker import registry
    from suite.run.directory import read_plan

    grid_dir = grid_dir_of(root, grid)
    rows, last = standings(grid_dir), launches.last(grid_dir)
    live = None
    if not (grid_dir / "jobs").is_dir():
        live = set()
    elif client.available():
        live = {grid_dir / "jobs" / job.info.name.rpartition("-")[2] for job in jobs(grid_dir).values()}
    has_live_workers = bool(registry.live_numbers(grid_dir))
    found = rubbish.old_jobs(grid_dir, live, last.code if last else "", has_live_workers=has_live_workers)
    if checkpoints:
        found += rubbish.old_checkpoints(grid_dir, rows)
    if orphans:
        found += rubbish.orphans(grid_dir, set(read_plan(grid_dir)))
    if not found:
        print("nothing to delete")
        return
    table = Table("what", "where", "MB")
    for each in found:
        table.add_row(each.what, str(each.path), f"{each.num_bytes / 1e6:,.1f}")
    Console().print(table)
    if yes or typer.confirm("delete all of it?"):
        print(f"{rubbish.delete(found) / 1e6:,.1f} MB deleted")


@with_where
def doctor(
    *,
    gpu: Annotated[
        bool,
        typer.Option("--gpu", help="Instead, run all checks that need a GPU on this node; under 25 minutes."),
    ] = False,
    root: Root = None,
    data_dir: DataDir = None,
    tracking_uri: TrackingUri = None,
    where: Where,
) -> None:
    """Check that grids can run: SLURM, a partition and a node of it, storage, data, MLflow. Print a fix per problem.

    [bold]python -m launch doctor --partition gpu[/]
    [bold]srun --partition gpu --gpus 1 python -m launch doctor --gpu --data-dir data[/]
    """
    from rich.console import Console

    from launch.doctor import examination, gpu_program
    from launch.slurm import client as slurm
    from launch.slurm.profile import load_profile

    profile = load_profile(where.cluster, where.flags)
    is_for_slurm = not where.local and profile.is_for_slurm
    if gpu:
        if is_for_slurm:
            fail("--gpu checks this node; on SLURM, run it there: srun --gpus 1 python -m launch doctor --gpu")
        raise SystemExit(gpu_program.run((root or profile.root or DEFAULT_ROOT) / "gpu", data_dir or profile.data_dir))
    if is_for_slurm:
        with suppress(slurm.SlurmError):  # the doctor reports it
            profile = profile.on(slurm.partitions())
    resources = profile.for_cell(None) if is_for_slurm else None
    places = (root or profile.root or DEFAULT_ROOT, data_dir or profile.data_dir or DEFAULT_DATA)
    is_well = examination.doctor(*places, tracking_uri or profile.tracking_uri, resources, Console())
    raise SystemExit(0 if is_well else 1)


def standings(grid_dir: Path) -> "list[Standing]":
    """The grid's planned cells with their states."""
    from launch import status
    from suite.run.directory import read_plan

    return status.standings(grid_dir, read_plan(grid_dir))
