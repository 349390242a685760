"""Training resumes only from an intact checkpoint of this cell and format; loading it runs no code."""

import hashlib
import logging
import math
import os
import pickle
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from needs import not_root

from suite.engines.process_group import Layout
from suite.recipe.cell import Cell
from suite.run import checkpoint
from suite.run.atomic import clean
from suite.run.checkpoint import CheckpointError
from suite.run.directory import RunDir
from suite.train import main, train
from suite.training.trainer import Trainer

CPU = torch.device("cpu")
CELL = "0123456789ab"
NOWHERE = Path("no-data-needed")


def _state(epoch: int, step: int = 0, **changes: object) -> dict[str, Any]:
    return {"cell": CELL, "epoch": epoch, "step": step, "w": torch.full((100,), float(epoch)), **changes}


def _save(folder: Path, *epochs: int) -> list[Path]:
    return [checkpoint.save(folder, _state(epoch)) for epoch in epochs]


def _newest(folder: Path) -> dict[str, Any]:
    found = checkpoint.load_newest(folder, CELL, CPU)
    assert found is not None
    return found[1]


def _write(path: Path, payload: bytes) -> Path:
    """Writes a file with the right checksum and arbitrary content."""
    path.write_bytes(hashlib.sha256(payload).hexdigest().encode() + payload)
    return path


def test_checkpoints_sort_by_epoch_and_step_and_the_newest_two_are_kept(tmp_path: Path) -> None:
    paths = [checkpoint.save(tmp_path, _state(*at)) for at in ((0, 900), (1, 0), (1, 5), (1, 40), (10, 3))]
    assert [path.name for path in paths] == sorted(path.name for path in paths)
    assert sorted(tmp_path.iterdir()) == paths[-2:]
    assert (_newest(tmp_path)["epoch"], _newest(tmp_path)["step"]) == (10, 3)


def test_a_checkpoint_says_what_wrote_it(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    assert _newest(tmp_path)["versions"]["torch"] == torch.__version__
    assert _newest(tmp_path)["format"] == checkpoint.FORMAT


# Damage


@pytest.mark.parametrize("twentieth", range(20))
def test_a_truncated_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, twentieth: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = _save(tmp_path, 1, 2)[1]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * twentieth // 20])
    assert _newest(tmp_path)["epoch"] == 1
    assert "epoch-000002-step-000000.pt: damaged (its checksum does not match); falling back" in caplog.text


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = _save(tmp_path, 1, 2)[1]
    whole = path.read_bytes()
    chance = random.Random(0)  # noqa: S311  (no secret)
    for _ in range(50):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        assert _newest(tmp_path)["epoch"] == 1
    path.write_bytes(whole)
    assert _newest(tmp_path)["epoch"] == 2


def test_a_missing_checkpoint_leaves_the_one_before(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2)[1].unlink()
    assert _newest(tmp_path)["epoch"] == 1


def test_a_checkpoint_that_vanishes_or_cannot_be_opened_is_passed_over(tmp_path: Path) -> None:
    path = _save(tmp_path, 1, 2)[1]
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    assert _newest(tmp_path)["epoch"] == 1


def test_training_never_starts_over_silently(tmp_path: Path) -> None:
    for path in _save(tmp_path, 1, 2):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint is intact; delete the folder to train from the start"):
        checkpoint.load_newest(tmp_path, CELL, CPU)
    assert checkpoint.load_newest(tmp_path / "none", CELL, CPU) is None


def test_a_damaged_checkpoint_that_was_passed_over_is_in_nobodys_way(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2)[1].write_bytes(b"torn")
    assert _newest(tmp_path)["epoch"] == 1
    checkpoint.save(tmp_path, _state(1, 50))
    assert [path.name[:24] for path in sorted(tmp_path.iterdir())] == [
        "epoch-000001-step-000000",
        "epoch-000001-step-000050",
    ]
    assert _newest(tmp_path)["step"] == 50


def test_what_a_killed_writer_left_is_cleared_up(tmp_path: Path) -> None:
    (path,) = _save(tmp_path, 1)
    (tmp_path / ".epoch-000002-step-000000.pt.4711.tmp").write_bytes(b"half")
    clean(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_every_damage_to_a_real_run_is_survived_with_the_same_bits_or_refused(
    make_run: Callable[..., RunDir], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    undisturbed, run = make_run("undisturbed"), make_run("damaged")
    train(undisturbed, NOWHERE)
    train(run, NOWHERE)
    before, newest = sorted(run.checkpoints.iterdir())
    whole = newest.read_bytes()
    for content in (whole[:-1], whole[:70] + b"?" + whole[71:], None):
        run.result_path.unlink()
        newest.unlink()
        if content is not None:
            newest.write_bytes(content)
        train(run, NOWHERE)
        assert f"resuming from epoch 1, step 0 ({before.name})" in caplog.text
        assert run.result() == undisturbed.result()
        caplog.clear()
    run.result_path.unlink()
    for path in run.checkpoints.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SystemExit) as stop:
        main(run.cell_path)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "no checkpoint is intact" in error
    assert error.count("\n") == 1
    assert (run.state().state, run.state().cause) == ("failed", "error")


# Foreign and malicious files


def test_a_whole_checkpoint_of_another_cell_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    checkpoint.save(tmp_path, _state(2, cell="another"))
    with pytest.raises(CheckpointError, match=r"epoch-000002-step-000000\.pt: the checkpoint is of cell another, this"):
        checkpoint.load_newest(tmp_path, CELL, CPU)


def test_a_trainer_refuses_the_state_of_another_cell(make_cell: Callable[..., Cell]) -> None:
    trainers = [Trainer(make_cell(seed=seed), Layout(), NOWHERE, None) for seed in (0, 1)]
    with pytest.raises(CheckpointError, match=r"the checkpoint is of cell .*, this is "):
        trainers[0].load_state_dict(trainers[1].state_dict())


def test_data_that_changed_since_the_checkpoint_are_refused(make_cell: Callable[..., Cell]) -> None:
    trainer = Trainer(make_cell(), Layout(), NOWHERE, None)
    state = trainer.state_dict()
    trainer.load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"^digits differs from the data of this run so far \(checksum"):
        trainer.load_state_dict(state | {"data": "d1" * 32})


def test_another_format_is_refused_by_its_number(tmp_path: Path) -> None:
    buffer, found = tmp_path / "content", checkpoint.FORMAT + 1
    torch.save(_state(2) | {"format": found}, buffer)
    _save(tmp_path, 1)
    _write(tmp_path / "epoch-000002-step-000000.pt", buffer.read_bytes())
    with pytest.raises(
        CheckpointError, match=f"checkpoint format {found}; this proxbench reads format {checkpoint.FORMAT}"
    ):
        checkpoint.load_newest(tmp_path, CELL, CPU)


def test_another_version_of_torch_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint.save(tmp_path, _state(1, versions={"proxbench": "0.1.0", "torch": "1.0"}))
    assert _newest(tmp_path)["epoch"] == 1
    assert "results may round differently" in caplog.text


class _Malice:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch was_here",)


@pytest.mark.parametrize("as_torch_saves", [True, False])
def test_a_malicious_checkpoint_with_a_right_checksum_runs_no_code_and_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_torch_saves: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "epoch-000001-step-000000.pt"
    if as_torch_saves:
        checkpoint.save(tmp_path, _state(1, w=_Malice()))
    else:
        _write(path, pickle.dumps(_Malice()))
    with pytest.raises(CheckpointError, match="it holds something other than tensors, numbers and strings") as refusal:
        checkpoint.load_newest(tmp_path, CELL, CPU)
    assert str(refusal.value).count("\n") == 0
    assert not (tmp_path / "was_here").exists()


def test_a_whole_file_that_is_no_state_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "content")
    path = _write(tmp_path / "epoch-000001-step-000000.pt", (tmp_path / "content").read_bytes())
    with pytest.raises(CheckpointError, match="not a checkpoint of proxbench: it holds a list"):
        checkpoint.load(path, CELL, CPU)


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of three megabytes: two ResNet-8 checkpoints fit, a third does not."""
    if why := not_root():
        pytest.skip(why)
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no small disk: this root may not mount one")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_fails_in_one_line_with_the_old_checkpoint_intact_and_a_retry_goes_on(
    small_disk: Path,
    make_run: Callable[..., RunDir],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("suite.run.saving.SAVING_SHARE", math.inf)
    undisturbed = make_run(training__epochs=3)
    train(undisturbed, NOWHERE)
    cell = undisturbed.cell()
    run = RunDir.create(small_disk / cell.id, cell)
    with pytest.raises(SystemExit) as stop:
        main(run.cell_path)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "cannot be written: No space left on device; earlier checkpoints are unchanged" in error
    assert error.count("\n") == 1
    assert (run.state().state, run.state().cause) == ("failed", "error")
    assert "No space left" in run.state().reason
    left = sorted(path.name for path in run.checkpoints.iterdir())
    assert left == ["epoch-000001-step-000000.pt", "epoch-000002-step-000000.pt"]
    subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)
    main(run.cell_path)
    assert run.state().state == "done"
    assert run.state().attempt == 2
    assert run.result() == undisturbed.result()
