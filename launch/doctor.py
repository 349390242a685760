"""`python -m launch doctor`: looks at everything a grid needs, here and where its jobs run, and names each fix."""

import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

from rich.console import Console
from rich.text import Text

from launch import slurm
from launch.diagnosis import Finding, Report, Verdict, of_partition, of_report
from launch.probe import trouble_with_server
from launch.resources import ProfileError, Resources, check, srun_arguments
from suite.run.locks import locked
from suite.run.mlflow_replica import default_uri

QUEUE_SECONDS = 60
"""How long the probe job may wait for a node."""
PROBE_SECONDS = 120
_COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "srun")
_STYLES: dict[Verdict, str] = {"ok": "green", "absent": "yellow", "can't tell": "yellow", "problem": "bold red"}
_CODE = Path(__file__).resolve().parents[1]


def doctor(root: Path, data_dir: Path, tracking_uri: str | None, resources: Resources | None, console: Console) -> bool:
    """Prints what it finds as it finds it; returns whether a grid could run.

    Args:
        root: where runs lie.
        data_dir: where data sets lie.
        tracking_uri: the MLflow store; None is the one in ROOT.
        resources: of the jobs; None where they run here.
        console: to print on.
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
                where = "this machine" if resources is None else f"a node of {resources.partition}"
                with console.status(f"looking at {where}"):
                    found = list(_probed(folder, data_dir, uri, resources))
                yield from found
            else:
                yield Finding("can't tell", "the nodes", "no job can start; see above")
    except OSError as error:
        yield Finding("problem", "ROOT here", f"{error.strerror}: {error.filename}", "name another with --root")


def _slurm(resources: Resources | None) -> Iterator[Finding]:
    """The commands, the controller, the partition, what may be asked for."""
    missing = [command for command in _COMMANDS if shutil.which(command) is None]
    if missing:
        fix = "run this on a login node of the cluster, or say `module load slurm` first"
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
    if resources.partition in partitions:
        yield of_partition(partitions[resources.partition])
    try:
        check([resources])
        yield Finding("ok", "what jobs ask for", _asked(resources))
    except ProfileError as error:
        for line in str(error).splitlines():
            what, _, said = line.rpartition(": ") if line.startswith("--") else ("what jobs ask for", "", line)
            yield Finding("problem", what, said, "change the flag, or the key of that name in the profile")


def _accounting() -> Finding:
    associations = slurm.accounts_and_qos()
    if associations is None:
        said = "no answer (sacct, sacctmgr): `status` goes by run directories and the queue alone"
        return Finding("absent", "SLURM's accounting", said)
    accounts = ", ".join(dict.fromkeys(each.account for each in associations)) or "none for this user"
    return Finding("ok", "SLURM's accounting", f"accounts: {accounts}")


def _asked(resources: Resources) -> str:
    asked = resources.model_dump(exclude_defaults=True) | {"time": f"{resources.time} min"}
    return ", ".join(f"{name} {value}" for name, value in asked.items())


@contextmanager
def _folder_in(root: Path) -> Iterator[Path]:
    """A folder in ROOT for the doctor's files; leaves nothing behind."""
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
    """What the probe says of this machine, or of a node."""
    nonce = secrets.token_hex(8)
    (folder / "nonce").write_text(nonce, encoding="utf-8")
    server = uri if _is_server(uri) else None
    words = ["-m", "launch.probe", str(folder), str(data_dir.resolve())]
    words += ["--tracking-uri", server] if server else []
    command = [sys.executable, *words] if resources is None else _job(resources, words, [folder, data_dir, _CODE])
    with locked(folder / "lock"):
        line, said, arrived = _run(command)
    if not line:
        yield _no_report(said, resources)
        return
    num_gpus = resources.gpus_per_node if resources else 0
    data_is_here = data_dir.is_dir()
    report = Report(json.loads(line), arrived, nonce, data_is_here, num_gpus, server, is_local=resources is None)
    yield from of_report(report)
    if report.found["nonce"] == nonce and not report.found["folder"] and not _answered(folder, nonce):
        fix = "put --root on a file system that the nodes share"
        yield Finding("problem", "shared file system", "what a node writes to ROOT does not show here", fix)


def _job(resources: Resources, words: list[str], mounts: list[Path]) -> list[str]:
    """Srun of the probe as one small task, with what a job's Python gets."""
    options = {
        "job-name": "proxbench-doctor",
        "partition": resources.partition,
        "nodes": 1,
        "ntasks": 1,
        "gpus-per-node": resources.gpus_per_node or None,
        "mem": resources.mem,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "time": 2,
        "immediate": QUEUE_SECONDS,
        "chdir": _CODE,
    }
    python = resources.python or shlex.quote(sys.executable)  # python may be several words, as in submitit
    script = "\n".join([*resources.setup, f"exec {python} {shlex.join(words)}"])
    return [
        "srun",
        *(f"--{name}={value}" for name, value in options.items() if value is not None),
        *srun_arguments(resources.model_copy(update={"cpus_per_task": 1}), mounts),
        *("bash", "-c", script),
    ]


def _run(command: list[str]) -> tuple[str, str, float]:
    """The probe's line, or nothing; what else was said, the last line of it; and when the line came."""
    environment = slurm.environment() | {"PYTHONPATH": os.pathsep.join([str(_CODE), *_python_path()])}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(
            command, env=environment, cwd=_CODE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        timer = Timer(QUEUE_SECONDS + PROBE_SECONDS, process.terminate)
        timer.start()
        line, arrived = "", 0.0
        for each in process.stdout or ():
            if each.startswith('{"node"'):  # --setup's commands may speak, too
                line, arrived = each, time.time()
        process.wait()
        timer.cancel()
        errors.seek(0)
        return line, errors.read().strip(), arrived


def _python_path() -> list[str]:
    return [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]


def _no_report(said: str, resources: Resources | None) -> Finding:
    """Why no probe came back."""
    last = said.splitlines()[-1] if said else f"nothing within {QUEUE_SECONDS + PROBE_SECONDS} s"
    if resources is None:
        return Finding("problem", "a probe here", last, "run it by itself to see more: python -m launch.probe . .")
    if "Requested nodes are busy" in said:
        fix = f"look at squeue --partition={resources.partition}, and ask again later"
        return Finding("can't tell", "the nodes", f"none was free within {QUEUE_SECONDS} s", fix)
    python = resources.python or sys.executable
    if "No such file or directory" in said or "not found" in said:
        fix = "name an interpreter that the nodes see with --python, or say --setup 'module load ...'"
        return Finding("problem", "Python on the nodes", f"{python} is not there", fix)
    if "No module named" in said:
        fix = "install proxbench there, or name an interpreter that has it with --python"
        return Finding("problem", "proxbench on the nodes", f"{python}: {last}", fix)
    return Finding(
        "problem", "a job on the nodes", last, "mend what SLURM says there; srun with the same flags shows it"
    )


def _answered(folder: Path, nonce: str) -> bool:
    """Whether the node's file shows here, for which a network file system may take a while."""
    path = folder / "answer"
    for _ in range(20):
        if path.exists() and path.read_text(encoding="utf-8") == nonce:
            return True
        time.sleep(0.5)
    return False


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _store(uri: str) -> Finding:
    """Whether runs can be brought to MLflow from here."""
    if _is_server(uri):
        if (trouble := trouble_with_server(uri)) is None:
            return Finding("ok", "MLflow", f"{uri} answers")
        fix = "start it (mlflow server), or leave --tracking-uri out: a store in ROOT needs none"
        return Finding("problem", "MLflow", f"{uri}: {trouble}", fix)
    if not uri.startswith("sqlite:///"):
        return Finding("can't tell", "MLflow", f"{uri} is neither a server nor a sqlite file")
    path = Path(uri.removeprefix("sqlite:///"))
    nearest = next(each for each in (path, *path.parents) if each.exists())
    if os.access(nearest, os.W_OK):
        return Finding("ok", "MLflow", f"{path} {'is' if path.exists() else 'can be'} written")
    return Finding("problem", "MLflow", f"{nearest} may not be written", "name another place with --tracking-uri")
