"""A cell's log: which file it is, its last lines, and following it from attempt to attempt."""

import codecs
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from suite.run.directory import RunDir

POLL_SECONDS = 0.5
_TAIL_BYTES = 8192


def newest_log(run: RunDir) -> Path | None:
    """What training printed in the newest attempt; None before the first.

    Of an attempt on several nodes it is the first node's; `log-node1.txt` beside it is the second's.
    """
    return max(run.attempts.glob("*/log.txt"), default=None)


def worker_log(grid_dir: Path) -> Path | None:
    """What the worker that printed last printed: an interpreter that is not there, a failed --setup line."""
    return max(grid_dir.glob("jobs/*/*_log.out"), key=lambda path: path.stat().st_mtime, default=None)


def last_lines(path: Path, num_lines: int) -> list[str]:
    """The file's last lines that are not blank; looks at its last 8 KiB only."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
        text = file.read().decode("utf-8", errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()][-num_lines:]


def follow(run: RunDir, out: TextIO, is_settled: Callable[[], bool]) -> None:
    """Copies the newest log to `out` as it grows, and the next attempt's after it, until the run is settled.

    Args:
        run: whose.
        out: where the text goes.
        is_settled: whether nothing more is to come; asked twice a second, so it had better be quick.
    """
    reader: _Reader | None = None
    while True:
        is_last = is_settled()  # asked before reading: what was written until then is still read
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
    """Reads on in a file that grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._num_read = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a read may end within a letter

    def news(self) -> str:
        """What was written since the last call; all of it anew if the file has become shorter."""
        try:
            with self.path.open("rb") as file:
                self._num_read = 0 if self.path.stat().st_size < self._num_read else self._num_read
                file.seek(self._num_read)
                content = file.read()
        except FileNotFoundError:  # cleaned away
            return ""
        self._num_read += len(content)
        return self._decoder.decode(content)
