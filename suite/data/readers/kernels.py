"""Loops over pixels that numpy has no word for, compiled by numba, which comes with FFCV: once per process.

They hold no lock of Python's, so threads run them side by side. Sums are added in the order written, so they come out
the same on every machine. Images are [H, 3 W] here, a row's pixels one after another.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

HALF = np.float32(0.5)
ONE, TWO, THREE, FOUR, FIVE = (np.uintp(number) for number in range(1, 6))

Levels = NDArray[np.uint8] | NDArray[np.float32]

_compiled: Callable[[Callable[..., Any]], Any] = numba.njit(nogil=True, error_model="numpy")


@_compiled
def _coverage(num: int, num_new: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Of each new pixel: the first old one under it [num_new]; the shares of that one and of the next [num_new, K].

    Shares of what lies beyond the last old pixel are 0.
    """
    scale, end_of_all = num / num_new, float(num)
    first, shares = np.empty(num_new, np.int64), np.empty((num_new, -(-num // num_new) + 1), np.float32)
    for new in range(num_new):
        begin, end = new * scale, min((new + 1) * scale, end_of_all)
        first[new] = int(begin)
        for k in range(shares.shape[1]):
            old = float(first[new] + k)
            shares[new, k] = max(min(end, old + 1.0) - max(begin, old), 0.0) / scale
    return first, shares


@_compiled
def _copy(levels: Levels, copied: Levels) -> None:
    """[n] into [>= n]."""
    for i in range(len(levels)):
        copied[i] = levels[i]


@_compiled
def _mix_rows(rows: Levels, first: int, shares: NDArray[np.float32], mixed: NDArray[np.float32]) -> None:
    """Rows `first`, `first` + 1, ... of rows [h, n], each by its share [K], into mixed [n]."""
    old, share = rows[first], shares[0]
    for i in range(len(mixed)):
        mixed[i] = share * np.float32(old[i])
    for k in range(1, len(shares)):
        old, share = rows[first + k], shares[k]
        if share > 0:
            for i in range(len(mixed)):
                mixed[i] += share * np.float32(old[i])


@_compiled
def _mix_columns(
    row: NDArray[np.float32], first: NDArray[np.int64], shares: NDArray[np.float32], mixed: NDArray[np.float32]
) -> None:
    """Of row [3 w], for each pixel of mixed [3 W]: pixel `first` [W] and the next, each by its share [W, K]."""
    for x in range(len(first)):
        old, new = np.uintp(3 * first[x]), np.uintp(3 * x)
        a, b = shares[x, 0], shares[x, 1]
        red = a * row[old] + b * row[old + THREE]
        green = a * row[old + ONE] + b * row[old + FOUR]
        blue = a * row[old + TWO] + b * row[old + FIVE]
        old += THREE
        for k in range(2, shares.shape[1]):
            old, a = old + THREE, shares[x, k]
            red, green, blue = red + a * row[old], green + a * row[old + ONE], blue + a * row[old + TWO]
        mixed[new], mixed[new + ONE], mixed[new + TWO] = red, green, blue


@_compiled
def _round(levels: NDArray[np.float32], rounded: NDArray[np.uint8]) -> None:
    """[n] into [n]."""
    for i in range(len(levels)):
        rounded[i] = np.int32(levels[i] + HALF)


@_compiled
def resize(image: NDArray[np.uint8], box: NDArray[np.int32], resized: NDArray[np.uint8]) -> None:
    """Window `box` [4] (top, left, height, width) of image [h, 3 w] into `resized` [H, 3 W].

    Each new pixel is the mean of what it covers, as in `resampling.area_resize`, but for rounding where two levels are
    equally near. Windows of that size stay exact.
    """
    top, left, height, width = np.int64(box[0]), np.int64(box[1]), np.int64(box[2]), np.int64(box[3])
    new_height, new_width = len(resized), resized.shape[1] // 3
    old = image[top : top + height, 3 * left : 3 * (left + width)]
    if height == new_height and width == new_width:
        for y in range(height):
            _copy(old[y], resized[y])
        return
    row, row_shares = _coverage(height, new_height)
    column, column_shares = _coverage(width, new_width)
    new, narrow = np.empty(3 * new_width, np.float32), np.zeros(3 * (width + column_shares.shape[1]), np.float32)
    # Columns take longest to mix, so that is done where there are fewer rows.
    if height > new_height:
        for y in range(new_height):
            _mix_rows(old, row[y], row_shares[y], narrow[: 3 * width])
            _mix_columns(narrow, column, column_shares, new)
            _round(new, resized[y])
    else:
        wide = np.empty((height, 3 * new_width), np.float32)
        for y in range(height):
            _copy(old[y], narrow)
            _mix_columns(narrow, column, column_shares, wide[y])
        for y in range(new_height):
            _mix_rows(wide, row[y], row_shares[y], new)
            _round(new, resized[y])


@_compiled
def finish(
    image: NDArray[np.uint8], mirrored: bool, normalized: NDArray[np.float32], finished: NDArray[np.float32]
) -> None:
    """`normalized` [256, 3] of image [H, 3 W], if `mirrored` from right to left, into `finished` [H, 3 W]."""
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
    mirrored: bool,
    normalized: NDArray[np.float32],
    windows: NDArray[np.uint8],
    finished: NDArray[np.float32],
) -> None:
    """Window `box` [4] of image [H, 3 W] into number `i` of windows [n, size, 3 size], or of finished, if that has n.

    Then one window is enough, which stays in the processor's cache.
    """
    window = windows[i % len(windows)]
    resize(image, box, window)
    if len(finished) > 0:
        finish(window, mirrored, normalized, finished[i])
