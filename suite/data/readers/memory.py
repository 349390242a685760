"""Images kept as bytes in the device's memory: for data sets of small images of one size."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from suite.data.augmentation import Crops
from suite.data.source import Pixels


class MemoryReader:
    """Reads whole images at their original size."""

    name = "memory"

    def __init__(self, data: Pixels, device: torch.device) -> None:
        self.labels = data.labels
        self._images, self._labels = data.images.to(device), data.labels.to(device)

    def read(self, batches: Sequence[Tensor], crops: Crops, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The images and labels of each batch. All images have one size, so `crops` and `size` are ignored."""
        del crops, size
        for batch in batches:
            index = batch.to(self._images.device)
            yield self._images[index], self._labels[index]
