"""Whether the kernel killed something of this job for lack of memory, as its control group has it."""

from contextlib import suppress
from pathlib import Path


def num_oom_kills(cgroup: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Processes of this one's control group (version 2) that were killed so far; 0 where that is not to be learnt."""
    with suppress(OSError, ValueError):
        for line in cgroup.read_text(encoding="utf-8").splitlines():
            if line.startswith("0::"):
                events = (root / line[3:].lstrip("/") / "memory.events").read_text(encoding="utf-8").split()
                return int(dict(zip(events[::2], events[1::2], strict=True)).get("oom_kill", "0"))
    return 0
