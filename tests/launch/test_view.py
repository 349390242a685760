"""Status shows every cell, and why a cell failed."""

import io
from collections.abc import Callable

import pytest
from rich.console import Console
from tiny_cells import put

from launch import view
from launch.plan import Standing
from launch.view import as_json, matrix, problems, summary
from suite.recipe.cell import Cell
from suite.run.directory import Planned, RunDir, State
from suite.run.processes import Process


def _row(cell: Cell, state: State, *, is_former: bool = False) -> Standing:
    return Standing(Planned(cell, is_former=is_former), state)


def _lines(rows: list[Standing], width: int = 100) -> list[list[str]]:
    """The contents of the matrix, line by line and column by column."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(matrix(rows, "grid"))
    text = console.export_text()
    return [[part.strip() for part in line.strip("│┃").split("│")] for line in text.splitlines() if "│" in line]


def _rows(make_cell: Callable[..., Cell], num_seeds: int = 4, models: int = 1) -> list[Standing]:
    states = [
        State(state="done"),
        State(state="running", epoch=3, num_epochs=10),
        State(state="running", epoch=6, num_epochs=10),
        State(state="failed", cause="oom", reason="out of memory"),
    ]
    return [
        _row(make_cell(model=model, quantizer=quantizer, seed=seed), states[seed % 4])
        for model in ("resnet8", "resnet20", "resnet56")[:models]
        for quantizer in ("bc", "bnn++")
        for seed in range(num_seeds)
    ]


def test_a_matrix_counts_the_seeds_of_each_model_and_quantizer_by_state(make_cell: Callable[..., Cell]) -> None:
    assert _lines(_rows(make_cell)) == [
        ["resnet8", "1 done", "1 done"],
        ["", "2 running 45%", "2 running 45%"],
        ["", "1 failed: oom", "1 failed: oom"],
    ]


def test_a_screen_too_narrow_for_that_gets_a_line_per_pair(make_cell: Callable[..., Cell]) -> None:
    quantizers = ["bc", "pc", "bnn", "bnn+", "bnn++"]
    rows = [
        _row(row.cell.model_copy(update={"quantizer": name}), row.state)
        for row in _rows(make_cell)[:4]
        for name in quantizers
    ]
    assert _lines(rows, width=120)[0] == ["resnet8"] + ["1 done"] * 5
    lines = _lines(rows, width=80)
    assert lines[0] == ["resnet8", "bc", "1 done, 2 running 45%, 1 failed: oom"]
    assert [line[:2] for line in lines[1:]] == [["", name] for name in quantizers[1:]]


def test_with_one_seed_nothing_is_counted(make_cell: Callable[..., Cell]) -> None:
    rows = [
        _row(make_cell(), State(state="running", epoch=3, num_epochs=10)),
        _row(make_cell(quantizer="bc"), State(state="done")),
        _row(make_cell(quantizer="bc", model="resnet20"), State(state="failed", cause="nan")),
    ]
    assert _lines(rows) == [["resnet8", "running 3/10", "done"], ["resnet20", "", "failed: nan"]]


def test_a_thousand_seeds_take_no_more_room(make_cell: Callable[..., Cell]) -> None:
    assert [line[1] for line in _lines(_rows(make_cell, num_seeds=1000), width=60)] == [
        "250 done",
        "500 running 45%",
        "250 failed: oom",
    ]


def test_a_matrix_tells_tasks_and_data_sets_apart(make_cell: Callable[..., Cell]) -> None:
    binary_inputs = make_cell(task="bwa", quantization__inputs={})
    rows = [_row(make_cell(), State(state="done")), _row(binary_inputs, State(state="failed", cause="nan"))]
    assert _lines(rows) == [["resnet8", "done"], ["resnet8 (bwa)", "failed: nan"]]
    former = _row(make_cell(), State("preempted"), is_former=True)
    assert _lines([rows[0], former]) == [["resnet8", "done"], ["resnet8 (former recipe)", "preempted"]]
    other = _row(make_cell(dataset="fashion-mnist"), State(state="queued"))
    assert _lines([rows[0], other]) == [["digits/resnet8", "done"], ["fashion-mnist/resnet8", "queued"]]


def test_the_summary_counts_all(make_cell: Callable[..., Cell]) -> None:
    assert summary(_rows(make_cell)) == "2 done, 4 running, 2 failed"


def test_a_failed_cell_shows_the_end_of_its_log(make_run: Callable[..., RunDir]) -> None:
    run = make_run()
    row = _row(run.cell(), State(state="failed", cause="oom", reason="out of memory"))
    said = f"digits/resnet8/bnn++/s0 ({run.path.name}) failed: oom: out of memory"
    assert problems([row]) == problems([row], run.path.parent) == [said]
    (run.attempts / "0001").mkdir(parents=True)
    (run.attempts / "0001" / "log.txt").write_text("epoch 1\nepoch 2\n\nTraceback\nMemoryError\n", encoding="utf-8")
    assert problems([row], run.path.parent) == [said, "    epoch 2", "    Traceback", "    MemoryError"]


def test_many_failures_are_counted_after_the_first_ten(make_cell: Callable[..., Cell]) -> None:
    rows = [_row(make_cell(seed=seed), State(state="failed", cause="nan")) for seed in range(33)]
    lines = problems(rows)
    assert len(lines) == 11
    assert lines[-1] == "… and 23 more: --json lists them"


def test_what_is_held_up_is_told_once_for_each_reason(make_cell: Callable[..., Cell]) -> None:
    parent = make_cell(quantizer="fp", quantization__sharpness={})
    failed = _row(parent, State(state="failed", cause="nan", reason="the loss is nan"))
    waiting = [
        _row(make_cell(init="finetune", parent=parent.id, quantizer=name), State("queued")) for name in ("bc", "bnn++")
    ]
    stopped = _row(make_cell(), State("preempted", reason="its worker is gone"))
    assert problems([failed, *waiting, stopped])[1:] == [
        f"{waiting[0].cell.name} ({waiting[0].cell.id}) and 1 more waits: needs {parent.name}, which failed: nan",
        f"digits/resnet8/bnn++/s0 ({stopped.cell.id}) preempted: its worker is gone",
    ]


def test_json_has_the_fields_of_the_state(make_cell: Callable[..., Cell]) -> None:
    (row,) = as_json([_row(make_cell(), State(state="queued", job_id="7", failures={"node": 1}))])
    assert (row["name"], row["state"], row["job_id"]) == ("digits/resnet8/bnn++/s0", "queued", "7")
    assert row["failures"] == {"node": 1}


@pytest.mark.parametrize("is_terminal", [False, True])
def test_watching_ends_when_all_is_settled(make_cell: Callable[..., Cell], *, is_terminal: bool) -> None:
    cell = make_cell()
    looks = [[_row(cell, State(state=state))] for state in ("queued", "running", "running", "done")]
    console = Console(width=80, record=True, file=io.StringIO(), force_terminal=is_terminal)
    last = looks[-1]
    assert (
        view.watch(console, lambda: looks.pop(0), lambda _: ["2 workers pending: Priority"], "tiny", seconds=0.0)
        == last
    )
    text = console.export_text()
    assert text.count("1 running") >= 1
    assert ("2 workers pending: Priority" in text) == is_terminal
    assert is_terminal or len(text.splitlines()) == 3, "a line for each change"


def test_ctrl_c_ends_watching_quietly(make_cell: Callable[..., Cell]) -> None:
    rows = [_row(make_cell(), State(state="running"))]

    def looks() -> list[Standing]:
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(True)
        return rows

    interrupted: list[bool] = []
    assert view.watch(Console(file=io.StringIO()), looks, lambda _: [], "tiny", seconds=0.0) == rows


def test_a_cells_attempts_are_listed_with_where_they_ran_and_how_they_ended(make_run: Callable[..., RunDir]) -> None:
    run = make_run()
    put(run, state="preempted", attempt=1, job_id="7_1", reason="stopped by SIGUSR2").log().touch()
    put(run, state="failed", attempt=2, job_id="7_2", cause="oom", reason="no room")
    put(run, state="running", attempt=3)
    row = _row(run.cell(), run.state())
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(view.attempts(row, run.path.parent))
    title, *lines, path = console.export_text().strip().splitlines()
    assert title.startswith(f"digits/resnet8/bnn++/s0 ({run.path.name}) running, epoch 0 of 2")
    assert path == str(run.path)
    shown = [[part.strip() for part in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    host = Process.this().host
    assert [(each[0], *each[2:]) for each in shown] == [
        ("1", host, "7_1", "preempted: stopped by SIGUSR2", "attempts/0001/log.txt"),
        ("2", host, "7_2", "failed: oom: no room", ""),
        ("3", host, "", "its worker is gone", ""),
    ]
