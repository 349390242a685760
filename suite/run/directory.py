"""The run directory ROOT/<grid>/<cell id>/: the source of truth about a run; tables and MLflow are made from it.

    cell.yaml        exactly what the id is the hash of
    attempts/0001/   each attempt: who made it, how it ran and ended, its log (see suite.run.attempt)
    journal.jsonl    metrics
    checkpoints/     the newest two
    predictions.npz  right or wrong for each test image, `hard` and `soft`: bool [N]
    result.json      the final numbers; its presence means done
    cancelled        its presence, without a result's, means cancelled; holds the reason
    handover.json    the job that the run was handed to, and after which attempt
    again.json       a user asked for a retry: failures up to this attempt no longer count

A run's state is derived from these files; it is stored nowhere else.
"""

import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from suite.recipe.cell import AS_IS, RECORDED, Cell, Execution
from suite.run import attempt as attempts
from suite.run.atomic import as_json, read_json, write_bytes, write_json, write_once
from suite.run.attempt import Attempt

StateName = Literal["planned", "queued", "running", "preempted", "done", "failed", "cancelled"]
Cause = Literal["error", "oom", "timeout", "nan", "node"]


@dataclass(frozen=True)
class State:
    """A run's state. Times are unix seconds; `reason` is one line for human readers.

    `failures` counts, by cause, failed attempts since the run last made progress; `failed_at` is its newest checkpoint
    at that time.
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
        self.journal, self.checkpoints = path / "journal.jsonl", path / "checkpoints"
        self.cell_path, self.result_path = path / "cell.yaml", path / "result.json"
        self.attempts, self.predictions_path = path / "attempts", path / "predictions.npz"
        self._cancelled, self._handover, self._again = (
            path / "cancelled",
            path / "handover.json",
            path / "again.json",
        )

    @classmethod
    def create(cls, path: Path, cell: Cell) -> "RunDir":
        """Creates the directory with its cell.yaml, unless it exists."""
        run = cls(path)
        if not run.cell_path.exists():
            text = yaml.dump(cell.model_dump(mode="json"), Dumper=yaml.CSafeDumper, sort_keys=False)
            write_bytes(run.cell_path, f"# {cell.name}, id {cell.id}\n{text}".encode())
        return run

    def cell(self) -> Cell:
        """The run's configuration."""
        return _read_cell(self.cell_path.resolve())

    def newest(self) -> Attempt | None:
        """Its newest attempt; None before the first."""
        return attempts.newest(self.attempts)

    def first(self) -> Attempt | None:
        """Its first attempt; None before that."""
        return next(iter(self.all_attempts()), None)

    def all_attempts(self) -> list[Attempt]:
        """In order."""
        count = attempts.newest_number(self.attempts)
        return [Attempt(self.attempts, number) for number in range(1, count + 1)]

    def appearance(self) -> str:
        """Fingerprint of the files, without opening them; it changes when the run's state or numbers do."""
        attempt = self.newest()
        ends = [] if attempt is None else [attempt.path / "end.json", attempt.provenance_path]
        files = (self.journal, self.result_path, self._cancelled, self._handover, self._again, *ends)
        return f"{0 if attempt is None else attempt.number} {' '.join(map(_look, files))}"

    def claim(self, job_id: str = "", **facts: Any) -> Attempt:  # noqa: ANN401  (anything YAML holds)
        """The next attempt, for this process: see suite.run.attempt.claim."""
        return attempts.claim(self.attempts, job_id, **facts)

    def is_live(self) -> bool:
        """Whether an attempt at it is under way."""
        attempt = self.newest()
        return attempt is not None and attempt.is_live()

    def state(self, *, as_told: bool = False) -> State:
        """The run's state according to its files: a killed run still says running; `is_live` checks.

        A failed attempt counts as running until the job that supervises it has decided whether to retry. With
        `as_told`, it counts as failed.
        """
        attempt = self.newest()
        number = 0 if attempt is None else attempt.number
        handover, again = read_json(self._handover), read_json(self._again)
        beat = None if attempt is None else attempt.beat()
        last = _begun(attempt) if beat is None else beat.time
        ends = {} if attempt is None else self._end(attempt, forgiven=again.get("after", 0))
        facts = {
            "attempt": number,
            "job_id": handover.get("job_id", "") or ("" if attempt is None else attempt.job_id),
            "epoch": 0 if beat is None else beat.epoch,
            "num_epochs": 0 if beat is None else beat.num_epochs,
            "heartbeat": max(last, *(each.get("time", 0.0) for each in (ends, handover, again))),
            "failures": ends.get("failures", {}),
            "failed_at": ends.get("failed_at", ""),
        }
        if self.result_path.exists():
            return State("done", **facts)
        if self._cancelled.exists():
            return State("cancelled", reason=self._cancelled.read_text(encoding="utf-8"), **facts)
        if handover.get("after") == number:
            return State(handover["state"], reason=handover["reason"], **facts)
        if attempt is None or again.get("after") == number:
            return State(**facts)
        if "state" not in ends or not (as_told or attempt.is_judged()):
            return State("running", **facts)
        return State(ends["state"], cause=ends.get("cause"), reason=ends.get("reason", ""), **facts)

    def _end(self, attempt: Attempt, forgiven: int) -> dict[str, Any]:
        """How the attempt ended, with the failures counted so far, which an orderly end leaves unchanged."""
        end = dict(attempt.end() or {})
        for number in range(attempt.number, forgiven, -1):
            earlier = end if number == attempt.number else Attempt(self.attempts, number).end() or {}
            if "failures" in earlier:
                return {**end, "failures": earlier["failures"], "failed_at": earlier["failed_at"]}
        return {key: value for key, value in end.items() if key not in {"failures", "failed_at"}}

    def hand_over(self, job_id: str, state: Literal["queued", "planned"] = "queued", reason: str = "") -> None:
        """Records that a job is going to run it, or why none is; valid until the next attempt begins."""
        write_json(
            self._handover,
            {
                "state": state,
                "job_id": job_id,
                "reason": reason,
                "after": attempts.newest_number(self.attempts),
                "time": time.time(),
            },
        )

    def take_back(self) -> None:
        """Withdraws the handover: no job is going to run it."""
        self._handover.unlink(missing_ok=True)

    def cancel(self, reason: str) -> None:
        """Marks the run cancelled, whatever its process still writes; stopping the process is the caller's job."""
        write_bytes(self._cancelled, reason.encode())

    def plan_again(self) -> None:
        """Lets a failed or cancelled run start again, as if for the first time; its checkpoints are kept."""
        write_json(self._again, {"after": attempts.newest_number(self.attempts), "time": time.time()})
        self.take_back()
        self._cancelled.unlink(missing_ok=True)

    def result(self) -> dict[str, Any] | None:
        """The final numbers; None until the run is done."""
        return read_json(self.result_path) or None

    def provenance(self) -> dict[str, Any]:
        """Provenance of the numbers, from the newest attempt that trained; empty before the first."""
        return next(filter(None, (attempt.provenance() for attempt in reversed(self.all_attempts()))), {})


def root_id(root: Path) -> str:
    """Unique random name of a ROOT, created on first use."""
    path = root / "root.json"
    if not path.exists():
        write_once(path, as_json({"id": secrets.token_hex(8)}))
    return str(read_json(path)["id"])


def _begun(attempt: Attempt | None) -> float:
    return 0.0 if attempt is None else attempt.path.stat().st_mtime


def _look(path: Path) -> str:
    try:
        status = path.stat()
    except FileNotFoundError:
        return "-"
    return f"{status.st_size}@{status.st_mtime_ns}"


@cache  # cell.yaml never changes, and a launcher asks for it twice a second
def _read_cell(path: Path) -> Cell:
    raw = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    return Cell.model_validate(raw, context=RECORDED)


def run_dirs(grid_dir: Path) -> list[RunDir]:
    """All run directories of a grid, sorted by cell id, including cells that are no longer in the grid."""
    return [RunDir(path.parent) for path in sorted(grid_dir.glob("*/cell.yaml"))]


def write_plan(grid_dir: Path, cells: Iterable[Cell], executions: Mapping[str, Execution] | None = None) -> None:
    """Records the cells of the grid as last launched, in order, and each one's execution, by id."""
    usual, given = AS_IS, executions or {}
    plan = {
        cell.id: {
            "cell": cell.model_dump(mode="json"),
            "execution": given.get(cell.id, usual).model_dump(mode="json"),
        }
        for cell in cells
    }
    write_json(grid_dir / "plan.json", plan)  # complete, so that readers open one file, not thousands


def read_plan(grid_dir: Path) -> list[str]:
    """Ids of the cells of the last launch, in order; empty before the first."""
    return list(read_json(grid_dir / "plan.json"))


def planned_cells(grid_dir: Path) -> dict[str, Cell]:
    """The cells of the last launch by id, in order."""
    plan = read_json(grid_dir / "plan.json")
    return {cell_id: Cell.model_validate(each["cell"], context=RECORDED) for cell_id, each in plan.items()}


def planned_executions(grid_dir: Path) -> dict[str, Execution]:
    """The execution of each cell of the last launch, by id."""
    plan = read_json(grid_dir / "plan.json")
    return {cell_id: Execution.model_validate(each["execution"]) for cell_id, each in plan.items()}
