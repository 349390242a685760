"""`status` with a real queue shows why jobs wait; without one, it shows what the run directories contain."""

import os
import re
import shutil
from pathlib import Path

import pytest

from cluster.commands import MODEST, WriteGrid, launch, until
from cluster.lab import Lab
from launch.slurm import client
from launch.supply import jobs


@pytest.mark.slow
def test_status_says_why_workers_wait(
    cluster: Lab, write_grid: WriteGrid, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid_dir = root / "tiny"
    whole = ["--nodes=4", "--exclusive", "--chdir=/", "--output=/dev/null"]
    other = cluster.run("sbatch", "--parsable", "--partition=urgent", *whole, "--wrap", "sleep 60").strip()
    until(lambda: client.queue()[other].state == "RUNNING", grid_dir)
    launch("grid", write_grid(quantizers=["fp"]), *MODEST, "--root", root)
    until(lambda: "1 worker pending: Resources" in launch("status", "--root", root).stdout, grid_dir)
    (job_id,) = jobs(grid_dir)
    cluster.run("scontrol", "uhold", job_id)
    until(lambda: "1 worker pending: JobHeldUser" in launch("status", "--root", root).stdout, grid_dir)
    cluster.run("scontrol", "release", job_id)
    cluster.run("scontrol", "update", f"JobId={job_id}", "StartTime=now+1hour")
    until(lambda: "1 worker pending: BeginTime" in launch("status", "--root", root).stdout, grid_dir)

    asked = tmp_path / "asked"
    for name in ("squeue", "sacct", "scontrol", "sinfo"):
        wrapper = tmp_path / "bin" / name
        wrapper.parent.mkdir(exist_ok=True)
        wrapper.write_text(f'#!/bin/sh\necho {name} >> {asked}\nexec {shutil.which(name)} "$@"\n', encoding="utf-8")
        wrapper.chmod(0o755)
    with monkeypatch.context() as watched:
        watched.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        launch("status", "--root", root)
    assert asked.read_text(encoding="utf-8") == "squeue\n", "the only command that the controller has to answer"

    conf = re.sub(r"(?m)^SlurmctldPort=.*$", "SlurmctldPort=1", cluster.conf.read_text("utf-8"))
    (tmp_path / "slurm.conf").write_text(conf, encoding="utf-8")
    with monkeypatch.context() as away:
        away.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))  # no controller listens there
        answer = launch("status", "--root", root)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "1 queued" in answer.stdout
    assert "squeue: " in answer.stdout

    cluster.run("scancel", job_id)
    assert "no worker; to resume: python -m launch grid tiny (as before)" in launch("status", "--root", root).stdout
