"""Workers on a real SLURM cluster train grids to their end, despite limits and faults of the site and its nodes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cluster.commands import (
    MODEST,
    SOURCE,
    WriteGrid,
    command,
    launch,
    run_of,
    standings,
    states,
    told,
    until_queue_is_empty,
)
from cluster.configuration import Settings
from cluster.lab import Lab
from launch.supply import HandedIn, deaths, supply
from launch.worker import registry

DIVERGING = {"epochs": 2, "batch_size": 256, "optimizer": "sgd", "learning_rate": 1e30}
SICK = """
import os, sys
if os.environ.get("SLURMD_NODENAME") == "node1":
    sys.modules["timm"] = None  # its import fails
"""
NOTE_DEVICES = """
import os, pathlib, sys
def note(event, values):
    if event == "os.putenv" and values[0] == b"CUDA_VISIBLE_DEVICES":
        (pathlib.Path(__file__).parent / f"devices-{values[1].decode()}").touch()
sys.addaudithook(note)
"""
pytestmark = pytest.mark.slow


def _python_path(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Makes every Python process of jobs launched later run the code first."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{SOURCE}")


@pytest.mark.long
def test_children_follow_their_parents_in_the_code_that_was_launched(
    cluster: Lab, write_grid: WriteGrid, root: Path, tmp_path: Path
) -> None:
    checkout, grid_dir = tmp_path / "checkout", root / "tiny"
    for package in ("quantizers", "models", "suite", "launch", "analysis"):
        shutil.copytree(SOURCE / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    as_author = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "launched"]):
        subprocess.run([*as_author, *words], check=True)
    commit = subprocess.check_output([*as_author, "rev-parse", "HEAD"], text=True).strip()
    with (checkout / "suite" / "training" / "seeds.py").open("a", encoding="utf-8") as file:
        file.write("\n# not committed\n")
    (checkout / "suite" / "new.py").touch()
    blocks = [
        {"quantizers": ["fp"], "seeds": [0]},
        {"quantizers": ["fp"], "seeds": [1], "training": DIVERGING},
        {"quantizers": ["bc"], "seeds": [0, 1], "init": "finetune"},
    ]
    nodes = ",".join(cluster.nodes)
    cluster.run("scontrol", "update", f"nodename={nodes}", "state=drain", "reason=test")
    on_finish = 'echo "$PROXBENCH_SUMMARY" >> finished'
    words = command("grid", write_grid(blocks=blocks), *MODEST, "--workers", "1", "--root", root)
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    answer = subprocess.run(
        [*words, "--on-finish", on_finish], cwd=checkout, env=environment, check=True, capture_output=True, text=True
    )
    assert answer.stdout.startswith("submitted 1 worker for 4 cells"), answer
    for path in checkout.rglob("*.py"):
        path.write_text("raise AssertionError('edited since')\n", encoding="utf-8")
    cluster.run("scontrol", "update", f"nodename={nodes}", "state=resume")
    until_queue_is_empty(grid_dir)

    rows = standings(grid_dir)
    assert {name: (row.state.state, row.state.cause) for name, row in rows.items()} == {
        "fp/s0": ("done", None),
        "fp/s1": ("failed", "nan"),
        "bc/s0/finetune": ("done", None),
        "bc/s1/finetune": ("queued", None),
    }, told(grid_dir)
    assert rows["fp/s1"].state.attempt == 1, "a NaN would recur: it is not retried"
    assert len({row.state.job_id for row in rows.values() if row.state.attempt}) == 1
    assert (grid_dir / "finished").read_text(encoding="utf-8") == "2 done, 1 queued, 1 failed\n"
    shown = launch("status", "--root", root).stdout
    assert "waits: needs digits/resnet8/fp/s1, which failed: nan" in shown
    assert "the loss is" in shown, "the reason, and the last lines of the log"
    code = run_of(grid_dir, "fp/s0").provenance()["code"]
    assert code["commit"] == commit
    assert "+# not committed" in code["diff"]
    assert code["untracked"] == "suite/new.py"


@pytest.mark.long
def test_limits_on_jobs_and_arrays_refuse_no_grid_and_a_worker_by_hand_takes_its_share(
    write_grid: WriteGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, grid_dir = tmp_path / "runs", tmp_path / "runs" / "tiny"
    grid = write_grid(quantizers=["fp", "bc"], seeds=[0, 1, 2, 3])
    with Lab(Settings(num_nodes=1, cpus_per_node=2, gpus_per_node=0, max_array_size=4)) as lab:
        monkeypatch.setenv("SLURM_CONF", str(lab.conf))
        lab.run("sacctmgr", "-i", "-Q", "modify", "user", "root", "where", "account=lab", "set", "MaxSubmitJobs=5")
        answer = launch("grid", grid, *MODEST, "--root", root)
        assert answer.stdout.startswith("submitted 5 workers for 8 cells (job "), answer
        assert "3 more workers will be submitted as SLURM's limits allow" in answer.stdout
        by_hand = subprocess.Popen(command("worker", "--root", root), cwd=SOURCE, stdout=subprocess.DEVNULL)
        until_queue_is_empty(grid_dir)
        assert by_hand.wait(60) == 0
    rows = standings(grid_dir)
    assert {row.state.state for row in rows.values()} == {"done"}, told(grid_dir)
    assert {row.state.attempt for row in rows.values()} == {1}
    workers = registry.workers(grid_dir)
    assert sorted(worker.job_id == "" for worker in workers) == [False] * 5 + [True]
    assert len({worker.job_id.partition("_")[0] for worker in workers}) == 3, (
        "an array of 4, a job, and the worker started by hand"
    )


@pytest.mark.long
def test_a_sick_node_loses_its_worker_and_no_cell(
    write_grid: WriteGrid, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid_dir = root / "tiny"
    _python_path(monkeypatch, tmp_path / "site", SICK)
    grid = write_grid(quantizers=["fp", "bc", "bnn", "bnn++"])
    launch("grid", grid, *MODEST, "--workers", "1", "--root", root)
    until_queue_is_empty(grid_dir)
    assert set(states(grid_dir).values()) == {"done"}, told(grid_dir)
    assert sorted(row.state.attempt for row in standings(grid_dir).values()) == [1, 2, 2, 2]
    sick, healthy = registry.workers(grid_dir)
    assert sick.host == "node1" != healthy.host
    reason = "retired: 3 cells failed here without a step; look at node1"
    assert f"worker 1 {reason}" in launch("status", "--root", root).stdout


def test_what_dies_before_python_is_told_and_not_handed_in_again(write_grid: WriteGrid, root: Path) -> None:
    cases = {
        "setup": (("--setup", "module load cuda/99"), "setup line 'module load cuda/99' failed: "),
        "python": (("--python", "/nowhere/python"), "Python did not start (exit status "),
    }
    for name, (flags, _) in cases.items():
        answer = launch("grid", write_grid(name=name, seeds=[0, 1]), *MODEST, *flags, "--workers", "3", "--root", root)
        assert answer.stdout.startswith("submitted 3 workers for 4 cells"), answer
    until_queue_is_empty(root / "python")
    for name, (_, reason) in cases.items():
        grid_dir = root / name
        assert len(deaths(grid_dir)) == 3
        said = launch("status", name, "--root", root).stdout
        assert said.count(reason) == 3, said
        assert "no worker; to resume: python -m launch grid" in said
        logs = launch("logs", "fp/s0", "--grid", name, "--root", root).stdout
        assert {"setup": "module: command not found", "python": "/nowhere/python"}[name] in logs
        assert {row.state.attempt for row in standings(grid_dir).values()} == {0}
        assert supply(grid_dir) == HandedIn()
        assert launch("scale", "2", "--grid", name, "--root", root).stdout.endswith("; 2 submitted\n"), "a user may"


def test_a_job_of_two_gpus_has_a_slot_on_each_and_a_gpu_that_torch_does_not_see_is_an_error(
    write_grid: WriteGrid, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid_dir = root / "tiny"
    _python_path(monkeypatch, tmp_path / "site", NOTE_DEVICES)
    two = ("--partition", "gpu", "--gpus-per-node", "2", "--mem", "1G", "--time", "1h", "--root", root)
    answer = launch("grid", write_grid(), *two)
    assert answer.stdout.startswith("submitted 1 worker for 2 cells"), answer
    until_queue_is_empty(grid_dir)
    (worker,) = registry.workers(grid_dir)
    assert (worker.num_slots, worker.num_gpus) == (2, 2)
    assert sorted(path.name for path in (tmp_path / "site").glob("devices-*")) == ["devices-0", "devices-1"]
    rows = standings(grid_dir).values()
    assert {(row.state.state, row.state.cause) for row in rows} == {("failed", "error")}
    assert all("sees no GPU, though SLURM_JOB_GPUS is 0,1" in row.state.reason for row in rows)
