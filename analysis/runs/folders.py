"""Run directories ROOT/<grid>/ -> tidy frame, the same one that MLflow gives for these runs; needs no store."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import pandas as pd
import yaml

from analysis.runs import frame as cells
from analysis.runs import tuning
from analysis.runs.frame import Results
from analysis.runs.looks import remark
from analysis.runs.provenance import Background, CellKey, facts_of
from suite.errors import UserError
from suite.recipe.cell import Cell
from suite.run.atomic import DamagedFileError
from suite.run.attempt import Attempt
from suite.run.directory import RunDir, declared_at, planned_cells, planned_rows, run_dirs
from suite.run.mlflow_replica import recipe

NUMBERS = ("top1_hard", "top1_soft", "num_binary_parameters", "num_full_precision_parameters")  # of result.json
NAN = float("nan")
_OF_A_CELL = ("dataset", "model", "quantizer", "seed", "task", "init", "recipe_id")


def load(roots: Path | Sequence[Path], grid: str | None = None) -> Results:
    """All cells of one grid, or of every grid in the roots, as last launched; accuracy is NaN for cells not yet run.

    The same grid in several roots is merged; if a cell is done in several roots, the first root's result counts.

    Raises:
        UserError: no such folder, unknown grid, no cells, or a file of a run that cannot be read.
    """
    roots = [roots] if isinstance(roots, Path) else list(roots)
    where = ", ".join(map(str, roots))
    found = [path for root in roots for path in grid_dirs(root)]
    if grid is not None:
        cells.require_known("grid", grid, {path.name for path in found}, where)
        found = [path for path in found if path.name == grid]
    rows: list[dict[str, object]] = []
    left_out: list[str] = []
    for path in reversed(found):  # the last row of a cell counts, so the first root wins
        with cells.uncollected():
            current = _planned(path)
            rows += [_row(RunDir(path / cell_id), cell, path.name) for cell_id, cell in current.items()]
        others = sorted(entry.name for entry in os.scandir(path) if entry.name not in current)
        runs = [run for name in others if (run := RunDir(path / name)).cell_path.exists()]
        left_out += [cell.name for cell in map(_cell, runs) if not cell.trial]
    if not rows:
        place = where if grid is None else ", ".join(map(str, found))
        if any((path / "tuning.json").exists() for path in found):
            raise UserError(f"{place}: no cells yet, they follow from tuning: python -m analysis tuning shows that")
        raise UserError(f"{place}: no cells; `python -m launch grid` makes them")
    done_in: dict[str, set[str]] = {path.name: set() for path in found}
    for row in rows:
        if row["state"] == "done":
            done_in[str(row["grid"])].add(str(row["cell_id"]))
    launches = {name: declared_at(path for path in found if path.name == name) for name in done_in}
    try:
        tuned, of_tuning = _tuned(found)
        remarks = [*filter(None, (remark(path, done_in[path.name]) for path in found)), *of_tuning.remarks]
        return cells.results(rows, left_out, launches, remarks, of_tuning.doubts, tuned)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


class TuningFindings(NamedTuple):
    """Doubts about how a grid was tuned, and remarks on it."""

    doubts: tuple[str, ...]
    remarks: tuple[str, ...]


def load_tuning(roots: Sequence[Path], grid: str | None = None) -> tuple[tuple[tuning.Tuned, ...], TuningFindings]:
    """How one grid, or every grid in the roots, was tuned; works before the grid's own cells exist.

    Raises:
        UserError: no such folder, unknown grid, nothing was tuned, or a file that cannot be read.
    """
    where = ", ".join(map(str, roots))
    found = [path for root in roots for path in grid_dirs(root)]
    if grid is not None:
        cells.require_known("grid", grid, {path.name for path in found}, where)
        found = [path for path in found if path.name == grid]
    tuned, findings = _tuned(found)
    if not tuned:
        raise UserError(f"{grid or where}: nothing is tuned; that takes a tune block in the grid (docs/tuning.md)")
    return tuned, findings


def _tuned(found: Iterable[Path]) -> tuple[tuple[tuning.Tuned, ...], TuningFindings]:
    """The tuning of the grids in these folders."""
    by_folder: dict[Path, list[tuning.Tuned]] = {}
    for path in found:
        with _reading(path / "tuning.json"):
            by_folder[path] = tuning.load(path)
    doubts = [line for path, own in by_folder.items() for line in tuning.doubts(path, own)]
    remarks = [line for own in by_folder.values() for line in tuning.remarks(own)]
    return tuning.merged(list(by_folder.values())), TuningFindings(tuple(doubts), tuple(remarks))


def grid_dirs(root: Path) -> list[Path]:
    """The grid folders in a root. Raises UserError if the root does not exist."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of runs; `python -m launch` makes it")
    return [path for path in sorted(root.iterdir()) if _is_grid(path)]


def right(run: str) -> "npt.NDArray[np.bool_] | None":
    """Which test images the run's hardened network classifies correctly, in data set order; None if not recorded.

    Raises:
        UserError: the file cannot be read.
    """
    path = RunDir(Path(run)).predictions_path
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return np.asarray(arrays["hard"], dtype=np.bool_)
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(
            f"{path}: not what a run writes there: {error}; restore it, or delete the run directory"
        ) from error


def backgrounds(frame: pd.DataFrame) -> dict[CellKey, Background]:
    """Further facts on each cell of a frame that `load` read, from the same run directories.

    Raises:
        UserError: a file of a run that cannot be read.
    """
    found = {}
    for (grid, folder), own in frame.groupby(["grid", frame["run"].map(lambda run: str(Path(run).parent))]):
        with _reading(Path(str(folder)) / "plan.json"):
            planned = planned_cells(Path(str(folder))) or {
                run.path.name: _cell(run) for run in run_dirs(Path(str(folder)))
            }
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


def _planned(grid_dir: Path) -> dict[str, dict[str, Any]]:
    """Setting and recipe id of each cell of the last launch, by id; if none was recorded, of each run directory."""
    with _reading(grid_dir / "plan.json"):
        planned = planned_rows(grid_dir)
        if not planned:
            every = {run.path.name: _cell(run) for run in run_dirs(grid_dir)}
            found = {cell_id: cell for cell_id, cell in every.items() if not cell.trial}
            planned = {cell_id: {**vars(cell), "recipe_id": cell.recipe_id} for cell_id, cell in found.items()}
        return {cell_id: {name: cell[name] for name in _OF_A_CELL} for cell_id, cell in planned.items()}


def _cell(run: RunDir) -> Cell:
    with _reading(run.cell_path):
        return run.cell()


def _row(run: RunDir, cell: Mapping[str, Any], grid: str) -> dict[str, object]:
    with _reading(run.result_path):
        result = run.result() or {}
        numbers = {key: float(result.get(key, NAN)) for key in NUMBERS}
    with _reading(run.attempts):
        attempts = run.all_attempts()
        provenance = next(filter(None, (attempt.provenance() for attempt in reversed(attempts))), {})
        hours = run.device_hours(attempts)
        if result:  # a result means done: no need to read other files
            state, cause, job_id = "done", "", _job_id(attempts)
        else:
            found = run.state()
            state, cause, job_id = found.state, found.cause or "", found.job_id
        commit = (provenance.get("code") or {}).get("commit") or ""
    execution = provenance.get("execution") or {}
    return {
        **cell,
        "grid": grid,
        "state": state,
        "cause": cause,
        "cell_id": run.path.name,
        "git_commit": commit,
        "code_digest": (provenance.get("code") or {}).get("digest") or "",
        "users_digest": (provenance.get("code") or {}).get("users_digest") or "",
        "device": provenance.get("device") or "",
        **{name: str(provenance.get(name) or "") for name in ("num_threads", "num_processes")},
        "determinism": str(execution.get("determinism") or ""),
        "device_hours": NAN if hours is None else hours,
        "weights_sha256": str(result.get("weights_sha256") or ""),
        **numbers,
        "job_id": job_id,
        "data_checksum": provenance.get("data_checksum") or "",
        "run": str(run.path),
    }


def _job_id(attempts: Sequence[Attempt]) -> str:
    """Job id of the newest attempt, from its end record if there is one: that file is faster to read."""
    if not attempts:
        return ""
    found = (attempts[-1].end() or {}).get("job_id")
    return attempts[-1].job_id if found is None else str(found)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns an error in reading `path`, or in a file that the error names, into a one-line UserError."""
    try:
        yield
    except DamagedFileError as error:
        raise UserError(str(error)) from error
    except (ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(
            f"{path}: not what a run writes there: {what}; restore it, or delete the run directory"
        ) from error
