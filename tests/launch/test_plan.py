"""Which cell is trained next is a pure function of the cells and their states."""

from collections.abc import Callable

import pytest

from launch.plan import Standing, blocked, is_over, matches, ready, select
from launch.supply import lacking
from suite.recipe.cell import Cell
from suite.run.directory import Planned, State, StateName


def _family(make_cell: Callable[..., Cell], **changes: object) -> tuple[Cell, Cell]:
    parent = make_cell(quantizer="fp", quantization__sharpness={}, **changes)
    return parent, make_cell(init="finetune", parent=parent.id, **changes)


def _row(cell: Cell, state: StateName = "queued", *, is_first: bool = False, shape: str = "") -> Standing:
    return Standing(Planned(cell, shape=shape, is_first=is_first), State(state=state))


def _ready(rows: list[Standing], failed_here: tuple[str, ...] = ()) -> list[Cell]:
    return [row.cell for row in ready(rows, failed_here)]


@pytest.mark.parametrize(
    ("state", "starts"),
    [
        ("planned", False),  # not requested
        ("queued", True),
        ("preempted", True),
        ("running", False),
        ("done", False),
        ("failed", False),
        ("cancelled", False),
    ],
)
def test_queued_and_preempted_cells_are_ready(make_cell: Callable[..., Cell], state: StateName, starts: bool) -> None:
    cell = make_cell()
    assert _ready([_row(cell, state)]) == ([cell] if starts else [])


@pytest.mark.parametrize(
    ("parent_state", "starts"), [("queued", False), ("running", False), ("failed", False), ("done", True)]
)
def test_a_finetune_cell_waits_for_its_parent(
    make_cell: Callable[..., Cell], parent_state: StateName, starts: bool
) -> None:
    parent, child = _family(make_cell)
    assert (child in _ready([_row(parent, parent_state), _row(child)])) == starts


def test_seeds_come_first_and_parents_before_others_of_their_seed(make_cell: Callable[..., Cell]) -> None:
    cells = [make_cell(quantizer=name, seed=seed) for name in ("bnn++", "bc") for seed in (0, 1)]
    parent, child = _family(make_cell)
    found = _ready([*map(_row, cells), _row(parent), _row(child)])
    assert found == [parent, cells[0], cells[2], cells[1], cells[3]]


def test_cells_asked_for_first_come_first_with_the_parents_they_need(make_cell: Callable[..., Cell]) -> None:
    parent, child = _family(make_cell, seed=7)
    others = [make_cell(seed=seed) for seed in (0, 1)]
    rows = [*map(_row, others), _row(parent), _row(child, is_first=True)]
    assert _ready(rows) == [parent, *others]
    assert _ready([*map(_row, others), _row(parent, "done"), _row(child, is_first=True)]) == [child, *others]


def test_a_cell_that_failed_on_this_machine_is_left_to_others_for_now(make_cell: Callable[..., Cell]) -> None:
    cells = [make_cell(seed=seed) for seed in range(3)]
    assert _ready([*map(_row, cells)], failed_here=(cells[0].id,)) == [cells[1], cells[2], cells[0]]


def test_a_cell_whose_parent_will_not_be_done_says_why_and_nothing_more_happens(make_cell: Callable[..., Cell]) -> None:
    parent, child = _family(make_cell)
    failed = Standing(Planned(parent), State(state="failed", cause="nan"))
    assert blocked([failed, _row(child)]) == {child.id: "needs digits/resnet8/fp/s0, which failed: nan"}
    assert is_over([failed, _row(child)])
    cancelled = [_row(parent, "cancelled"), _row(child)]
    assert blocked(cancelled) == {child.id: "needs digits/resnet8/fp/s0, which was cancelled"}
    assert blocked([_row(parent, "running"), _row(child)]) == {}
    assert not is_over([_row(parent, "running"), _row(child)])


# How many workers


def test_as_many_workers_are_missing_as_cells_need(make_cell: Callable[..., Cell]) -> None:
    rows = [_row(make_cell(seed=seed), shape="a") for seed in range(7)]
    assert lacking(rows, {"a": 2}, {}, None) == {"a": 4}
    assert lacking(rows, {"a": 2}, {"a": 3}, None) == {"a": 1}
    assert lacking(rows, {"a": 2}, {"a": 4}, None) == {}
    assert lacking(rows, {"b": 1}, {}, None) == {}, "no worker of another shape can train them"


def test_a_limit_on_workers_is_shared_out_over_the_shapes(make_cell: Callable[..., Cell]) -> None:
    rows = [_row(make_cell(seed=seed), shape="ab"[seed % 2]) for seed in range(12)]
    assert lacking(rows, {"a": 1, "b": 1}, {}, 5) == {"a": 3, "b": 2}
    assert lacking(rows, {"a": 1, "b": 1}, {"a": 3}, 5) == {"a": 1, "b": 1}
    assert lacking(rows, {"a": 1, "b": 1}, {"a": 5}, 5) == {}


def test_running_cells_keep_their_workers_and_cells_that_wait_for_a_parent_need_none(
    make_cell: Callable[..., Cell],
) -> None:
    parent, child = _family(make_cell)
    rows = [_row(parent, "running", shape="a"), _row(child, shape="a"), _row(make_cell(seed=3), shape="a")]
    assert lacking(rows, {"a": 1}, {"a": 1}, None) == {"a": 1}


# Patterns


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("resnet8", True),
        ("resnet8/bnn++", True),
        ("s0", True),
        ("*/s0", True),
        ("digits", True),
        ("resnet", False),
        ("bnn", False),
        ("bnn++/s1", False),
        ("resnet*/bnn*", True),
    ],
)
def test_a_pattern_fits_whole_parts_of_a_name(make_cell: Callable[..., Cell], pattern: str, fits: bool) -> None:
    assert matches(make_cell(), pattern) == fits


def test_an_id_is_a_pattern(make_cell: Callable[..., Cell]) -> None:
    assert matches(make_cell(), make_cell().id)
    assert not matches(make_cell(), make_cell(seed=1).id)


def test_selecting_a_finetune_cell_selects_its_parent(make_cell: Callable[..., Cell]) -> None:
    parent, child = _family(make_cell)
    other = make_cell(seed=1)
    assert select([parent, child, other], ["finetune"]) == [parent, child]
    assert select([parent, child, other], []) == [parent, child, other]
    assert select([parent, child, other], ["nothing"]) == []
