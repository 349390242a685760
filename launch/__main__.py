"""The launcher's commands; see `python -m launch --help`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch import upkeep
from launch.options import CellsPerGpu, CpusPerCell, GpusPerCell, Where, with_where
from launch.selection import (
    DEFAULT_DATA,
    DEFAULT_ROOT,
    Cells,
    DataDir,
    GridArgument,
    GridName,
    OfGrid,
    Only,
    Root,
    Set,
    TrackingUri,
    Yes,
    fail,
    grid_dir_of,
    matching,
)
from suite.errors import UserError

if TYPE_CHECKING:  # they import pydantic's models, which --help must not wait for
    from collections.abc import Iterable, Mapping, Sequence

    from launch.slurm.profile import Profile
    from launch.start import Start
    from suite.recipe.cell import Cell
    from suite.run.directory import Planned

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Run grids of (model x quantizer x seed) and show their status.\n\n"
    "[bold]python -m launch grid digits --local[/]  a first grid, minutes on a laptop\n"
    "[bold]python -m analysis tables digits[/]      its table",
)
First = Annotated[
    list[str] | None, typer.Option(help="Train cells matching this before all others; also in a live grid. Repeatable.")
]
ConfirmGpuHours = Annotated[
    float | None,
    typer.Option(min=0, help="Ask before launching more than this many estimated GPU-hours.", show_default="100"),
]


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
    first: First = None,
    keep_former: Annotated[
        bool, typer.Option("--keep-former", help="Finish the cells that the edited grid no longer has.")
    ] = False,
    cancel_former: Annotated[
        bool, typer.Option("--cancel-former", help="Cancel the cells that the edited grid no longer has.")
    ] = False,
    confirm_gpu_hours: ConfirmGpuHours = None,
    only_tune: Annotated[
        bool, typer.Option("--only-tune", help="Run only the grid's trials and choose values; train no other cells.")
    ] = False,
    choices: Annotated[
        Path | None,
        typer.Option(
            help="Use the values chosen in this file, or in the bundled choices of this name; run no trials.",
            metavar="FILE",
        ),
    ] = None,
    yes: Yes = False,
    on_finish: Annotated[
        str | None,
        typer.Option(
            help="Shell command to run when the grid has ended; PROXBENCH_GRID and PROXBENCH_SUMMARY describe it.",
            metavar="CMD",
        ),
    ] = None,
    root: Root = None,
    data_dir: DataDir = None,
    tracking_uri: TrackingUri = None,
    where: Where,
) -> None:
    """Run a grid's unfinished cells: with workers on SLURM, or with --local on this machine.

    [bold]python -m launch grid digits --local --set training.epochs=5 --only resnet8[/]
    [bold]python -m launch grid imagenet --partition gpu --time 24h --workers 16[/]
    [bold]python -m launch grid digits --local --set tune=null[/]

    Launching again resumes the grid: done cells stay done, killed cells resume
    from their newest checkpoint, failed cells wait for [bold]retry[/]. A grid
    with a [bold]tune[/] block first runs its trials, then chooses the best values
    for each method and model, and trains its own cells with them.
    """
    from launch.plan import matches
    from launch.tuning import look_ahead, planned
    from suite.recipe.grid_file import load_grid, path_of

    loaded = load_grid(grid, set_)
    for name, is_given in (("--only-tune", only_tune), ("--choices", choices is not None)):
        if is_given and not loaded.is_tuned:
            fail(f"{name}: {grid} has no tune block; omit {name}, or add one")
    if keep_former and cancel_former:
        fail("--keep-former and --cancel-former exclude each other: give one of them")
    if not dry_run:
        _require_a_place(where)
    is_asking_slurm = not dry_run or where.flags or where.cluster
    profile = (where if is_asking_slurm else replace(where, local=True)).profile()
    grid_dir = (root or profile.root or DEFAULT_ROOT) / loaded.name
    ahead = look_ahead(grid_dir, loaded, choices, only or [], only_tune=only_tune)
    if not ahead.wanted:
        fail(f"--only {' --only '.join(only or [])} matches no cell of {grid}; --dry-run without --only lists them")
    if lost := [pattern for pattern in first or [] if not any(matches(cell, pattern) for cell in ahead.whole.cells)]:
        fail(f"--first {lost[0]} matches no cell of {grid}; --dry-run lists them")
    tuning = replace(ahead.tuning, shapes=_shapes(grid_dir, ahead.whole.cells, where, profile))
    cells = {
        cell.id: replace(
            planned(cell, ahead.resolved, tuning), is_first=any(matches(cell, pattern) for pattern in first or [])
        )
        for cell in ahead.resolved.cells
    }
    start = _start(
        "grid",
        grid_dir,
        cells,
        ahead.wanted,
        where,
        profile,
        every=ahead.whole.cells,
        text=(grid, path_of(grid).read_text(encoding="utf-8"), tuple(set_ or [])),
        declared=loaded.declared(ahead.choices),
        choices="" if choices is None else str(choices),
        data_dir=data_dir,
        tracking_uri=tracking_uri,
        on_finish=on_finish,
        confirm_gpu_hours=confirm_gpu_hours,
    )
    start = replace(start, former="keep" if keep_former else "cancel" if cancel_former else None, is_sure=yes)
    if loaded.is_tuned:
        start = replace(start, tuning=tuning, choices=ahead.choices, later=ahead.later)
    if dry_run:
        start.show()
    else:
        start.run()


@app.command()
def debug(
    grid: GridArgument = "digits",
    cell: Annotated[str, typer.Option(help="A cell id, or a pattern as in --only; the first match runs.")] = "bnn++",
    max_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to take.")] = 10,
    set_: Set = None,
    data_dir: DataDir = None,
) -> None:
    """Train the first steps of one cell in this process, so that breakpoints work. Nothing is recorded.

    [bold]python -m pdb -m launch debug digits --cell resnet8/bnn++/s0[/]
    """
    from launch import debug as in_process
    from launch.plan import matches
    from suite.recipe.grid_file import load_grid

    loaded = load_grid(grid, set_).untuned()
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
    oom: Annotated[bool, typer.Option("--oom", help="Only cells that ran out of memory; see --mem.")] = False,
    timeout: Annotated[
        bool, typer.Option("--timeout", help="Only cells that hung, or saved no checkpoint within the time limit.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show which cells would start; change nothing.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="execution.KEY=VALUE",
            help="Change how they run, e.g. execution.micro_batch_size=64; their recipe stays the same.",
        ),
    ] = None,
    confirm_gpu_hours: ConfirmGpuHours = None,
    yes: Yes = False,
    grid: OfGrid = None,
    root: Root = None,
    data_dir: DataDir = None,
    tracking_uri: TrackingUri = None,
    where: Where,
) -> None:
    """Restart failed and cancelled cells from their newest checkpoints. Omitted options are as in the last launch.

    [bold]python -m launch retry --failed[/]
    [bold]python -m launch retry --oom --mem 64G[/]
    [bold]python -m launch retry --oom --set execution.micro_batch_size=64[/]
    """
    from launch import launches
    from launch.plan import chosen_already, needed
    from launch.status import standings
    from suite.recipe.grid_file import laid_over_execution
    from suite.run.directory import read_plan

    grid_dir = grid_dir_of(root, grid)
    rows = standings(grid_dir, read_plan(grid_dir))
    causes = [cause for cause, is_asked in (("oom", oom), ("timeout", timeout)) if is_asked]
    again = [
        row
        for row in matching(rows, cells)
        if (row.state.state == "failed" and (not causes or row.state.cause in causes))
        or (row.state.state == "cancelled" and not (failed or causes))
    ]
    if not again:
        fail("nothing to retry: no matching cell has failed or was cancelled")
    if any(row.cell.trial and row.planned.tuned in chosen_already(rows) for row in again):
        print("some of these are trials whose choice is already made: the choice stays, and analysis reports changes")
    last = launches.last(grid_dir)
    where = where.after(last)
    _require_a_place(where)
    profile = where.profile()
    ids = {row.cell.id for row in again}
    while more := {row.cell.id for row in rows if not ids.isdisjoint(row.cell.needs)} - ids:
        ids |= more
    ids |= needed(ids, {row.cell.id: row.cell for row in rows})
    planned = {row.cell.id: row.planned for row in rows}
    for row in again:
        execution = laid_over_execution(row.planned.execution, set_ or [])
        shape = row.planned.shape if where.local else profile.for_cell(row.cell).shape
        planned[row.cell.id] = replace(row.planned, execution=execution, shape=shape)
    start = _start(
        "retry",
        grid_dir,
        planned,
        frozenset(row.cell.id for row in rows if row.cell.id in ids and row.state.state != "planned"),
        where,
        profile,
        text=(last.grid, last.text, last.overrides) if last else ("", "", ()),
        declared=last.declared if last else {},
        data_dir=data_dir or (Path(last.data_dir) if last else None),
        tracking_uri=tracking_uri or (last.tracking_uri if last else None),
        on_finish=last.on_finish if last else None,
        confirm_gpu_hours=confirm_gpu_hours,
    )
    start = replace(start, again=frozenset(row.cell.id for row in again), is_sure=yes)
    if dry_run:
        start.show()
    else:
        start.run()


@app.command()
def worker(
    grid: GridName = None,
    only: Only = None,
    stay: Annotated[
        bool, typer.Option("--stay", help="Wait for cells that other workers train, until the grid has ended.")
    ] = False,
    slots: Annotated[int | None, typer.Option(min=1, help="Cells at a time; default: as many as fit.")] = None,
    gpus_per_cell: GpusPerCell = None,
    cells_per_gpu: CellsPerGpu = None,
    cpus_per_cell: CpusPerCell = None,
    root: Root = None,
    data_dir: DataDir = None,
) -> None:
    """Train cells of a launched grid in this process: in a PBS or LSF job, a pod, or on a colleague's machine.

    [bold]python -m launch worker digits --root /project/runs --data-dir /project/data[/]

    Any number of workers that see ROOT can share a grid; each cell is trained by
    one of them.
    """
    from rich.console import Console

    from launch import launches
    from launch.here import work_here
    from launch.plan import select
    from launch.worker.slots import slots_here
    from launch.worker.spec import EXIT_AGAIN, WorkerSpec
    from launch.worker.worker import finish
    from suite.run.directory import planned_cells

    grid_dir = grid_dir_of(root, grid)
    last = launches.last(grid_dir)
    wanted = None if only is None else tuple(cell.id for cell in select(planned_cells(grid_dir).values(), only))
    spec = WorkerSpec(
        grid_dir.resolve(),
        (data_dir or Path(last.data_dir if last else DEFAULT_DATA)).resolve(),
        Path(last.code) if last else None,
        cells=wanted,
        only=tuple(only or ()),
        gpus_per_cell=gpus_per_cell or 1,
        cells_per_gpu=cells_per_gpu or 1,
        cpus_per_cell=cpus_per_cell,
        max_slots=slots,
        train_options=last.train_options if last else (),
    )
    outcome, reason = work_here(spec, slots_here(spec), None, Console(), stays=stay)
    print(f"worker: {outcome}{f' ({reason})' if reason else ''}")
    if outcome == "again":
        raise SystemExit(EXIT_AGAIN)
    finish(grid_dir)
    raise SystemExit(1 if outcome == "retired" else 0)


for _command in (
    upkeep.status,
    upkeep.logs,
    upkeep.cancel,
    upkeep.scale,
    upkeep.sync,
    upkeep.adopt,
    upkeep.clean,
    upkeep.doctor,
):
    app.command()(_command)


def _shapes(grid_dir: Path, cells: "Iterable[Cell]", where: Where, profile: "Profile") -> dict[str, str]:
    """The cells' shapes, by `place_of`. A local launch keeps the planned ones: SLURM's workers pick cells by shape."""
    from suite.run.directory import read_plan
    from suite.run.tuning import place_of

    before = {place_of(each.cell): each.shape for each in read_plan(grid_dir).values()} if where.local else {}
    return {
        place: before[place] if place in before else profile.for_cell(cell).shape
        for place, cell in {place_of(cell): cell for cell in cells}.items()
    }


def _start(
    command: str,
    grid_dir: Path,
    planned: "Mapping[str, Planned]",
    wanted: frozenset[str],
    where: Where,
    profile: "Profile",
    *,
    every: "Sequence[Cell]" = (),
    text: tuple[str, str, tuple[str, ...]],
    declared: dict[str, Any],
    choices: str = "",
    data_dir: Path | None,
    tracking_uri: str | None,
    on_finish: str | None,
    confirm_gpu_hours: float | None,
) -> "Start":
    from launch.launches import Launch
    from launch.start import Start
    from suite.run.mlflow_replica import default_uri

    asked = [profile.for_cell(cell) for cell in every or [each.cell for each in planned.values()]]
    resources = {each.shape: each.model_dump(mode="json") for each in asked}  # Start drops shapes that no cell has
    name, content, overrides = text
    launch = Launch(
        command,
        name,
        content,
        overrides,
        "local" if where.local else "slurm",
        where.cluster,
        dict(where.flags),
        resources,
        str((data_dir or profile.data_dir or DEFAULT_DATA).resolve()),
        tracking_uri or profile.tracking_uri or default_uri(grid_dir.parent),
        "",
        where.train_options,
        on_finish or profile.on_finish,
        len(wanted),
        declared,
        choices,
    )
    limit = profile.confirm_gpu_hours if confirm_gpu_hours is None else confirm_gpu_hours
    return Start(grid_dir, launch, planned, wanted, where, profile, confirm_gpu_hours=limit)


def _require_a_place(where: Where) -> None:
    from launch.start import require_a_place

    require_a_place(where)


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        fail(str(error))
