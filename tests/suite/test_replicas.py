"""TensorBoard and Weights & Biases replicate the journals: the same numbers, each once, however often synced."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_cells import tiny_cell

from suite.errors import UserError
from suite.run import tensorboard_replica, wandb_replica
from suite.run.directory import RunDir
from suite.run.journal import Journal, token

EPOCHS = {1: {"train/loss": 2.5, "val/top1": 0.25}, 2: {"train/loss": 1.5, "val/top1": 0.5}}


def _write(run: RunDir, *epochs: int) -> None:
    """Makes another attempt that records these epochs."""
    attempt = run.claim()
    journal = Journal(run.journal, attempt)
    for epoch in epochs:
        journal.append(epoch, EPOCHS[epoch])
    journal.close()
    attempt.finish(state="preempted", reason="")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    cell = tiny_cell()
    run = RunDir.create(tmp_path / "grid" / cell.id, cell)
    _write(run, 1)
    return run


def _events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_tensorboard_shows_each_epoch_once_also_after_a_resume(run: RunDir, tmp_path: Path) -> None:
    events = tmp_path / "events"
    assert tensorboard_replica.sync(run.path.parent, events) == 1
    assert tensorboard_replica.sync(run.path.parent, events) == 0
    _write(run, 1, 2)  # killed after epoch 1, which is trained and recorded again
    assert tensorboard_replica.sync(run.path.parent, events) == 1
    (folder,) = (events / "grid").iterdir()
    assert folder.name == f"digits_resnet8_bnn++_s0-{run.cell().id[:6]}"
    shown = _events(folder)
    assert shown == {name: [(epoch, own[name]) for epoch, own in EPOCHS.items()] for name in EPOCHS[1]}


def test_runs_of_two_recipes_with_one_name_have_a_folder_each(run: RunDir, tmp_path: Path) -> None:
    other = tiny_cell(training__epochs=3)
    assert other.name == run.cell().name
    _write(RunDir.create(run.path.parent / other.id, other), 1, 2)
    assert tensorboard_replica.sync(run.path.parent, tmp_path / "events") == 2
    assert tensorboard_replica.sync(run.path.parent, tmp_path / "events") == 0
    assert len(list((tmp_path / "events" / "grid").iterdir())) == 2


def test_wandb_gets_each_epoch_once_with_the_recipe(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    grid_dir = run.path.parent
    assert wandb_replica.sync(grid_dir, "mine") == 1
    assert wandb_replica.sync(grid_dir, "mine") == 0
    _write(run, 1, 2)
    assert wandb_replica.sync(grid_dir, "mine") == 1
    own = token(run.journal)
    assert json.loads((grid_dir / "wandb.json").read_text()) == {f"mine/{own}": 2}
    files = sorted(grid_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert [file.stem for file in files] == [f"run-{own}"] * 2
    assert [_history(file) for file in files] == [[(1, EPOCHS[1])], [(2, EPOCHS[2])]]


def _history(file: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, metrics) of each record in W&B's own file."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for content in _records(file.read_bytes()[7:]):
        record: Any = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            items = {
                (item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item
            }
            found.append((items["_step"], {k: v for k, v in items.items() if not k.startswith("_")}))
    return found


def _records(content: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log, each stored as checksum (4 bytes), length (2), kind (1: whole) and content."""
    at = 0
    while at + 7 <= len(content):
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        assert kind == 1, "a file this short has no record in parts"
        yield content[at + 7 : at + 7 + length]
        at += 7 + length


@pytest.mark.parametrize(("replica", "package"), [(tensorboard_replica, "tensorboard"), (wandb_replica, "wandb")])
def test_a_missing_package_is_named(
    run: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    replica: ModuleType,
    package: str,
) -> None:
    import sys

    for name in [
        package,
        *(name for name in sys.modules if name.startswith(("torch.utils.tensorboard", f"{package}."))),
    ]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"--{package}: not installed: pip install 'proxbench\[{package}\]'"):
        replica.sync(run.path.parent, tmp_path / "x" if package == "tensorboard" else "x")
