"""The launcher's commands; `python -m launch --help` teaches them."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from suite.errors import UserError
from suite.gridfile import bundled_names, load_grid

if TYPE_CHECKING:  # these import torch or rich, which --help must not wait for
    from launch.plan import Standing
    from suite.config import Cell

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Runs grids of (model x quantizer x seed) and tells how they stand.\n\n"
    "A first one, minutes on a laptop: [bold]python -m launch grid digits --local[/]\n\n"
    "Then: [bold]python -m analysis tables digits[/]",
)

GridArgument = Annotated[
    str,
    typer.Argument(help=f"A bundled grid ({', '.join(bundled_names())}) or the path of a YAML file.", metavar="GRID"),
]
GridName = Annotated[
    str | None,
    typer.Argument(help="Name of a launched grid; may be left out where ROOT holds only one.", metavar="[GRID]"),
]
Root = Annotated[Path, typer.Option(envvar="PROXBENCH_ROOT", help="Where run directories and the MLflow store lie.")]
DataDir = Annotated[Path, typer.Option(envvar="PROXBENCH_DATA", help="Where data sets lie, or are downloaded to.")]
TrackingUri = Annotated[
    str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow store or server; default: sqlite in ROOT.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key for every cell, e.g. training.epochs=2. Repeatable.")
]
Only = Annotated[
    list[str] | None, typer.Option(help="Only cells matching this: an id, 'resnet20/bnn++', '*/s0'. Repeatable.")
]
MaxParallel = Annotated[
    int | None, typer.Option(min=1, help="Cells at a time; default: one per GPU, else one per core.")
]
Local = Annotated[bool, typer.Option("--local", help="Run on this machine, in parallel processes.")]
EXIT_INTERRUPTED = 130  # the shells' number for Ctrl-C
DEFAULT_ROOT, DEFAULT_DATA = Path("runs"), Path("data")


@app.command()
def grid(
    grid: GridArgument = "imagenet",
    local: Local = False,
    max_parallel: MaxParallel = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the cells and what would start; start nothing.")
    ] = False,
    set_: Set = None,
    only: Only = None,
    root: Root = DEFAULT_ROOT,
    data_dir: DataDir = DEFAULT_DATA,
    tracking_uri: TrackingUri = None,
) -> None:
    """Run a grid's cells that are not done or running yet.

    Launching again goes on where the last launch stopped: done cells stay done, killed ones resume from their newest
    checkpoint, failed ones wait for [bold]retry[/].

    [dim]python -m launch grid digits --local --set training.epochs=5 --only resnet8[/]
    """
    from launch.plan import select

    loaded = load_grid(grid, set_)
    cells = loaded.cells()
    wanted = select(cells, only or [])
    if not wanted:
        _fail(f"--only {' --only '.join(only or [])} matches no cell of {grid}; --dry-run without it lists them")
    if dry_run:
        _show_plan(root / loaded.name, wanted)
    else:
        _require_a_machine(local)
        _run_locally(root / loaded.name, cells, wanted, data_dir, max_parallel, tracking_uri)


@app.command()
def debug(
    grid: GridArgument = "digits",
    cell: Annotated[str, typer.Option(help="An id, or a pattern as in --only; the first that fits is run.")] = "bnn++",
    max_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to take.")] = 10,
    set_: Set = None,
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """Train the first steps of one cell in this very process, recorded nowhere: breakpoints work.

    [dim]python -m pdb -m launch debug digits --cell resnet8/bnn++/s0[/]
    """
    from launch.debug import first_steps
    from launch.plan import matches

    found = [each for each in load_grid(grid, set_).cells() if matches(each, cell)]
    if not found:
        _fail(f"--cell {cell} matches no cell of {grid}; python -m launch grid {grid} --dry-run lists them")
    first_steps(found[0], data_dir, max_steps)


@app.command()
def status(
    grid: GridName = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one object per cell.")] = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Show where each cell of a grid stands, and why cells failed."""
    from launch import status as view

    grid_dir = _grid_dir(root, grid)
    rows = _standings(grid_dir)
    if as_json:
        print(json.dumps(view.as_json(rows), indent=2))
    else:
        _show(grid_dir.name, rows)


@app.command()
def logs(
    cell: Annotated[str, typer.Argument(help="A cell's id, or a pattern that fits one: resnet20/bnn++/s0.")],
    grid: Annotated[str | None, typer.Option(help="Name of a launched grid.")] = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Print a cell's log, its newest attempt's."""
    from suite.rundir import RunDir

    grid_dir = _grid_dir(root, grid)
    rows = _matching(_standings(grid_dir), [cell])
    if len(rows) > 1:
        _fail(f"{cell} fits {len(rows)} cells, {rows[0].cell.name} and {rows[1].cell.name} among them; name one")
    written = sorted(RunDir(grid_dir / rows[0].cell.id).logs.glob("*_log.out"), key=lambda path: path.stat().st_mtime)
    if not written:
        _fail(f"{rows[0].cell.name} has no log yet: it is {rows[0].state.state}")
    sys.stdout.write(written[-1].read_text(encoding="utf-8", errors="replace"))


@app.command()
def retry(
    grid: GridName = None,
    only: Only = None,
    local: Local = False,
    max_parallel: MaxParallel = None,
    root: Root = DEFAULT_ROOT,
    data_dir: DataDir = DEFAULT_DATA,
    tracking_uri: TrackingUri = None,
) -> None:
    """Start failed and cancelled cells again, from their newest checkpoints, and the cells that wait for them."""
    from suite.rundir import RunDir

    _require_a_machine(local)
    grid_dir = _grid_dir(root, grid)
    rows = _standings(grid_dir)
    again = [row for row in _matching(rows, only) if row.state.state in {"failed", "cancelled"}]
    if not again:
        _fail("nothing to retry: no such cell has failed or was cancelled")
    for row in again:
        RunDir(grid_dir / row.cell.id).update(state="planned", attempt=0, cause=None, reason="")
    ids = {row.cell.id for row in again}
    wanted = [row.cell for row in rows if row.cell.id in ids or row.cell.parent in ids]
    _run_locally(grid_dir, [row.cell for row in rows], wanted, data_dir, max_parallel, tracking_uri)


@app.command()
def cancel(grid: GridName = None, only: Only = None, root: Root = DEFAULT_ROOT) -> None:
    """Stop cells that are not done; what they learnt up to their newest checkpoint is kept for a retry."""
    from launch.job import stop
    from suite.rundir import RunDir

    grid_dir = _grid_dir(root, grid)
    rows = [row for row in _matching(_standings(grid_dir), only) if not row.is_settled]
    for row in reversed(rows):  # the waiting before the running, or they would start in between
        stop(RunDir(grid_dir / row.cell.id), "cancelled", "cancelled by hand")
    print(f"{len(rows)} cancelled")


@app.command()
def sync(grid: GridName = None, root: Root = DEFAULT_ROOT, tracking_uri: TrackingUri = None) -> None:
    """Bring the MLflow store up to date with the run directories, or rebuild it from them."""
    from suite import tracking

    uri = tracking_uri or tracking.default_uri(root)
    num_changed = tracking.sync(_grid_dir(root, grid), uri)
    print(f"{num_changed} runs changed; look at them: mlflow ui --backend-store-uri {uri}")


def _run_locally(
    grid_dir: Path,
    cells: "list[Cell]",
    wanted: "list[Cell]",
    data_dir: Path,
    max_parallel: int | None,
    tracking_uri: str | None,
) -> NoReturn:
    """Runs the wanted cells and says what came of it. Exit status 1 if one of them is not done."""
    from rich.console import Console

    from launch.cluster import LocalCluster
    from launch.local import launch
    from suite.tracking import default_uri

    uri = tracking_uri or default_uri(grid_dir.parent)
    try:
        rows = launch(grid_dir, cells, wanted, LocalCluster(data_dir, max_parallel), uri, Console())
    except KeyboardInterrupt:
        print("stopped; the cells keep what they learnt up to their last epoch: launch again to go on", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    _show(grid_dir.name, rows)
    print(f"table:  python -m analysis tables {grid_dir.name} --root {grid_dir.parent}")
    print(f"browse: mlflow ui --backend-store-uri {uri}")
    raise SystemExit(0 if all(row.state.state == "done" for row in rows) else 1)


def _show_plan(grid_dir: Path, cells: "list[Cell]") -> None:
    from launch.cluster import is_alive
    from launch.plan import ready
    from launch.status import standing
    from suite.rundir import RunDir

    rows = [standing(RunDir(grid_dir / cell.id), cell, is_alive) for cell in cells]
    _show(f"{grid_dir.name}: {len(cells)} cells", rows)
    print(f"{len(ready(rows))} would start at once; nothing was started")


def _show(title: str, rows: "list[Standing]") -> None:
    from rich.console import Console

    from launch.status import matrix, problems

    console = Console()
    console.print(matrix(rows, title))
    for problem in problems(rows):
        console.print(problem, markup=False, highlight=False, soft_wrap=True)


def _grid_dir(root: Path, grid: str | None) -> Path:
    launched = sorted(path.parent.name for path in root.glob("*/plan.json"))
    if grid is None and len(launched) == 1:
        return root / launched[0]
    if grid in launched:
        return root / str(grid)
    what = "which grid?" if grid is None else f"no grid {grid!r}."
    return _fail(f"{what} {root} holds {', '.join(launched) or 'none: launch one, or name another --root'}")


def _standings(grid_dir: Path) -> "list[Standing]":
    from launch.cluster import is_alive
    from launch.status import standings

    return standings(grid_dir, is_alive)


def _matching(rows: "list[Standing]", patterns: list[str] | None) -> "list[Standing]":
    from launch.plan import matches

    found = [row for row in rows if not patterns or any(matches(row.cell, pattern) for pattern in patterns)]
    if not found:
        _fail(f"{', '.join(patterns or [])} matches no cell; python -m launch status --json lists them")
    return found


def _require_a_machine(local: bool) -> None:
    if local:
        return
    from launch.cluster import has_slurm

    if not has_slurm():
        _fail("no SLURM here (sbatch is not on PATH); add --local to run on this machine")
    _fail("submission to SLURM is not built yet; add --local to run on this machine")


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        _fail(str(error))
