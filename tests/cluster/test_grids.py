"""Grids that run on a real SLURM cluster to their end: parents and children, packs, and the code they were given."""

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.commands import MODEST, SOURCE, WriteGrid, launch
from cluster.lab import Lab
from launch import slurm
from suite.run.directory import RunDir, planned_cells

DIVERGING = {"epochs": 2, "batch_size": 256, "optimizer": "sgd", "learning_rate": 1e30}
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


def wait_for_the_queue_to_empty(seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while slurm.queue():
        assert time.monotonic() < deadline, slurm.queue()
        time.sleep(0.5)


def statuses(root: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(launch("status", "--json", "--root", root).stdout)}


def test_children_follow_a_parent_that_is_done_and_are_cancelled_with_one_that_failed(
    write_grid: WriteGrid, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    blocks = [
        {"quantizers": ["fp"], "seeds": [0]},
        {"quantizers": ["fp"], "seeds": [1], "training": DIVERGING},
        {"quantizers": ["bc"], "seeds": [0, 1], "init": "finetune"},
    ]
    answer = launch("grid", write_grid(blocks=blocks), *MODEST, "--root", root)
    assert "submitted 4 cells" in answer.stdout, answer.stderr
    wait_for_the_queue_to_empty()
    rows = statuses(root)
    assert {name.removeprefix("digits/resnet8/"): (row["state"], row["cause"]) for name, row in rows.items()} == {
        "fp/s0": ("done", None),
        "fp/s1": ("failed", "nan"),
        "bc/s0/finetune": ("done", None),
        "bc/s1/finetune": ("cancelled", None),
    }
    assert rows["digits/resnet8/bc/s1/finetune"]["reason"] == "starts from digits/resnet8/fp/s1, which failed: nan"
    shown = launch("status", "--root", root).stdout
    assert "digits/resnet8/fp/s1" in shown
    assert "the loss is" in shown, "the reason, and the last lines of the log"
    assert {row["attempt"] for row in rows.values()} == {1, 0}, "a NaN comes again: it is not tried again"
    again = launch("retry", "--failed", *MODEST, "--root", root)
    assert "submitted 2 cells" in again.stdout, "the parent and its child"
    wait_for_the_queue_to_empty()
    assert statuses(root)["digits/resnet8/bc/s1/finetune"]["state"] == "cancelled"


def test_a_job_runs_the_code_that_was_submitted_not_what_was_edited_since(
    cluster: Lab, write_grid: WriteGrid, tmp_path: Path
) -> None:
    checkout, root = tmp_path / "checkout", tmp_path / "runs"
    for package in ("quantizers", "models", "suite", "launch", "analysis"):
        shutil.copytree(SOURCE / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    as_author = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "submitted"]):
        subprocess.run([*as_author, *words], check=True)
    commit = subprocess.check_output([*as_author, "rev-parse", "HEAD"], text=True).strip()
    with (checkout / "suite" / "training" / "seeds.py").open("a", encoding="utf-8") as file:
        file.write("\n# not committed\n")
    (checkout / "suite" / "new.py").touch()
    nodes = ",".join(cluster.nodes)
    cluster.run("scontrol", "update", f"nodename={nodes}", "state=drain", "reason=test")
    at_submission = {"PYTHONPATH": str(checkout)}
    grid = write_grid(quantizers=["fp"])
    answer = launch("grid", grid, *MODEST, "--root", root, checkout=checkout, environment=at_submission)
    assert "submitted 1 cell as" in answer.stdout, answer.stderr
    for path in checkout.rglob("*.py"):
        path.write_text("raise AssertionError('edited since')\n", encoding="utf-8")
    cluster.run("scontrol", "update", f"nodename={nodes}", "state=resume")
    wait_for_the_queue_to_empty()
    (run,) = (RunDir(root / "tiny" / cell_id) for cell_id in planned_cells(root / "tiny"))
    assert run.state().state == "done", run.state()
    code = run.provenance()["code"]
    assert code["commit"] == commit
    assert "+# not committed" in code["diff"]
    assert code["untracked"] == "suite/new.py"


def test_packed_cells_share_a_job_and_one_that_fails_leaves_the_others(write_grid: WriteGrid, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    blocks = [{"quantizers": ["fp", "bc"]}, {"quantizers": ["bc"], "seeds": [7], "training": DIVERGING}]
    packed = [*MODEST[:-4], "--cpus-per-task", "3", "--gpus-per-node", "0", "--pack", "3"]
    answer = launch("grid", write_grid(blocks=blocks), *packed, "--root", root)
    assert "submitted 3 cells as 1 job" in answer.stdout, answer.stderr
    wait_for_the_queue_to_empty()
    rows = statuses(root)
    assert {row["state"] for name, row in rows.items() if not name.endswith("s7")} == {"done"}
    assert rows["digits/resnet8/bc/s7"]["cause"] == "nan"
    assert len({row["job_id"] for row in rows.values()}) == 1
