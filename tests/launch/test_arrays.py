"""Which arrays a launch submits."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_cells import tiny_cell

from launch.arrays import Array, arrays, dependency, limited, startable
from launch.plan import Standing
from launch.resources import Resources
from suite.recipe.cell import Cell
from suite.run.directory import State

PLAIN, BIG = Resources(partition="gpu"), Resources(partition="gpu", gpus_per_node=8)


def _cells(num_seeds: int) -> list[Cell]:
    return [tiny_cell(seed=seed, quantizer="fp", quantization={}) for seed in range(num_seeds)]


def _child(parent: Cell, quantizer: str = "bc") -> Cell:
    return parent.model_copy(update={"quantizer": quantizer, "init": "finetune", "parent": parent.id})


def _ids(array: Array) -> list[str]:
    return [cell.id for task in array.tasks for cell in task]


def test_cells_of_one_shape_are_one_array_in_order() -> None:
    cells = _cells(5)
    (array,) = arrays(cells, [], lambda _: PLAIN, 1001)
    assert [task[0] for task in array.tasks] == cells
    assert (array.parent, array.after, array.max_parallel) == (None, (), None)


def test_each_shape_of_resources_is_an_array() -> None:
    cells = _cells(4)
    made = arrays(cells, [], lambda cell: BIG if cell.seed == 2 else PLAIN, 1001)
    assert {array.resources: len(array.tasks) for array in made} == {PLAIN: 3, BIG: 1}


def test_arrays_are_split_below_the_clusters_limit_and_hold_each_cell_once() -> None:
    cells = _cells(25)
    made = arrays(cells, [], lambda _: PLAIN, 10)
    assert [len(array.tasks) for array in made] == [10, 10, 5]
    assert [cell_id for array in made for cell_id in _ids(array)] == [cell.id for cell in cells]


def test_packed_cells_share_a_task() -> None:
    cells = _cells(5)
    (array,) = arrays(cells, [], lambda _: Resources(partition="gpu", pack=2), 1001)
    assert [len(task) for task in array.tasks] == [2, 2, 1]


def test_cells_that_wait_for_a_parent_come_after_it_one_array_per_parent() -> None:
    parents = _cells(2)
    children = [_child(parent, quantizer) for parent in parents for quantizer in ("bc", "bnn")]
    cells = [*children, *parents]
    made = arrays(cells, [cell.id for cell in cells], lambda _: PLAIN, 1001)
    assert [array.parent for array in made] == [None, parents[0].id, parents[1].id]
    assert [len(array.tasks) for array in made] == [2, 2, 2]


def test_a_child_whose_parent_is_done_waits_for_nothing() -> None:
    (parent,) = _cells(1)
    (array,) = arrays([_child(parent)], [], lambda _: PLAIN, 1001)
    assert array.parent is None


@pytest.mark.parametrize("state", ["done", "failed", "cancelled", "running", "queued"])
def test_only_planned_and_preempted_cells_are_submitted(state: str) -> None:
    cells = _cells(3)
    states = ["planned", state, "preempted"]
    rows = [Standing(cell, State(state=each)) for cell, each in zip(cells, states, strict=True)]  # type: ignore[arg-type]
    assert startable(rows) == [cells[0], cells[2]]


def test_a_cell_in_the_queue_is_not_submitted_whatever_its_file_says() -> None:
    cells = _cells(2)
    rows = [Standing(cell, State(state="preempted"), has_job=cell.seed == 0) for cell in cells]
    assert startable(rows) == [cells[1]]


def test_a_child_is_submitted_with_its_parent_and_never_without() -> None:
    (parent,) = _cells(1)
    child = _child(parent)

    def submitted(parent_row: Standing) -> list[str]:
        return [cell.quantizer for cell in startable([parent_row, Standing(child, State())])]

    assert submitted(Standing(parent, State())) == ["fp", "bc"]
    assert submitted(Standing(parent, State(state="running"), has_job=True)) == ["bc"]
    assert submitted(Standing(parent, State(state="done"))) == ["bc"]
    assert submitted(Standing(parent, State(state="failed"))) == []


@st.composite
def _launches(draw: st.DrawFn) -> list[Array]:
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    children = draw(st.lists(st.integers(1, 9), max_size=6))
    (cell,) = _cells(1)
    first = [Array(PLAIN, ((cell,),) * size) for size in sizes]
    return first + [Array(PLAIN, ((cell,),) * size, parent=cell.id) for size in children]


@given(_launches(), st.integers(1, 12))
def test_never_more_tasks_at_a_time_than_max_parallel(launch: list[Array], max_parallel: int) -> None:
    placed = limited(launch, max_parallel)
    before = _ancestors(placed)
    assert [replace(array, max_parallel=None, after=()) for array in placed] == launch
    widths = _widths_side_by_side(placed, lambda one, other: one not in before[other] and other not in before[one])
    assert max(widths) <= max_parallel


def _ancestors(placed: list[Array]) -> list[set[int]]:
    """Per array, all that have to end before it: first the direct ones, which always lie in front."""
    found: list[set[int]] = []
    for place, array in enumerate(placed):
        assert all(other < place for other in array.after)
        found.append({ancestor for other in array.after for ancestor in {other} | found[other]})
    return found


def _widths_side_by_side(placed: list[Array], may_overlap: Callable[[int, int], bool]) -> Iterator[int]:
    """Total width of each set of arrays that may all run at a time."""
    for size in range(1, len(placed) + 1):
        for group in combinations(range(len(placed)), size):
            if all(may_overlap(one, other) for one, other in combinations(group, 2)):
                yield sum(min(placed[place].max_parallel or 0, len(placed[place].tasks)) for place in group)


def test_lanes_share_out_the_whole_limit() -> None:
    (cell,) = _cells(1)
    placed = limited([Array(PLAIN, ((cell,),) * 9) for _ in range(3)], 8)
    assert Counter(array.max_parallel for array in placed) == {3: 2, 2: 1}
    assert all(array.after == () for array in placed)


def test_a_dependency_names_the_parents_task_and_the_arrays_before() -> None:
    (cell,) = _cells(1)
    array = Array(PLAIN, ((cell,),), parent=cell.id, after=(0, 2))
    assert dependency(array, ["10", "11", "12"], "9_4") == "afterok:9_4,afterany:10:12"
    assert dependency(Array(PLAIN, ((cell,),)), [], "") is None


def test_packed_cells_wait_for_their_parents_job_to_end_however() -> None:
    (cell,) = _cells(1)
    array = Array(Resources(partition="gpu", pack=3), ((cell,),), parent=cell.id)
    assert dependency(array, [], "9_4") == "afterany:9_4"
