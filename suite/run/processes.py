"""Identifies processes and whether they are alive. A process id is not enough, because it may be reused."""

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
    """A process, uniquely identified.

    `machine` identifies a host's boot and its namespace of process ids; `start` is in ticks since boot. Both are empty
    on systems without /proc.
    """

    host: str
    machine: str
    pid: int
    start: str

    @classmethod
    def this(cls) -> "Process":
        """The calling process."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> "Process":
        """The process of this machine with the given id."""
        return cls(platform.node(), _machine(), pid, _start_of(pid) or "")

    def is_alive(self) -> bool | None:
        """Whether the process is alive; None if unknown, because it is on another machine or in another container."""
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
    """Start time of the process; None if it does not exist or is a zombie."""
    try:
        # The name, field 2, is in parentheses and may contain any character. State is field 3, start time 22.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in {b"Z", b"X"} else fields[19].decode()


def obey_the_parent() -> None:
    """Makes a worker process ignore Ctrl-C and exit when its parent exits, for whatever reason. Call in the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def follow() -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
