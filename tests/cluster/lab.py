"""A real SLURM cluster on one machine: munge, MariaDB, slurmdbd, slurmctld and a slurmd for each virtual node.

    with Lab(Settings(num_nodes=4)) as lab:
        lab.run("sbatch", "--partition", "gpu", "--wrap", "hostname")
        lab.kill_node("node2")

Its daemons run as root, without systemd or cgroups, on free ports, and write to a single folder, in memory if possible.
Everything is removed at the end, even if the process that started the cluster is killed.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from needs import not_root

from cluster import processes
from cluster.configuration import Ports, Settings, write_configuration

PACKAGES = "slurm-wlm slurmdbd slurm-wlm-mysql-plugin munge mariadb-server"
START_SECONDS = 60.0


class LabError(RuntimeError):
    """A daemon of the cluster did not start."""


def obstacle(*, accounting: bool = True) -> str | None:
    """Why no cluster can be started here, in one line; None if one can."""
    wanted = ["munged", "slurmctld", "slurmd", *(["mariadbd", "mariadb-install-db", "slurmdbd"] * accounting)]
    missing = [program for program in wanted if shutil.which(program, path=_path()) is None]
    if missing:
        return f"no SLURM ({', '.join(missing)} missing); on Debian: sudo apt-get install {PACKAGES}"
    return not_root()


class Lab:
    """The cluster, which runs within its context. `environment`: what SLURM's commands need to reach it."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.nodes = self.settings.nodes
        self.folder = Path(tempfile.mkdtemp(prefix="lab-", dir=_memory_or_disk()))
        self.conf = self.folder / "slurm.conf"
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))},
            "SLURM_CONF": str(self.conf),
            "PATH": _path(),
        }
        self.mark = f"SLURM_CONF={self.conf}"  # jobs inherit it, and are found by it
        self._reaper = self._start_reaper()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Lab":  # noqa: PYI034  (Self came with Python 3.11)
        """The cluster with all nodes idle.

        Raises:
            LabError: a daemon did not start; the message has its name and the end of its log.
        """
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, *command: str) -> str:
        """Runs a command, of SLURM or any other, and returns its output. CalledProcessError if it fails."""
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout

    def kill_node(self, name: str) -> None:
        """Simulates a power cut: SIGKILL to its slurmd, its jobs' slurmstepds, and everything these started."""
        processes.kill(self.mark, f"LAB_NODE={name}")
        processes.kill(self.mark, f"SLURMD_NODENAME={name}")  # processes that left their parents
        self._daemons.pop(f"slurmd-{name}").wait()

    def start_node(self, name: str) -> None:
        """Restarts a killed node; SLURM uses it once it has registered."""
        # A rebooted machine says so, and SLURM requeues its jobs. This one did not reboot: SLURM would take a minute.
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=booted")
        self._start_slurmd(name)

    def _start_slurmd(self, name: str) -> None:
        self._spawn(f"slurmd-{name}", "slurmd", "-D", "-N", name, LAB_NODE=name)

    def wait_until_idle(self) -> None:
        """Waits until every node is idle. LabError after a minute, or if a daemon has ended."""
        self._wait("slurmctld", lambda: self._says("sinfo -h -p debug -N -o %T").split() == ["idle"] * len(self.nodes))

    def stop(self) -> None:
        """Ends every daemon and job, and deletes the folder."""
        self._reaper.communicate()
        for daemon in self._daemons.values():
            daemon.wait()

    def _start_reaper(self) -> "subprocess.Popen[bytes]":
        """A process that cleans up once its pipe is closed: by stop(), or by the kernel if this process is killed."""
        command = [sys.executable, "-S", processes.__file__, str(self.folder), self.mark]
        environment = {key: value for key, value in self.environment.items() if key != "SLURM_CONF"}
        return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, cwd="/", start_new_session=True)

    def _start(self) -> None:
        ports = Ports.pick(len(self.nodes))
        write_configuration(self.folder, self.settings, ports)
        folder = self.folder / "munge"
        files = [f"--{kind}={folder / kind}" for kind in ("socket", "key-file", "pid-file", "log-file", "seed-file")]
        self._spawn("munged", "munged", "--foreground", *files)
        if self.settings.accounting:
            self._start_accounting()
        self._wait("munged", lambda: self._succeeds(f"munge -n -S {folder / 'socket'}"))
        self._spawn("slurmctld", "slurmctld", "-D")
        for name in self.nodes:
            self._start_slurmd(name)
        self.wait_until_idle()

    def _start_accounting(self) -> None:
        folder = self.folder / "mariadb"
        data, socket_path, log = folder / "data", folder / "socket", self.folder / "log" / "mariadb-install-db.log"
        small = ["--no-defaults", "--user=root", f"--datadir={data}", "--innodb-log-file-size=8M"]
        install = ["mariadb-install-db", *small, "--skip-test-db"]
        with log.open("wb") as file:
            if subprocess.run(install, env=self.environment, stdout=file, stderr=file, check=False).returncode:
                raise LabError(f"mariadb-install-db failed; {self._log_of('mariadb-install-db')}")
        files = [f"--socket={socket_path}", f"--pid-file={folder / 'pid'}"]
        hasty = ["--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=64M"]
        self._spawn("mariadbd", "mariadbd", *small, *files, *hasty, "--skip-networking", "--skip-log-bin")
        self._wait("mariadbd", lambda: _answers(socket_path))
        self._spawn("slurmdbd", "slurmdbd", "-D", MYSQL_UNIX_PORT=str(socket_path))
        self._wait("slurmdbd", lambda: self._succeeds("sacctmgr -n show cluster"))
        # A batch of commands cannot use a QOS that it creates: two batches.
        self._account("add cluster lab", "add account lab,other cluster=lab", "add qos high priority=1000")
        self._account("add user root account=lab,other defaultaccount=lab qos=normal,high defaultqos=normal")

    def _account(self, *commands: str) -> None:
        script = "\n".join([*commands, "quit", ""])
        subprocess.run(
            ["sacctmgr", "-i"], input=script, env=self.environment, check=True, capture_output=True, text=True
        )

    def _spawn(self, name: str, *command: str, **variables: str) -> None:
        with (self.folder / "log" / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment | variables,
                cwd="/",
                start_new_session=True,  # so that Ctrl-C reaches only the tests
            )

    def _wait(self, name: str, is_ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not is_ready():
            for other, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    raise LabError(f"{other} ended with status {daemon.returncode}; {self._log_of(other)}")
            if time.monotonic() > deadline:
                raise LabError(f"{name} is not ready after {START_SECONDS:.0f} s; {self._log_of(name)}")
            time.sleep(0.05)

    def _log_of(self, name: str) -> str:
        lines = (self.folder / "log" / f"{name}.log").read_text(errors="replace").splitlines()
        return "\n".join(["its log ends:", *lines[-15:]])

    def _says(self, command: str) -> str:
        return subprocess.run(command.split(), env=self.environment, check=False, capture_output=True, text=True).stdout

    def _succeeds(self, command: str) -> bool:
        return not subprocess.run(command.split(), env=self.environment, check=False, capture_output=True).returncode


def _path() -> str:
    return f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"


def _memory_or_disk() -> str:
    """Memory if 1 GiB is free and programs may run from it: MariaDB waits seconds for a busy disk."""
    memory = Path("/dev/shm")  # noqa: S108  (a fresh folder in it)
    if not os.access(memory, os.W_OK):
        return tempfile.gettempdir()
    stat = os.statvfs(memory)
    is_fit = not stat.f_flag & os.ST_NOEXEC and stat.f_bavail * stat.f_frsize > 1 << 30
    return str(memory) if is_fit else tempfile.gettempdir()


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0
