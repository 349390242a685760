"""What a pass over an FFCV file makes of samples, and memory to put it in."""

import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from suite.data.augmentation import Crops, Normalization


@dataclass(frozen=True)
class Wish:
    """What a pass makes of samples: windows of size x size, as they are or, where `normalized` is given, finished.

    `mirrored` is bool [N]. `normalized`, float32 [256, 3], is what becomes of each level.
    """

    crops: Crops
    size: int
    mirrored: NDArray[np.bool_] | None = None
    normalized: NDArray[np.float32] | None = None

    @property
    def dtype(self) -> type[np.uint8 | np.float32]:
        """Of the images."""
        return np.uint8 if self.normalized is None else np.float32


def normalized(normalization: Normalization) -> NDArray[np.float32]:
    """[256, 3]: what it makes of each level of each channel."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(1, 3, -1, -1)
    return normalization(levels)[0, :, :, 0].T.contiguous().numpy()


class Memory:
    """Room for batches of a pass, used again once nobody has the batch any more: fresh memory would be paged in."""

    def __init__(self, shape: tuple[int, ...], dtype: type[np.uint8 | np.float32]) -> None:
        self._shape, self._dtype = shape, dtype
        self._free: deque[NDArray[Any]] = deque()

    def take(self, num_samples: int) -> NDArray[Any]:
        """[num_samples, ...], to be made a tensor: its memory is free when the array is gone, which tensors keep.

        Slices of the array do not keep it: numpy has them refer to what the array is itself a slice of.
        """
        whole = self._free.pop() if self._free else np.empty(self._shape, self._dtype)
        batch = whole[:num_samples]
        weakref.finalize(batch, self._free.append, whole).atexit = False
        return batch
