"""A finished run is adopted completely or not at all."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_cells import plan, put

from launch.adopt import Adopted, adopt
from suite.errors import UserError
from suite.run import checkpoint
from suite.run.atomic import write_json
from suite.run.directory import RunDir

MakeRun = Callable[..., RunDir]
NAME = "digits/resnet8/bnn++/s0"


def _finished(make_run: MakeRun, grid: str = "there", **changes: object) -> RunDir:
    run = make_run(grid, **changes)
    put(run, state="done", job_id="7").log().write_text("epoch 2/2\n", encoding="utf-8")
    checkpoint.save(run.checkpoints, {"epoch": 2, "step": 0, "cell": run.path.name})
    run.journal.write_text("{}\n", encoding="utf-8")
    write_json(run.result_path, {"top1_hard": 0.5})
    return run


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def mine(make_run: MakeRun) -> RunDir:
    """The cell here, requested but not started."""
    run = make_run("here")
    plan(run)
    return run


def test_a_finished_run_is_taken_with_all_its_files(make_run: MakeRun, mine: RunDir) -> None:
    run = _finished(make_run)
    before = _files(run.path)
    assert adopt(mine.path.parent, run.path.parent) == [Adopted(NAME)]
    assert (mine.state().state, mine.state().job_id) == ("done", "7")
    assert _files(mine.path) == _files(run.path) == before
    assert adopt(mine.path.parent, run.path.parent) == [Adopted(NAME, "it was already started here")]


def _of_another_cell(run: RunDir) -> None:
    run.cell_path.write_text(run.cell_path.read_text(encoding="utf-8").replace("seed: 0", "seed: 5"), encoding="utf-8")


def _torn(run: RunDir) -> None:
    run.cell_path.write_text("model: [resnet8", encoding="utf-8")


def _of_no_cell(run: RunDir) -> None:
    run.cell_path.write_text("model: resnet8\n", encoding="utf-8")


def _with_a_flipped_bit(run: RunDir) -> None:
    (path,) = run.checkpoints.glob("*.pt")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _unfinished(run: RunDir) -> None:
    run.result_path.unlink()
    put(run, state="preempted")


@pytest.mark.parametrize(
    ("spoil", "refusal"),
    [
        (_of_another_cell, "its cell.yaml has the id "),
        (_torn, "its cell.yaml is damaged"),
        (_of_no_cell, "its cell.yaml is damaged"),
        (_with_a_flipped_bit, "checkpoint epoch-000002-step-000000.pt is damaged"),
        (_unfinished, "it is preempted there"),
    ],
)
def test_a_run_that_is_not_what_it_should_be_is_left_and_nothing_here_changes(
    make_run: MakeRun, mine: RunDir, spoil: Callable[[RunDir], None], refusal: str
) -> None:
    run = _finished(make_run)
    spoil(run)
    before = _files(mine.path.parent)
    (found,) = adopt(mine.path.parent, run.path.parent)
    assert found.refusal.startswith(refusal)
    assert _files(mine.path.parent) == before
    assert mine.state().state == "queued"


def test_a_cell_that_somebody_has_begun_here_stays_his(make_run: MakeRun, mine: RunDir) -> None:
    attempt = mine.claim()
    before = _files(mine.path.parent)
    run = _finished(make_run)
    assert adopt(mine.path.parent, run.path.parent) == [Adopted(NAME, "it was already started here")]
    assert _files(mine.path.parent) == before
    assert mine.is_live()
    attempt.finish(state="preempted")


def test_a_run_of_no_cell_of_the_grid_is_left(make_run: MakeRun, mine: RunDir) -> None:
    run = _finished(make_run, seed=1)
    assert adopt(mine.path.parent, run.path.parent) == [Adopted("digits/resnet8/bnn++/s1", "the grid has no such cell")]
    assert not (mine.path.parent / run.path.name).exists()


def test_a_folder_without_runs_is_refused(mine: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no runs there; name a grid's folder, ROOT/here"):
        adopt(mine.path.parent, tmp_path)


def test_a_copy_that_broke_off_is_not_done(make_run: MakeRun, mine: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _finished(make_run)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(OSError, match="No space"):
        adopt(mine.path.parent, run.path.parent)
    assert mine.result() is None
