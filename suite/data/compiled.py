"""Loops over pixels that numpy has no word for, compiled by numba, which comes with FFCV: once per process.

They hold no lock of Python's, so threads run them side by side.
"""

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from suite.data.augmentation import Normalization

LEVELS = 256


def _enlarge(image: NDArray[np.uint8], enlarged: NDArray[np.uint8]) -> None:
    """[h, w, 3] into [H, W, 3], H >= h and W >= w: a new pixel covers one old pixel, or parts of two neighbours."""
    height, width = image.shape[:2]
    new_height, new_width = enlarged.shape[:2]
    rows = np.empty((height, new_width, 3), np.float32)
    for x in range(new_width):
        first = x * width // new_width
        after, share = min(first + 1, width - 1), max((x + 1) * width - (first + 1) * new_width, 0) / width
        for y in range(height):
            for c in range(3):
                value = np.float32(image[y, first, c])
                rows[y, x, c] = value + np.float32(share) * (np.float32(image[y, after, c]) - value)
    for y in range(new_height):
        first = y * height // new_height
        after, share = min(first + 1, height - 1), max((y + 1) * height - (first + 1) * new_height, 0) / height
        above, below, new = rows[first].reshape(-1), rows[after].reshape(-1), enlarged[y].reshape(-1)
        for i in range(3 * new_width):
            new[i] = np.uint8(above[i] + np.float32(share) * (below[i] - above[i]) + np.float32(0.5))


def _finish(
    images: NDArray[np.uint8], mirrored: NDArray[np.bool_], table: NDArray[np.float32], finished: NDArray[np.float32]
) -> None:
    """`table` [256, 3] of images [B, H, W, 3], of those `mirrored` [B] from right to left, into `finished`."""
    width = images.shape[2]
    for i in range(images.shape[0]):
        for y in range(images.shape[1]):
            old, new = images[i, y], finished[i, y]
            if mirrored[i]:
                for x in range(width):
                    for c in range(3):
                        new[x, c] = table[old[width - 1 - x, c], c]
            else:
                for x in range(width):
                    for c in range(3):
                        new[x, c] = table[old[x, c], c]


enlarge = numba.njit(nogil=True, error_model="numpy")(_enlarge)
_finish_fast = numba.njit(nogil=True, error_model="numpy")(_finish)


def finish(images: Tensor, mirrored: Tensor, normalization: Normalization) -> Tensor:
    """uint8 images [B, 3, H, W] on the CPU -> float32, channels last, mirrored (bool [B]) and normalised.

    The very bits that torch's flip and `normalization` give, which take six times as long.
    """
    levels = torch.arange(LEVELS, dtype=torch.uint8).view(1, 1, LEVELS, 1).expand(1, 3, -1, -1)
    table = normalization(levels)[0, :, :, 0].T.contiguous()
    images = images.contiguous(memory_format=torch.channels_last)
    finished = torch.empty_like(images, dtype=torch.float32)
    old, new = (batch.permute(0, 2, 3, 1).numpy() for batch in (images, finished))
    _finish_fast(old, mirrored.numpy(), table.numpy(), new)
    return finished
