"""Standings follow from run directories and their processes; cost follows from the workers' records."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_cells import plan, put

from launch.plan import Standing
from launch.status import cost, standing, standings
from launch.view import overview
from launch.worker import registry
from launch.worker.registry import Worker
from suite.recipe.cell import Cell
from suite.run.directory import Planned, RunDir, State, read_plan, write_plan

MakeRun = Callable[..., RunDir]


def test_standings_are_the_plans_in_its_order(make_run: MakeRun) -> None:
    runs = [make_run(seed=seed) for seed in (2, 0, 1)]
    grid_dir = runs[0].path.parent
    plan(*runs)
    put(runs[1], state="running")
    rows = standings(grid_dir, read_plan(grid_dir))
    assert [row.cell.seed for row in rows] == [2, 0, 1]
    assert [row.state.state for row in rows] == ["queued", "preempted", "queued"]
    assert rows[1].state.reason == "its worker is gone"


def test_a_cell_without_a_directory_was_not_asked_for_and_looking_makes_none(
    tmp_path: Path, make_cell: Callable[..., Cell]
) -> None:
    cell = make_cell()
    write_plan(tmp_path, [Planned(cell)])
    (row,) = standings(tmp_path, read_plan(tmp_path))
    assert (row.state, row.is_settled) == (State("planned"), False)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_cell_runs_for_as_long_as_its_attempt_lives(make_run: MakeRun) -> None:
    run = make_run()
    planned = Planned(run.cell())
    attempt = run.claim("7_1", worker=3)
    state = standing(run, planned).state
    assert (state.state, state.job_id, state.attempt) == ("running", "7_1", 1)
    attempt.finish(state="preempted", reason="stopped by SIGUSR2")
    assert (standing(run, planned).state.state, standing(run, planned).state.reason) == (
        "preempted",
        "stopped by SIGUSR2",
    )


def test_a_retried_cell_is_queued_whatever_its_last_attempt_was(make_run: MakeRun) -> None:
    run = make_run()
    planned = Planned(run.cell())
    put(run, state="failed", cause="oom", failures={"oom": 2}, failed_at="")
    assert standing(run, planned).is_settled
    run.plan_again()
    row = standing(run, planned)
    assert (row.state.state, row.state.failures, row.state.attempt) == ("queued", {}, 1)
    run.cancel("by hand")
    assert standing(run, planned).is_settled


def test_known_cells_are_not_looked_at_again(make_run: MakeRun) -> None:
    known, other = make_run(seed=0), make_run(seed=1)
    plan(known, other)
    read = read_plan(known.path.parent)
    before = {known.path.name: Standing(read[known.path.name], State("done"))}
    assert [row.state.state for row in standings(known.path.parent, read, before)] == ["done", "queued"]


# Cost


def _worker(*, hours: float, num_gpus: int = 0, is_live: bool = False) -> Worker:
    now = time.time()
    made = now - 3600 * hours
    return Worker(1, "node1", "7_1", "", 1, num_gpus, made, None if is_live else now, now, "", is_live)


def _row(cell: Cell, state: State) -> Standing:
    return Standing(Planned(cell), state)


def test_what_is_to_go_costs_what_the_epochs_so_far_did(make_cell: Callable[..., Cell]) -> None:
    cells = [make_cell(seed=seed, training__epochs=10) for seed in range(5)]
    states = [State("done"), State("preempted", epoch=5), State("queued"), State("planned"), State("failed", epoch=9)]
    rows = [_row(cell, state) for cell, state in zip(cells, states, strict=True)]
    found = cost(rows, [_worker(hours=2.0), _worker(hours=1.0)])
    assert (found.unit, found.eta) == ("worker-hours", None), "no worker is live"
    assert (found.spent, found.to_go) == pytest.approx((3.0, 3.0))  # 15 of 30 epochs
    live = cost(rows, [_worker(hours=1.0, num_gpus=2), _worker(hours=0.5, num_gpus=2, is_live=True)])
    assert live.unit == "GPU-hours"
    assert (live.spent, live.to_go) == pytest.approx((3.0, 3.0))
    assert live.eta == pytest.approx(time.time() + 3600 * 1.5, abs=5)


def test_cells_that_follow_from_trials_are_to_go_too(make_cell: Callable[..., Cell]) -> None:
    rows = [_row(make_cell(trial=True, training__epochs=10), State("done"))]
    assert cost(rows, [_worker(hours=1.0)], num_later_epochs=30).to_go == pytest.approx(3.0)


def test_before_the_first_epoch_nobody_can_tell(make_cell: Callable[..., Cell]) -> None:
    found = cost([_row(make_cell(), State("running"))], [_worker(hours=1.0, is_live=True)])
    assert (found.to_go, found.eta) == (None, None)
    assert cost([], []).spent == 0


# The workers


def test_workers_are_numbered_listed_and_counted_until_they_end(tmp_path: Path) -> None:
    first, second = (
        registry.register(tmp_path, job, node=f"n{job}", shape="s", num_slots=2, num_gpus=4) for job in "78"
    )
    assert (first.number, second.number) == (1, 2)
    known: set[int] = set()
    assert registry.live_numbers(tmp_path, known) == [1, 2]
    first.write_end(state="retired", reason=f"{registry.RETIRED}: 3 cells failed here")
    second.write_end(state="over", reason="")
    assert registry.live_numbers(tmp_path, known) == []
    assert known == {1, 2}
    assert registry.live_numbers(tmp_path) == []
    found = registry.workers(tmp_path)
    assert [(each.number, each.host, each.job_id, each.num_slots, each.is_live) for each in found] == [
        (1, "n7", "7", 2, False),
        (2, "n8", "8", 2, False),
    ]
    assert registry.sick_nodes(found) == ["n7"]
    assert found[0].gpu_hours == pytest.approx(4 * (found[0].ended - found[0].made) / 3600)  # type: ignore[operator]


def test_the_limit_on_workers_is_none_until_set(tmp_path: Path) -> None:
    assert registry.limit(tmp_path) is None
    registry.set_limit(tmp_path, 0)
    assert registry.limit(tmp_path) == 0
    registry.set_limit(tmp_path, None)
    assert registry.limit(tmp_path) is None


def test_an_overview_tells_who_works_who_retired_and_what_it_costs(make_run: MakeRun) -> None:
    run = make_run()
    plan(run)
    grid_dir = run.path.parent
    rows = standings(grid_dir, read_plan(grid_dir))
    assert overview(grid_dir, rows) == ["no worker; to resume: python -m launch grid grid (as before)"]
    sick = registry.register(grid_dir, "7", node="node1", num_slots=1, num_gpus=0)
    sick.write_end(state="retired", reason=f"{registry.RETIRED}: 3 cells failed here")
    live = registry.register(grid_dir, "8", node="node2", num_slots=2, num_gpus=0)
    live.note(made=time.time() - 3600)
    registry.set_limit(grid_dir, 4)
    worker, retired, price, limit = overview(grid_dir, rows)
    assert worker == "worker 2 on node2, job 8: 2 cells at a time, for 1.0 h"
    assert retired == "worker 1 retired: 3 cells failed here"
    assert price == "1.0 worker-hours spent"
    assert limit == "at most 4 workers: python -m launch scale N"
