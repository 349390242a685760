"""The launcher's commands; `python -m launch --help` teaches them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch import slurm, upkeep
from launch.options import Where, with_where
from launch.selection import (
    DEFAULT_DATA,
    DEFAULT_ROOT,
    Cells,
    DataDir,
    GridArgument,
    OfGrid,
    Only,
    Root,
    Set,
    TrackingUri,
    fail,
    grid_dir_of,
    matching,
)
from suite.errors import UserError

if TYPE_CHECKING:  # they import pydantic's models, which --help must not wait for
    from collections.abc import Mapping

    from launch.resources import Profile
    from suite.recipe.cell import Cell, Execution

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Runs grids of (model x quantizer x seed) and tells how they stand.\n\n"
    "A first one, minutes on a laptop: [bold]python -m launch grid digits --local[/]\n\n"
    "Then: [bold]python -m analysis tables digits[/]",
)


@app.command()
@with_where
def grid(
    *,
    grid: GridArgument = "imagenet",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the cells and what would start; start nothing.")
    ] = False,
    set_: Set = None,
    only: Only = None,
    root: Root = None,
    data_dir: DataDir = None,
    tracking_uri: TrackingUri = None,
    where: Where,
) -> None:
    """Run a grid's cells that are not done, running or queued yet: on SLURM, or with --local here.

    Launching again goes on where the last launch stopped: done cells stay done, killed ones resume from their newest
    checkpoint, failed ones wait for [bold]retry[/].

    [dim]python -m launch grid imagenet --partition gpu --time 24h --max-parallel 16[/]

    [dim]python -m launch grid digits --local --set training.epochs=5 --only resnet8[/]
    """
    from launch.plan import select
    from suite.recipe.grid_file import load_grid

    loaded = load_grid(grid, set_)
    cells = loaded.cells()
    wanted = select(cells, only or [])
    if not wanted:
        fail(f"--only {' --only '.join(only or [])} matches no cell of {grid}; --dry-run without it lists them")
    profile = where.profile()
    grid_dir = (root or profile.root or DEFAULT_ROOT) / loaded.name
    _start(grid_dir, cells, wanted, loaded.executions(), data_dir, tracking_uri, where, profile, dry_run=dry_run)


@app.command()
def debug(
    grid: GridArgument = "digits",
    cell: Annotated[str, typer.Option(help="An id, or a pattern as in --only; the first that fits is run.")] = "bnn++",
    max_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to take.")] = 10,
    set_: Set = None,
    data_dir: DataDir = None,
) -> None:
    """Train the first steps of one cell in this very process, recorded nowhere: breakpoints work.

    [dim]python -m pdb -m launch debug digits --cell resnet8/bnn++/s0[/]
    """
    from launch import debug as in_process
    from launch.plan import matches
    from suite.recipe.grid_file import load_grid

    loaded = load_grid(grid, set_)
    found = [each for each in loaded.cells() if matches(each, cell)]
    if not found:
        fail(f"--cell {cell} matches no cell of {grid}; python -m launch grid {grid} --dry-run lists them")
    in_process.debug(found[0], loaded.executions()[found[0].id], data_dir or DEFAULT_DATA, max_steps)


@app.command()
@with_where
def retry(
    *,
    cells: Cells = None,
    failed: Annotated[bool, typer.Option("--failed", help="Only failed cells, not cancelled ones.")] = False,
    oom: Annotated[bool, typer.Option("--oom", help="Only cells whose memory ran out; see --mem.")] = False,
    timeout: Annotated[
        bool, typer.Option("--timeout", help="Only cells that hung or got no further in their time.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="execution.KEY=VALUE",
            help="Run them in another way, execution.micro_batch_size=64 say; their recipe stays.",
        ),
    ] = None,
    grid: OfGrid = None,
    root: Root = None,
    data_dir: DataDir = None,
    tracking_uri: TrackingUri = None,
    where: Where,
) -> None:
    """Start failed and cancelled cells again, from their newest checkpoints, and the cells that wait for them.

    [dim]python -m launch retry --oom --partition gpu --mem 64G[/]

    [dim]python -m launch retry --oom --local --set execution.micro_batch_size=64[/]
    """
    from suite.recipe.grid_file import laid_over_execution
    from suite.run.directory import RunDir, planned_executions

    profile = where.profile()
    grid_dir = grid_dir_of(root or profile.root, grid)
    rows = upkeep.standings(grid_dir)
    causes = [cause for cause, is_asked in (("oom", oom), ("timeout", timeout)) if is_asked]
    again = [
        row
        for row in matching(rows, cells)
        if (row.state.state == "failed" and (not causes or row.state.cause in causes))
        or (row.state.state == "cancelled" and not (failed or causes))
    ]
    if not again:
        fail("nothing to retry: no such cell has failed or was cancelled")
    _require_a_place(where, profile)
    executions = planned_executions(grid_dir)
    changed = {row.cell.id: laid_over_execution(executions[row.cell.id], set_ or []) for row in again}
    ids = {row.cell.id for row in again}
    again += [row for row in rows if row.cell.parent in ids and row.state.state == "cancelled"]
    for row in again:
        RunDir(grid_dir / row.cell.id).plan_again()
    family = ids | {row.cell.id for row in rows if row.cell.parent in ids} | {row.cell.parent for row in again}
    wanted = [row.cell for row in rows if row.cell.id in family]
    _start(grid_dir, [row.cell for row in rows], wanted, executions | changed, data_dir, tracking_uri, where, profile)


@app.command()
def cancel(cells: Cells = None, grid: OfGrid = None, root: Root = None) -> None:
    """Stop cells that are not done; what they learnt up to their newest checkpoint is kept for a retry."""
    from launch.stopping import cancel as stop

    grid_dir = grid_dir_of(root, grid)
    rows = upkeep.standings(grid_dir)
    print(f"{stop(grid_dir, matching(rows, cells), rows)} cancelled")


for _command in (upkeep.status, upkeep.logs, upkeep.sync, upkeep.clean, upkeep.doctor):
    app.command()(_command)


def _start(
    grid_dir: Path,
    cells: "list[Cell]",
    wanted: "list[Cell]",
    executions: "Mapping[str, Execution]",
    data_dir: Path | None,
    tracking_uri: str | None,
    where: Where,
    profile: "Profile",
    *,
    dry_run: bool = False,
) -> None:
    from launch.start import Start
    from suite.run.mlflow_replica import default_uri

    start = Start(
        grid_dir,
        cells,
        wanted,
        executions,
        data_dir or profile.data_dir or DEFAULT_DATA,
        tracking_uri or profile.tracking_uri or default_uri(grid_dir.parent),
        profile,
        where.train_options,
    )
    if dry_run and (where.local or not (profile.names_a_partition and slurm.available())):
        start.show_local()
        return
    _require_a_place(where, profile)
    if where.local:
        start.locally()
    if dry_run:
        start.show_on_slurm()
    else:
        start.on_slurm()


def _require_a_place(where: Where, profile: "Profile") -> None:
    if where.local:
        return
    if not slurm.available():
        fail("no SLURM here (sbatch is not on PATH); add --local to run on this machine")
    if not profile.names_a_partition:
        names = ", ".join(slurm.partitions())
        fail(f"where? --partition ({names}), a profile with --cluster, or --local for this machine")


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        fail(str(error))
