"""`python -m launch doctor`: checks everything a grid needs, here and where its jobs run, and names each fix."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

from launch.doctor.diagnosis import Finding, Report, Verdict, of_partition, of_report
from launch.doctor.probe import AGAIN, REPORT, SIGNALLED, trouble_with_server
from launch.slurm import client as slurm
from launch.slurm import hand_over
from launch.slurm.resources import ProfileError, Resources, check
from launch.worker.spec import WorkerSpec
from suite.run.locks import locked
from suite.run.mlflow_replica import default_uri

QUEUE_SECONDS = 60
"""How long the probe job may wait for a node."""
PROBE_SECONDS = 120
SIGNAL_SECONDS = 60
"""How long a signal may take to reach the job, and how long SLURM may take to restart it."""
LOOK_SECONDS = 3.0
"""Interval between queue lookups for the probe job: long, to spare the controller."""
JOB_MINUTES = 15
_COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "srun")
_STYLES: dict[Verdict, str] = {"ok": "green", "absent": "yellow", "can't tell": "yellow", "problem": "bold red"}
_CODE = Path(__file__).resolve().parents[1]
"""Folder of the package `launch`."""


def doctor(root: Path, data_dir: Path, tracking_uri: str | None, resources: Resources | None, console: Console) -> bool:
    """Prints each finding at once; returns whether a grid could run.

    Args:
        root: folder of the grids.
        data_dir: folder of the data sets.
        tracking_uri: the MLflow store; None: the one in ROOT.
        resources: what the jobs request; None: cells run on this machine.
        console: where to print.
    """
    uri = tracking_uri or default_uri(root)
    is_well = True
    for finding in _examined(root, data_dir, uri, resources, console):
        console.print(_line(finding), soft_wrap=True)
        is_well &= finding.verdict != "problem"
    return is_well


def _line(finding: Finding) -> Text:
    line = Text.assemble(
        (f"{finding.verdict:<11}", _STYLES[finding.verdict]), f"{finding.what}: ", (finding.said, "dim")
    )
    return line.append(f"\n{'':<11}→ {finding.fix}") if finding.fix else line


def _examined(root: Path, data_dir: Path, uri: str, resources: Resources | None, console: Console) -> Iterator[Finding]:
    jobs_can_start = True
    if resources is not None or slurm.available():
        for finding in _slurm(resources):
            jobs_can_start &= finding.verdict != "problem"
            yield finding
    yield _store(uri)
    try:
        with _folder_in(root) as folder:
            if resources is None or jobs_can_start:
                where = (
                    "this machine"
                    if resources is None
                    else f"a node of {resources.partition or 'the default partition'}"
                )
                with console.status(f"checking {where}"):
                    found = list(_probed(folder, data_dir, uri, resources))
                yield from found
            else:
                yield Finding("can't tell", "the nodes", "no job can start; see above")
    except OSError as error:
        yield Finding("problem", "ROOT here", f"{error.strerror}: {error.filename}", "name another with --root")


def _slurm(resources: Resources | None) -> Iterator[Finding]:
    """Checks the commands, the controller, the partition, and whether jobs may request these resources."""
    missing = [command for command in _COMMANDS if shutil.which(command) is None]
    if missing:
        fix = "run this on a login node of the cluster, or run `module load slurm` first"
        yield Finding("problem", "SLURM's commands", f"not on PATH: {', '.join(missing)}", fix)
        return
    try:
        yield Finding("ok", "SLURM", f"{slurm.version()}; {slurm.ping()}")
        partitions = slurm.partitions()
    except slurm.SlurmError as error:
        fix = "run this on a login node; if it is one, ask the administrators whether slurmctld is up"
        yield Finding("problem", "SLURM's controller", str(error), fix)
        return
    yield _accounting()
    if resources is None:
        yield Finding("can't tell", "its nodes", "no partition is named", f"name --partition ({', '.join(partitions)})")
        return
    for name in resources.partitions:
        if name in partitions:
            yield of_partition(partitions[name])
    try:
        check([resources])
        yield Finding("ok", "resources of jobs", _asked(resources))
    except ProfileError as error:
        for line in str(error).splitlines():
            what, _, said = line.rpartition(": ") if line.startswith("--") else ("resources of jobs", "", line)
            yield Finding("problem", what, said, "change the flag, or the key of that name in the profile")


def _accounting() -> Finding:
    associations = slurm.accounts_and_qos()
    if associations is None:
        said = "no answer (sacct, sacctmgr): `status` uses only run directories and the queue"
        return Finding("absent", "SLURM's accounting", said)
    accounts = ", ".join(dict.fromkeys(each.account for each in associations)) or "none for this user"
    return Finding("ok", "SLURM's accounting", f"accounts: {accounts}")


def _asked(resources: Resources) -> str:
    asked = resources.model_dump(exclude_defaults=True) | {"time": f"{resources.time} min"}
    return ", ".join(f"{name} {value}" for name, value in asked.items())


@contextmanager
def _folder_in(root: Path) -> Iterator[Path]:
    """Creates a folder in ROOT for the doctor's files, and deletes it afterwards."""
    is_new = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=root) as folder:
            Path(folder).chmod(0o755)
            yield Path(folder).resolve()
    finally:
        if is_new:
            root.rmdir()


def _probed(folder: Path, data_dir: Path, uri: str, resources: Resources | None) -> Iterator[Finding]:
    """Findings of a probe of this machine, or of a node."""
    nonce = secrets.token_hex(8)
    (folder / "nonce").write_text(nonce, encoding="utf-8")
    server = uri if _is_server(uri) else None
    with locked(folder / "lock"):
        if resources is not None:
            yield from _job(folder, data_dir, server, resources, nonce)
            return
        words = [sys.executable, "-m", "launch.doctor.probe", str(folder), str(data_dir.resolve())]
        line, said, arrived = _run([*words, *(["--tracking-uri", server] if server else [])])
    if not line:
        last = said.splitlines()[-1] if said else f"no output within {PROBE_SECONDS} s"
        fix = "for details: python -m launch.doctor.probe . ."
        yield Finding("problem", "probe of this machine", last, fix)
        return
    yield from of_report(Report(json.loads(line), arrived, nonce, data_dir.is_dir(), 0, server, is_local=True))


def _job(folder: Path, data_dir: Path, server: str | None, resources: Resources, nonce: str) -> Iterator[Finding]:
    """Submits a real worker's job: checks its report, whether signals reach it, and whether SLURM restarts it."""
    spec = WorkerSpec(folder, data_dir.resolve(), _CODE.parent, probe=server or "none")
    path = spec.write(folder / "jobs" / "doctor" / "spec.json")
    asked = resources.model_copy(update={"time": min(resources.time, JOB_MINUTES)})
    try:
        job_id = hand_over.submit(asked, path, 1)
    except slurm.SlurmError as error:
        yield Finding("problem", "a worker on the nodes", str(error), "change the flag, or the profile's key")
        return
    report = folder / REPORT
    try:
        job = _wait_for(report.exists, job_id, QUEUE_SECONDS + PROBE_SECONDS)
        if not report.exists():
            yield _no_report(path.parent, job, resources)
            return
        found = json.loads(report.read_text(encoding="utf-8"))
        arrived = report.stat().st_mtime  # by the file server's clock
        here = folder / "clock"
        here.touch()
        arrived += time.time() - here.stat().st_mtime  # by this machine's
        data_is_here, num_gpus = data_dir.is_dir(), resources.num_gpus
        yield from of_report(Report(found, arrived, nonce, data_is_here, num_gpus, server, is_local=False))
        if found["nonce"] == nonce and not found["folder"] and not _answered(folder, nonce):
            fix = "put --root on a file system that the nodes share"
            yield Finding("problem", "shared file system", "files that a node writes to ROOT do not appear here", fix)
            return
        yield from _signalled(folder, job_id, found["node"])
    finally:
        slurm.cancel([job_id])


def _signalled(folder: Path, job_id: str, node: str) -> Iterator[Finding]:
    """Whether SIGUSR2 reaches a worker, as before a time limit, and whether SLURM restarts it if work is left."""
    slurm.signal(job_id, "USR2")
    job = _wait_for((folder / SIGNALLED).exists, job_id, SIGNAL_SECONDS)
    if not (folder / SIGNALLED).exists():
        fix = "at a time limit, cells lose all steps since their last checkpoint: add --checkpoint-minutes 5"
        yield Finding("problem", f"signals on {node}", "SIGUSR2 did not reach a worker", fix)
        return
    yield Finding("ok", f"signals on {node}", "SIGUSR2 reaches a worker")
    deadline = time.monotonic() + SIGNAL_SECONDS
    while time.monotonic() < deadline:
        job = slurm.queue().get(job_id)
        if job is None or job.state not in {"RUNNING", "COMPLETING"} or (folder / AGAIN).exists():
            break
        time.sleep(LOOK_SECONDS)
    if job is not None:
        yield Finding("ok", "requeue", "SLURM restarts a worker that leaves work behind")
        return
    said = "SLURM does not restart jobs here: workers submit successors if sbatch works on nodes"
    yield Finding("absent", "requeue", said, "if sbatch does not work there, launch again when jobs have ended")


def _wait_for(is_there: Callable[[], bool], job_id: str, seconds: float) -> slurm.JobInfo | None:
    """Waits until `is_there()`, the job is gone, or time is up; returns the job as last seen in the queue."""
    started: float | None = None
    begin = look_at = time.monotonic()
    job: slurm.JobInfo | None = None
    while not is_there():
        now = time.monotonic()
        if now >= look_at:
            look_at = now + LOOK_SECONDS
            job = slurm.queue().get(job_id)
            if job is None:
                return None
            started = started or (now if job.state == "RUNNING" else None)
        if now - begin > seconds or (started is None and now - begin > QUEUE_SECONDS):
            return job
        time.sleep(0.2)
    return job


def _run(command: list[str]) -> tuple[str, str, float]:
    """Runs the probe; returns its line (or ''), its standard error, and when the line arrived."""
    environment = slurm.environment() | {"PYTHONPATH": os.pathsep.join([str(_CODE.parent), *_python_path()])}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return "", "", time.time()
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"node"')]
    return (lines or [""])[-1], done.stderr.strip(), time.time()


def _python_path() -> list[str]:
    return [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]


def _no_report(folder: Path, job: slurm.JobInfo | None, resources: Resources) -> Finding:
    """Explains why no worker reported. `job`: as last seen in the queue."""
    if job is not None and job.state != "RUNNING":
        where = resources.partition or "the default partition"
        fix = f"look at squeue --partition={where}, and try again later"
        reason = f" ({job.reason})" if job.reason else ""
        return Finding("can't tell", "the nodes", f"none was free within {QUEUE_SECONDS} s{reason}", fix)
    logs = sorted(folder.glob("*_log.out"))
    said = logs[-1].read_text(encoding="utf-8", errors="replace").strip() if logs else ""
    died = hand_over.died(folder)
    python = resources.python or sys.executable
    if "No module named" in said:
        fix = "install proxbench there, or name an interpreter that has it with --python"
        last = next(line for line in reversed(said.splitlines()) if "No module named" in line)
        return Finding("problem", "proxbench on the nodes", f"{python}: {last}", fix)
    if "No such file or directory" in said or "not found" in said:
        fix = "name an interpreter that the nodes have with --python, or add --setup 'module load ...'"
        what = died[-1].reason if died else f"{python} does not exist"
        return Finding("problem", "Python on the nodes", what, fix)
    last = died[-1].reason if died else said.splitlines()[-1] if said else f"no output within {PROBE_SECONDS} s"
    return Finding("problem", "a worker on the nodes", last, "fix this error; sbatch with the same options shows it")


def _answered(folder: Path, nonce: str) -> bool:
    """Whether the node's file appears here within 10 s: a network file system may take that long."""
    path = folder / "answer"
    for _ in range(20):
        if path.exists() and path.read_text(encoding="utf-8") == nonce:
            return True
        time.sleep(0.5)
    return False


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _store(uri: str) -> Finding:
    """Whether runs can be copied to MLflow from here."""
    if _is_server(uri):
        if (trouble := trouble_with_server(uri)) is None:
            return Finding("ok", "MLflow", f"{uri} answers")
        fix = "start it (mlflow server), or omit --tracking-uri: the store in ROOT needs no server"
        return Finding("problem", "MLflow", f"{uri}: {trouble}", fix)
    if not uri.startswith("sqlite:///"):
        return Finding("can't tell", "MLflow", f"{uri} is neither a server nor a sqlite file")
    path = Path(uri.removeprefix("sqlite:///"))
    nearest = next(each for each in (path, *path.parents) if each.exists())
    if os.access(nearest, os.W_OK):
        return Finding("ok", "MLflow", f"{path} {'is writable' if path.exists() else 'can be created'}")
    return Finding("problem", "MLflow", f"{nearest} is not writable", "name another store with --tracking-uri")
