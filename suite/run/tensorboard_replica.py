"""Replicates the run directories to TensorBoard: one folder of events for each run."""

import json
import shutil
from pathlib import Path

from suite.errors import UserError
from suite.run import journal
from suite.run.atomic import write_json
from suite.run.directory import RunDir, run_dirs

MARK = "proxbench.json"
"""File in a run's folder that identifies the journal of its events, and how much of it they cover."""


def sync(grid_dir: Path, folder: Path) -> int:
    """Writes events to folder/GRID/RUN for runs whose journals have grown; returns the number of such runs.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard: not installed: pip install 'proxbench[tensorboard]'") from error
    num_changed = 0
    for run in run_dirs(grid_dir):
        cell, mark = run.cell(), _mark(run)
        # The id is needed because a run of an earlier recipe has the same name.
        place = folder / grid_dir.name / f"{cell.name.replace('/', '_')}-{cell.id[:6]}"
        if not mark["bytes"] or _read(place / MARK) == mark:
            continue
        shutil.rmtree(place, ignore_errors=True)  # start over: TensorBoard would show two events of one step
        with SummaryWriter(str(place)) as writer:
            for record in journal.newest(run.journal):
                for name, value in record.metrics.items():
                    writer.add_scalar(name, value, record.epoch, walltime=record.time)
        write_json(place / MARK, mark)
        num_changed += 1
    return num_changed


def _mark(run: RunDir) -> dict[str, object]:
    size = run.journal.stat().st_size if run.journal.exists() else 0
    return {"token": journal.token(run.journal), "bytes": size}


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
