"""What a data set is once it is found: parts for training, validation and test; in memory, in files, in FFCV files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from suite.data.beton import read_index
from suite.errors import DataError
from suite.training.seeds import stream

SPLIT_SEED = stream(0, "split")
"""Every split is drawn from this one seed: fixed for all cells, on all machines."""


@dataclass(frozen=True)
class Pixels:
    """images: uint8 [N, C, H, W]; labels: int64 [N]."""

    images: Tensor
    labels: Tensor

    def subset(self, index: Tensor) -> "Pixels":
        """The images at `index` (int64 [M]), in that order."""
        return Pixels(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Files:
    """paths: N image files, decoded when asked for; labels: int64 [N]."""

    paths: tuple[Path, ...]
    labels: Tensor

    def subset(self, index: Tensor) -> "Files":
        """The files at `index` (int64 [M]), in that order."""
        return Files(tuple(self.paths[i] for i in index.tolist()), self.labels[index])


@dataclass(frozen=True)
class Encoded:
    """`samples`: int64 [N], numbers of the samples in an FFCV file, decoded when asked for; labels: int64 [N]."""

    path: Path
    samples: Tensor
    labels: Tensor

    def subset(self, index: Tensor) -> "Encoded":
        """The samples at `index` (int64 [M]), in that order."""
        return Encoded(self.path, self.samples[index], self.labels[index])

    def pixels(self) -> Pixels:
        """All of them at once, of images of one size that are stored as they are.

        Raises:
            DataError: they are not.
        """
        index = read_index(self.path)
        height, width = int(index.heights[0]), int(index.widths[0])
        if index.is_jpeg.any() or (index.heights != height).any() or (index.widths != width).any():
            raise DataError(f"{self.path}: has JPEGs or images of several sizes; prepare it again with --jpeg-share 0")
        content = np.memmap(self.path, np.uint8, "r")
        numbers = index.offsets[self.samples.numpy()]
        images = np.stack([content[start : start + height * width * 3] for start in numbers])
        return Pixels(torch.from_numpy(images).view(-1, height, width, 3).permute(0, 3, 1, 2), self.labels)


Part = Pixels | Files | Encoded


@dataclass(frozen=True)
class Description:
    """What a network has to know of a data set: its classes, the side of its images and their colour channels."""

    classes: tuple[str, ...]
    image_size: int
    in_chans: int

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"classes": list(self.classes), "image_size": self.image_size, "in_chans": self.in_chans}

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "Description":
        """From a checkpoint."""
        return cls(tuple(saved["classes"]), saved["image_size"], saved["in_chans"])


@dataclass(frozen=True)
class Source:
    """A data set; `checksum` is what provenance records of it. `validation` is the part its makers meant for that."""

    classes: tuple[str, ...]
    train: Part
    test: Part
    image_size: int
    checksum: str
    validation: Part | None = None

    @property
    def description(self) -> Description:
        """What a network has to know; decoded files are RGB."""
        in_chans = self.train.images.shape[1] if isinstance(self.train, Pixels) else 3
        return Description(self.classes, self.image_size, in_chans)


def hold_out(num: int, fraction: float) -> tuple[Tensor, Tensor]:
    """(kept, held out): sorted int64 indices into `num` samples, a fixed random share, the same for all seeds."""
    order = torch.randperm(num, generator=torch.Generator().manual_seed(SPLIT_SEED))
    num_held_out = round(num * fraction)
    return order[num_held_out:].sort().values, order[:num_held_out].sort().values
