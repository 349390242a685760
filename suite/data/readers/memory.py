"""Images held in the device's memory as bytes: for data sets of small images of one size."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from suite.data.augmentation import Crops
from suite.data.source import Pixels


class MemoryReader:
    """Whole images at their own size."""

    name = "memory"

    def __init__(self, data: Pixels, device: torch.device) -> None:
        self.labels = data.labels
        self._images, self._labels = data.images.to(device), data.labels.to(device)

    def read(self, batches: Sequence[Tensor], crops: Crops, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of each batch; they have one size, so `crops` and `size` change nothing."""
        del crops, size
        for batch in batches:
            index = batch.to(self._images.device)
            yield self._images[index], self._labels[index]
