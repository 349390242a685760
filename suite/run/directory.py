"""The run directory ROOT/<grid>/<cell id>/: the source of truth about a run; tables and MLflow are made from it.

    cell.yaml        the cell; its id is the hash of exactly this content
    attempts/0001/   each attempt: its creator, how it ran and ended, its log (see suite.run.attempt)
    journal.jsonl    metrics
    checkpoints/     the newest two
    predictions.npz  whether each test image is classified correctly, `hard` and `soft`: bool [N]
    result.json      the final numbers; its presence means done
    cancelled        its presence, without result.json, means cancelled; contains the reason
    again.json       a user requested a retry: failures up to this attempt no longer count

A run's state is derived from these files and stored nowhere else.
"""

import json
import secrets
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from suite.recipe.cell import Cell
from suite.recipe.settings import AS_IS, RECORDED, Execution
from suite.run import attempt as attempts
from suite.run.atomic import as_json, read_json, write_bytes, write_json, write_once
from suite.run.attempt import Attempt

StateName = Literal["planned", "queued", "running", "preempted", "done", "failed", "cancelled"]
Cause = Literal["error", "oom", "timeout", "nan", "node"]


@dataclass(frozen=True)
class State:
    """A run's state. Times are unix seconds; `reason` is one line for human readers.

    `failures` counts, by cause, the failed attempts since the run last made progress; `failed_at` is the newest
    checkpoint at that time.
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
        self._cancelled, self._again = path / "cancelled", path / "again.json"

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
        """The newest attempt; None before the first."""
        return attempts.newest(self.attempts)

    def first(self) -> Attempt | None:
        """The first attempt; None if there is none yet."""
        return next(iter(self.all_attempts()), None)

    def all_attempts(self) -> list[Attempt]:
        """All attempts, in order."""
        count = attempts.newest_number(self.attempts)
        return [Attempt(self.attempts, number) for number in range(1, count + 1)]

    def appearance(self) -> str:
        """Fingerprint of the files, without opening them: changes with the run's state and numbers."""
        attempt = self.newest()
        ends = [] if attempt is None else [attempt.path / "end.json", attempt.provenance_path]
        files = (self.journal, self.result_path, self._cancelled, self._again, *ends)
        return f"{0 if attempt is None else attempt.number} {' '.join(map(_look, files))}"

    def claim(self, job_id: str = "", **facts: Any) -> Attempt:  # noqa: ANN401  (anything YAML holds)
        """Claims the run for this process: see suite.run.attempt.claim."""
        return attempts.claim(self.attempts, job_id, **facts)

    def is_live(self) -> bool:
        """Whether the newest attempt is still running."""
        attempt = self.newest()
        return attempt is not None and attempt.is_live()

    def state(self, *, as_told: bool = False) -> State:
        """The run's state according to its files. A killed run is still "running": check with `is_live`.

        A run with a directory is queued until its first attempt. A failed attempt counts as running until the worker
        that supervises it has decided whether to retry; with `as_told`, it counts as failed at once.
        """
        attempt = self.newest()
        number = 0 if attempt is None else attempt.number
        again = read_json(self._again)
        beat = None if attempt is None else attempt.beat()
        last = _begun(attempt) if beat is None else beat.time
        ends = {} if attempt is None else self._end(attempt, forgiven=again.get("after", 0))
        facts = {
            "attempt": number,
            "job_id": "" if attempt is None else attempt.job_id,
            "epoch": 0 if beat is None else beat.epoch,
            "num_epochs": 0 if beat is None else beat.num_epochs,
            "heartbeat": max(last, *(each.get("time", 0.0) for each in (ends, again))),
            "failures": ends.get("failures", {}),
            "failed_at": ends.get("failed_at", ""),
        }
        if self.result_path.exists():
            return State("done", **facts)
        if self._cancelled.exists():
            return State("cancelled", reason=self._cancelled.read_text(encoding="utf-8"), **facts)
        if attempt is None or again.get("after") == number:
            return State("queued" if self.cell_path.exists() else "planned", **facts)
        if "state" not in ends or not (as_told or attempt.is_judged()):
            return State("running", **facts)
        return State(ends["state"], cause=ends.get("cause"), reason=ends.get("reason", ""), **facts)

    def _end(self, attempt: Attempt, forgiven: int) -> dict[str, Any]:
        """How the attempt ended, with the failures counted so far; an orderly end does not change that count."""
        end = dict(attempt.end() or {})
        for number in range(attempt.number, forgiven, -1):
            earlier = end if number == attempt.number else Attempt(self.attempts, number).end() or {}
            if "failures" in earlier:
                return {**end, "failures": earlier["failures"], "failed_at": earlier["failed_at"]}
        return {key: value for key, value in end.items() if key not in {"failures", "failed_at"}}

    def cancel(self, reason: str) -> None:
        """Marks the run cancelled, even if its process still writes; the caller must stop the process."""
        write_bytes(self._cancelled, reason.encode())

    def is_cancelled(self) -> bool:
        """Whether a user has cancelled the run, even if its process still runs."""
        return self._cancelled.exists()

    def plan_again(self) -> None:
        """Lets a failed or cancelled run start again, with its failure count reset and its checkpoints kept."""
        write_json(self._again, {"after": attempts.newest_number(self.attempts), "time": time.time()})
        self._cancelled.unlink(missing_ok=True)

    def result(self) -> dict[str, Any] | None:
        """The final numbers; None until the run is done."""
        return read_json(self.result_path) or None

    def device_hours(self, attempts: Iterable[Attempt] | None = None) -> float | None:
        """Device-hours of the attempts (default: all): processes times hours from claim to end or last heartbeat."""
        attempts = self.all_attempts() if attempts is None else attempts
        hours = [attempt.device_hours() for attempt in attempts]
        known = [value for value in hours if value is not None]
        return sum(known) if known else None

    def provenance(self) -> dict[str, Any]:
        """Provenance of the numbers, from the newest attempt that trained; empty before the first."""
        return next(filter(None, (attempt.provenance() for attempt in reversed(self.all_attempts()))), {})


def declared_at(grid_dirs: Iterable[Path]) -> list[dict[str, Any]]:
    """The declarations of a grid's launches to analysis, oldest first: see suite.recipe.grid.Grid.declared.

    Takes several folders, because a grid may be launched in several ROOTs.
    """
    launches: list[dict[str, Any]] = []
    for path in (grid_dir / "launches.jsonl" for grid_dir in grid_dirs):
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with suppress(ValueError):  # torn by a killed launcher
                launches.append(json.loads(line))
    launches.sort(key=lambda launch: launch.get("time", 0.0))
    return [launch["declared"] for launch in launches if launch.get("declared")]


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


@cache  # cell.yaml never changes, and a launcher reads it twice a second
def _read_cell(path: Path) -> Cell:
    raw = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    return Cell.model_validate(raw, context=RECORDED)


def run_dirs(grid_dir: Path) -> list[RunDir]:
    """All run directories of a grid, sorted by cell id, including cells that are no longer in the grid."""
    return [RunDir(path.parent) for path in sorted(grid_dir.glob("*/cell.yaml"))]


@dataclass(frozen=True)
class Planned:
    """A cell of a launched grid and how it runs.

    `shape` names the resources it needs: only workers of that shape train it. `is_first`: train it before the others.
    `is_former`: it belongs to an earlier version of the grid and must still be finished. `tuned`: the setting that it
    is a trial of, or whose choice it uses. `is_later`: it was planned after the launch, when a choice was made.
    """

    cell: Cell
    execution: Execution = AS_IS
    shape: str = ""
    is_first: bool = False
    is_former: bool = False
    tuned: str = ""
    is_later: bool = False


def write_plan(grid_dir: Path, planned: Iterable[Planned]) -> None:
    """Records the cells of a launched grid, in order, replacing an earlier plan."""
    plan = {
        each.cell.id: {
            "cell": each.cell.model_dump(mode="json"),
            "recipe_id": each.cell.recipe_id,
            "execution": each.execution.model_dump(mode="json"),
            "shape": each.shape,
            "is_first": each.is_first,
            "is_former": each.is_former,
            "tuned": each.tuned,
            "is_later": each.is_later,
        }
        for each in planned
    }
    write_json(grid_dir / "plan.json", plan)  # with whole cells, so that readers open one file instead of thousands


def read_plan(grid_dir: Path) -> dict[str, Planned]:
    """The cells of the last launch by id, in order, including former ones that must still be finished."""
    return {
        cell_id: Planned(
            Cell.model_validate(each["cell"], context=RECORDED),
            Execution.model_validate(each["execution"]),
            each["shape"],
            *(each[name] for name in ("is_first", "is_former", "tuned", "is_later")),
        )
        for cell_id, each in read_json(grid_dir / "plan.json").items()
    }


def planned_rows(grid_dir: Path) -> dict[str, dict[str, Any]]:
    """`planned_cells` without trials, as plain values, with their recipe_id.

    Not validated, because 10,000 cells would take seconds.
    """
    return {
        cell_id: {**each["cell"], "recipe_id": each["recipe_id"]}
        for cell_id, each in _current(grid_dir).items()
        if not each["cell"].get("trial")
    }


def planned_cells(grid_dir: Path) -> dict[str, Cell]:
    """The cells of the last launch by id, in order, without former ones; empty before the first."""
    return {
        cell_id: Cell.model_validate(each["cell"], context=RECORDED) for cell_id, each in _current(grid_dir).items()
    }


def planned_ids(grid_dir: Path) -> list[str]:
    """The keys of `planned_cells`."""
    return list(_current(grid_dir))


def _current(grid_dir: Path) -> dict[str, Any]:
    return {cell_id: each for cell_id, each in read_json(grid_dir / "plan.json").items() if not each["is_former"]}
