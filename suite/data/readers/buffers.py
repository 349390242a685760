"""Reusable batch buffers."""

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
        """An array [num_samples, ...] to turn into a tensor. Its buffer is reused once the array is garbage-collected.

        A tensor made from the array keeps it alive. A slice does not: in numpy it refers to the array's own base.
        """
        whole = self._free.pop() if self._free else np.empty(self._shape, self._dtype)
        batch = whole[:num_samples]
        weakref.finalize(batch, self._free.append, whole).atexit = False
        return batch
