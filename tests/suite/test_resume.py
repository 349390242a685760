"""A run interrupted after any step ends bit-identical to an uninterrupted one, on one process and on two."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import CELLS, NOWHERE, cell_of, differences, numbers, place_of
from torch import Tensor

from suite.engines.process_group import Layout
from suite.recipe.cell import Cell
from suite.run import checkpoint, failures, saving
from suite.run.directory import RunDir
from suite.train import Options, main, train
from suite.training.trainer import Trainer


@pytest.mark.parametrize("name", CELLS)
def test_an_interruption_after_any_step_changes_no_bit(name: str, tmp_path: Path) -> None:
    assert list(differences(cell_of(name), Layout(), tmp_path)) == []


@pytest.mark.long
def test_on_two_processes_neither_and_a_nan_on_one_stops_both_at_its_step(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = Path(__file__).with_name("interrupted.py")
    path = os.pathsep.join([str(program.parents[1]), *sys.path])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    command = [sys.executable, *torchrun, str(program), str(tmp_path)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert sorted(answer.stdout.splitlines()) == [
        "process 0: the loss is not finite at step 1 (epoch 1)",
        "process 1: the loss is nan at step 1 (epoch 1)",
    ]


def test_another_number_of_processes_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    cell = cell_of("bnn++")
    trainer = Trainer(cell, Layout(), NOWHERE, None)
    states = []
    trainer.train_epoch(lambda _number, _loss: states.append(trainer.state_dict()["totals"].clone()))
    assert [totals.shape for totals in states] == [(1, 3)] * 2
    state = trainer.state_dict() | {"epoch": 0, "step": 1, "totals": torch.cat([states[0] / 2, states[0] / 2])}
    path = checkpoint.save(tmp_path, state)
    resumed = Trainer(cell, Layout(), NOWHERE, None)
    resumed.load_state_dict(checkpoint.load(path, cell.id, torch.device("cpu")))
    assert torch.equal(resumed.totals, states[0][0])


# When checkpoints are written


def _written_after(run: RunDir, cell: Cell, **options: float) -> list[tuple[int, int]]:
    """(epoch, step) of each checkpoint in the first epoch."""
    trainer = Trainer(cell, Layout(), NOWHERE, None)
    every: dict[str, float | None] = {"every_steps": None, "every_minutes": 10.0, **options}
    checkpoints = saving.Checkpoints(run, run.claim(), trainer, every["every_steps"], every["every_minutes"])  # type: ignore[arg-type]
    written: list[tuple[int, int]] = []

    def on_step(number: int, _loss: Tensor) -> None:
        checkpoints.step(number)
        newest = checkpoint.newest_first(run.checkpoints)
        if newest and (at := (trainer.epoch, trainer.step)) == place_of(newest[0]):
            written.append(at)

    trainer.train_epoch(on_step)
    return written


def test_checkpoints_come_every_so_many_steps(make_run: Callable[..., RunDir]) -> None:
    run = make_run(training__batch_size=200)
    assert _written_after(run, run.cell(), every_steps=2) == [(0, 2), (0, 4)]


def test_checkpoints_come_every_so_many_minutes(make_run: Callable[..., RunDir]) -> None:
    run = make_run(training__batch_size=400)
    assert _written_after(run, run.cell(), every_minutes=0.0) == [
        (0, 2)
    ]  # the third step's is saved at the epoch's end
    assert _written_after(make_run("late", training__batch_size=400), run.cell(), every_minutes=1e6) == []


def test_of_short_epochs_those_are_saved_that_keep_saving_below_half_a_percent(
    make_run: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, saved = 0.0, []
    run = make_run(training__epochs=10)
    trainer = Trainer(run.cell(), Layout(), NOWHERE, None)

    def save_for_a_second(_folder: Path, state: dict[str, Any], _require_newest: object) -> None:
        nonlocal seconds
        seconds += 1
        saved.append(state["epoch"])

    monkeypatch.setattr("suite.run.saving.time.monotonic", lambda: seconds)
    monkeypatch.setattr(checkpoint, "save", save_for_a_second)
    checkpoints = saving.Checkpoints(run, run.claim(), trainer, None, 10.0)
    for _ in range(10):
        seconds, trainer.epoch = seconds + 60, trainer.epoch + 1
        checkpoints.epoch()
    assert saved == [1, 5, 9, 10]  # 1 s is half a percent of 200 s; always the first and last


def test_an_epoch_that_ends_where_a_checkpoint_is_due_is_saved_at_any_cost(
    make_run: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("suite.run.saving.SAVING_SHARE", 0.0)
    run = make_run(training__epochs=3, training__batch_size=400)  # three steps each
    every_second = saving.Checkpoints(run, run.claim(), Trainer(run.cell(), Layout(), NOWHERE, None), 2, 10.0)
    trainer, places = every_second.trainer, set()

    def on_step(number: int, _loss: Tensor) -> None:
        every_second.step(number)

    for _ in range(2):
        trainer.train_epoch(on_step)
        every_second.epoch()
        places |= {place_of(path) for path in checkpoint.newest_first(run.checkpoints)}
    assert places == {(0, 2), (1, 1), (2, 0)}


def test_a_run_that_is_asked_to_stop_saves_after_the_step_and_goes_on_from_there(
    make_run: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    undisturbed, run = make_run("undisturbed"), make_run("stopped")
    train(undisturbed, NOWHERE)
    beat = failures.Heartbeat.beat

    def ask(self: failures.Heartbeat, step: int, epoch: int) -> None:
        beat(self, step, epoch)
        if step in {2, 6}:
            signal.raise_signal(signal.SIGUSR2 if step == 2 else signal.SIGTERM)

    monkeypatch.setattr(failures.Heartbeat, "beat", ask)
    for attempt, (name, place) in enumerate((("SIGUSR2", (0, 4)), ("SIGTERM", (1, 3))), 1):
        with pytest.raises(SystemExit) as stop:
            main(run.cell_path)
        assert stop.value.code == 1
        state = run.state()
        assert (state.state, state.reason, state.attempt) == ("preempted", f"stopped by {name}", attempt)
        assert place_of(checkpoint.newest_first(run.checkpoints)[0]) == place
    main(run.cell_path)
    assert "resuming from epoch 1, step 3" in caplog.text
    assert run.result() == undisturbed.result()
    assert numbers(run) == numbers(undisturbed)


def test_never_resume_refuses_what_there_is_and_deletes_nothing(
    make_run: Callable[..., RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(training__epochs=1)
    main(run.cell_path, resume="never")
    files = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        main(run.cell_path, resume="never")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("--resume never: ")
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == files


def test_the_same_state_is_saved_whether_or_not_anything_is_saved_before(
    make_run: Callable[..., RunDir],
) -> None:
    runs = [make_run(grid) for grid in ("seldom", "often")]
    for run, steps in zip(runs, (None, 1), strict=True):
        train(run, NOWHERE, options=Options(checkpoint_steps=steps))
    assert runs[0].result() == runs[1].result()
    assert numbers(runs[0]) == numbers(runs[1])
