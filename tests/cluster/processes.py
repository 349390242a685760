"""Finds processes by their environment variables; as a program, ends them once the process it serves has ended.

    python processes.py FOLDER NAME=VALUE     waits for the end of its input; then kills the processes, deletes FOLDER

Standard library only: it must start quickly, and survive everything else.
"""

import os
import shutil
import signal
import sys
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

KILL_SECONDS = 20.0


def found(*variables: str) -> list[int]:
    """Processes that have all of these NAME=VALUE in their environment, and all descendants of these processes."""
    wanted = {variable.encode() for variable in variables}
    children: dict[int, list[int]] = defaultdict(list)
    pids = []
    for path in Path("/proc").glob("[0-9]*"):
        pid = int(path.name)
        with suppress(OSError):  # it has ended meanwhile
            state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
            if state in "ZX" or pid == os.getpid():
                continue
            children[int(parent)].append(pid)
            if wanted <= set((path / "environ").read_bytes().split(b"\0")):
                pids.append(pid)
    for pid in pids:  # pids grows during the loop
        pids += [child for child in children.pop(pid, []) if child not in pids]
    return sorted(pids)


def kill(*variables: str) -> None:
    """Sends SIGKILL to all processes that `found` finds, oldest first, until none is left."""
    deadline = time.monotonic() + KILL_SECONDS
    while pids := found(*variables):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {pids} do not end")
        time.sleep(0.02)


def _reap(folder: str, variable: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # Ctrl-C etc. are for the process it serves
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    kill(variable)
    shutil.rmtree(folder)


if __name__ == "__main__":
    _reap(*sys.argv[1:])
