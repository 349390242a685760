"""What starts next is a pure function of the cells and where they stand."""

from collections.abc import Callable

import pytest

from launch.plan import Signs, Standing, blocked, matches, ready, select, stand, without_lost_children
from launch.slurm import JobInfo
from suite.recipe.cell import Cell
from suite.run.directory import State, StateName


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
    rows = [Standing(parent, State(state="failed", cause="nan")), Standing(child, State())]
    assert blocked(rows) == {child.id: "starts from digits/resnet8/fp/s0, which failed: nan"}
    cancelled = [Standing(parent, State(state="cancelled")), Standing(child, State())]
    assert blocked(cancelled) == {child.id: "starts from digits/resnet8/fp/s0, which was cancelled"}
    assert blocked([Standing(parent, State(state="running")), Standing(child, State())]) == {}


def _job(state: str, reason: str = "") -> JobInfo:
    return JobInfo("7_3", state, reason, node="", name="grid-token")


HELD, ALIVE, NOTHING = Signs(is_held=True), Signs(is_alive=True), Signs()


@pytest.mark.parametrize(
    ("written", "signs", "true", "has_job"),
    [
        (State(), NOTHING, "planned", False),
        (State(state="queued", job_id="1"), ALIVE, "queued", True),
        (State(state="queued", job_id="1"), NOTHING, "planned", False),  # the launcher died before its job began
        (State(state="queued", job_id="1", attempt=1), NOTHING, "preempted", False),
        (State(state="queued", job_id="1"), HELD, "running", True),
        (State(state="running", attempt=1), HELD, "running", True),
        (State(state="running", attempt=1), ALIVE, "running", True),  # the job is about to record how it ended
        (State(state="running", attempt=1), NOTHING, "preempted", False),  # kill -9
        (State(state="preempted", attempt=1), ALIVE, "preempted", False),  # the job is about to end
        (State(state="done"), HELD, "done", False),  # its process is about to end
        (State(state="failed", cause="nan"), NOTHING, "failed", False),
        (State(state="cancelled"), HELD, "cancelled", False),
    ],
)
def test_the_truth_is_what_lives_not_what_was_last_written(
    make_cell: Callable[..., Cell], written: State, signs: Signs, true: StateName, has_job: bool
) -> None:
    row = stand(make_cell(), written, signs)
    assert (row.state.state, row.has_job) == (true, has_job)


@pytest.mark.parametrize(
    ("written", "job", "true"),
    [
        (State(), "PENDING", "queued"),
        (State(), "RUNNING", "running"),  # nothing is written yet
        (State(), "COMPLETING", "running"),
        (State(), "CONFIGURING", "queued"),
        (State(state="running", attempt=1), "RUNNING", "running"),
        (State(state="running", attempt=1), "PENDING", "preempted"),  # requeued, or its node died
        (State(state="preempted", attempt=1), "PENDING", "preempted"),
        (State(state="preempted", attempt=1), "RUNNING", "running"),  # about to go on
        (State(state="preempted", attempt=1), "COMPLETING", "preempted"),
        (State(state="planned", attempt=3), "PENDING", "queued"),  # by a retry
        (State(state="done"), "COMPLETING", "done"),
        (State(state="failed", cause="oom", attempt=1), "RUNNING", "failed"),  # beside others of its pack
        (State(state="cancelled"), "PENDING", "cancelled"),
    ],
)
def test_a_live_job_tells_what_its_cell_does(
    make_cell: Callable[..., Cell], written: State, job: str, true: StateName
) -> None:
    row = stand(make_cell(), written, Signs(submitted_as="7_3", job=_job(job)))
    assert row.state.state == true
    assert row.has_job != row.is_settled
    assert ready([row]) == [], "it is not to be submitted again"


@pytest.mark.parametrize(
    ("written", "job", "true", "reason"),
    [
        (State(state="running", attempt=1), "TIMEOUT", "preempted", "its job is gone (SLURM: TIMEOUT)"),
        (State(state="queued", attempt=1), "NODE_FAIL", "preempted", "its job is gone (SLURM: NODE_FAIL)"),
        (State(state="running", attempt=1), None, "preempted", "its job is gone"),  # no accounting
        (State(state="queued"), "CANCELLED", "planned", "its job is gone (SLURM: CANCELLED)"),
        (State(), "FAILED", "planned", "its job is gone (SLURM: FAILED)"),  # it broke before it could write
        (State(state="preempted", attempt=1, reason="SIGUSR2"), "CANCELLED", "preempted", "SIGUSR2"),
    ],
)
def test_a_cell_whose_job_is_gone_can_start_again(
    make_cell: Callable[..., Cell], written: State, job: str | None, true: StateName, reason: str
) -> None:
    cell = make_cell()
    row = stand(cell, written, Signs(submitted_as="7_3", job=_job(job) if job else None))
    assert (row.state.state, row.state.reason) == (true, reason)
    assert ready([row]) == [cell]


def test_a_cell_in_the_queue_says_why_it_waits_and_as_which_job(make_cell: Callable[..., Cell]) -> None:
    row = stand(make_cell(), State(), Signs(submitted_as="7_3", job=_job("PENDING", "Resources")))
    assert (row.state.reason, row.state.job_id) == ("waits in SLURM's queue: Resources", "7_3")


@pytest.mark.parametrize(
    ("written", "age_seconds", "true"),
    [
        (State(), 1e9, "queued"),  # submitted, and who knows
        (State(state="running", attempt=1), 60.0, "running"),
        (State(state="running", attempt=1), 720.0, "preempted"),
        (State(state="preempted", attempt=1), 60.0, "preempted"),
        (State(state="done"), 1e9, "done"),
    ],
)
def test_where_slurm_cannot_be_asked_the_heartbeat_tells(
    make_cell: Callable[..., Cell], written: State, age_seconds: float, true: StateName
) -> None:
    row = stand(make_cell(), written, Signs(submitted_as="7_3", heartbeat_age_seconds=age_seconds))
    assert row.state.state == true
    assert row.has_job == (true in {"queued", "running"})
    held = stand(make_cell(), written, Signs(is_held=True, submitted_as="7_3", heartbeat_age_seconds=age_seconds))
    assert held.state.state == ("done" if true == "done" else "running")


def test_a_submitted_cell_is_cancelled_with_the_parent_that_failed(make_cell: Callable[..., Cell]) -> None:
    parent, child = _family(make_cell)
    rows = [Standing(parent, State(state="failed", cause="oom")), Standing(child, State())]
    assert without_lost_children(rows, submitted={parent.id}) == rows, "a cell that was never submitted can wait"
    _, lost = without_lost_children(rows, submitted={child.id})
    assert lost.state == State(state="cancelled", reason="starts from digits/resnet8/fp/s0, which failed: oom")
    in_queue = [rows[0], Standing(child, State(state="queued"), has_job=True)]
    assert without_lost_children(in_queue, submitted={child.id}) == in_queue, "its job will see to it"


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
