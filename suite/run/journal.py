"""The append-only record of a run: one JSON object per line, written by process 0.

Each attempt first writes {"time": unix seconds, "attempt": n, "token": the attempt's}, then its records, {"time",
"attempt", "epoch": k, "metrics": {name: value}}. After a crash, the epochs since the last checkpoint are trained and
recorded again; `newest` keeps the last attempt's record of each epoch.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from suite.run.attempt import Attempt


@dataclass(frozen=True)
class Record:
    """Metrics of one epoch, counted from 1; the last one also has the test results."""

    time: float
    attempt: int
    epoch: int
    metrics: dict[str, float]


class Journal:
    """Appends an attempt's records; first terminates a line torn by a crash, so that it damages no other line."""

    def __init__(self, path: Path, attempt: Attempt) -> None:
        self._attempt = attempt
        attempt.require_newest()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")
        self._write({"token": attempt.token})

    def append(self, epoch: int, metrics: dict[str, float]) -> None:
        """Adds one record and flushes it to disk.

        Raises:
            SupersededError: a later attempt has begun.
        """
        self._attempt.require_newest()
        self._write({"epoch": epoch, "metrics": metrics})

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, entry: dict[str, Any]) -> None:
        line = {"time": time.time(), "attempt": self._attempt.number, **entry}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def token(path: Path) -> str:
    """Token of the first attempt that wrote here, which distinguishes journals of the same name; empty if none did."""
    try:
        with path.open("rb") as file:
            return str(json.loads(file.readline())["token"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return ""


def read(path: Path, offset: int = 0) -> tuple[list[Record], int]:
    """(records from byte `offset` on, offset after the last complete line); skips torn lines."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    return list(_parse(whole)), offset + len(whole)


def newest(path: Path) -> list[Record]:
    """One record per epoch, in order; if an epoch was trained again, the last attempt's."""
    merged: dict[int, Record] = {}
    for record in sorted(read(path)[0], key=lambda record: record.attempt):
        before = merged.get(record.epoch, record)
        merged[record.epoch] = replace(record, metrics={**before.metrics, **record.metrics})
    return [merged[epoch] for epoch in sorted(merged)]


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Metrics by epoch; if an epoch was trained again, the last attempt's."""
    return {record.epoch: record.metrics for record in newest(path)}


def _parse(content: bytes) -> Iterator[Record]:
    for line in content.splitlines():
        try:
            yield Record(**json.loads(line))
        except (ValueError, TypeError):  # an attempt's first line, or a torn one
            continue
