"""Submits workers to SLURM through submitit, and reports workers that never started.

A job is one worker: `launch.worker.worker.run` on a spec, GRID/jobs/TOKEN/spec.json. Beside the spec are its script,
pickle and log, and two marker files for each start of a job: TASK-RESTART.began, which the worker touches first, and
TASK-RESTART.died, which the batch script writes if the worker did not begin or was killed.
"""

import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from launch.slurm import client
from launch.slurm.client import SlurmError
from launch.slurm.resources import Resources, sbatch_parameters
from launch.worker.spec import EXIT_AGAIN

SIGNAL_SECONDS = 120
"""How long before its time limit SLURM signals a job to save its checkpoints."""
_LIMITS = ("Submit", "Invalid job array specification", "queue full", "temporarily")
"""How sbatch reports too many jobs: AssocMaxSubmitJobLimit, QOSMaxSubmitJobPerUserLimit, ..."""
_POLICY = "Job violates accounting/QOS policy"
"""Some limit was exceeded. On most sites, an earlier line says which: a submission limit, or one on size or time."""
_MAX_RESTARTS = 20
_BEGINNING = r"""
# The script survives stop signals, to decide what comes next.
trap : USR2 TERM
# Set if sbatch exports nothing; srun would then export nothing either.
unset SLURM_EXPORT_ENV
# SLURM_JOB_ID of an array's last task is the whole array's.
task=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; task=${task:-$SLURM_JOB_ID}
restarts=${SLURM_RESTART_COUNT:-0}
start=@FOLDER@/$task-$restarts
again() {
  case $(scontrol --oneliner show job "$task" 2>/dev/null) in
    *JobState=RUNNING*) if scontrol requeue "$task"; then sleep 60; return; fi ;;
    *PreemptTime=[0-9]*) ;;  # with PreemptMode=CANCEL
    ?*) return ;;  # SLURM is already requeueing it, or it was cancelled
  esac
  @PYTHON@ -m launch.worker hand-on @SPEC@ || echo @ADVICE@
}
died() {
  case $(scontrol --oneliner show job "$task" 2>/dev/null) in *JobState=RUNNING*|'') ;; *) return ;; esac
  local reason=${1//\\/\\\\}; reason=$(tr -d '\000-\037' <<< "${reason//\"/\\\"}")
  printf '{"job": "%s", "status": %d, "node": "%s", "reason": "%s", "time": %d}\n' \
    "$task" "$status" "${SLURMD_NODENAME:-$(hostname)}" "$reason" "$(date +%s)" > "$start.died.part"
  mv "$start.died.part" "$start.died"
}
last_line() { grep -v -e '^srun:' -e '^ *$' @FOLDER@/"${task}_0_log.out" | tail -n 1 | cut -c 1-200 | sed 's/^/: /'; }
ended() {
  status=$?
  trap - EXIT ERR; set +eu +o pipefail
  local is_stopped=; case $status in 138|143) is_stopped=yes ;; esac  # by USR2 or TERM, too early to report it
  if [ ! -e "$start.began" ] && [ ! $is_stopped ]; then
    died "${failed:-Python did not start (exit status $status)}$(last_line)"
  elif [ $status -eq @AGAIN@ ]; then
    again
  elif [ $status -ge 128 ]; then
    if [ ! $is_stopped ]; then died "the job's step was killed (status $status): out of memory?"; fi
    if [ "$restarts" -lt @RESTARTS@ ]; then again; fi
  fi
  exit $status
}
trap ended EXIT
failing() { if [ "$3" = "$0" ]; then failed="setup line '$(sed -n "$2p" "$0")' failed"; exit "$1"; fi; }
trap 'failing $? $LINENO "${BASH_SOURCE[0]}"' ERR
""".strip()
"""Start of the batch script. `ended` runs when it exits: outside any container, and once for any number of nodes."""
_READY = """
trap - ERR; set +eu +o pipefail
cd @CODE@
export PYTHONPATH=@CODE@${PYTHONPATH:+:$PYTHONPATH}
""".strip()
"""Follows the --setup lines, which may have changed the directory."""


class LimitError(SlurmError):
    """SLURM refuses further jobs of this user for now, or an array of this size."""


@dataclass(frozen=True)
class DeadStart:
    """A start of a job whose worker did not begin or was killed.

    `job`: its id, `12_3`; `status`: the script's exit status; `node`: where; `reason`: one line; `time`: unix seconds.
    """

    job: str
    status: int
    node: str
    reason: str
    time: int


def submit(resources: Resources, spec: Path, num_workers: int, exclude: Sequence[str] = ()) -> str:
    """Submits identical workers, several of them as an array, and returns the job's id.

    Args:
        resources: what each worker requests.
        spec: absolute path of the workers' spec. Its field `code` is the folder to run from. A container mounts the
            grid's folder and the spec's `data_dir`.
        num_workers: at least 1.
        exclude: nodes to avoid, in addition to the nodes that `resources` excludes.

    Raises:
        LimitError: sbatch refuses this number of jobs.
        SlurmError: sbatch refuses for another reason, or is missing, or --setup is not valid shell.
    """
    _valid(script(resources, spec, num_workers, exclude))
    executor = _executor(resources, spec, num_workers, exclude)
    before = set(_leftovers(spec.parent))
    try:
        with _environment(), redirect_stderr(io.StringIO()), executor.batch():  # submitit prints what sbatch says
            jobs = [executor.submit(work, str(spec)) for _ in range(num_workers)]
    except submitit.core.utils.FailedJobError as error:
        for path in set(_leftovers(spec.parent)) - before:
            path.unlink(missing_ok=True)
        raise refusal(str(error)) from error
    return str(jobs[0].job_id).partition("_")[0]


def test(resources: Resources, folder: Path) -> None:
    """Has SLURM check such a job. `folder` would hold the job's files; it need not exist.

    Submits a job that would begin in an hour, then cancels it: `sbatch --test-only` refuses every job while nodes are
    down or drained, and SLURM does not check held jobs.

    Raises:
        SlurmError: sbatch refuses it, other than for a limit on the number of jobs.
    """
    text = _valid(script(resources, folder / "spec.json", 1))
    command = ["sbatch", "--parsable", "--begin=now+1hour", "--mail-type=NONE", "--chdir=/"]
    done = subprocess.run(command, input=text, env=client.environment(), capture_output=True, text=True, check=False)
    if not done.returncode:
        client.cancel([done.stdout.strip().partition(";")[0]])
    elif not isinstance(error := refusal(done.stderr), LimitError):
        raise error


def script(resources: Resources, spec: Path, num_workers: int, exclude: Sequence[str] = ()) -> str:
    """The batch script that `submit` would pass to sbatch. The spec need not exist."""
    executor = _executor(resources, spec, num_workers, exclude)
    if num_workers > 1:  # as submitit does for an array
        executor.parameters["map_count"] = num_workers
    return str(executor._make_submission_file_text(executor._submitit_command_str, uid=""))  # noqa: SLF001


def work(spec: str) -> None:
    """The entry point that submitit calls on each node of a job."""
    from launch.worker.worker import run  # late: the launcher does not need it

    run(spec)


def died(folder: Path) -> list[DeadStart]:
    """Starts of the jobs in a spec's folder whose worker did not begin or was killed, oldest first."""
    found = []
    for path in folder.glob("*.died"):
        try:
            found.append(DeadStart(**json.loads(path.read_text(encoding="utf-8", errors="replace"))))
        except (OSError, ValueError, TypeError):  # e.g. its disk was full
            found.append(DeadStart(path.stem.rpartition("-")[0], 0, "", "see its log", 0))
    return sorted(found, key=lambda each: (each.time, each.job))


def refusal(said: str) -> SlurmError:
    """The error for sbatch's message, in one line."""
    lines = [line.strip().removeprefix("sbatch: ").removeprefix("error: ") for line in said.splitlines()]
    lines = list(dict.fromkeys(filter(None, lines))) or ["refused without a message"]
    is_limit = any(word in line for line in lines for word in _LIMITS) or (len(lines) == 1 and _POLICY in lines[0])
    return (LimitError if is_limit else SlurmError)(f"sbatch: {'; '.join(lines[-3:])}")


def _executor(resources: Resources, spec: Path, num_workers: int, exclude: Sequence[str]) -> submitit.SlurmExecutor:
    if not client.available():
        raise SlurmError("sbatch is not on PATH: run this on a login node of the cluster")
    folder = spec.parent
    grid_dir = folder.parent.parent
    fields: dict[str, Any] = json.loads(spec.read_text(encoding="utf-8")) if spec.exists() else {}
    code = fields.get("code", str(grid_dir / "code"))
    executor = submitit.SlurmExecutor(folder=folder, python=resources.python)
    mounts = [grid_dir, *map(Path, filter(None, [fields.get("data_dir")]))]
    parameters = sbatch_parameters(resources, mounts)
    own_python = shlex.quote(sys.executable)
    values = {
        "FOLDER": shlex.quote(str(folder)),
        "SPEC": shlex.quote(str(spec)),
        "CODE": shlex.quote(code),
        "PYTHON": own_python if resources.container or resources.python is None else resources.python,
        "ADVICE": shlex.quote(f"launch the grid again: python -m launch grid {shlex.quote(grid_dir.name)}"),
        "AGAIN": str(EXIT_AGAIN),
        "RESTARTS": str(_MAX_RESTARTS),
    }
    parameters["setup"] = [_filled(_BEGINNING, values), *resources.setup, _filled(_READY, values)]
    options = parameters["additional_parameters"]
    if excluded := [*filter(None, [options.get("exclude")]), *exclude]:
        options["exclude"] = ",".join(excluded)
    options |= {"chdir": code} | ({} if "no-requeue" in options else {"requeue": True})
    executor.update_parameters(
        **parameters,
        job_name=f"{grid_dir.name}-{folder.name}",
        array_parallelism=num_workers,
        signal_delay_s=min(SIGNAL_SECONDS, resources.time * 60 // 4),
    )
    return executor


def _valid(text: str) -> str:
    """Returns the script if it is valid shell; otherwise raises SlurmError."""
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    if checked.returncode:
        raise SlurmError(f"--setup: not valid shell: {checked.stderr.strip().splitlines()[0]}")
    return text


def _filled(text: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def _leftovers(folder: Path) -> list[Path]:
    """Files that submitit writes before it calls sbatch."""
    return [*folder.glob("*.pkl"), *folder.glob(".submission_file_*.sh")]


@contextmanager
def _environment() -> Iterator[None]:
    """Within the context, this process has client.environment(), which sbatch and the job inherit."""
    before = dict(os.environ)
    cleaned = client.environment()
    try:
        os.environ.clear()
        os.environ.update(cleaned)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
