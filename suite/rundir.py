"""The run directory ROOT/<grid>/<cell id>/: the only truth about a run; tables and MLflow are made from it.

cell.yaml  state.json  journal.jsonl  checkpoints/  result.json  provenance.json  processes/  logs/  lock
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from suite.config import RECORDED, Cell
from suite.files import write_bytes, write_json

StateName = Literal["planned", "queued", "running", "preempted", "done", "failed", "cancelled"]
Cause = Literal["error", "oom", "timeout", "nan", "node"]


@dataclass(frozen=True)
class State:
    """Where a run stands. Times are unix seconds; `reason` is one line for people."""

    state: StateName = "planned"
    attempt: int = 0
    cause: Cause | None = None
    reason: str = ""
    job_id: str = ""
    epoch: int = 0
    num_epochs: int = 0
    heartbeat: float = 0.0


class RunDir:
    """Paths and atomic reads and writes of one run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal, self.checkpoints, self.logs = path / "journal.jsonl", path / "checkpoints", path / "logs"
        self.result_path, self.provenance_path = path / "result.json", path / "provenance.json"
        self.cell_path, self._state_path = path / "cell.yaml", path / "state.json"
        self.processes = path / "processes"  # heartbeats and last words of this attempt's processes
        self.lock = path / "lock"  # held, as suite.locks has it, by the process that trains

    @classmethod
    def create(cls, path: Path, cell: Cell) -> "RunDir":
        """The directory with its cell.yaml; leaves an existing one as it is."""
        run = cls(path)
        if not run.cell_path.exists():
            text = f"# {cell.name}, id {cell.id}\n" + yaml.safe_dump(cell.model_dump(mode="json"), sort_keys=False)
            write_bytes(run.cell_path, text.encode())
        return run

    def cell(self) -> Cell:
        """The run's configuration."""
        return _read_cell(self.cell_path.resolve())

    def state(self) -> State:
        """Where the run stands, as last written: a killed run still says running; its lock tells. A result is done."""
        if not self._state_path.exists():
            return State()
        state = State(**json.loads(self._state_path.read_text(encoding="utf-8")))
        return replace(state, state="done", cause=None) if self.result_path.exists() else state

    def update(self, **changes: Any) -> State:  # noqa: ANN401  (State's fields)
        """Rewrites state.json with some fields changed and a fresh heartbeat."""
        state = replace(self.state(), heartbeat=time.time(), **changes)
        write_json(self._state_path, asdict(state))
        return state

    def result(self) -> dict[str, Any] | None:
        """The final numbers; None until the run is done."""
        if not self.result_path.exists():
            return None
        result: dict[str, Any] = json.loads(self.result_path.read_text(encoding="utf-8"))
        return result

    def provenance(self) -> dict[str, Any]:
        """Where the numbers came from; empty before the first attempt."""
        if not self.provenance_path.exists():
            return {}
        provenance: dict[str, Any] = json.loads(self.provenance_path.read_text(encoding="utf-8"))
        return provenance


@cache  # cell.yaml never changes, and a launcher asks for it twice a second
def _read_cell(path: Path) -> Cell:
    return Cell.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")), context=RECORDED)


def run_dirs(grid_dir: Path) -> list[RunDir]:
    """Every run directory of a grid, by cell id: those of the last launch and those of earlier recipes."""
    return [RunDir(path.parent) for path in sorted(grid_dir.glob("*/cell.yaml"))]


def write_plan(grid_dir: Path, cells: list[Cell]) -> None:
    """Notes which cells the grid consists of as last launched, in order."""
    write_json(grid_dir / "plan.json", [cell.id for cell in cells])


def read_plan(grid_dir: Path) -> list[str]:
    """Ids of the cells of the last launch, in order; empty before the first."""
    path = grid_dir / "plan.json"
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []
