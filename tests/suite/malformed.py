"""Makes odd or broken image files.

Each is a row: a name, its expected result (`stored`, `converted`, `broken` or `ignored`), and its content.
"""

import io
import os
import struct
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RNG = np.random.default_rng(0)
Array = NDArray[Any]
Make = Callable[[Path], None]


class Case(NamedTuple):
    name: str
    fate: str
    make: Make


def pixels(height: int = 40, width: int = 52, channels: int = 3) -> Array:
    """A smooth picture with some noise, neither too easy nor too hard for JPEG."""
    rows, columns = np.mgrid[:height, :width]
    waves = [127 + 80 * np.sin(rows / (5 + c) + columns / (9 - c)) for c in range(channels)]
    return np.clip(np.stack(waves, 2) + RNG.normal(0, 8, (height, width, channels)), 0, 255).astype(np.uint8)


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (40, 52), **options: object) -> bytes:
    """A picture converted to `mode`, as an image file in Pillow's format `kind`."""
    buffer = io.BytesIO()
    Image.fromarray(pixels(*size)).convert(mode).save(buffer, format=kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, data: bytes) -> bytes:
    """A hand-made PNG file: `depth` bits, `colour` type, rows of `data`, each preceded by filter 0."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def content(what: bytes) -> Make:
    return lambda path: _write(path, what)


def _write(path: Path, what: bytes) -> None:
    path.write_bytes(what)


def grey_16(values: Array) -> bytes:
    """A 16-bit grey PNG of uint16 [H, W]."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(values.shape[1], values.shape[0], 16, 0, rows)


def several_frames(kind: str) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.fromarray(pixels()) for _ in range(3)]
    frames[0].save(buffer, format=kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def _translucent(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(channels=4)).save(buffer, format=kind)
    return buffer.getvalue()


def _tiff(mode: str) -> bytes:
    array: dict[str, Array] = {
        "F": pixels()[:, :, 0].astype(np.float32),
        "I": pixels()[:, :, 0].astype(np.int32) * 257,
        "I too large": pixels()[:, :, 0].astype(np.int32) * 100_000,
        "I;16": pixels()[:, :, 0].astype(np.uint16) * 257,
    }
    buffer = io.BytesIO()
    Image.fromarray(array[mode]).save(buffer, format="TIFF")
    return buffer.getvalue()


def _huge_jpeg() -> bytes:
    """A JPEG whose frame header claims 65,500 x 65,500 pixels."""
    jpeg = bytearray(encoded("JPEG"))
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = struct.pack(">HH", 65500, 65500)
    return bytes(jpeg)


def _flipped(file: bytes, position: int) -> bytes:
    changed = bytearray(file)
    changed[position] ^= 0xFF
    return bytes(changed)


def _with_hole(file: bytes) -> bytes:
    half = len(file) // 2
    return file[:half] + bytes(len(file) - half - 12) + file[-12:]


def _with_thumbnail() -> bytes:
    """A JPEG with another JPEG inside its header."""
    inside, whole = encoded("JPEG", size=(8, 8)), encoded("JPEG")
    return whole[:2] + b"\xff\xe1" + struct.pack(">H", len(inside) + 2) + inside + whole[2:]


def _cut(kind: str, suffix: str, percents: list[int], **options: object) -> list[Case]:
    whole = encoded(kind, **options)  # type: ignore[arg-type]
    return [
        Case(f"{kind}-cut-at-{percent}%{suffix}", "broken", content(whole[: len(whole) * percent // 100]))
        for percent in percents
    ]


def files() -> list[Case]:
    """The files of one class."""
    return [*_whole(), *_converted(), *_misnamed(), *_torn(), *_no_images(), *_odd_names(), *_ignored()]


def _whole() -> list[Case]:
    return [
        Case("plain.jpg", "stored", content(encoded("JPEG"))),
        Case("progressive.JPG", "stored", content(encoded("JPEG", progressive=True))),
        Case("full-colour.jpeg", "stored", content(encoded("JPEG", subsampling=0))),
        Case("restarts.jpg", "stored", content(encoded("JPEG", restart_marker_rows=1))),
        Case("exif-says-turned.jpg", "stored", content(encoded("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"))),
        Case("torn-exif.jpg", "stored", content(encoded("JPEG", exif=b"Exif\0\0II*\0\xff\xff"))),
        Case("long-comment.jpg", "stored", content(encoded("JPEG", comment=b"?" * 60_000))),
        Case("rubbish-after-the-end.jpg", "stored", content(encoded("JPEG") + b"rubbish" * 100)),
        Case("zeros-after-the-end.jpg", "stored", content(encoded("JPEG") + b"\0" * 3)),
        Case("plain.png", "stored", content(encoded("PNG"))),
        Case("plain.bmp", "stored", content(encoded("BMP"))),
        Case("plain.webp", "stored", content(encoded("WEBP"))),
        Case("lossless.webp", "stored", content(encoded("WEBP", lossless=True))),
        Case("one-pixel.png", "stored", content(encoded("PNG", size=(1, 1)))),
        Case("one-pixel.jpg", "stored", content(encoded("JPEG", size=(1, 1)))),
        Case("one-row.png", "stored", content(encoded("PNG", size=(1, 3000)))),
        Case("one-column.jpg", "stored", content(encoded("JPEG", size=(3000, 1)))),
        Case("thumbnail.jpg", "stored", content(_with_thumbnail())),
        Case("large.jpg", "stored", content(encoded("JPEG", size=(300, 500)))),
    ]


def _converted() -> list[Case]:
    ramp = np.linspace(0, 65535, 40 * 52).reshape(40, 52).astype(np.uint16)
    deep = b"".join(b"\0" + RNG.integers(0, 256, 52 * 6, dtype=np.uint8).tobytes() for _ in range(40))
    return [
        *(Case(f"mode-{m}.png", "converted", content(encoded("PNG", m))) for m in ("1", "L", "P", "LA", "RGBA")),
        *(Case(f"mode-{m}.jpg", "converted", content(encoded("JPEG", m))) for m in ("L", "CMYK")),
        Case("mode-RGBA.webp", "converted", content(_translucent("WEBP"))),
        Case("mode-L.bmp", "converted", content(encoded("BMP", "L"))),
        Case("palette-with-transparency.png", "converted", content(encoded("PNG", "P", transparency=b"\0\x80\xff"))),
        Case("16-bit-grey.png", "converted", content(grey_16(ramp))),
        Case("16-bit-grey.jpg", "converted", content(_tiff("I;16"))),
        Case("32-bit-grey.jpg", "converted", content(_tiff("I"))),
        Case("16-bit-rgb.png", "converted", content(png(52, 40, 16, 2, deep))),
        Case("cmyk-tiff.jpg", "converted", content(encoded("TIFF", "CMYK"))),
        Case("ycbcr-tiff.jpg", "converted", content(encoded("TIFF", "YCbCr"))),
        Case("animated.webp", "converted", content(several_frames("WEBP"))),
        Case("animated.png", "converted", content(several_frames("PNG"))),
    ]


def _misnamed() -> list[Case]:
    """Files whose suffix differs from their content, which counts."""
    return [
        *(
            Case(f"really-{kind.lower()}.{suffix}", "converted", content(encoded(kind)))
            for kind, suffix in (("PNG", "jpg"), ("BMP", "JPEG"), ("WEBP", "jpg"), ("TIFF", "jpg"), ("PPM", "png"))
        ),
        Case("really-jpeg.png", "converted", content(encoded("JPEG"))),
        Case("really-gif.JPEG", "converted", content(encoded("GIF", "P"))),
        Case("animated-gif.jpg", "converted", content(several_frames("GIF"))),
        Case("really-mpo.jpg", "converted", content(several_frames("MPO"))),
    ]


def _torn() -> list[Case]:
    every = list(range(2, 100, 6))
    halves = {kind: encoded(kind)[: len(encoded(kind)) // 2] + bytes(9000) for kind in ("PNG", "JPEG")}
    return [
        *_cut("JPEG", ".jpg", every),
        *_cut("PNG", ".png", every[:-1]),
        *_cut("WEBP", ".webp", [5, 30, 60, 90]),
        *_cut("BMP", ".bmp", [3, 10, 50, 95]),
        *_cut("TIFF", ".jpg", [3, 50]),
        *(Case(f"half-zeros.{kind.lower()}", "broken", content(half)) for kind, half in halves.items()),
        Case("hole.png", "broken", content(_with_hole(encoded("PNG")))),
        Case("end-cut-off.jpg", "broken", content(encoded("JPEG")[:-2])),
        Case("end-cut-off-but-not-the-thumbnails.jpg", "broken", content(_with_thumbnail()[:-2])),
        Case("bad-checksum.png", "broken", content(_flipped(encoded("PNG"), 30))),
        Case("bad-size.png", "broken", content(_flipped(encoded("PNG"), 19))),
    ]


def _no_images() -> list[Case]:
    noise = [RNG.integers(0, 256, 500, dtype=np.uint8).tobytes() for _ in range(4)]
    return [
        Case("zero-bytes.jpg", "broken", content(b"")),
        Case("one-byte.png", "broken", content(b"\xff")),
        Case("zeros.jpg", "broken", content(bytes(5000))),
        Case("a-web-page.jpg", "broken", content(b"<!DOCTYPE html><title>404 Not Found</title>")),
        Case("drawing.png", "broken", content(b'<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"/>')),
        *(Case(f"noise-{i}.jpg", "broken", content(each)) for i, each in enumerate(noise)),
        *(Case(f"jpeg-noise-{i}.jpg", "broken", content(b"\xff\xd8\xff" + each)) for i, each in enumerate(noise)),
        *(Case(f"png-noise-{i}.png", "broken", content(b"\x89PNG\r\n\x1a\n" + each)) for i, each in enumerate(noise)),
        Case("no-width.png", "broken", content(png(0, 10, 8, 2, b"\0" * 10))),
        Case("bomb.png", "broken", content(png(30_000, 30_000, 8, 2, bytes(1000)))),
        Case("bomb.jpg", "broken", content(_huge_jpeg())),
        Case("floats.jpg", "broken", content(_tiff("F"))),
        Case("more-than-16-bits.jpg", "broken", content(_tiff("I too large"))),
        Case("a-folder.jpg", "broken", Path.mkdir),
        Case("dangling.jpg", "broken", lambda path: path.symlink_to("nowhere.jpg")),
        Case("circular.jpg", "broken", lambda path: path.symlink_to(path.name)),
        Case("to-a-folder.jpg", "broken", lambda path: path.symlink_to("..")),
        Case("to-a-file.jpg", "stored", lambda path: path.symlink_to("plain.jpg")),
        Case("a-pipe.jpg", "broken", os.mkfifo),
    ]


def _odd_names() -> list[Case]:
    names = [
        os.fsdecode(b"latin-1-\xe4\xf6\xfc.jpg"),
        os.fsdecode(b"\xff\xfe.jpg"),
        "spaces and, commas.jpg",
        "new\nline.jpg",
        "tab\tand\x1b[31mcolour.jpg",
        "[bold]markup[red].jpg",
        "{braces}%s.jpg",
        "\u00fcml\u00e4ut.jpg",
        unicodedata.normalize("NFD", "\u00fcml\u00e4ut.jpg"),
        "\u732b.jpg",
        "-rf.jpg",
        "x" * 245 + ".jpg",
        "back\\slash.jpg",
        'quo"te.jpg',
    ]
    whole = [Case(name, "stored", content(encoded("JPEG"))) for name in names]
    return [*whole, Case(os.fsdecode(b"broken-\xe4.jpg"), "broken", content(b"no"))]


def _ignored() -> list[Case]:
    return [
        Case("Thumbs.db", "ignored", content(b"?")),
        Case(".DS_Store", "ignored", content(b"?")),
        Case("notes.txt", "ignored", content(b"?")),
        Case("no-suffix", "ignored", content(encoded("JPEG"))),
        Case("copy.jpg.tmp", "ignored", content(encoded("JPEG"))),
        Case(os.fsdecode(b"\xe4.txt"), "ignored", content(b"?")),
        Case("nested", "ignored", Path.mkdir),
    ]
