"""What to do next, as pure functions of the grid's cells and where their runs stand."""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from launch.slurm import JobInfo
from suite.recipe.cell import Cell
from suite.run.directory import Cause, State, StateName

SETTLED: frozenset[StateName] = frozenset(("done", "failed", "cancelled"))
FRESH_SECONDS = 300.0
"""How old the last sign of life of a run may be that is believed to live."""
BUSY: frozenset[StateName] = frozenset(("queued", "running"))
_WAITING = frozenset(
    ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
)

RETRIES: Mapping[Cause, int] = {"nan": 0, "error": 1, "oom": 1, "timeout": 2, "node": 5}
"""How often a run starts again, by what ended it, before it has failed for good. Progress, a newer checkpoint, starts
the count anew. Preemptions are no failures. nan: the same numbers would come again."""


def after_failure(state: State, cause: Cause, reason: str, newest_checkpoint: str) -> dict[str, Any]:
    """Changes to the state of a run that an attempt ended: preempted, to start again, or failed for good.

    Args:
        state: before.
        cause: what ended the attempt.
        reason: one line for people.
        newest_checkpoint: name of the run's newest checkpoint, empty where it has none.
    """
    before = state.failures if state.failed_at == newest_checkpoint else {}
    failures = {**before, cause: before.get(cause, 0) + 1}
    is_final = failures[cause] > RETRIES[cause]
    changes = {"cause": cause, "reason": reason, "failures": failures, "failed_at": newest_checkpoint}
    return changes | {"state": "failed" if is_final else "preempted"}


@dataclass(frozen=True)
class Standing:
    """A cell and where its run stands: `state` is what is true, not what a killed process last wrote.

    `has_job`: something lives that runs it or is going to, so it is not to be submitted.
    """

    cell: Cell
    state: State
    has_job: bool = False

    @property
    def is_settled(self) -> bool:
        """Whether it stays as it is until somebody asks for a retry."""
        return self.state.state in SETTLED


@dataclass(frozen=True)
class Signs:
    """What there is to see of the process or job that has a cell."""

    is_held: bool = False
    """A process holds the run's lock."""
    is_alive: bool = False
    """The process of its local job lives."""
    submitted_as: str = ""
    """Id of the SLURM job that the cell belongs to."""
    job: JobInfo | None = None
    """That job, as the queue or else the accounting has it; None where neither knows it."""
    heartbeat_age_seconds: float | None = None
    """Where SLURM has the cell and cannot be asked: how old its last sign of life is."""


def stand(cell: Cell, state: State, signs: Signs) -> Standing:
    """Where a cell stands: what was written of its run, as far as what lives, or no longer does, bears it out."""
    if state.state in SETTLED:
        return Standing(cell, state)
    if signs.is_held:
        return Standing(cell, replace(state, state="running"), has_job=True)
    if signs.is_alive and state.state in BUSY:
        return Standing(cell, state, has_job=True)
    if signs.heartbeat_age_seconds is not None:
        return _guess(cell, state, signs.heartbeat_age_seconds)
    if signs.job is not None and signs.job.is_live:
        return Standing(cell, _in_queue(state, signs.job), has_job=True)
    return Standing(cell, _left(state, signs))


def _in_queue(state: State, job: JobInfo) -> State:
    here = replace(state, job_id=job.job_id)
    if job.state in _WAITING:
        reason = f"waits in SLURM's queue: {job.reason}" if job.reason not in {"", "None"} else ""
        is_begun = state.attempt > 0 and state.state != "planned"
        return replace(here, state="preempted" if is_begun else "queued", reason=reason or state.reason)
    if job.state == "COMPLETING" and state.state == "preempted":
        return here
    return replace(here, state="running")


def _left(state: State, signs: Signs) -> State:
    """Of a run that nothing has any more."""
    reason = f"its job is gone (SLURM: {signs.job.state})" if signs.job is not None else "its job is gone"
    if state.state == "running" or (state.state == "queued" and state.attempt):
        return replace(state, state="preempted", reason=reason)
    if state.state == "queued" or (state.state == "planned" and signs.submitted_as):
        return replace(state, state="planned", job_id=state.job_id or signs.submitted_as, reason=reason)
    return state


def _guess(cell: Cell, state: State, age_seconds: float) -> Standing:
    """Goes by the heartbeat. What no job has touched yet counts as queued, lest it be run twice."""
    if state.state == "preempted":
        return Standing(cell, state)
    if state.state == "planned" or state.attempt == 0:
        return Standing(cell, replace(state, state="queued"), has_job=True)
    if age_seconds < FRESH_SECONDS:
        return Standing(cell, replace(state, state="running"), has_job=True)
    reason = f"no sign of life for {age_seconds / 60:.0f} min, and SLURM cannot be asked"
    return Standing(cell, replace(state, state="preempted", reason=reason))


def without_lost_children(rows: Iterable[Standing], submitted: Container[str]) -> list[Standing]:
    """Cancelled are the cells that were submitted, whose job is gone, and whose parent failed or was cancelled."""
    rows = list(rows)
    why = blocked(row for row in rows if not row.has_job)
    return [
        replace(row, state=replace(row.state, state="cancelled", cause=None, reason=why[row.cell.id]))
        if row.cell.id in why and row.cell.id in submitted
        else row
        for row in rows
    ]


def ready(standings: Iterable[Standing]) -> list[Cell]:
    """The cells to start now, in order: planned or preempted and without a job, their full-precision parent done."""
    by_id = {standing.cell.id: standing for standing in standings}
    return [
        standing.cell
        for standing in by_id.values()
        if standing.state.state in {"planned", "preempted"}
        and not standing.has_job
        and (standing.cell.parent is None or by_id[standing.cell.parent].state.state == "done")
    ]


def blocked(standings: Iterable[Standing]) -> dict[str, str]:
    """Cell id -> why it will not start: its parent failed or was cancelled."""
    rows = [(standing, standing.cell.id) for standing in standings]
    lost = {cell_id: row for row, cell_id in rows if row.state.state in {"failed", "cancelled"}}
    return {
        cell_id: f"starts from {lost[row.cell.parent].cell.name}, which {_end(lost[row.cell.parent].state)}"
        for row, cell_id in rows
        if row.cell.parent in lost and not row.is_settled
    }


def _end(state: State) -> str:
    return f"failed: {state.cause}" if state.state == "failed" else "was cancelled"


def select(cells: list[Cell], patterns: list[str]) -> list[Cell]:
    """The cells that match any pattern, and the parents they start from; all of them where there is no pattern.

    A pattern is a cell id, or a glob over the display name's parts: `resnet20`, `resnet20/bnn++`, `*/s0`.
    """
    wanted = [cell for cell in cells if not patterns or any(matches(cell, pattern) for pattern in patterns)]
    needed = {cell.id for cell in wanted} | {cell.parent for cell in wanted}
    return [cell for cell in cells if cell.id in needed]


def matches(cell: Cell, pattern: str) -> bool:
    """Whether the pattern is the cell's id or a run of whole parts of its name."""
    return cell.id == pattern or fnmatchcase(f"/{cell.name}/", f"*/{pattern}/*")
