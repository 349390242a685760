"""Seconds that a command takes of a processor: what its user waits on an idle machine, measured on a busy one."""

import resource
import subprocess
import sys
from pathlib import Path


def timed(*arguments: str | Path) -> tuple[str, float]:
    """What `python ARGUMENTS` writes, and the CPU time of it and of its children, in seconds.

    Raises CalledProcessError where it exits with another status than 0.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, *map(str, arguments)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return answer.stdout, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
