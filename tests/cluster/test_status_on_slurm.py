"""Where cells stand, told from a real queue and its accounting."""

import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_cells import put, tiny_cell

from cluster.lab import Lab
from launch import slurm
from launch.plan import Standing
from launch.status import standings
from launch.submissions import Submission
from suite.run.directory import RunDir, write_plan

CELLS = [tiny_cell(seed=seed) for seed in range(4)]
pytestmark = pytest.mark.slow


@pytest.fixture
def submitted(cluster: Lab, tmp_path: Path) -> Submission:
    """Four cells as an array that runs two tasks at a time, none of which ever writes anything."""
    write_plan(tmp_path, CELLS)
    command = ["sbatch", "--parsable", "--array=0-3%2", "--output=/dev/null", "--wrap=sleep 600"]
    job_id = cluster.run(*command).strip()
    return Submission("token", tuple((cell.id,) for cell in CELLS), job_id=job_id).write(tmp_path)


def _states(rows: Sequence[Standing]) -> list[str]:
    return [row.state.state for row in rows]


def _until(grid_dir: Path, states: list[str], reason: str = "") -> list[Standing]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        rows = standings(grid_dir)
        if _states(rows) == states and reason in rows[-1].state.reason:
            return rows
        time.sleep(1.0)
    raise AssertionError(f"{_states(rows)}, {rows[-1].state.reason}, not {states}, {reason}")


def test_the_queue_and_the_accounting_tell_where_cells_stand(submitted: Submission, tmp_path: Path) -> None:
    rows = _until(tmp_path, ["running", "running", "queued", "queued"])
    assert [row.state.job_id for row in rows] == [f"{submitted.job_id}_{index}" for index in range(4)]
    put(RunDir(tmp_path / CELLS[0].id), state="running", attempt=1)
    slurm.cancel([str(submitted.job_id)])
    rows = _until(tmp_path, ["preempted", "planned", "planned", "planned"], "CANCELLED")
    assert {row.state.reason for row in rows} == {"its job is gone (SLURM: CANCELLED)"}
    assert not any(row.has_job for row in rows)


def test_without_slurm_the_run_directories_tell(
    submitted: Submission, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [RunDir(tmp_path / cell.id) for cell in CELLS]
    put(runs[0], state="running", attempt=1)
    put(runs[1], state="failed", attempt=1, cause="nan")
    conf = re.sub(r"(?m)^SlurmctldPort=.*$", "SlurmctldPort=1", Path(os.environ["SLURM_CONF"]).read_text("utf-8"))
    (tmp_path / "slurm.conf").write_text(conf, encoding="utf-8")
    with monkeypatch.context() as away:
        away.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))  # nobody answers there
        assert _states(standings(tmp_path)) == ["running", "failed", "queued", "queued"]
    assert capsys.readouterr().err.count("\n") == 1
    slurm.cancel([str(submitted.job_id)])


def test_one_squeue_and_one_sacct_are_all_a_look_costs(
    submitted: Submission, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.cancel([str(submitted.job_id)])
    asked = tmp_path / "asked"
    for command in ("squeue", "sacct"):
        real = shutil.which(command)
        wrapper = tmp_path / "bin" / command
        wrapper.parent.mkdir(exist_ok=True)
        wrapper.write_text(f'#!/bin/sh\necho {command} >> {asked}\nexec {real} "$@"\n', encoding="utf-8")
        wrapper.chmod(0o755)
    _until(tmp_path, ["planned"] * 4)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    standings(tmp_path)
    assert asked.read_text(encoding="utf-8") == "squeue\nsacct\n"
