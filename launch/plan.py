"""What to do next, as pure functions of the grid's cells and where their runs stand."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from suite.config import Cell
from suite.rundir import State

MAX_ATTEMPTS = 3
"""How often a run that dies without a word is started."""


@dataclass(frozen=True)
class Standing:
    """A cell and where its run stands: `state` is what is true, not what a killed process last wrote."""

    cell: Cell
    state: State

    @property
    def is_settled(self) -> bool:
        """Whether it stays as it is until somebody asks for a retry."""
        return self.state.state in {"done", "failed", "cancelled"}


def truth(state: State, *, is_held: bool, job_is_alive: bool) -> State:
    """The state of a run that is not done: only what a living process holds is running or queued."""
    if state.state == "done":
        return state
    if is_held:
        return replace(state, state="running")
    if state.state == "running" and not job_is_alive:
        reason = "its process was killed"
        if state.attempt >= MAX_ATTEMPTS:
            return replace(state, state="failed", cause="error", reason=f"{reason}, {state.attempt} times")
        return replace(state, state="preempted", reason=reason)
    if state.state == "queued" and not job_is_alive:
        return replace(state, state="planned")
    return state


def ready(standings: Iterable[Standing]) -> list[Cell]:
    """The cells to start now, in order: planned or preempted, their full-precision parent done."""
    by_id = {standing.cell.id: standing for standing in standings}
    return [
        standing.cell
        for standing in by_id.values()
        if standing.state.state in {"planned", "preempted"} and _parent_state(standing.cell, by_id) in {None, "done"}
    ]


def blocked(standings: Iterable[Standing]) -> dict[str, str]:
    """Cell id -> why it will not start: its parent failed or was cancelled."""
    by_id = {standing.cell.id: standing for standing in standings}
    return {
        standing.cell.id: f"starts from {by_id[standing.cell.parent].cell.name}, which is {state}"
        for standing in by_id.values()
        if standing.cell.parent is not None
        and not standing.is_settled
        and (state := _parent_state(standing.cell, by_id)) in {"failed", "cancelled"}
    }


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


def _parent_state(cell: Cell, by_id: Mapping[str, Standing]) -> str | None:
    return None if cell.parent is None else by_id[cell.parent].state.state
