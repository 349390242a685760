"""Images made smaller or larger, the same on every machine; without torch, for worker processes."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array


def area_resize(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """[h, w, C] -> [height, width, C]: each new pixel is the mean of what it covers, as OpenCV's INTER_AREA has it."""
    if image.shape[:2] == (height, width):
        return image
    rows = _coverage(image.shape[0], height) @ image.reshape(image.shape[0], -1).astype(np.float64)
    columns = rows.reshape(height, image.shape[1], -1).transpose(1, 0, 2).reshape(image.shape[1], -1)
    means = (_coverage(image.shape[1], width) @ columns).reshape(width, height, -1).transpose(1, 0, 2)
    resized: NDArray[np.uint8] = np.rint(means).astype(np.uint8)
    return resized


@lru_cache(maxsize=4096)
def _coverage(num: int, num_new: int) -> csr_array:
    """[num_new, num]: the share of each new pixel that each old one covers."""
    edges = np.arange(num_new + 1) * (num / num_new)
    old = np.arange(num)
    overlap = np.minimum(edges[1:, None], old + 1) - np.maximum(edges[:-1, None], old)
    return csr_array(np.maximum(overlap, 0) * (num_new / num))
