"""Locks that the kernel lets go of when their process ends, however it ends.

For politeness between commands, not for correctness: where the file system has no locks, everybody gets one.
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
    """Holds the lock file for this process, True, or says that another process holds it, False."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        for _ in range(20):  # somebody asking for the holder has a free lock for microseconds
            if _try_lock(file, fcntl.LOCK_EX):
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
                yield True
                return
            time.sleep(0.05)
        yield False


def holder(path: Path) -> int | None:
    """Process id of who holds the lock file, on its own machine; None if nobody does."""
    if not path.exists():
        return None
    with path.open(encoding="utf-8") as file:
        if _try_lock(file, fcntl.LOCK_SH):
            return None
        text = file.read()
        return int(text) if text.isdecimal() else 0  # not written yet: it has held the lock for microseconds


def _try_lock(file: TextIO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}:
            raise
    return True
