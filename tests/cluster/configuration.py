"""Writes slurm.conf and its companions, for a cluster whose nodes all run on this machine."""

import os
import random
import secrets
import socket
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Settings of a cluster. Nodes may claim more than the machine has."""

    num_nodes: int = 4
    cpus_per_node: int = 16
    memory_per_node_mib: int = 16_000
    gpus_per_node: int = 2
    cpus_of_last_node: int | None = None  # if it differs from the other nodes
    over_memory_kill: bool = False  # whether to kill a step that exceeds its memory
    accounting: bool = True  # slurmdbd, and with it sacct, accounts and QOS
    max_array_size: int = 1001  # SLURM's default
    grace_seconds: int = 0  # between the signal of a preemption and its end
    requeue_seconds: int = 5  # before a requeued job may start again
    kill_seconds: int = 5  # between SIGTERM and SIGKILL
    node_timeout_seconds: int = 10  # before a silent node is DOWN
    # Not 1: submitit's files of an earlier cluster's job would be taken for a new job's.
    first_job_id: int = field(default_factory=lambda: 1000 + int(time.time()) % 1_000_000)

    @property
    def nodes(self) -> list[str]:
        """node1, node2, ..."""
        return [f"node{number}" for number in range(1, self.num_nodes + 1)]


@dataclass(frozen=True)
class Ports:
    """TCP ports of the daemons."""

    slurmctld: int
    slurmdbd: int
    slurmd: tuple[int, ...]

    @classmethod
    def pick(cls, num_nodes: int) -> "Ports":
        """Ports that are free now, below the kernel's automatically assigned ports."""
        ports: dict[int, None] = {}
        while len(ports) < num_nodes + 2:
            port = random.randrange(10_000, 32_000)  # noqa: S311  (no secret)
            with socket.socket() as server:
                if server.connect_ex(("127.0.0.1", port)):
                    ports[port] = None
        slurmctld, slurmdbd, *slurmd = ports
        return cls(slurmctld, slurmdbd, tuple(slurmd))


def write_configuration(folder: Path, settings: Settings, ports: Ports) -> None:
    """Writes the cluster's folder: configuration, munge's key, GPUs."""
    folder.chmod(0o755)  # jobs of other users must reach the munge socket
    for name in ("log", "state", "spool", "munge", "mariadb", "devices"):
        (folder / name).mkdir()
    _write(folder / "munge" / "key-file", secrets.token_hex(64))
    for number in range(settings.gpus_per_node):  # SLURM needs character devices: these are copies of /dev/null
        os.mknod(folder / "devices" / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    _write(folder / "slurm.conf", _slurm_conf(folder, settings, ports))
    _write(folder / "slurmdbd.conf", _slurmdbd_conf(folder, ports))
    _write(folder / "gres.conf", _gres_conf(folder, settings))
    _write(folder / "cgroup.conf", "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")  # unused, but SLURM looks for it


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o644 if path.name == "slurm.conf" else 0o600)


def _slurm_conf(folder: Path, settings: Settings, ports: Ports) -> str:
    host = socket.gethostname().split(".")[0]
    gres = f" Gres=gpu:{settings.gpus_per_node}" if settings.gpus_per_node else ""
    cpus = [settings.cpus_per_node] * settings.num_nodes
    cpus[-1] = settings.cpus_of_last_node or cpus[-1]
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
        f"CPUs={count} RealMemory={settings.memory_per_node_mib}{gres}"
        for name, port, count in zip(settings.nodes, ports.slurmd, cpus, strict=True)
    )
    kills = "JobAcctGatherParams=OverMemoryKill\nJobAcctGatherFrequency=1" if settings.over_memory_kill else ""
    return f"""\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports.slurmctld}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for as long as a credential lives.
AuthInfo=socket={folder}/munge/socket,cred_expire={settings.requeue_seconds}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
{kills}
MpiDefault=none
SwitchType=switch/none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=10000,default_queue_depth=2000,bf_interval=1
FirstJobId={settings.first_job_id}
MaxArraySize={settings.max_array_size}
KillWait={settings.kill_seconds}
CompleteWait=0
SlurmdTimeout={settings.node_timeout_seconds}
BatchStartTimeout=10
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{_accounting(folder, ports) if settings.accounting else "AccountingStorageType=accounting_storage/none"}
GresTypes=gpu
{nodes}
PartitionName=debug Nodes=ALL Default=YES DefaultTime=60 PriorityTier=1
PartitionName=gpu Nodes=ALL DefaultTime=60 PriorityTier=1 GraceTime={settings.grace_seconds}
PartitionName=urgent Nodes=ALL DefaultTime=60 PriorityTier=10 PreemptMode=OFF
"""


def _accounting(folder: Path, ports: Ports) -> str:
    return f"""\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports.slurmdbd}
AccountingStoragePass={folder}/munge/socket
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=associations,limits,qos"""


def _slurmdbd_conf(folder: Path, ports: Ports) -> str:
    # "localhost" means MariaDB's socket, which slurmdbd finds in MYSQL_UNIX_PORT: no port, and root needs no password.
    return f"""\
DbdHost=localhost
DbdPort={ports.slurmdbd}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
"""


def _gres_conf(folder: Path, settings: Settings) -> str:
    lines = [f"Name=gpu File={folder}/devices/gpu{number}" for number in range(settings.gpus_per_node)]
    return "\n".join(["AutoDetect=off", *lines, ""])
