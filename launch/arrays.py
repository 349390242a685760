"""Which arrays to submit, as pure functions of the cells that are to start: one per shape of resources and parent."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from launch.plan import Standing
from launch.resources import Resources
from suite.recipe.cell import Cell

_T = TypeVar("_T")


@dataclass(frozen=True)
class Array:
    """One sbatch. All its cells start from the same full-precision cell, `parent`, if that is not done yet."""

    resources: Resources
    tasks: tuple[tuple[Cell, ...], ...]
    parent: str | None = None
    max_parallel: int | None = None
    after: tuple[int, ...] = ()
    """Places of the arrays, in the launch, that have to end first, however they end."""


def startable(rows: Iterable[Standing]) -> list[Cell]:
    """The cells to submit: neither settled nor in the queue, and their parent done, in the queue or in this list.

    Of a cell and its parent, the parent comes first in `rows`.
    """
    may_be_parents: set[str | None] = {None}
    found = []
    for row in rows:
        is_new = row.state.state in {"planned", "preempted"} and not row.has_job and row.cell.parent in may_be_parents
        if is_new:
            found.append(row.cell)
        if is_new or row.has_job or row.state.state == "done":
            may_be_parents.add(row.cell.id)
    return found


def arrays(
    cells: Iterable[Cell], unfinished: Iterable[str], resources: Callable[[Cell], Resources], max_array_size: int
) -> list[Array]:
    """The arrays that run `cells`, those that others start from first.

    Args:
        cells: to start.
        unfinished: ids of cells that are not done: who starts from one of them has to wait for it.
        resources: what each cell asks for.
        max_array_size: most tasks of an array.
    """
    waited_for = set(unfinished)
    groups: dict[tuple[str | None, Resources], list[Cell]] = {}
    for cell in cells:
        parent = cell.parent if cell.parent in waited_for else None
        groups.setdefault((parent, resources(cell)), []).append(cell)
    return [
        Array(shape, tasks, parent)
        for (parent, shape), members in sorted(groups.items(), key=lambda group: group[0][0] is not None)
        for tasks in _chunks(_chunks(members, shape.pack), max_array_size)
    ]


def limited(arrays: Sequence[Array], max_parallel: int) -> list[Array]:
    """The arrays with limits and an order such that never more than `max_parallel` tasks run at a time.

    SLURM limits one array only. So the arrays share out lanes, which share out the limit; in a lane they follow each
    other. Those that wait for a parent come after all that don't.
    """
    placed = list(arrays)
    first = [place for place, array in enumerate(arrays) if array.parent is None]
    second = [place for place, array in enumerate(arrays) if array.parent is not None]
    for places, before in ((first, []), (second, first)):
        lanes: list[list[int]] = [[] for _ in range(min(max_parallel, len(places)))]
        for place in places:
            min(lanes, key=lambda lane: sum(len(arrays[other].tasks) for other in lane)).append(place)
        for number, lane in enumerate(lanes):
            width = max_parallel // len(lanes) + (number < max_parallel % len(lanes))
            for turn, place in enumerate(lane):
                after = lane[turn - 1 : turn] if turn else before
                placed[place] = replace(arrays[place], max_parallel=width, after=tuple(after))
    return placed


def dependency(array: Array, job_ids: Sequence[str], parent_job: str) -> str | None:
    """SLURM's words for what has to end first: `afterok:413854_3,afterany:413855`.

    Where cells are packed, a job fails with any of them: then only its end is waited for, and the cell's own job looks
    at whether its parent is done.
    """
    words = [f"{'afterok' if array.resources.pack == 1 else 'afterany'}:{parent_job}"] if parent_job else []
    words += ["afterany:" + ":".join(job_ids[place] for place in array.after)] if array.after else []
    return ",".join(words) or None


def _chunks(items: Sequence[_T], size: int) -> list[tuple[_T, ...]]:
    return [tuple(items[start : start + size]) for start in range(0, len(items), size)]
