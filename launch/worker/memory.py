"""Whether the kernel killed a process of this job because it ran out of memory, according to its control group."""

from contextlib import suppress
from pathlib import Path


def num_oom_kills(cgroup: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Number of processes killed so far in this process's memory control group (version 2 or 1); 0 if unknown."""
    with suppress(OSError):
        for line in cgroup.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            folder = path.lstrip("/")
            if not controllers and (count := _count(root / folder / "memory.events")) is not None:
                return count
            if "memory" in controllers.split(",") and (
                count := _count(root / "memory" / folder / "memory.oom_control")
            ):
                return count
    return 0


def _count(path: Path) -> int | None:
    """The entry `oom_kill` of a file of names and numbers."""
    with suppress(OSError, ValueError):
        words = path.read_text(encoding="utf-8").split()
        return int(dict(zip(words[::2], words[1::2], strict=True)).get("oom_kill", "0"))
    return None
