"""On-disk progress of `prepare` on a split, so that an interrupted call resumes and produces identical bytes.

A record file beside the unfinished data file has one JSON line per source file, in order, written after the image.
"""

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from suite.data.beton import ROW, BetonWriter, data_start, partial
from suite.data.class_folders import Entry, Split, escaped
from suite.data.decoding import Storage, Stored, Task, store

COMMIT_SECONDS, COMMIT_BYTES = 2.0, 64 << 20
"""Interval between commits of progress to disk: a kill loses at most this much work."""


@dataclass
class Done:
    """Result of a split's first `num_entries` files: rows of stored, notes on converted, reasons for broken ones."""

    rows: NDArray[Any] = field(default_factory=lambda: np.zeros(0, ROW))
    converted: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    num_entries: int = 0

    def add(self, entry: Entry, note: str | None, *, is_broken: bool) -> None:
        """The next file."""
        if note is not None:
            (self.broken if is_broken else self.converted)[escaped(entry.name)] = note
        self.num_entries += 1


class Recorder:
    """Stores a split's images one after another; everything up to the last `commit` survives a crash.

    Starts from an earlier call's progress, in `done`, up to the first file or setting that has changed.
    """

    def __init__(self, beton: Path, split: Split, storage: Storage) -> None:
        self._split, self._path = split, record_path(beton)
        head = {"storage": asdict(storage), "data_start": data_start(len(split.entries), storage.page_bytes)}
        self._head = (json.dumps(head) + "\n").encode()
        self.done, keep = self._resume(beton, storage)
        self._writer = BetonWriter(beton, len(split.entries), storage.page_bytes, self.done.rows)
        self._file = self._path.open("r+b" if keep else "wb")
        self._file.truncate(keep)
        self._file.seek(keep)
        self._lines = [] if keep else [self._head]
        self._num_bytes, self._time = 0, time.monotonic()

    def add(self, stored: Stored) -> None:
        """Stores the result for the next file of the split."""
        entry, row = self._split.entries[self.done.num_entries], None
        if stored.sample is not None:
            self._writer.append(stored.sample)
            row = self._writer.rows[-1].tolist()
            self._num_bytes += len(stored.sample.content)
        self.done.add(entry, stored.note, is_broken=row is None)
        self._lines.append((json.dumps([entry.name, entry.num_bytes, row, stored.note]) + "\n").encode())
        if self._num_bytes > COMMIT_BYTES or time.monotonic() - self._time > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Flushes the images first, then the lines that refer to them."""
        self._writer.flush()
        self._file.write(b"".join(self._lines))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._lines, self._num_bytes, self._time = [], 0, time.monotonic()
        self.done.rows = self._writer.rows

    def finish(self) -> Path:
        """Completes the data file, still under its temporary name."""
        self.commit()
        self._file.close()
        return self._writer.finish()

    def publish(self) -> None:
        """Gives the data file its final name and deletes the record."""
        self._writer.publish()
        self._path.unlink()

    def stop(self) -> None:
        """Closes the files; the next call resumes from them."""
        self._writer.abandon()
        with suppress(OSError):  # on a full disk, flushing the buffer fails again
            self._file.close()

    def _resume(self, beton: Path, storage: Storage) -> tuple[Done, int]:
        """An earlier call's progress on this split, and the length in bytes of the record's valid part."""
        done, rows, keep = Done(), np.zeros(len(self._split.entries), ROW), 0
        try:
            num_stored = partial(beton).stat().st_size
            lines = self._path.open("rb")
        except FileNotFoundError:
            return done, keep
        with lines:
            if lines.readline() != self._head:
                return done, keep
            keep = len(self._head)
            num_rows = 0
            for number, (entry, line) in enumerate(zip(self._split.entries, lines, strict=False)):
                row, note = _fields(entry, line, num_stored)
                if row is None and (note is None or self._is_mended(entry, number, storage)):
                    break
                if row is not None:
                    rows[num_rows] = tuple(row)
                    num_rows += 1
                done.add(entry, note, is_broken=row is None)
                keep += len(line)
            done.rows = rows[:num_rows]
        return done, keep

    def _is_mended(self, entry: Entry, number: int, storage: Storage) -> bool:
        return store(Task(str(self._split.folder / entry.name), number, entry.label), storage).sample is not None


def _fields(entry: Entry, line: bytes, num_stored: int) -> tuple[Sequence[Any] | None, str | None]:
    """(row, note) of a record's line; (None, None) if the line is torn or for another file, or its image is missing."""
    try:
        name, num_bytes, row, note = json.loads(line)
    except (ValueError, TypeError):
        return None, None
    is_same = line.endswith(b"\n") and (name, num_bytes) == entry[:2]
    if not is_same or (row is not None and (row[3] != entry.label or row[4] + row[5] > num_stored)):
        return None, None
    return row, note


def record_path(beton: Path) -> Path:
    """Path of an unfinished data file's record."""
    return beton.with_name(f".{beton.name}.record")
