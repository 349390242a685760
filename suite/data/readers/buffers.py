"""Batch buffers that are reused."""

import weakref
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Buffers:
    """Pool of batch buffers for one pass.

    A buffer is reused when its array is garbage-collected; newly allocated pages would have to be faulted in.
    """

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
