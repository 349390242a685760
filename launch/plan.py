"""Decides which cells to train next: pure functions of the grid's cells and their states."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from suite.recipe.cell import Cell
from suite.run.directory import Cause, Planned, State, StateName

SETTLED: frozenset[StateName] = frozenset(("done", "failed", "cancelled"))
WAITING: frozenset[StateName] = frozenset(("queued", "preempted"))
"""States of cells that were requested but that no worker is training."""

RETRIES: Mapping[Cause, int] = {"nan": 0, "error": 1, "oom": 1, "timeout": 2, "node": 5}
"""How many times in a row a run is restarted after each cause before it counts as failed for good.

A newer checkpoint resets the count. Preemptions are not failures. nan is not retried: the same numbers would recur.
"""


def after_failure(state: State, cause: Cause, reason: str, newest_checkpoint: str) -> dict[str, Any]:
    """Changes to the state of a run whose attempt failed: preempted (to be restarted), or failed for good.

    Args:
        state: the state before.
        cause: what ended the attempt.
        reason: one line for human readers.
        newest_checkpoint: name of the run's newest checkpoint, empty if it has none.
    """
    before = state.failures if state.failed_at == newest_checkpoint else {}
    failures = {**before, cause: before.get(cause, 0) + 1}
    is_final = failures[cause] > RETRIES[cause]
    changes = {"cause": cause, "reason": reason, "failures": failures, "failed_at": newest_checkpoint}
    return changes | {"state": "failed" if is_final else "preempted"}


@dataclass(frozen=True)
class Standing:
    """A planned cell and its true state, which takes into account whether its processes are alive."""

    planned: Planned
    state: State

    @property
    def cell(self) -> Cell:
        """The cell."""
        return self.planned.cell

    @property
    def is_settled(self) -> bool:
        """Whether only a user's retry can change it."""
        return self.state.state in SETTLED


def ready(rows: Sequence[Standing], failed_here: Collection[str] = ()) -> list[Standing]:
    """The cells that can be started now, in order: those given --first, then trials, then seed by seed, parents first.

    Seed by seed, so that a grid stopped at any time has complete pairs of methods.

    Args:
        rows: the whole grid.
        failed_here: ids of cells that failed on this machine; they come last.
    """
    done = {row.cell.id for row in rows if row.state.state == "done"}
    first = {row.cell.id for row in rows if row.planned.is_first}
    first |= needed(first, {row.cell.id: row.cell for row in rows})
    parents = {each for row in rows for each in row.cell.needs}
    found = [row for row in rows if row.state.state in WAITING and done.issuperset(row.cell.needs)]

    def rank(row: Standing) -> tuple[bool, bool, bool, int, bool]:
        cell = row.cell
        return cell.id in failed_here, cell.id not in first, not cell.trial, cell.seed, cell.id not in parents

    return sorted(found, key=rank)


def blocked(rows: Iterable[Standing]) -> dict[str, str]:
    """Cell id -> why it will not start: a cell it needs failed, was cancelled, was not requested, or is blocked."""
    rows = list(rows)
    lost = {row.cell.id: _end(row.state) for row in rows if row.state.state in {"failed", "cancelled", "planned"}}
    by_id = {row.cell.id: row for row in rows}
    found: dict[str, str] = {}
    while True:
        new = {
            row.cell.id: f"needs {by_id[each].cell.name}, which {lost.get(each, 'will not start')}"
            for row in rows
            if row.state.state in WAITING and row.cell.id not in found
            for each in row.cell.needs
            if each in lost or each in found
        }
        if not new:
            return found
        found |= new


def needed(ids: Iterable[str], cells: Mapping[str, Cell]) -> set[str]:
    """Ids of all cells that the given ones need, directly or indirectly. `cells`: by id."""
    found: set[str] = set()
    waiting = list(ids)
    while waiting:
        cell = cells.get(waiting.pop())
        new = set() if cell is None else set(cell.needs) - found
        found |= new
        waiting += new
    return found


def is_over(rows: Sequence[Standing]) -> bool:
    """Whether only a user can change anything: no cell runs, none can be started, and no choice can be made."""
    held_up = blocked(rows)
    is_idle = all(row.is_settled or row.cell.id in held_up or row.state.state == "planned" for row in rows)
    return is_idle and not choosable(rows)


def choosable(rows: Iterable[Standing]) -> set[str]:
    """Names of tuned settings with no own cells planned whose trials have all ended, one of them done on all seeds."""
    return {name for name, has_choice in _unfollowed(rows).items() if has_choice}


def chosen_already(rows: Iterable[Standing]) -> set[str]:
    """Names of tuned settings whose own cells are planned."""
    return {row.planned.tuned for row in rows if not row.cell.trial} - {""}


def hopeless(rows: Iterable[Standing]) -> set[str]:
    """Names of tuned settings whose trials have all ended, none of them done on all seeds: no cells follow."""
    return {name for name, has_choice in _unfollowed(rows).items() if not has_choice}


def _unfollowed(rows: Iterable[Standing]) -> dict[str, bool]:
    """Settings whose trials have all ended and whose cells are not planned: name -> whether a choice can be made."""
    rows = list(rows)
    planned = chosen_already(rows)
    trials: dict[str, list[Standing]] = {}
    for row in rows:
        if row.cell.trial and row.planned.tuned and row.planned.tuned not in planned and not row.planned.is_former:
            trials.setdefault(row.planned.tuned, []).append(row)
    return {name: _has_finished_one(own) for name, own in trials.items() if all(row.is_settled for row in own)}


def _has_finished_one(trials: Iterable[Standing]) -> bool:
    """Whether any trial is done on all its seeds."""
    done: dict[str, bool] = {}
    for row in trials:
        recipe = row.cell.recipe_id
        done[recipe] = done.get(recipe, True) and row.state.state == "done"
    return any(done.values())


def _end(state: State) -> str:
    return {"failed": f"failed: {state.cause}", "cancelled": "was cancelled"}.get(state.state, "was not requested")


def select(cells: Iterable[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells that match any pattern, and the cells these need; all cells without patterns.

    A pattern is a cell id, or a glob over whole parts of the display name: `resnet20`, `resnet20/bnn++`, `*/s0`.
    """
    cells = list(cells)
    asked = {cell.id for cell in cells if not patterns or any(matches(cell, pattern) for pattern in patterns)}
    wanted = asked | needed(asked, {cell.id: cell for cell in cells})
    return [cell for cell in cells if cell.id in wanted]


def matches(cell: Cell, pattern: str) -> bool:
    """Whether the pattern is the cell's id or a sequence of whole parts of its name."""
    return cell.id == pattern or fnmatchcase(f"/{cell.name}/", f"*/{pattern}/*")
