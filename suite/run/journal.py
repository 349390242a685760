"""The append-only record of a run: one JSON object a line, written by rank 0.

A record is {"time": unix seconds, "attempt": n, "epoch": k, "metrics": {name: value}}. After a crash the epochs since
the last checkpoint are trained again and recorded again; `read_metrics` keeps the last record of each epoch.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Record:
    """Metrics of one epoch (counted from 1; the last one carries the test results too)."""

    time: float
    attempt: int
    epoch: int
    metrics: dict[str, float]


class Journal:
    """Appends records to one file; a line torn by an earlier crash is ended first, so that it harms no other."""

    def __init__(self, path: Path, attempt: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._attempt = attempt
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")

    def append(self, epoch: int, metrics: dict[str, float]) -> None:
        """Adds one record and flushes it to the disk."""
        record = {"time": time.time(), "attempt": self._attempt, "epoch": epoch, "metrics": metrics}
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read(path: Path, offset: int = 0) -> tuple[list[Record], int]:
    """(records from byte `offset` on, the offset after the last whole line); torn lines are passed over."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    return list(_parse(whole)), offset + len(whole)


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Metrics by epoch, the last attempt's where an epoch was trained again."""
    merged: dict[int, dict[str, float]] = {}
    for record in read(path)[0]:
        merged.setdefault(record.epoch, {}).update(record.metrics)
    return merged


def _parse(content: bytes) -> Iterator[Record]:
    for line in content.splitlines():
        try:
            yield Record(**json.loads(line))
        except (ValueError, TypeError):  # the torn last line of a killed attempt
            continue
