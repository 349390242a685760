"""What starts next is a pure function of the cells and where they stand."""

from collections.abc import Callable

import pytest

from launch.plan import MAX_ATTEMPTS, Standing, blocked, matches, ready, select, truth
from suite.config import Cell
from suite.rundir import State, StateName


def _family(make_cell: Callable[..., Cell]) -> tuple[Cell, Cell]:
    parent = make_cell(quantizer="fp", quantization__sharpness={})
    return parent, make_cell(init="finetune", parent=parent.id)


@pytest.mark.parametrize(
    ("state", "starts"),
    [
        ("planned", True),
        ("preempted", True),
        ("queued", False),
        ("running", False),
        ("done", False),
        ("failed", False),
        ("cancelled", False),
    ],
)
def test_only_planned_and_preempted_cells_start(make_cell: Callable[..., Cell], state: StateName, starts: bool) -> None:
    cell = make_cell()
    assert ready([Standing(cell, State(state=state))]) == ([cell] if starts else [])


@pytest.mark.parametrize(
    ("parent_state", "starts"), [("planned", False), ("running", False), ("failed", False), ("done", True)]
)
def test_a_finetune_cell_waits_for_its_parent(
    make_cell: Callable[..., Cell], parent_state: StateName, starts: bool
) -> None:
    parent, child = _family(make_cell)
    rows = [Standing(parent, State(state=parent_state)), Standing(child, State())]
    assert (child in ready(rows)) == starts


def test_a_cell_whose_parent_failed_says_so(make_cell: Callable[..., Cell]) -> None:
    parent, child = _family(make_cell)
    rows = [Standing(parent, State(state="failed")), Standing(child, State())]
    assert blocked(rows) == {child.id: "starts from digits/resnet8/fp/s0, which is failed"}
    assert blocked([Standing(parent, State(state="running")), Standing(child, State())]) == {}


@pytest.mark.parametrize(
    ("written", "is_held", "job_is_alive", "true"),
    [
        (State(), False, False, "planned"),
        (State(state="queued", job_id="1"), False, True, "queued"),
        (State(state="queued", job_id="1"), False, False, "planned"),  # the launcher died before its job began
        (State(state="queued", job_id="1"), True, True, "running"),
        (State(state="running"), True, True, "running"),
        (State(state="running"), False, True, "running"),  # the job is about to record how it ended
        (State(state="running"), False, False, "preempted"),  # kill -9
        (State(state="running", attempt=MAX_ATTEMPTS), False, False, "failed"),
        (State(state="done"), True, True, "done"),  # its process is about to end
        (State(state="failed", cause="nan"), False, False, "failed"),
        (State(state="cancelled"), False, False, "cancelled"),
    ],
)
def test_the_truth_is_what_lives_not_what_was_last_written(
    written: State, is_held: bool, job_is_alive: bool, true: StateName
) -> None:
    assert truth(written, is_held=is_held, job_is_alive=job_is_alive).state == true


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
