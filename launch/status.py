"""Where a grid stands: run directories -> standings -> a matrix for people or JSON for programs."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from launch.plan import Standing, blocked, truth
from suite.config import Cell
from suite.locks import holder
from suite.rundir import RunDir, StateName, read_plan

COLOURS: dict[StateName, str] = {
    "planned": "bright_black",
    "queued": "yellow",
    "running": "cyan",
    "preempted": "magenta",
    "done": "green",
    "failed": "bold red",
    "cancelled": "red",
}


def standings(grid_dir: Path, is_alive: Callable[[str], bool]) -> list[Standing]:
    """Every cell of the last launch, in the grid's order. `is_alive` tells whether a job id still has a job."""
    runs = [RunDir(grid_dir / cell_id) for cell_id in read_plan(grid_dir)]
    return [standing(run, run.cell(), is_alive) for run in runs]


def standing(run: RunDir, cell: Cell, is_alive: Callable[[str], bool]) -> Standing:
    """Where one run stands, whose directory need not exist."""
    state = run.state()
    true = truth(
        state,
        is_held=holder(run.lock) is not None,
        job_is_alive=bool(state.job_id) and is_alive(state.job_id),
    )
    return Standing(cell, true)


def matrix(rows: Sequence[Standing], title: str) -> Table:
    """One line per (data set, model, quantizer), one column per seed."""
    seeds = sorted({row.cell.seed for row in rows})
    table = Table(title=title, title_justify="left", caption=summary(rows), caption_justify="left")
    for column in ("model", "quantizer"):
        table.add_column(column)
    for seed in seeds:
        table.add_column(f"s{seed}", justify="right")
    lines: dict[tuple[str, str], dict[int, Standing]] = {}
    for row in rows:
        setting = [row.cell.init] * (row.cell.init != "scratch") + [row.cell.task] * (row.cell.task != "bw")
        model = row.cell.model + f" ({', '.join(setting)})" * bool(setting)
        lines.setdefault((model, row.cell.quantizer), {})[row.cell.seed] = row
    last_model = ""
    for (model, quantizer), by_seed in lines.items():
        cells = [_cell_text(by_seed[seed]) if seed in by_seed else Text("") for seed in seeds]
        table.add_row(model if model != last_model else "", quantizer, *cells)
        last_model = model
    return table


def summary(rows: Sequence[Standing]) -> str:
    """`12 done, 2 running, 22 planned`, most advanced first."""
    counts = Counter(row.state.state for row in rows)
    return ", ".join(f"{counts[state]} {state}" for state in reversed(COLOURS) if counts[state])


def problems(rows: Sequence[Standing]) -> list[str]:
    """One line per cell that failed or can't start, with the cause and what to do."""
    failed = [
        f"{row.cell.name} ({row.cell.id}) failed: {row.state.cause}: {row.state.reason}"
        for row in rows
        if row.state.state == "failed"
    ]
    names = {row.cell.id: row.cell.name for row in rows}
    return failed + [f"{names[cell_id]} ({cell_id}) waits: {why}" for cell_id, why in blocked(rows).items()]


def as_json(rows: Sequence[Standing]) -> list[dict[str, Any]]:
    """One object per cell, with the fields of state.json."""
    return [{"cell": row.cell.id, "name": row.cell.name, **vars(row.state)} for row in rows]


def _cell_text(row: Standing) -> Text:
    state = row.state
    text = f"{state.epoch}/{state.num_epochs}" if state.state == "running" and state.num_epochs else state.state
    return Text(f"{state.cause}" if state.state == "failed" else text, style=COLOURS[state.state])
