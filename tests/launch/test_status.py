"""Status shows every cell, and says why one failed."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from launch.cluster import LocalCluster
from launch.local import launch
from launch.plan import Standing
from launch.status import as_json, matrix, problems, standings, summary
from suite.config import Cell
from suite.rundir import RunDir, State, write_plan


def _text(rows: list[Standing]) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(matrix(rows, "grid"))
    return console.export_text()


def test_a_matrix_has_a_line_per_quantizer_and_a_column_per_seed(make_cell: Callable[..., Cell]) -> None:
    rows = [
        Standing(make_cell(seed=0), State(state="done")),
        Standing(make_cell(seed=1), State(state="running", epoch=3, num_epochs=9)),
        Standing(make_cell(quantizer="bc"), State(state="failed", cause="oom", reason="out of memory")),
    ]
    text = _text(rows)
    assert [line.split() for line in text.splitlines() if "bnn++" in line] == [
        ["│", "resnet8", "│", "bnn++", "│", "done", "│", "3/9", "│"]
    ]
    assert "oom" in text
    assert summary(rows) == "1 failed, 1 done, 1 running"
    assert problems(rows) == [f"digits/resnet8/bc/s0 ({rows[2].cell.id}) failed: oom: out of memory"]


def test_a_matrix_tells_tasks_apart(make_cell: Callable[..., Cell]) -> None:
    binary_inputs = make_cell(task="bwa", quantization__inputs={})
    rows = [Standing(make_cell(), State(state="done")), Standing(binary_inputs, State(state="failed", cause="nan"))]
    lines = [line.split() for line in _text(rows).splitlines() if "bnn++" in line]
    assert lines == [
        ["│", "resnet8", "│", "bnn++", "│", "done", "│"],
        ["│", "resnet8", "(bwa)", "│", "bnn++", "│", "nan", "│"],
    ]


def test_json_has_the_fields_of_the_state_file(make_cell: Callable[..., Cell]) -> None:
    (row,) = as_json([Standing(make_cell(), State(state="queued", job_id="7"))])
    assert (row["name"], row["state"], row["job_id"]) == ("digits/resnet8/bnn++/s0", "queued", "7")


def test_standings_are_the_plans_in_its_order(make_run: Callable[..., RunDir]) -> None:
    runs = [make_run(seed=seed) for seed in (2, 0, 1)]
    write_plan(runs[0].path.parent, [run.cell() for run in runs])
    runs[1].update(state="running", job_id="1")
    rows = standings(runs[0].path.parent, lambda _job_id: False)
    assert [row.cell.seed for row in rows] == [2, 0, 1]
    assert [row.state.state for row in rows] == ["planned", "preempted", "planned"]


class _StillbornJobs(LocalCluster):
    """Every job ends before its training begins."""

    def submit(self, run: RunDir) -> str:
        run.update(state="queued", job_id="7")
        return "7"

    def is_alive(self, job_id: str) -> bool:  # noqa: ARG002
        return False


def test_a_cell_whose_jobs_never_begin_fails_in_the_end(
    make_run: Callable[..., RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.local.POLL_SECONDS", 0.0)
    run = make_run()
    cells = [run.cell()]
    uri = "http://127.0.0.1:9"  # no store is needed, and none that is dead does harm
    console = Console(file=io.StringIO())
    (row,) = launch(run.path.parent, cells, cells, _StillbornJobs(tmp_path), uri, console)
    assert (row.state.state, row.state.reason) == ("failed", "its job ended 3 times without a result")


@pytest.mark.parametrize(("visible", "max_parallel"), [("0,1,2", 3), ("", None)])
def test_one_cell_per_gpu_else_one_per_core(
    monkeypatch: pytest.MonkeyPatch, visible: str, max_parallel: int | None
) -> None:
    import os

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    num_cores = len(os.sched_getaffinity(0))
    cluster = LocalCluster(Path("data"))
    assert cluster.max_parallel == (max_parallel or num_cores)
    assert cluster.num_threads == max(num_cores // cluster.max_parallel, 1)
    assert LocalCluster(Path("data"), max_parallel=1).num_threads == num_cores
