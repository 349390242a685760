"""The run directory ROOT/<grid>/<cell id>/: the only truth about a run; tables and MLflow are made from it.

cell.yaml  state.json  journal.jsonl  checkpoints/  result.json  provenance.json  processes/  logs/  lock  cancelled
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from suite.recipe.cell import RECORDED, Cell
from suite.run.atomic import write_bytes, write_json

StateName = Literal["planned", "queued", "running", "preempted", "done", "failed", "cancelled"]
Cause = Literal["error", "oom", "timeout", "nan", "node"]


@dataclass(frozen=True)
class State:
    """Where a run stands. Times are unix seconds; `reason` is one line for people.

    `failures` counts by cause what ended attempts since the run last got on; `failed_at` is its newest checkpoint then.
    """

    state: StateName = "planned"
    attempt: int = 0
    cause: Cause | None = None
    reason: str = ""
    job_id: str = ""
    epoch: int = 0
    num_epochs: int = 0
    heartbeat: float = 0.0
    failures: Mapping[Cause, int] = field(default_factory=dict)
    failed_at: str = ""


class RunDir:
    """Paths and atomic reads and writes of one run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal, self.checkpoints, self.logs = path / "journal.jsonl", path / "checkpoints", path / "logs"
        self.result_path, self.provenance_path = path / "result.json", path / "provenance.json"
        self.cell_path, self._state_path = path / "cell.yaml", path / "state.json"
        self.processes = path / "processes"  # heartbeats and last words of this attempt's processes
        self.lock = path / "lock"  # held, as suite.run.locks has it, by the process that trains
        self._cancelled = path / "cancelled"  # its presence, without a result's, means cancelled; holds the reason

    @classmethod
    def create(cls, path: Path, cell: Cell) -> "RunDir":
        """The directory with its cell.yaml; leaves an existing one as it is."""
        run = cls(path)
        if not run.cell_path.exists():
            text = yaml.dump(cell.model_dump(mode="json"), Dumper=yaml.CSafeDumper, sort_keys=False)
            write_bytes(run.cell_path, f"# {cell.name}, id {cell.id}\n{text}".encode())
        return run

    def cell(self) -> Cell:
        """The run's configuration."""
        return _read_cell(self.cell_path.resolve())

    def state(self) -> State:
        """Where the run stands, as last written: a killed run still says running; its lock tells. A result is done."""
        state = self._written()
        if self.result_path.exists():
            return replace(state, state="done", cause=None)
        if self._cancelled.exists():
            return replace(state, state="cancelled", cause=None, reason=self._cancelled.read_text(encoding="utf-8"))
        return state

    def _written(self) -> State:
        if not self._state_path.exists():
            return State()
        return State(**json.loads(self._state_path.read_text(encoding="utf-8")))

    def cancel(self, reason: str) -> None:
        """The run is cancelled from here on, whatever its process still writes; who runs it is to look and stop it."""
        write_bytes(self._cancelled, reason.encode())

    def plan_again(self) -> None:
        """A failed or cancelled run may start again, as if for the first time; its checkpoints stay."""
        self._cancelled.unlink(missing_ok=True)
        self.update(state="planned", cause=None, reason="", failures={}, failed_at="")

    def update(self, **changes: Any) -> State:  # noqa: ANN401  (State's fields)
        """Rewrites state.json with some fields changed and a fresh heartbeat."""
        state = replace(self._written(), heartbeat=time.time(), **changes)
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
    raw = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    return Cell.model_validate(raw, context=RECORDED)


def run_dirs(grid_dir: Path) -> list[RunDir]:
    """Every run directory of a grid, by cell id: those of the last launch and those of earlier recipes."""
    return [RunDir(path.parent) for path in sorted(grid_dir.glob("*/cell.yaml"))]


def write_plan(grid_dir: Path, cells: list[Cell]) -> None:
    """Notes which cells the grid consists of as last launched, in order: whole, so that one file tells of thousands."""
    write_json(grid_dir / "plan.json", {cell.id: cell.model_dump(mode="json") for cell in cells})


def read_plan(grid_dir: Path) -> list[str]:
    """Ids of the cells of the last launch, in order; empty before the first."""
    path = grid_dir / "plan.json"
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []


def planned_cells(grid_dir: Path) -> dict[str, Cell]:
    """The cells of the last launch by id, in order."""
    path = grid_dir / "plan.json"
    raw = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if isinstance(raw, list):  # as launched before 2026-11-23
        return {cell_id: RunDir(grid_dir / cell_id).cell() for cell_id in raw}
    return {cell_id: Cell.model_validate(value, context=RECORDED) for cell_id, value in raw.items()}
