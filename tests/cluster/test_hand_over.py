"""Workers on a real cluster: what is submitted, what the batch script does when they end, and what SLURM refuses."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.commands import SOURCE
from cluster.configuration import Settings
from cluster.lab import Lab
from launch.slurm import client
from launch.slurm.client import SlurmError
from launch.slurm.hand_over import LimitError, died, refusal, script, submit
from launch.slurm.resources import Resources

WORKER = '''
import json, os, sys, time
from pathlib import Path

def run(spec):
    """Ends as the spec says that this start should: with a status, by a signal (negative), or when it is stopped."""
    folder, fields = Path(spec).parent, json.loads(Path(spec).read_text())
    array, restart = os.environ.get("SLURM_ARRAY_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    task = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    seen = {"cwd": os.getcwd(), "environment": dict(os.environ)}
    (folder / f"{task}-{restart}.began").write_text(json.dumps(seen))
    end = fields["ends"][min(restart, len(fields["ends"]) - 1)]
    if end == "when stopped":
        import signal
        stopped = []
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.append(1))
        while not stopped:
            time.sleep(0.05)
        end = 75
    if end == "memory":
        hog = bytearray(600 << 20)
        time.sleep(60)
    if end < 0:
        os.kill(os.getpid(), -end)
    sys.exit(end)
'''
HAND_ON = """
import json, sys
from pathlib import Path

fields = json.loads(Path(sys.argv[2]).read_text())
Path(sys.argv[2]).with_name("handed-on").write_text(json.dumps(sys.argv[1:]))
sys.exit(fields.get("hand_on", 0))
"""
MODEST = Resources(partition="gpu", mem="200M", time=60)
MakeSpec = Callable[..., Path]


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A code snapshot whose worker ends as its spec says."""
    folder = tmp_path_factory.mktemp("code of a grid")
    for package in ("launch", "suite", "quantizers", "models"):
        shutil.copytree(SOURCE / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "launch" / "worker" / "worker.py").write_text(WORKER, encoding="utf-8")
    (folder / "launch" / "worker" / "__main__.py").write_text(HAND_ON, encoding="utf-8")
    return folder


@pytest.fixture
def make_spec(tmp_path: Path, code: Path) -> MakeSpec:
    """Writes a spec that says how each start of a worker ends; the last entry is for all further starts."""

    def make(*ends: int | str, **fields: object) -> Path:
        spec = tmp_path / "a grid" / "jobs" / "token" / "spec.json"
        spec.parent.mkdir(parents=True)
        spec.write_text(json.dumps({"code": str(code), "ends": ends or [0], **fields}), encoding="utf-8")
        return spec

    return make


@pytest.fixture(autouse=True)
def _no_jobs_left(cluster: Lab) -> Iterator[None]:
    yield
    client.cancel(list(client.queue()))
    _wait(cluster, lambda: not client.queue())


def _wait(cluster: Lab, is_true: Callable[[], bool], *folders: Path) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline, (cluster.run("squeue"), [_log(folder) for folder in folders])
        time.sleep(0.1)


def _end(cluster: Lab, job_id: str, *folders: Path) -> None:
    """Waits until the job, with all its tasks, has ended for good."""
    _wait(cluster, lambda: not any(name.partition("_")[0] == job_id for name in client.queue()), *folders)


def _log(folder: Path) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*_log.out")))


def _names(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def _with(**changes: object) -> Resources:
    return Resources.model_validate(MODEST.model_dump(exclude_unset=True) | changes)


def test_several_workers_are_one_array_and_run_the_snapshots_code(
    cluster: Lab, make_spec: MakeSpec, code: Path
) -> None:
    spec = make_spec()
    job_id = submit(MODEST, spec, 3)
    assert {job.name for job in client.queue().values()} == {"a grid-token"}
    _end(cluster, job_id, spec.parent)
    assert _names(spec.parent, "*.began") == [f"{job_id}_{task}-0.began" for task in range(3)], _log(spec.parent)
    assert died(spec.parent) == []
    assert json.loads((spec.parent / f"{job_id}_0-0.began").read_text(encoding="utf-8"))["cwd"] == str(code)


def test_a_worker_with_work_left_is_started_again_by_the_same_job(cluster: Lab, make_spec: MakeSpec) -> None:
    spec = make_spec(75, 0)
    job_id = submit(MODEST, spec, 2)
    _end(cluster, job_id, spec.parent)
    expected = [f"{job_id}_{task}-{restart}.began" for task in range(2) for restart in range(2)]
    assert _names(spec.parent, "*.began") == expected, _log(spec.parent)
    assert not _names(spec.parent, "handed-on")
    assert died(spec.parent) == []


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        (("true", "module load cuda/99"), "setup line 'module load cuda/99' failed: "),
        (('echo "a\\tb" && false',), "setup line 'echo \"a\\tb\" && false' failed: a\\tb"),
        (("set -euo pipefail", "ls /nowhere | cat"), "setup line 'ls /nowhere | cat' failed: ls: cannot access"),
        (("source /nowhere/activate",), "setup line 'source /nowhere/activate' failed: "),
        (("exit 3",), "Python did not start (exit status 3)"),
    ],
)
def test_a_job_whose_setup_fails_ends_before_python_and_says_why(
    cluster: Lab, make_spec: MakeSpec, setup: tuple[str, ...], reason: str
) -> None:
    spec = make_spec()
    job_id = submit(_with(setup=setup), spec, 1)
    _end(cluster, job_id, spec.parent)
    (start,) = died(spec.parent)
    assert start.reason.startswith(reason), (start.reason, _log(spec.parent))
    assert (start.job, start.node in cluster.nodes, start.status > 0) == (job_id, True, True)
    assert abs(time.time() - start.time) < 60
    assert not _names(spec.parent, "*.began")


def test_setup_lines_may_fail_where_shell_allows_it_and_span_lines(cluster: Lab, make_spec: MakeSpec) -> None:
    spec = make_spec()
    sourced = spec.with_name("env.sh")
    sourced.write_text("false\nexport FROM_SETUP=1\n", encoding="utf-8")
    setup = ("false || true", "if false", "then exit 1", "fi", f"source '{sourced}'", "set -e", "cd /")
    _end(cluster, submit(_with(setup=setup), spec, 1), spec.parent)
    (began,) = spec.parent.glob("*.began")
    assert json.loads(began.read_text(encoding="utf-8"))["environment"]["FROM_SETUP"] == "1"


@pytest.mark.parametrize("python", ["/nowhere/python", f"{sys.executable} -m nowhere"])
def test_a_job_without_a_working_python_is_not_started_again(cluster: Lab, make_spec: MakeSpec, python: str) -> None:
    spec = make_spec()
    _end(cluster, submit(_with(python=python), spec, 1), spec.parent)
    (start,) = died(spec.parent)
    assert start.reason.startswith("Python did not start (exit status "), start
    assert "nowhere" in start.reason


def test_the_launchers_variables_bend_neither_sbatch_nor_the_job(
    cluster: Lab, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    bending = {
        "SBATCH_PARTITION": "debug",
        "SBATCH_NO_REQUEUE": "1",
        "SBATCH_WAIT": "1",
        "SBATCH_EXPORT": "NONE",
        "SBATCH_TIMELIMIT": "1",
        "SLURM_CPU_BIND": "map_cpu:77",
        "SLURM_MEM_PER_CPU": "1",
        "SRUN_CONTAINER": "x",
    }
    for name, value in (bending | {"KEPT": "yes"}).items():
        monkeypatch.setenv(name, value)
    spec = make_spec(75, 0)
    job_id = submit(MODEST, spec, 1)
    assert os.environ["SBATCH_PARTITION"] == "debug"
    shown = cluster.run("scontrol", "--oneliner", "show", "job", job_id)
    assert {"Partition=gpu", "Requeue=1", "TimeLimit=01:00:00"} <= set(shown.split())
    _end(cluster, job_id, spec.parent)
    began = json.loads((spec.parent / f"{job_id}-1.began").read_text(encoding="utf-8"))
    assert began["environment"]["KEPT"] == "yes"
    assert not [name for name in bending if began["environment"].get(name) == bending[name]]


def test_a_launch_from_inside_a_job_is_like_any_other(cluster: Lab, make_spec: MakeSpec) -> None:
    spec = make_spec(0)
    program = (
        "from pathlib import Path; from launch.slurm.hand_over import submit;"
        "from launch.slurm.resources import Resources;"
        f"print(submit(Resources(partition='gpu', mem='200M', time=60), Path({str(spec)!r}), 2))"
    )
    around = ("salloc", "-Q", "-p", "debug", "--mem-per-cpu=150", "--gpus-per-node=1", "--time=5")
    step = ("srun", "--cpu-bind=none", f"--chdir={SOURCE}", sys.executable, "-c", program)
    job_id = cluster.run(*around, *step)
    _end(cluster, job_id.strip(), spec.parent)
    assert len(_names(spec.parent, "*.began")) == 2, _log(spec.parent)


def test_a_site_that_exports_nothing_starts_workers(cluster: Lab, make_spec: MakeSpec) -> None:
    spec = make_spec()
    _end(cluster, submit(_with(sbatch={"export": "NONE"}), spec, 1), spec.parent)
    assert len(_names(spec.parent, "*.began")) == 1, _log(spec.parent)


@pytest.mark.parametrize(("hand_on", "has_advice"), [(0, False), (1, True)])
def test_a_job_that_may_not_be_requeued_hands_on(
    cluster: Lab, make_spec: MakeSpec, hand_on: int, has_advice: bool
) -> None:
    spec = make_spec(75, hand_on=hand_on)
    job_id = submit(_with(sbatch={"no-requeue": "true"}), spec, 1)
    _end(cluster, job_id, spec.parent)
    assert json.loads(spec.with_name("handed-on").read_text(encoding="utf-8")) == ["hand-on", str(spec)]
    assert _names(spec.parent, "*.began") == [f"{job_id}-0.began"]
    assert ("launch the grid again: python -m launch grid 'a grid'" in _log(spec.parent)) is has_advice


@pytest.mark.parametrize("grace", [0, 10])
def test_a_worker_that_preemption_cancels_goes_on(cluster: Lab, make_spec: MakeSpec, grace: int) -> None:
    spec = make_spec("when stopped", 0)
    cluster.run("scontrol", "update", "PartitionName=gpu", "PreemptMode=CANCEL", f"GraceTime={grace}")
    try:
        options = {"nodelist": "node1", "exclusive": "true"}
        job_id = submit(_with(sbatch=options), spec, 1)
        _wait(cluster, lambda: bool(_names(spec.parent, "*.began")), spec.parent)
        urgent = ("--parsable", "-p", "urgent", "-w", "node1", "--exclusive", "-o", "/dev/null", "--chdir", "/")
        cluster.run("sbatch", *urgent, "--wrap", "true")
        _end(cluster, job_id, spec.parent)
        went_on = _names(spec.parent, "handed-on") + _names(spec.parent, f"{job_id}-1.began")
        assert len(went_on) == 1, _log(spec.parent)
        assert died(spec.parent) == []
    finally:
        cluster.run("scontrol", "update", "PartitionName=gpu", "PreemptMode=REQUEUE", "GraceTime=0")


def test_a_cancelled_worker_stays_away(cluster: Lab, make_spec: MakeSpec) -> None:
    spec = make_spec("when stopped")
    job_id = submit(MODEST, spec, 2)
    _wait(cluster, lambda: len(_names(spec.parent, "*.began")) == 2, spec.parent)
    client.cancel([job_id])
    _end(cluster, job_id, spec.parent)
    assert len(_names(spec.parent, "*.began")) == 2
    assert not _names(spec.parent, "handed-on")
    assert died(spec.parent) == []


def test_a_worker_that_was_killed_is_told_and_started_again(cluster: Lab, make_spec: MakeSpec) -> None:
    spec = make_spec(-9, 0)
    job_id = submit(MODEST, spec, 1)
    _end(cluster, job_id, spec.parent)
    (start,) = died(spec.parent)
    assert (start.job, start.status) == (job_id, 137)
    assert start.reason == "the job's step was killed (status 137): out of memory?"
    assert _names(spec.parent, "*.began") == [f"{job_id}-0.began", f"{job_id}-1.began"]


def test_a_worker_that_failed_is_not_started_again(cluster: Lab, make_spec: MakeSpec) -> None:
    spec = make_spec(1)
    job_id = submit(MODEST, spec, 1)
    _end(cluster, job_id, spec.parent)
    assert _names(spec.parent, "*.began") == [f"{job_id}-0.began"]
    assert died(spec.parent) == []


@pytest.mark.slow
def test_a_worker_that_slurm_kills_for_its_memory_is_told(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lab(Settings(num_nodes=1, accounting=False, over_memory_kill=True)) as lab:
        monkeypatch.setenv("SLURM_CONF", str(lab.conf))
        spec = make_spec("memory", 0)
        job_id = submit(_with(mem="300M"), spec, 1)
        _end(lab, job_id, spec.parent)
        assert [start.job for start in died(spec.parent)] == [job_id], _log(spec.parent)
        assert _names(spec.parent, "*.began") == [f"{job_id}-0.began", f"{job_id}-1.began"]


def test_too_many_jobs_are_a_limit_and_leave_nothing_behind(cluster: Lab, make_spec: MakeSpec) -> None:
    spec = make_spec()
    change = ("sacctmgr", "-i", "-Q", "modify", "user", "root", "where", "account=lab", "set")
    cluster.run(*change, "MaxSubmitJobs=2")
    try:
        with pytest.raises(LimitError, match=r"^sbatch: AssocMaxSubmitJobLimit; .*violates accounting/QOS policy"):
            submit(MODEST, spec, 3)
        assert [path.name for path in spec.parent.iterdir()] == ["spec.json"]
        assert client.limits(None, None) == 2
        job_id = submit(MODEST, spec, 2)
        _end(cluster, job_id, spec.parent)
    finally:
        cluster.run(*change, "MaxSubmitJobs=-1")


def test_an_array_beyond_the_largest_is_a_limit(cluster: Lab, make_spec: MakeSpec) -> None:
    spec = make_spec()
    with pytest.raises(LimitError, match=r"^sbatch: Batch job submission failed: Invalid job array specification$"):
        submit(MODEST, spec, cluster.settings.max_array_size + 1)
    assert [path.name for path in spec.parent.iterdir()] == ["spec.json"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"account": "nobody"},
            "sbatch: Batch job submission failed: Invalid account or account/partition combination",
        ),
        ({"mem": "999T"}, "sbatch: Memory specification can not be satisfied; Batch job submission failed: Requested "),
        ({"sbatch": {"no-such": "1"}}, "sbatch: unrecognized option '--no-such=1'"),
        ({"setup": ("if true",)}, "--setup: not valid shell: bash: line "),
    ],
)
def test_any_other_refusal_says_why_in_one_line_and_leaves_nothing_behind(
    capfd: pytest.CaptureFixture[str], make_spec: MakeSpec, changes: dict[str, object], said: str
) -> None:
    spec = make_spec()
    with pytest.raises(SlurmError) as caught:
        submit(_with(**changes), spec, 2)
    assert not isinstance(caught.value, LimitError)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in spec.parent.iterdir()] == ["spec.json"]


POLICY = "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time)"


@pytest.mark.parametrize(
    ("said", "is_limit"),
    [
        (f"sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: {POLICY}", True),
        (f"sbatch: error: QOSGrpSubmitJobsLimit\nsbatch: error: {POLICY}", True),
        (f"sbatch: error: MaxSubmitJobsPerAccount\nsbatch: error: {POLICY}", True),
        (f"sbatch: error: {POLICY}", True),
        (f"sbatch: error: QOSMaxWallDurationPerJobLimit\nsbatch: error: {POLICY}", False),
        ("sbatch: error: Batch job submission failed: Invalid qos specification", False),
        ("", False),
    ],
)
def test_a_limit_of_submission_is_told_from_other_limits(said: str, is_limit: bool) -> None:
    assert isinstance(refusal(said), LimitError) is is_limit


def test_nodes_to_stay_away_from_add_up_and_the_script_needs_no_spec(cluster: Lab, tmp_path: Path) -> None:
    assert cluster.nodes
    resources = _with(sbatch={"exclude": "node1"})
    text = script(resources, tmp_path / "grid" / "jobs" / "token" / "spec.json", 4, ["node2", "node3"])
    assert "#SBATCH --exclude=node1,node2,node3\n" in text
    assert "#SBATCH --array=0-3%4\n" in text
    assert "--hold" not in text
    assert not (tmp_path / "grid").exists()


def test_a_record_that_cannot_be_read_is_a_dead_start_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "12_3-1.died").touch()
    (start,) = died(tmp_path)
    assert (start.job, start.reason) == ("12_3", "see its log")
