"""What SLURM says: every client command but sbatch, one function each; what reads their text is pure.

A job is named as SLURM names it to people: `413854`, or `413854_3` for a task of an array.
"""

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from suite.errors import UserError

TIMEOUT_SECONDS = 60
_MAX_IDS_PER_SCANCEL = 500
_FINISHED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "NODE_FAIL"}
_FINISHED |= {"PREEMPTED", "BOOT_FAIL", "LAUNCH_FAILED", "REVOKED"}
_JOB = re.compile(r"(?P<id>\d+)(?:_\[(?P<tasks>[^\]%]*)[^\]]*\])?")


class SlurmError(UserError):
    """A SLURM command failed: which, what it said, what to do. One line."""


@dataclass(frozen=True)
class JobInfo:
    """A job, or one task of an array. `state` is SLURM's word; `reason` why it waits, or empty; `node` a node list."""

    job_id: str
    state: str
    reason: str
    node: str
    name: str

    @property
    def is_live(self) -> bool:
        """Whether it is queued, runs, or is about to again."""
        return self.state not in _FINISHED


@dataclass(frozen=True)
class Partition:
    """A partition and its nodes, counted. `time_limit_minutes` None: endless; `kinds`: (CPUs, GPUs) of its nodes."""

    name: str
    is_up: bool
    time_limit_minutes: int | None
    num_nodes: int
    num_idle: int
    num_allocated: int
    num_down: int
    kinds: tuple[tuple[int, int], ...]

    @property
    def has_gpus(self) -> bool:
        """Whether a job may ask for GPUs there."""
        return self.max_gpus_per_node > 0

    @property
    def max_cpus_per_node(self) -> int:
        """CPUs of its largest node."""
        return max(cpus for cpus, _ in self.kinds)

    @property
    def max_gpus_per_node(self) -> int:
        """GPUs of the node that has most."""
        return max(gpus for _, gpus in self.kinds)

    @property
    def cpus_per_gpu(self) -> int:
        """CPUs that a GPU's job may take without keeping its node's other GPUs idle; 0 where there are no GPUs."""
        return min((cpus // gpus for cpus, gpus in self.kinds if gpus), default=0)


@dataclass(frozen=True)
class Association:
    """What this user may submit as: an account, in one partition or (empty) any, with these qualities of service."""

    account: str
    partition: str
    qos: tuple[str, ...]


def available() -> bool:
    """Whether this machine submits to SLURM."""
    return shutil.which("sbatch") is not None


def queue() -> dict[str, JobInfo]:
    """The jobs of this user that wait or run, by id; one squeue for all of them."""
    # Not -r, a line per task: it leaves out the last of 12_[1-7:2], as are left when others have started.
    return parse_jobs(_output("squeue", "--me", "-h", "-o", "%i|%T|%r|%N|%j"))


def accounting(array_ids: Iterable[str]) -> dict[str, JobInfo]:
    """What became of the jobs, and of all tasks of those that are arrays; one sacct for all of them.

    It lags the queue by seconds. Empty where there is no accounting.
    """
    ids = ",".join(array_ids)
    if not ids:  # sacct -j '' tells of every job
        return {}
    text = _accounting("sacct", "-X", "-n", "-P", "-o", "JobID,State,Reason,NodeList,JobName", "-j", ids)
    return {} if text is None else parse_jobs(text)


def max_array_size() -> int:
    """One more than the highest index an array may have here."""
    text = _output("scontrol", "show", "config")
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, re.MULTILINE)
    if found is None:
        raise SlurmError("scontrol show config names no MaxArraySize; python -m launch doctor tells more")
    return int(found[1])


def cancel(job_ids: Sequence[str]) -> None:
    """Cancels the jobs, or tasks of arrays; one that has ended is left in peace."""
    for first in range(0, len(job_ids), _MAX_IDS_PER_SCANCEL):
        _output("scancel", "--quiet", *job_ids[first : first + _MAX_IDS_PER_SCANCEL])


def release(job_id: str) -> None:
    """Lets a job that was submitted on hold, or a whole array, start."""
    _output("scontrol", "release", job_id)


def partitions() -> dict[str, Partition]:
    """The partitions by name."""
    return parse_partitions(_output("sinfo", "-h", "-o", "%R|%a|%l|%F|%c|%G"))


def accounts_and_qos() -> list[Association] | None:
    """What this user may submit as; None where nothing is accounted, so that any account and QOS goes."""
    user = pwd.getpwuid(os.getuid()).pw_name
    text = _accounting("sacctmgr", "-n", "-P", "show", "assoc", f"user={user}", "format=account,partition,qos")
    return None if text is None else parse_associations(text)


def version() -> str:
    """SLURM's own name and version of the client commands."""
    return _output("squeue", "--version").strip()


def ping() -> str:
    """What the controllers answer, in one line."""
    return "; ".join(_output("scontrol", "ping").split("\n")).strip("; ")


def environment() -> dict[str, str]:
    """This process's, without what would bend a SLURM command: a user's formats, and the job this may be part of."""
    bending = re.compile(r"(SQUEUE|SACCT|SINFO|SRUN|SBATCH)_|SLURM_(?!CONF|CLUSTERS)")
    kept = {key: value for key, value in os.environ.items() if not bending.match(key)}
    return {**kept, "SLURM_BITSTR_LEN": "0"}  # else `12_[1-5,...]`, with the rest left out


def parse_jobs(text: str) -> dict[str, JobInfo]:
    """Jobs by id from lines `id|state|reason|nodes|name`; `12_[3,5-9:2%4]` is a task each."""
    jobs = {}
    for line in text.splitlines():
        job, state, reason, node, name = line.split("|", 4)
        word = state.partition(" ")[0]  # sacct says CANCELLED by 1000
        why = "" if reason == "None" or word in _FINISHED else reason  # sacct keeps why it once waited
        where = "" if node == "None assigned" else node
        for job_id in _expanded(job):
            jobs[job_id] = JobInfo(job_id, word, why, where, name)
    return jobs


def parse_partitions(text: str) -> dict[str, Partition]:
    """Partitions from lines `name|up|time limit|allocated/idle/other/total nodes|cpus|gres`, one per kind of node."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        name, up, limit, nodes, cpus, gres = line.split("|")
        allocated, idle, down, total = map(int, nodes.split("/"))
        kinds = ((int(cpus.rstrip("+")), num_gpus(gres)),)
        here = Partition(name, up == "up", minutes(limit), total, idle, allocated, down, kinds)
        found[name] = _together(found[name], here) if name in found else here
    return found


def parse_associations(text: str) -> list[Association]:
    """Associations from lines `account|partition|qos,qos`."""
    rows = [line.split("|") for line in text.splitlines()]
    return [Association(account, partition, tuple(filter(None, qos.split(",")))) for account, partition, qos in rows]


def num_gpus(gres: str) -> int:
    """GPUs of a node from sinfo's list of its resources: `gpu:a100:4(S:0-1),gpu:h100:2,nvme:1` has 6."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,()]+)??:(\d+)", gres))


def minutes(text: str) -> int | None:
    """Minutes, rounded up, from SLURM's forms (90, 90:00, 1:30:00, 1-12, 1-12:30) or 90m, 12h, 2d; None is endless.

    Raises:
        ValueError: none of these.
    """
    if text.lower() in {"infinite", "unlimited"}:
        return None
    if short := re.fullmatch(r"(\d+)([mhd])", text):
        return int(short[1]) * {"m": 1, "h": 60, "d": 24 * 60}[short[2]]
    form = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if form is None:
        raise ValueError(f"{text!r} is no time; write 90m, 12h, 2d, or as SLURM has it: minutes, 12:00:00, 1-12:00:00")
    days, *rest = form.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is None and len(numbers) < 3:  # noqa: PLR2004  (without days or hours: minutes[:seconds])
        numbers.insert(0, 0)
    hours, mins, seconds = (*numbers, 0, 0)[:3]
    return int(days or 0) * 24 * 60 + hours * 60 + mins + (seconds > 0)


def _expanded(job: str) -> Iterator[str]:
    found = _JOB.fullmatch(job)
    if found is None or found["tasks"] is None:
        yield job
        return
    for part in found["tasks"].split(","):
        first, _, rest = part.partition("-")
        last, _, step = rest.partition(":")
        for task in range(int(first), int(last or first) + 1, int(step or 1)):
            yield f"{found['id']}_{task}"


def _together(one: Partition, other: Partition) -> Partition:
    return replace(
        one,
        num_nodes=one.num_nodes + other.num_nodes,
        num_idle=one.num_idle + other.num_idle,
        num_allocated=one.num_allocated + other.num_allocated,
        num_down=one.num_down + other.num_down,
        kinds=one.kinds + other.kinds,
    )


def _accounting(*command: str) -> str | None:
    """As _output; None where SLURM keeps no accounts, or who keeps them is away: nothing hangs on them."""
    try:
        return _output(*command)
    except SlurmError:
        return None


def _output(*command: str) -> str:
    """What the command prints.

    Raises:
        SlurmError: it is missing, fails, or takes longer than a minute.
    """
    try:
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not on PATH: run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{command[0]} took more than {TIMEOUT_SECONDS} s: the controller is overloaded or away; try again later"
        ) from None
    if done.returncode:
        lines = filter(None, (_plain(line, command[0]) for line in (done.stderr or done.stdout).splitlines()))
        said = "; ".join(islice(lines, 2)) or f"exit status {done.returncode}"
        raise SlurmError(f"{command[0]}: {said} (python -m launch doctor tells more)")
    return done.stdout


def _plain(line: str, command: str) -> str:
    return re.sub(rf"^{command}: (error: |fatal: )?", "", line.strip())
