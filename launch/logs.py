"""Finds a cell's log, reads its last lines, and follows it from attempt to attempt."""

import codecs
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from suite.run.directory import RunDir

POLL_SECONDS = 0.5
_TAIL_BYTES = 8192


def newest_log(run: RunDir) -> Path | None:
    """The log of the newest attempt; None before the first.

    If the attempt runs on several nodes, this is the first node's log; `log-node1.txt` beside it is the second's.
    """
    return max(run.attempts.glob("*/log.txt"), default=None)


def worker_log(grid_dir: Path) -> Path | None:
    """The worker log that was written last; it shows a missing interpreter or a failed --setup line."""
    return max(grid_dir.glob("jobs/*/*_log.out"), key=lambda path: path.stat().st_mtime, default=None)


def last_lines(path: Path, num_lines: int) -> list[str]:
    """The last non-blank lines in the file's last 8 KiB."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
        text = file.read().decode("utf-8", errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()][-num_lines:]


def follow(run: RunDir, out: TextIO, is_settled: Callable[[], bool]) -> None:
    """Copies the newest log to `out` as it grows, then each later attempt's log, until the run is settled.

    Args:
        run: the run whose logs to follow.
        out: stream to write to.
        is_settled: returns whether the log is complete; called twice a second, so it should be fast.
    """
    reader: _Reader | None = None
    while True:
        is_last = is_settled()  # checked before reading, so that everything written up to then is read
        path = newest_log(run)
        if reader is not None:
            out.write(reader.news())
        if path is not None and (reader is None or path != reader.path):
            if reader is not None:
                out.write(f"==> {path} <==\n")
            reader = _Reader(path)
            out.write(reader.news())
        out.flush()
        if is_last:
            return
        time.sleep(POLL_SECONDS)


class _Reader:
    """Reads a growing file incrementally."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._num_read = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a read may end inside a character

    def news(self) -> str:
        """The text added since the last call; the whole file if it has become shorter."""
        try:
            with self.path.open("rb") as file:
                self._num_read = 0 if self.path.stat().st_size < self._num_read else self._num_read
                file.seek(self._num_read)
                content = file.read()
        except FileNotFoundError:  # deleted meanwhile
            return ""
        self._num_read += len(content)
        return self._decoder.decode(content)
