"""FFCV's file format, version 2, in numpy: files of RGB images and integer labels, read and written without FFCV.

A file is a header, two field descriptors, a row of metadata per sample, the images' bytes, and a table of image
offsets. Images begin on the first page after the metadata. None crosses a page boundary, because FFCV reads by page.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from suite.errors import DataError

VERSION = 2
PAGE_BYTES = 8 << 20
"""FFCV's default page size: a power of two, at least as large as the largest image."""
MAX_SIDE = 2**16 - 1
"""In pixels: heights and widths are stored in two bytes."""

_HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page", "<u4"), ("num_samples", "<u8"), ("table", "<u8")]
)
_FIELD = np.dtype([("kind", "u1"), ("name", "S16"), ("arguments", "V1024")])
_INT, _RGB_IMAGE = 1, 2
_JPEG, _RAW = 0, 1
_FIELDS = np.array([(_RGB_IMAGE, b"image", b""), (_INT, b"label", b"")], _FIELD)
# C's alignment of {{u8, u16, u16, u64} packed, i64}: FFCV's metadata of an image and a label.
_METADATA = np.dtype(
    {
        "names": ["mode", "width", "height", "offset", "label"],
        "formats": ["u1", "<u2", "<u2", "<u8", "<i8"],
        "offsets": [0, 1, 3, 5, 16],
        "itemsize": 24,
    }
)
_ALLOCATION = np.dtype([("sample", "<u8"), ("offset", "<u8"), ("num_bytes", "<u8")])
ROW = np.dtype(
    [
        ("is_jpeg", "?"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("label", "<i8"),
        ("offset", "<u8"),
        ("num_bytes", "<u8"),
    ]
)
"""Metadata of one sample, as stored in the file."""


@dataclass(frozen=True)
class Index:
    """Location, size and format of a file's N images: int64 [N] each, is_jpeg bool [N] (False: raw pixels)."""

    labels: NDArray[np.int64]
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]
    is_jpeg: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    num_bytes: NDArray[np.int64]

    def __len__(self) -> int:
        """N."""
        return len(self.labels)


def read_index(path: Path) -> Index:
    """The index of a file of images and labels. Reads no image.

    Raises:
        DataError: the file does not exist, is of another kind, or its index points outside it.
    """
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            return _read_index(path, _Bytes(path, file.fileno(), num_bytes))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; `python -m suite.data prepare` makes such files") from error


@dataclass(frozen=True)
class _Bytes:
    path: Path
    descriptor: int
    num_bytes: int

    def read(self, dtype: np.dtype[Any], count: int, offset: int, what: str) -> NDArray[Any]:
        if offset + count * dtype.itemsize > self.num_bytes:
            raise DataError(f"{self.path}: torn: {what} would end after the file's {self.num_bytes:,} bytes")
        content = bytearray(count * dtype.itemsize)
        done = 0
        while done < len(content):  # one read returns at most 2 GiB
            num = os.preadv(self.descriptor, [memoryview(content)[done:]], offset + done)
            if num == 0:
                raise DataError(f"{self.path}: the file shrank while it was being read")
            done += num
        return np.frombuffer(content, dtype)


def _read_index(path: Path, file: _Bytes) -> Index:
    header = file.read(_HEADER, 1, 0, "the header")[0]
    num, page, table = int(header["num_samples"]), int(header["page"]), int(header["table"])
    if header["version"] != VERSION or not page or page & (page - 1):
        raise DataError(f"{path}: not an FFCV file of version {VERSION}, or one that was never finished")
    fields = file.read(_FIELD, min(int(header["num_fields"]), 16), _HEADER.itemsize, "the list of fields")
    found = [(int(field["kind"]), field["name"].decode("ascii", "replace")) for field in fields]
    if found != [(_RGB_IMAGE, "image"), (_INT, "label")]:
        names = ", ".join(name for _, name in found)
        raise DataError(f"{path}: its fields are ({names}), not an RGB image 'image' and an integer 'label'")
    if not num:
        raise DataError(f"{path}: it has no samples")
    start = _HEADER.itemsize + fields.nbytes
    metadata = file.read(_METADATA, num, start, f"the metadata of {num:,} samples")
    allocations = file.read(_ALLOCATION, num, table, f"the table of {num:,} images")
    allocations = allocations[np.argsort(allocations["sample"], kind="stable")]
    num_bytes, offsets = (_signed(values) for values in (allocations["num_bytes"], metadata["offset"]))
    heights, widths, mode = (metadata[name].astype(np.int64) for name in ("height", "width", "mode"))
    faults = {
        "is not in the table of images": (allocations["sample"] != np.arange(num))
        | (allocations["offset"] != metadata["offset"]),
        "lies outside of the data": (offsets < start + metadata.nbytes) | (offsets > table - num_bytes),
        "is empty": (num_bytes <= 0) | (heights == 0) | (widths == 0),
        "lies on two pages": offsets // page != (offsets + num_bytes - 1) // page,
        "is stored in an unknown way": (mode != _JPEG) & (mode != _RAW),
        "has not 3 bytes per pixel": (mode == _RAW) & (num_bytes != 3 * heights * widths),
    }
    for fault, where in faults.items():
        if where.any():
            raise DataError(f"{path}: torn index: image {int(where.argmax())} {fault} ({int(where.sum()):,} such)")
    return Index(metadata["label"].astype(np.int64), heights, widths, mode == _JPEG, offsets, num_bytes)


def _signed(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """As int64; numbers too large for it are clamped, so that they stay out of range instead of turning negative."""
    return np.minimum(values, np.uint64(2**62)).astype(np.int64)


@dataclass(frozen=True)
class Sample:
    """One stored image: the bytes of a JPEG file, or RGB pixels row by row. Sides in pixels."""

    is_jpeg: bool
    height: int
    width: int
    label: int
    content: bytes


class BetonWriter:
    """Writes up to `capacity` samples, in order, to `.NAME.partial` beside `path`, then renames it to `path`.

    To resume after a kill, pass the samples already flushed as `rows` (ROW [n]). The file's content depends only on
    the samples, capacity and page size. Leaving the context manager closes the file, or abandons it on an exception.
    """

    def __init__(
        self, path: Path, capacity: int, page_bytes: int = PAGE_BYTES, rows: NDArray[Any] | None = None
    ) -> None:
        self.path, self.partial, self.page_bytes = path, partial(path), page_bytes
        self._rows, self._num = np.zeros(capacity, ROW), 0
        self._end = data_start(capacity, page_bytes)
        if rows is not None and len(rows):
            self._num = len(rows)
            self._rows[: self._num] = rows
            self._end = int(rows[-1]["offset"] + rows[-1]["num_bytes"])
        self._file = os.fdopen(os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b", 1 << 20)
        if rows is not None and os.fstat(self._file.fileno()).st_size < self._end * bool(len(rows)):
            self._file.close()
            raise ValueError(f"{self.partial} is too short for the {len(rows)} samples it should hold")
        self._file.truncate(self._end if self._num else 0)

    @property
    def rows(self) -> NDArray[Any]:
        """ROW [n]: the samples written so far."""
        return self._rows[: self._num]

    def append(self, sample: Sample) -> None:
        """Writes the next sample.

        Raises:
            ValueError: the sample does not fit on a page, its sides are too long, or the file is full.
        """
        size = len(sample.content)
        if not 0 < size <= self.page_bytes or max(sample.height, sample.width) > MAX_SIDE:
            raise ValueError(f"an image of {sample.height} x {sample.width} and {size:,} bytes does not fit")
        offset = self._end
        if offset // self.page_bytes != (offset + size - 1) // self.page_bytes:
            offset = -(-offset // self.page_bytes) * self.page_bytes
        if self._num == len(self._rows):
            raise ValueError(f"the file is laid out for {self._num} samples")
        self._file.seek(offset)  # skipped bytes read as zeros
        self._file.write(sample.content)
        self._rows[self._num] = (sample.is_jpeg, sample.height, sample.width, sample.label, offset, size)
        self._end, self._num = offset + size, self._num + 1

    def flush(self) -> None:
        """Flushes everything written so far to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> Path:
        """Completes and closes the partial file and returns its path; then call `publish`."""
        rows = self.rows
        header = np.array((VERSION, len(_FIELDS), self.page_bytes, len(rows), self._end), _HEADER)
        metadata, table = np.zeros(len(self._rows), _METADATA), np.zeros(len(rows), _ALLOCATION)
        for name in ("width", "height", "offset", "label"):
            metadata[name][: len(rows)] = rows[name]
        metadata["mode"][: len(rows)] = np.where(rows["is_jpeg"], _JPEG, _RAW)
        table["sample"], table["offset"], table["num_bytes"] = np.arange(len(rows)), rows["offset"], rows["num_bytes"]
        self._file.seek(self._end)
        self._file.write(table.tobytes())
        self._file.seek(_HEADER.itemsize)
        self._file.write(_FIELDS.tobytes() + metadata.tobytes())
        self.flush()
        self._file.seek(0)  # last: a header marks the file as complete
        self._file.write(header.tobytes())
        self.flush()
        self._file.close()
        return self.partial

    def publish(self) -> None:
        """Renames the finished file to `path`."""
        self.partial.replace(self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        """Finishes and publishes."""
        self.finish()
        self.publish()

    def abandon(self) -> None:
        """Closes the partial file and leaves it in place."""
        with suppress(OSError):  # on a full disk, flushing the buffer fails again
            self._file.close()

    def __enter__(self) -> "BetonWriter":  # noqa: PYI034  (Self is younger than Python 3.10)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def data_start(capacity: int, page_bytes: int) -> int:
    """Offset of the first image in a file for `capacity` samples: the first page after their metadata."""
    end = _HEADER.itemsize + _FIELDS.nbytes + capacity * _METADATA.itemsize
    return -(-end // page_bytes) * page_bytes


def partial(path: Path) -> Path:
    """Path of an unfinished file."""
    return path.with_name(f".{path.name}.partial")
