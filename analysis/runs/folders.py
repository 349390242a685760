"""Run directories ROOT/<grid>/ -> tidy frame: the frame that MLflow gives for the same runs, and no store needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import yaml

from analysis.runs import frame as cells
from analysis.runs.backgrounds import Background, CellKey, facts_of
from analysis.runs.frame import Results
from suite.errors import UserError
from suite.recipe.cell import Cell
from suite.run.atomic import DamagedFileError
from suite.run.directory import RunDir, planned_cells, run_dirs
from suite.run.mlflow_replica import recipe

NUMBERS = ("top1_hard", "top1_soft", "num_binary_parameters", "num_full_precision_parameters")  # of result.json
NAN = float("nan")


def load(root: Path, grid: str | None = None) -> Results:
    """All cells of one grid, or of every grid in root, as last launched; cells not yet run have accuracy NaN.

    Raises:
        UserError: no such folder, unknown grid, no cells, or a file of a run that cannot be read.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of runs; `python -m launch` makes it")
    grids = {path.name: path for path in sorted(root.iterdir()) if _is_grid(path)}
    if grid is not None:
        cells.require_known("grid", grid, grids, str(root))
        grids = {grid: grids[grid]}
    rows: list[dict[str, object]] = []
    left_out: list[str] = []
    for path in grids.values():
        current = _planned(path)
        rows += [_row(RunDir(path / cell_id), cell, path.name) for cell_id, cell in current.items()]
        left_out += [_cell(run).name for run in run_dirs(path) if run.path.name not in current]
    if not rows:
        raise UserError(f"{root / (grid or '')}: no cells; `python -m launch grid` makes them")
    try:
        return cells.results(rows, left_out)
    except ValueError as error:
        raise UserError(f"{root}: {error}") from error


def backgrounds(frame: pd.DataFrame) -> dict[CellKey, Background]:
    """What else the run directories of a frame that `load` read there know of each cell.

    Raises:
        UserError: a file of a run that cannot be read.
    """
    found = {}
    for (grid, folder), own in frame.groupby(["grid", frame["run"].map(lambda run: str(Path(run).parent))]):
        planned = _planned(Path(str(folder)))
        for cell_id, run in zip(own["cell_id"], own["run"], strict=True):
            found[str(grid), str(cell_id)] = _background(RunDir(Path(run)), planned[cell_id])
    return found


def _background(run: RunDir, cell: Cell) -> Background:
    params = {key: str(value) for key, value in recipe(cell)}
    with _reading(run.attempts):
        state, facts = run.state(), facts_of(run.provenance())
    first = run.first() if state.state == "done" else None
    times = None if first is None else (float(first.facts["made"]), state.heartbeat)
    return Background(params, facts, state.reason, times)


def _is_grid(path: Path) -> bool:
    return (path / "plan.json").exists() or any(path.glob("*/cell.yaml"))


def _planned(grid_dir: Path) -> dict[str, Cell]:
    """The last launch's cells by id; every run directory's where runs were started without a launcher."""
    with _reading(grid_dir / "plan.json"):
        planned = planned_cells(grid_dir)
    return planned or {run.path.name: _cell(run) for run in run_dirs(grid_dir)}


def _cell(run: RunDir) -> Cell:
    with _reading(run.cell_path):
        return run.cell()


def _row(run: RunDir, cell: Cell, grid: str) -> dict[str, object]:
    with _reading(run.attempts):
        state, provenance = run.state(), run.provenance()
    with _reading(run.result_path):
        result = run.result() or {}
        numbers = {key: float(result.get(key, NAN)) for key in NUMBERS}
        commit = (provenance.get("code") or {}).get("commit") or ""
    return {
        **cell.model_dump(include=set(cells.SCHEMA)),
        "grid": grid,
        "state": state.state,
        "cause": state.cause or "",
        "recipe_id": cell.recipe_id,
        "cell_id": cell.id,
        "git_commit": commit,
        **numbers,
        "job_id": state.job_id,
        "data_checksum": provenance.get("data_checksum") or "",
        "run": str(run.path),
    }


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What is wrong with the file, or another one that is named, becomes one line."""
    try:
        yield
    except DamagedFileError as error:
        raise UserError(str(error)) from error
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        what = str(error).splitlines()[0]
        raise UserError(
            f"{path}: not what a run writes there: {what}; restore it, or delete the run directory"
        ) from error
