"""What was handed to SLURM: GRID/submissions/TOKEN.json, one per array, so that each cell is run by one job.

A launcher may be killed at any moment. So a record is written first; then sbatch takes the array, held; then the
record gets the job's id, and counts from here on; then the array is released. What a killed launcher left is plain to
the next: a held array whose record (its token is in the job's name) has no id is cancelled, one with an id is released.
"""

import json
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from suite.run.atomic import write_json


@dataclass(frozen=True)
class Submission:
    """One sbatch. `tasks`: ids of the cells of each array index, several where packed; `made`: unix seconds."""

    token: str
    tasks: tuple[tuple[str, ...], ...]
    code: str = ""
    job_id: str | None = None
    is_released: bool = False
    made: float = field(default_factory=time.time)

    def task_job_id(self, index: int) -> str:
        """SLURM's name of one task, `413854_3`; empty while the job's id is not known."""
        if self.job_id is None:
            return ""
        return self.job_id if len(self.tasks) == 1 else f"{self.job_id}_{index}"

    def write(self, grid_dir: Path) -> "Submission":
        """Puts the record down, durably; returns it."""
        write_json(_folder(grid_dir) / f"{self.token}.json", asdict(self))
        return self


def new_token(number: int) -> str:
    """Name of a record, later ones sorting behind: time, its number within the launch, and a random part."""
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{number:04d}-{secrets.token_hex(3)}"


def job_name(grid_dir: Path, token: str) -> str:
    """What SLURM calls the record's job."""
    return f"{grid_dir.name}-{token}"


def read(grid_dir: Path) -> list[Submission]:
    """The grid's records, oldest first, also those that never got an id."""
    raw = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(_folder(grid_dir).glob("*.json"))]
    return [Submission(**{**each, "tasks": tuple(map(tuple, each["tasks"]))}) for each in raw]


def owners(submissions: Iterable[Submission]) -> dict[str, tuple[Submission, int]]:
    """Cell id -> the newest record with a job's id that lists it, and the task there."""
    return {
        cell_id: (submission, index)
        for submission in submissions
        if submission.job_id is not None
        for index, cells in enumerate(submission.tasks)
        for cell_id in cells
    }


def _folder(grid_dir: Path) -> Path:
    return grid_dir / "submissions"
