"""Locks that the kernel releases when their process ends, even if it is killed.

They keep commands from interfering, but correctness does not rely on them: without flock, every lock succeeds.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Yields True if this process now holds the lock on the file, False if another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        for _ in range(20):  # `holder` takes a free lock for microseconds
            if _try_lock(file, fcntl.LOCK_EX):
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
                yield True
                return
            time.sleep(0.05)
        yield False


def holder(path: Path) -> int | None:
    """Id, on its own machine, of the process that holds the lock on the file; None if it is free."""
    if not path.exists():
        return None
    with path.open(encoding="utf-8") as file:
        if _try_lock(file, fcntl.LOCK_SH):
            return None
        text = file.read()
        return int(text) if text.isdecimal() else 0  # not written yet: the lock was just taken


def _try_lock(file: TextIO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}:
            raise
    return True
