"""Copies finished runs from another ROOT, or from another cluster's copy, after checking them."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from suite.errors import UserError
from suite.run.atomic import DamagedFileError
from suite.run.attempt import Attempt
from suite.run.directory import RunDir, planned_cells


@dataclass(frozen=True)
class Adopted:
    """The outcome for one run: its cell's name (or folder), and why it was not adopted; empty if it was."""

    name: str
    refusal: str = ""


def adopt(grid_dir: Path, source: Path) -> list[Adopted]:
    """Copies the finished runs of `source`, a grid's folder in another ROOT, into this grid.

    A run is adopted if its cell is in the grid's plan, its id is the hash of its cell.yaml, its checkpoints match their
    checksums, and the cell has no attempt here. Its result is copied last: an interrupted copy does not count as done.

    Raises:
        UserError: `source` holds no runs.
    """
    found = sorted(path.parent for path in source.glob("*/cell.yaml"))
    if not found:
        raise UserError(f"{source}: no runs there; name a grid's folder, ROOT/{grid_dir.name}")
    plan = planned_cells(grid_dir)
    return [_adopt(grid_dir, RunDir(path), set(plan)) for path in found]


def _adopt(grid_dir: Path, run: RunDir, planned: set[str]) -> Adopted:
    try:
        cell = run.cell()
    except (ValidationError, UnicodeDecodeError, yaml.YAMLError):
        return Adopted(run.path.name, "its cell.yaml is damaged")
    mine = RunDir(grid_dir / cell.id)
    if refusal := _refusal(run, mine, cell.id, planned):
        return Adopted(cell.name, refusal)
    mine.attempts.mkdir(parents=True, exist_ok=True)
    try:
        Attempt(mine.attempts, 1).path.mkdir()  # claims the cell, just as a worker would
    except FileExistsError:
        return Adopted(cell.name, "it was already started here")
    shutil.copytree(run.attempts, mine.attempts, dirs_exist_ok=True)
    for path in sorted(run.path.iterdir()):
        if path.is_dir() and path != run.attempts:
            shutil.copytree(path, mine.path / path.name, dirs_exist_ok=True)
        elif path.is_file() and path != run.result_path:
            shutil.copy2(path, mine.path / path.name)
    temporary = mine.path / ".result.json.adopted"
    shutil.copy2(run.result_path, temporary)
    temporary.replace(mine.result_path)
    return Adopted(cell.name)


def _refusal(run: RunDir, mine: RunDir, cell_id: str, planned: set[str]) -> str:
    if run.path.name != cell_id:
        return f"its cell.yaml has the id {cell_id}"
    if cell_id not in planned:
        return "the grid has no such cell"
    if mine.newest() is not None:
        return "it was already started here"
    try:
        state = run.state().state
    except DamagedFileError as error:
        return str(error)
    if state != "done":
        return f"it is {state} there"
    from suite.run import checkpoint

    damaged = [path.name for path in sorted(run.checkpoints.glob("epoch-*.pt")) if not checkpoint.is_intact(path)]
    return f"checkpoint {damaged[0]} is damaged" if damaged else ""
