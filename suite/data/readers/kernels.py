"""Pixel loops that NumPy cannot vectorise, compiled by numba, which comes with FFCV: once per process.

They release the GIL, so threads run them in parallel. Sums are integers, so results are the same on every machine.
Images here are uint8 [H, 3 W]: the pixels of a row are consecutive.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

INTERPOLATIONS = ("bilinear", "bicubic", "area")
"""The kernels' `interpolation` arguments are indices into this."""
ONE, TWO, THREE = (np.uintp(number) for number in range(1, 4))
DARKEST, BRIGHTEST = np.int32(0), np.int32(255)
BLOCK = 16
"""Number of rows transposed together: enough to fill the cache lines written to."""

_compiled: Callable[[Callable[..., Any]], Any] = numba.njit(nogil=True, error_model="numpy")


@_compiled
def _filter(x: float, interpolation: int) -> float:
    """The triangle filter, or Keys' cubic with a = -0.5 (interpolation 1), at distance x."""
    x = abs(x)
    if interpolation == 0:
        return max(1.0 - x, 0.0)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    return -0.5 * (((x - 5.0) * x + 8.0) * x - 4.0) if x < 2.0 else 0.0  # noqa: PLR2004


@_compiled
def _shares(num: int, num_new: int, interpolation: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]:
    """For each new pixel: the first contributing old pixel and their count, both [num_new]; their shares [num_new, K].

    For area, a share is the fraction covered. The other filters are stretched if the image shrinks (antialiasing).
    """
    scale = num / num_new
    support = max(scale, 1.0) * (2.0 if interpolation == 1 else 1.0)
    first, count = np.empty(num_new, np.int64), np.empty(num_new, np.int64)
    shares = np.zeros((num_new, 2 * int(np.ceil(support)) + 1))
    for new in range(num_new):
        if interpolation == 2:  # noqa: PLR2004
            begin, end = new * scale, min((new + 1) * scale, float(num))
            first[new] = int(begin)
            count[new] = int(np.ceil(end)) - first[new]
            for k in range(count[new]):
                old = float(first[new] + k)
                shares[new, k] = max(min(end, old + 1.0) - max(begin, old), 0.0)
        else:
            centre = scale * (new + 0.5)
            first[new] = max(int(centre - support + 0.5), 0)
            count[new] = min(int(centre + support + 0.5), num) - first[new]
            for k in range(count[new]):
                shares[new, k] = _filter((k + first[new] - centre + 0.5) * (1.0 / max(scale, 1.0)), interpolation)
        total = 0.0
        for k in range(count[new]):
            total += shares[new, k]
        for k in range(count[new]):
            shares[new, k] /= total
    return first, count, shares


@_compiled
def _in_16_bits(shares: NDArray[np.float64]) -> tuple[NDArray[np.int16], int]:
    """(round(shares * 2**bits), bits), as in torch: as many bits as the largest share allows, at most 22."""
    largest, bits = shares.max(), 0
    while bits < 22 and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:  # noqa: PLR2004
        bits += 1
    rounded = np.empty(shares.shape, np.int16)
    for new in range(shares.shape[0]):
        for k in range(shares.shape[1]):
            share = shares[new, k] * (1 << bits)
            rounded[new, k] = int(share - 0.5) if share < 0 else int(share + 0.5)
    return rounded, bits


@_compiled
def _mix_rows(old: NDArray[np.uint8], new: NDArray[np.uint8], interpolation: int) -> None:
    """Resizes rows [h, n] into rows [H, n]."""
    first, count, exact = _shares(len(old), len(new), interpolation)
    shares, bits = _in_16_bits(exact)
    num, half, shift = old.shape[1], np.int32(1 << (bits - 1)), np.int32(bits)
    sums = np.empty(num, np.int32)
    for y in range(len(new)):
        mixed = new[y]
        sums[:] = half
        for k in range(count[y]):
            row, share = old[first[y] + k], np.int32(shares[y, k])
            for i in range(num):
                sums[i] += share * np.int32(row[i])
        for i in range(num):
            mixed[i] = min(max(sums[i] >> shift, DARKEST), BRIGHTEST)


@_compiled
def _transpose(image: NDArray[np.uint8], transposed: NDArray[np.uint8]) -> None:
    """Transposes image [h, 3 w] into [w, 3 h], pixel by pixel."""
    for begin in range(0, len(image), BLOCK):
        for x in range(len(transposed)):
            column, old = transposed[x], np.uintp(3 * x)
            for y in range(begin, min(begin + BLOCK, len(image))):
                row, new = image[y], np.uintp(3 * y)
                column[new], column[new + ONE], column[new + TWO] = row[old], row[old + ONE], row[old + TWO]


@_compiled
def _copy(image: NDArray[np.uint8], copied: NDArray[np.uint8]) -> None:
    for y in range(len(image)):
        row, new = image[y], copied[y]
        for i in range(len(row)):
            new[i] = row[i]


@_compiled
def resize(image: NDArray[np.uint8], box: NDArray[np.int32], interpolation: int, resized: NDArray[np.uint8]) -> None:
    """Resizes window `box` [4] (top, left, height, width) of image [h, 3 w] into `resized` [H, 3 W].

    Bilinear and bicubic are bit-identical to `torch.nn.functional.interpolate(..., antialias=True)` of the uint8
    window: columns first, with bytes in between. Area is within one level of `resize.area_resize`. A window that
    already has the right size is copied exactly.
    """
    top, left, height, width = np.int64(box[0]), np.int64(box[1]), np.int64(box[2]), np.int64(box[3])
    new_height, new_width = len(resized), resized.shape[1] // 3
    old = image[top : top + height, 3 * left : 3 * (left + width)]
    if height == new_height and width == new_width:
        _copy(old, resized)
        return
    # Mixing rows handles many pixels at a time, mixing columns one: so transpose the image and mix rows.
    standing = np.empty((width, 3 * height), np.uint8)
    _transpose(old, standing)
    if width != new_width:
        wide, standing = standing, np.empty((new_width, 3 * height), np.uint8)
        _mix_rows(wide, standing, interpolation)
    lying = np.empty((height, 3 * new_width), np.uint8)
    _transpose(standing, lying)
    if height == new_height:
        _copy(lying, resized)
    else:
        _mix_rows(lying, resized, interpolation)


@_compiled
def finish(
    image: NDArray[np.uint8], mirrored: bool, normalized: NDArray[np.float32], finished: NDArray[np.float32]
) -> None:
    """Maps image [H, 3 W] through `normalized` [256, 3] into `finished` [H, 3 W], mirrored horizontally if asked."""
    width = image.shape[1] // 3
    for y in range(len(image)):
        old, new = image[y], finished[y]
        if mirrored:
            for x in range(width):
                for c in range(3):
                    new[3 * x + c] = normalized[old[3 * (width - 1 - x) + c], c]
        else:
            for x in range(width):
                for c in range(3):
                    new[3 * x + c] = normalized[old[3 * x + c], c]


@_compiled
def render(
    i: int,
    image: NDArray[np.uint8],
    box: NDArray[np.int32],
    interpolation: int,
    mirrored: bool,
    normalized: NDArray[np.float32],
    windows: NDArray[np.uint8],
    finished: NDArray[np.float32],
) -> None:
    """Resizes window `box` [4] of image [H, 3 W] into entry `i` of `windows` or, if not empty, of `finished`.

    Both are [n, size, 3 size]. With `finished`, `windows` needs only one entry, which stays in the processor's cache.
    """
    window = windows[i % len(windows)]
    resize(image, box, interpolation, window)
    if len(finished) > 0:
        finish(window, mirrored, normalized, finished[i])
