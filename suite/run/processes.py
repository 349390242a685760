"""Which process somebody is, and whether that one still lives: a process id alone is soon another's."""

import multiprocessing
import os
import platform
import signal
import threading
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process, unmistakably. `machine` names a boot of a host and its namespace of process ids; `start` is in ticks
    since boot. Both are empty where there is no /proc.
    """

    host: str
    machine: str
    pid: int
    start: str

    @classmethod
    def this(cls) -> "Process":
        """The one that asks."""
        return cls(platform.node(), _machine(), os.getpid(), _start_of(os.getpid()) or "")

    def is_alive(self) -> bool | None:
        """Whether it lives; None from where that cannot be seen: another machine, another container."""
        if not self.machine or self.machine != _machine():
            return None
        return _start_of(self.pid) == self.start


@cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _start_of(pid: int) -> str | None:
    """When the process started; None where there is none, or only its remains that nobody has asked after."""
    try:
        # After the name, which stands in parentheses and may hold any character: state is field 3, start time 22.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in {b"Z", b"X"} else fields[19].decode()


def obey_the_parent() -> None:
    """Called in a worker process: from now on it ignores Ctrl-C, and exits when its parent exits for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def follow() -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
