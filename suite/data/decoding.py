"""Turns an image file into a stored sample. Worker processes import this module, so it needs only numpy and Pillow.

A file whose pixels are not 8-bit RGB is converted and reported. A file that cannot be fully decoded counts as broken.
"""

import io
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from suite.data.arrow import image_of, is_row
from suite.data.beton import MAX_SIDE, PAGE_BYTES, Sample
from suite.data.class_folders import escaped
from suite.data.resize import area_resize
from suite.errors import DataError
from suite.training.seeds import stream

MAX_UNLIMITED_PAGE_BYTES = 64 << 20
"""Page size if images of any size are stored; an image that does not fit must be shrunk."""
_END_OF_JPEG = b"\xff\xd9"
_GREY_16 = {"I", "I;16", "I;16L", "I;16B", "I;16N"}
_WITH_OTHER_ALPHA = {"La": "LA", "RGBa": "RGBA"}
_SUFFIX_FORMATS = {
    "JPEG": {".jpg", ".jpeg"},
    "PNG": {".png"},
    "BMP": {".bmp"},
    "WEBP": {".webp"},
}


@dataclass(frozen=True)
class Storage:
    """How images are stored: longer side at most `max_resolution` pixels, a share of them as JPEG, the rest raw.

    `quality` is Pillow's JPEG quality for re-encoded images; `page_bytes` is the file's page size.
    """

    max_resolution: int | None
    quality: int
    jpeg_share: float
    page_bytes: int

    @classmethod
    def of(cls, max_resolution: int | None, quality: int, jpeg_share: float) -> "Storage":
        """Storage with FFCV's default page size, or the next power of two that holds the largest raw image."""
        if max_resolution is None:
            return cls(None, quality, jpeg_share, MAX_UNLIMITED_PAGE_BYTES)
        page_bytes = max(PAGE_BYTES, 1 << (3 * max_resolution**2 - 1).bit_length())
        return cls(max_resolution, quality, jpeg_share, page_bytes)

    def wants_jpeg(self, number: int) -> bool:
        """Whether to store image `number` as JPEG: a random draw that depends only on the number."""
        return stream(0, "jpeg", number) / 2**63 < self.jpeg_share


class Task(NamedTuple):
    """One file to store under `label`; `number` is its sample number if no file of the split is broken."""

    path: str
    number: int
    label: int


class Stored(NamedTuple):
    """Result for one file: a sample and, if converted, its original format; or None and the reason it is broken."""

    sample: Sample | None
    note: str | None


class _BrokenError(Exception):
    """str() is the reason."""


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """Opens an image file or a row of an Arrow file; decode the image inside the `with` block.

    Raises:
        DataError: the file cannot be opened, or the block raises an exception; the message names the file.
    """
    try:
        with Image.open(image_of(path) if isinstance(path, str) and is_row(path) else path) as image:
            yield image
    except Exception as error:  # Pillow's decoders can raise any exception on damaged files
        what = _first_line(str(error) or type(error).__name__)
        raise DataError(f"{escaped(str(path))}: cannot be decoded ({what})") from error


def read_rgb(path: str | Path) -> NDArray[np.uint8]:
    """The file's pixels [H, W, 3] as `prepare` would store them raw and at their original size.

    Raises:
        DataError: the file cannot be decoded; the message names it.
    """
    with opened(path) as image:
        return to_rgb(image)


def store_all(tasks: Sequence[Task], storage: Storage) -> list[Stored]:
    """Applies `store` to each task; runs in a worker process."""
    return [store(task, storage) for task in tasks]


def store(task: Task, storage: Storage) -> Stored:
    """Reads the file, decodes all of it, resizes and encodes. Depends only on its arguments and the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata, which we do not use
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _store(task, storage)
    except _BrokenError as error:
        return Stored(None, str(error))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return Stored(None, f"more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels: a decompression bomb?")
    except OSError as error:
        return Stored(None, _first_line(error.strerror or str(error)))
    except Exception as error:  # noqa: BLE001  (Pillow's decoders can raise any exception on damaged files)
        return Stored(None, _first_line(f"cannot be decoded: {type(error).__name__}: {error}"))


def _first_line(text: str) -> str:
    """The first line of the text, printable and short enough to be shown with a file name."""
    return " ".join(text.encode("ascii", "backslashreplace").decode().split())[:160]


def _store(task: Task, storage: Storage) -> Stored:
    content = _read(Path(task.path))
    buffer = io.BytesIO(content)
    try:
        image = Image.open(buffer)
    except UnidentifiedImageError as error:
        raise _BrokenError("not an image of a known format") from error
    with image:
        _require_whole(image, content, buffer.tell())
        note = _what_is_odd(image, task.path)
        pixels = to_rgb(image)
        is_as_it_was = note is None and image.format == "JPEG" and _is_plain_jpeg(image, content)
    resized = _resized(pixels, storage.max_resolution)
    height, width = resized.shape[:2]
    if max(height, width) > MAX_SIDE:
        raise _BrokenError(f"too large: {width} x {height} pixels; shrink it with --max-resolution")
    is_jpeg = storage.wants_jpeg(task.number)
    if not is_jpeg:
        content = resized.tobytes()
    elif not is_as_it_was or resized is not pixels or len(content) > storage.page_bytes:
        content = _jpeg(resized, storage.quality)
    if len(content) > storage.page_bytes:
        raise _BrokenError(
            f"too large: {width} x {height} pixels are {len(content):,} bytes, "
            f"more than a page's {storage.page_bytes:,}; shrink it with --max-resolution"
        )
    return Stored(Sample(is_jpeg, height, width, task.label, content), note)


def _read(path: Path) -> bytes:
    try:
        kind = path.stat().st_mode
    except FileNotFoundError as error:
        raise _BrokenError("a broken link" if path.is_symlink() else "the file has disappeared") from error
    if stat.S_ISDIR(kind):
        raise _BrokenError("a folder named like an image")
    if not stat.S_ISREG(kind):  # reading a pipe could block forever
        raise _BrokenError("neither a file nor a folder")
    content = path.read_bytes()
    if not content:
        raise _BrokenError("an empty file")
    return content


def _require_whole(image: Image.Image, content: bytes, num_read: int) -> None:
    """Rejects damage that decoders ignore: a gap in a PNG, or a JPEG cut short (its header has `num_read` bytes)."""
    if image.format == "PNG":
        with Image.open(io.BytesIO(content)) as again:
            again.verify()
    elif image.format == "JPEG" and content.find(_END_OF_JPEG, num_read) < 0:
        raise _BrokenError("cut short: the end of the JPEG is missing")


def _what_is_odd(image: Image.Image, path: str) -> str | None:
    """Format and mode of an image not yet loaded; None if it is a single 8-bit RGB frame that matches its suffix."""
    odd = [f"{image.format}, {image.mode}"]
    if image.mode in {"RGB", "RGBA"} and ";16" in str(getattr(image, "tile", "")):
        odd.append("in 16 bits")
    if image.format in {"PNG", "WEBP"} and getattr(image, "is_animated", False):
        odd.append("the first of several frames")
    is_as_named = Path(path).suffix.lower() in _SUFFIX_FORMATS.get(image.format or "", ())
    return None if image.mode == "RGB" and is_as_named and len(odd) == 1 else ", ".join(odd)


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """RGB pixels [H, W, 3]. Drops alpha, divides 16-bit levels by 257, and uses the first of several frames."""
    image.load()
    if min(image.size) < 1:
        raise _BrokenError("it has no pixels")
    if image.mode in _GREY_16:
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 2**16 - 1:
            raise _BrokenError("its pixels are integers of more than 16 bits")
        grey = np.rint(values / 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise _BrokenError("its pixels are floating-point numbers, of no known range")
    if image.mode in _WITH_OTHER_ALPHA:
        image = image.convert(_WITH_OTHER_ALPHA[image.mode])
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _is_plain_jpeg(image: Image.Image, content: bytes) -> bool:
    """Whether the image is a JPEG with three colour channels and no bytes after its end."""
    return getattr(image, "layers", 0) == 3 and content.endswith(_END_OF_JPEG)  # noqa: PLR2004


def _resized(pixels: NDArray[np.uint8], max_resolution: int | None) -> NDArray[np.uint8]:
    """The array itself if it is small enough; else resized by area, with sides rounded down, as in FFCV."""
    height, width = pixels.shape[:2]
    if max_resolution is None or max(height, width) <= max_resolution:
        return pixels
    ratio = max_resolution / max(height, width)
    return area_resize(pixels, max(int(ratio * height), 1), max(int(ratio * width), 1))


def _jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()
