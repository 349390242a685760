"""A tuned grid of tiny cells, as a launch leaves it, and its trials' ends, without training anything."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from tiny_cells import put, tiny_grid

from launch import launches
from launch.launches import Launch
from launch.plan import Standing
from launch.status import standings
from launch.tuning import look_ahead, planned
from suite.recipe.cell import Cell
from suite.recipe.choices import FILE
from suite.recipe.grid_file import load_grid
from suite.run.atomic import write_json
from suite.run.directory import RunDir, read_plan, write_plan
from suite.run.tuning import place_of, write_choices

LR = "training.learning_rate"
TUNE: dict[str, Any] = {LR: [0.001, 0.003, 0.01], "trials": 3, "seeds": [1000, 1001]}
FINETUNE = [{}, {"init": "finetune", "quantizers": ["bnn++"]}]


def grid_file(folder: Path, **changes: object) -> Path:
    """The file of a tuned grid; keyword arguments replace its keys."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_grid(**{"tune": TUNE, **changes}), sort_keys=False), encoding="utf-8")
    return path


def launched(
    folder: Path,
    *,
    only: tuple[str, ...] = (),
    only_tune: bool = False,
    choices: Path | None = None,
    **changes: object,
) -> Path:
    """The folder of a grid as a launch leaves it before any worker begins."""
    grid_dir = folder / "runs" / "tiny"
    grid_dir.mkdir(parents=True, exist_ok=True)
    grid = load_grid(str(grid_file(folder, **changes)))
    ahead = look_ahead(grid_dir, grid, choices, only, only_tune=only_tune)
    write_choices(grid_dir / FILE, ahead.choices)
    tuning = replace(ahead.tuning, shapes={place_of(cell): "" for cell in ahead.whole.cells})
    tuning.write(grid_dir)
    write_plan(grid_dir, [planned(cell, ahead.resolved, tuning) for cell in ahead.resolved.cells])
    launch = Launch(
        "grid", "tiny", "", (), "local", None, {}, {}, "data", "", "", declared=grid.declared(ahead.choices)
    )
    launches.remember(grid_dir, launch)
    for cell in ahead.resolved.cells:
        if cell.id in ahead.wanted:
            RunDir.create(grid_dir / cell.id, cell)
    return grid_dir


def rows_of(grid_dir: Path) -> list[Standing]:
    """Where all its cells stand."""
    return standings(grid_dir, read_plan(grid_dir))


def finish(grid_dir: Path, of: Callable[[Cell], float | str | None]) -> None:
    """Ends the trials: with a score, a failure's cause, or, for None, not at all."""
    for row in rows_of(grid_dir):
        outcome = of(row.cell) if row.cell.trial and row.state.state != "done" else None
        run = RunDir(grid_dir / row.cell.id)
        if isinstance(outcome, float):
            put(run, state="running")
            write_json(run.result_path, {"val_top1_hard": outcome, "val_top1_soft": outcome})
        elif outcome is not None:
            put(run, state="failed", cause=outcome)


def by_rate(scores: Mapping[float, float | str | None]) -> Callable[[Cell], float | str | None]:
    """An outcome for `finish`, by learning rate."""
    return lambda cell: scores[cell.training.learning_rate]


GOOD: Callable[[Cell], float | str | None] = by_rate({0.001: 0.5, 0.003: 0.8, 0.01: 0.7})
