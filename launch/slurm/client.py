"""SLURM's client commands except sbatch, one function each. The functions that parse their output are pure.

Job ids have SLURM's form: `413854`, or `413854_3` for a task of an array. Lines of another form, such as a site's
banner, are skipped.
"""

import os
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice

from suite.errors import UserError

TIMEOUT_SECONDS = 60
_MAX_IDS_PER_SCANCEL = 500
_FINISHED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "NODE_FAIL"}
_FINISHED |= {"PREEMPTED", "BOOT_FAIL", "LAUNCH_FAILED", "REVOKED"}
_NOT_ENDED = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED"}
_JOB = re.compile(r"(?P<id>\d+(?:_\d+)?)(?:_\[(?P<tasks>[^\]%]*)[^\]]*\])?")
_PARTITION = re.compile(
    r"(?P<name>[^|*]+)(?P<star>\*?)\|(?P<up>\w+)\|(?P<limit>[^|]+)\|"
    r"(?P<allocated>\d+)/(?P<idle>\d+)/(?P<other>\d+)/(?P<total>\d+)\|(?P<cpus>\d+)\+?\|(?P<gres>[^|]*)\|(?P<preempt>.+)"
)
_ASSOCIATION_BARS = 5
_BENDING = re.compile(r"(SQUEUE|SACCT|SINFO|SRUN|SBATCH|SALLOC)_|SLURM_(?!(CONF|CLUSTERS|JWT)$)")


class SlurmError(UserError):
    """A SLURM command failed. The message is one line: the command, its error, and the fix."""


@dataclass(frozen=True)
class JobInfo:
    """A job, or one task of an array. `state` is SLURM's; `reason`: why it waits, or empty; `node`: a node list."""

    job_id: str
    state: str
    reason: str
    node: str
    name: str

    @property
    def is_live(self) -> bool:
        """Whether it is queued or running, or will run again."""
        return self.state not in _FINISHED


@dataclass(frozen=True)
class Partition:
    """A partition and the number of its nodes.

    `time_limit_minutes` None: unlimited; `kinds`: (CPUs, GPUs) of its nodes; `preempt_mode`: what SLURM does to a
    preempted job, REQUEUE or CANCEL for example.
    """

    name: str
    is_up: bool
    time_limit_minutes: int | None
    num_nodes: int
    num_idle: int
    num_allocated: int
    num_down: int
    kinds: tuple[tuple[int, int], ...]
    is_default: bool = False
    preempt_mode: str = "OFF"

    @property
    def has_gpus(self) -> bool:
        """Whether a job may request GPUs there."""
        return self.max_gpus_per_node > 0

    @property
    def max_cpus_per_node(self) -> int:
        """CPUs of its largest node."""
        return max(cpus for cpus, _ in self.kinds)

    @property
    def max_gpus_per_node(self) -> int:
        """GPUs of the node that has the most."""
        return max(gpus for _, gpus in self.kinds)

    @property
    def cpus_per_gpu(self) -> int:
        """A GPU's share of its node's CPUs, so that a job leaves the other GPUs usable; 0 without GPUs."""
        return min((cpus // gpus for cpus, gpus in self.kinds if gpus), default=0)


@dataclass(frozen=True)
class Association:
    """An account that this user may charge, in one partition or (empty) in all, with these QOS.

    `is_default`: sbatch charges this account if none is given; `default_qos`: empty if SLURM names none;
    `max_submit_jobs`: pending and running jobs, each array task one; None: unlimited.
    """

    account: str
    partition: str
    qos: tuple[str, ...]
    is_default: bool = False
    default_qos: str = ""
    max_submit_jobs: int | None = None


@dataclass(frozen=True)
class Config:
    """Settings of the cluster.

    `max_array_size`: one more than the highest index of an array; `enforces_accounts`: whether jobs need an account and
    QOS of this user's; `enforces_limits`: whether limits of accounts and QOS are applied.
    """

    max_array_size: int
    enforces_accounts: bool
    enforces_limits: bool


def available() -> bool:
    """Whether this machine can submit to SLURM."""
    return shutil.which("sbatch") is not None


def queue() -> dict[str, JobInfo]:
    """This user's pending and running jobs, by id."""
    # Not -r (one line per task): it omits the last task of 12_[1-7:2], a form that appears once others have started.
    return parse_jobs(_output("squeue", "--me", "-a", "-h", "-o", "%i|%T|%r|%N|%j"))


def limits(account: str | None, qos: str | None, partition: str | None = None) -> int | None:
    """How many more jobs this user may submit, each array task counted as one; None: unlimited or unknown.

    Ignores limits of whole accounts, against which other users' jobs count too.
    """
    if not config().enforces_limits or not (associations := accounts_and_qos()):
        return None
    text = _accounting("sacctmgr", "-n", "-P", "show", "qos", "format=Name,MaxSubmitJobsPerUser")
    charged = _output("squeue", "--me", "-a", "-h", "-o", "%i|%a|%q")
    return parse_limits(associations, text or "", charged, account, qos, partition)


def config() -> Config:
    """The cluster's configuration.

    Raises:
        SlurmError: scontrol fails, or names no MaxArraySize.
    """
    return parse_config(_output("scontrol", "show", "config"))


def signal(job_id: str, name: str) -> None:
    """Sends a signal to the job's processes, but not to its batch script."""
    _output("scancel", "--quiet", f"--signal={name}", job_id)


def cancel(job_ids: Sequence[str]) -> None:
    """Cancels jobs, or tasks of arrays. Ids of jobs that have ended are ignored."""
    for first in range(0, len(job_ids), _MAX_IDS_PER_SCANCEL):
        _output("scancel", "--quiet", *job_ids[first : first + _MAX_IDS_PER_SCANCEL])


def out_of_memory(job_ids: Iterable[str]) -> set[str]:
    """The jobs whose last start ran out of memory, according to sacct (seconds late); empty without accounting."""
    wanted = set(job_ids)
    if not wanted:  # sacct -j '' lists every job
        return set()
    text = _accounting("sacct", "-D", "-n", "-P", "-o", "JobID,State", "-j", ",".join(sorted(wanted)))
    return parse_out_of_memory(text or "") & wanted


def time_left_seconds(job_id: str) -> float | None:
    """Seconds until this process's job, named `job_id`, reaches its time limit; None if unknown."""
    if (end := os.environ.get("SLURM_JOB_END_TIME", "")).isdecimal():
        return int(end) - time.time()
    try:
        return parse_end(_output("scontrol", "--oneliner", "show", "job", job_id))
    except SlurmError:
        return None


def partitions() -> dict[str, Partition]:
    """The partitions by name, hidden ones included."""
    # -e: otherwise nodes of different sizes share one line, with the smallest size.
    return parse_partitions(_output("sinfo", "-e", "-a", "-h", "-o", "%P|%a|%l|%F|%c|%G|%M"))


def accounts_and_qos() -> list[Association] | None:
    """Accounts and QOS that this user may charge; None without accounting, when any will do."""
    user = pwd.getpwuid(os.getuid()).pw_name
    columns = "format=DefaultAccount,Account,Partition,QOS,DefaultQOS,MaxSubmitJobs"
    text = _accounting("sacctmgr", "-n", "-P", "show", "user", user, "withassoc", columns)
    return None if text is None else parse_associations(text)


def version() -> str:
    """Name and version of the client commands: `slurm-wlm 22.05.8`."""
    return _output("squeue", "--version").strip()


def ping() -> str:
    """The controllers' state, in one line."""
    return "; ".join(_output("scontrol", "ping").split("\n")).strip("; ")


def environment() -> dict[str, str]:
    """This process's environment, minus variables that change what SLURM's commands do or that describe a job."""
    kept = {key: value for key, value in os.environ.items() if not _BENDING.match(key)}
    return {**kept, "SLURM_BITSTR_LEN": "0"}  # otherwise squeue shortens `12_[1-5,...]`


def parse_jobs(text: str) -> dict[str, JobInfo]:
    """Jobs by id from lines `id|state|reason|nodes|name`; an id `12_[3,5-9:2%4]` is several tasks."""
    jobs = {}
    for line in text.splitlines():
        job, state, reason, node, name = (*line.split("|", 4), *[""] * 4)[:5]
        why = "" if reason == "None" or state in _FINISHED else reason
        for job_id in _expanded(job):
            jobs[job_id] = JobInfo(job_id, state, why, node, name)
    return jobs


def parse_limits(
    associations: Sequence[Association],
    qos_limits: str,
    jobs: str,
    account: str | None,
    qos: str | None,
    partition: str | None = None,
) -> int | None:
    """How many more jobs may be submitted; None: unlimited.

    Args:
        associations: the user's associations.
        qos_limits: lines `QOS|maximum of pending and running jobs per user`, with nothing after the bar if unlimited.
        jobs: the user's jobs in the queue, as lines `id|account|QOS`.
        account: None: the default account.
        qos: None: the account's default.
        partition: None: any.
    """
    here = [each for each in associations if each.account == account or (account is None and each.is_default)]
    here = [each for each in here if each.partition in {"", partition}]
    if not here:
        return None
    charged = max(here, key=lambda each: each.partition)  # the partition's own association overrides the general one
    name = qos or charged.default_qos or "normal"
    of_qos = dict(line.split("|") for line in qos_limits.splitlines() if line.count("|") == 1).get(name, "")
    rows = [line.split("|") for line in jobs.splitlines() if line.count("|") == 2]  # noqa: PLR2004
    if of_qos:  # it replaces the account's limit
        return max(int(of_qos) - sum(len(list(_expanded(job))) for job, _, used in rows if used == name), 0)
    if charged.max_submit_jobs is None:
        return None
    taken = sum(len(list(_expanded(job))) for job, used, _ in rows if used == charged.account)
    return max(charged.max_submit_jobs - taken, 0)


def parse_config(text: str) -> Config:
    """The configuration from lines `Name = value`.

    Raises:
        SlurmError: there is no MaxArraySize among them.
    """
    found: Mapping[str, str] = dict(re.findall(r"^(\w+) *= *(.*?) *$", text, re.MULTILINE))
    if not found.get("MaxArraySize", "").isdecimal():
        raise SlurmError("scontrol show config names no MaxArraySize (details: python -m launch doctor)")
    enforced = set(found.get("AccountingStorageEnforce", "").lower().split(","))
    return Config(
        int(found["MaxArraySize"]),
        enforces_accounts=bool(enforced & {"associations", "limits", "qos", "safe", "wckeys", "all"}),
        enforces_limits=bool(enforced & {"limits", "safe", "all"}),
    )


def parse_out_of_memory(text: str) -> set[str]:
    """Jobs whose last ended start ran out of memory, from lines `id|state` or `id.step|state`."""
    starts: dict[str, list[set[str]]] = {}
    for line in text.splitlines():
        name, _, state = line.partition("|")
        job, dot, _ = name.partition(".")
        if not dot or job not in starts:
            starts.setdefault(job, []).append(set())
        starts[job][-1].add(state.partition(" ")[0])  # sacct says CANCELLED by 1000
    ended = {job: [start for start in those if not start & _NOT_ENDED] for job, those in starts.items()}
    return {job for job, those in ended.items() if those and "OUT_OF_MEMORY" in those[-1]}


def parse_end(text: str) -> float | None:
    """Seconds until the EndTime in scontrol's output for a job; None if it has none."""
    found = re.search(r"\bEndTime=(\d{4}-\S+)", text)
    return datetime.fromisoformat(found[1]).timestamp() - time.time() if found else None


def parse_partitions(text: str) -> dict[str, Partition]:
    """Partitions from lines `name|up|time limit|allocated/idle/other/total nodes|cpus|gres|PreemptMode`.

    There is a line for each kind of node. The default partition's name ends in a star.
    """
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        if (row := _PARTITION.fullmatch(line)) is None:
            continue
        allocated, idle, down, total = (int(row[count]) for count in ("allocated", "idle", "other", "total"))
        kinds = ((int(row["cpus"]), num_gpus(row["gres"])),)
        limit, is_up, is_default = minutes(row["limit"]), row["up"] == "up", bool(row["star"])
        name, preempt = row["name"], row["preempt"].upper()
        here = Partition(name, is_up, limit, total, idle, allocated, down, kinds, is_default, preempt)
        found[name] = _together(found[name], here) if name in found else here
    return found


def parse_associations(text: str) -> list[Association]:
    """Associations from lines `default account|account|partition|qos,qos|default qos|max submitted jobs`."""
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == _ASSOCIATION_BARS]
    return [
        Association(
            account,
            partition,
            tuple(filter(None, qos.split(","))),
            is_default=account == default,
            default_qos=default_qos,
            max_submit_jobs=int(limit) if limit else None,
        )
        for default, account, partition, qos, default_qos, limit in rows
    ]


def num_gpus(gres: str) -> int:
    """GPUs of a node from sinfo's list of its resources: `gpu:a100:4(S:0-1),gpu:h100:2,nvme:1` has 6."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,()]+)??:(\d+)", gres))


def minutes(text: str) -> int | None:
    """Minutes, rounded up, from SLURM's forms (90, 90:00, 1:30:00, 1-12, 1-12:30) or 90m, 12h, 2d; None: unlimited.

    Raises:
        ValueError: the text has none of these forms.
    """
    if text.lower() in {"infinite", "unlimited"}:
        return None
    if short := re.fullmatch(r"(\d+)([mhd])", text):
        return int(short[1]) * {"m": 1, "h": 60, "d": 24 * 60}[short[2]]
    form = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if form is None:
        raise ValueError(f"{text!r} is not a time; write 90m, 12h, 2d, or SLURM's minutes, 12:00:00, 1-12:00:00")
    days, *rest = form.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is None and len(numbers) < 3:  # noqa: PLR2004  (without days or hours: minutes[:seconds])
        numbers.insert(0, 0)
    hours, mins, seconds = (*numbers, 0, 0)[:3]
    return int(days or 0) * 24 * 60 + hours * 60 + mins + (seconds > 0)


def _expanded(job: str) -> Iterator[str]:
    found = _JOB.fullmatch(job)
    if found is None:
        return
    if found["tasks"] is None:
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
    """Like _output, but None if accounting is off or slurmdbd is down. Callers must work without it."""
    try:
        return _output(*command)
    except SlurmError:
        return None


def _output(*command: str) -> str:
    """Runs the command and returns its output.

    Raises:
        SlurmError: the command is missing, fails, or takes longer than a minute.
    """
    try:
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not on PATH: run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{command[0]} took more than {TIMEOUT_SECONDS} s: the controller is overloaded or down; try again later"
        ) from None
    if done.returncode:
        lines = filter(None, (_plain(line, command[0]) for line in (done.stderr or done.stdout).splitlines()))
        said = "; ".join(islice(lines, 2)) or f"exit status {done.returncode}"
        raise SlurmError(f"{command[0]}: {said} (details: python -m launch doctor)")
    return done.stdout


def _plain(line: str, command: str) -> str:
    return re.sub(rf"^{command}: (error: |fatal: )?", "", line.strip())
