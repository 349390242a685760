"""A loaded data set: training, validation and test parts, each in memory, in image files or in FFCV files."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from suite.data.beton import read_index
from suite.data.class_folders import Split
from suite.data.decoding import read_rgb
from suite.errors import DataError
from suite.training.seeds import stream

SPLIT_SEED = stream(0, "split")
"""The seed of all splits: the same for all cells on all machines."""


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
    """paths: N image files, decoded on demand; text, because a million Path objects take 400 MB. labels: int64 [N]."""

    paths: tuple[str, ...]
    labels: Tensor

    @classmethod
    def of(cls, split: Split) -> "Files":
        """The files of a split of class folders."""
        paths = tuple(f"{split.folder}/{entry.name}" for entry in split.entries)
        return cls(paths, torch.tensor([entry.label for entry in split.entries]))

    def subset(self, index: Tensor) -> "Files":
        """The files at `index` (int64 [M]), in that order."""
        return Files(tuple(self.paths[i] for i in index.tolist()), self.labels[index])

    def pixels(self) -> Pixels:
        """All images, decoded; they must have one size.

        Raises:
            DataError: sizes differ, or an image cannot be decoded.
        """
        images = [read_rgb(path) for path in self.paths]
        for path, image in zip(self.paths, images, strict=True):
            if image.shape != images[0].shape:
                sizes = " and ".join(f"{width} x {height}" for height, width, _ in (images[0].shape, image.shape))
                raise DataError(f"{path}: images of one size are expected, found {sizes} pixels")
        stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        return Pixels(stacked, self.labels)


@dataclass(frozen=True)
class Encoded:
    """Samples of an FFCV file, decoded on demand. samples: int64 [N], numbers in the file; labels: int64 [N]."""

    path: Path
    samples: Tensor
    labels: Tensor

    def subset(self, index: Tensor) -> "Encoded":
        """The samples at `index` (int64 [M]), in that order."""
        return Encoded(self.path, self.samples[index], self.labels[index])

    def pixels(self) -> Pixels:
        """All images; they must be raw and have one size.

        Raises:
            DataError: some are JPEGs, or sizes differ.
        """
        index = read_index(self.path)
        height, width = int(index.heights[0]), int(index.widths[0])
        if index.is_jpeg.any() or (index.heights != height).any() or (index.widths != width).any():
            raise DataError(
                f"{self.path}: contains JPEGs or images of several sizes; prepare it again with --jpeg-share 0"
            )
        content = np.memmap(self.path, np.uint8, "r")
        numbers = index.offsets[self.samples.numpy()]
        images = np.stack([content[start : start + height * width * 3] for start in numbers])
        return Pixels(torch.from_numpy(images).view(-1, height, width, 3).permute(0, 3, 1, 2), self.labels)


Part = Pixels | Files | Encoded


@dataclass(frozen=True)
class Description:
    """The properties of a data set that a network depends on: classes, image side and colour channels."""

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
    """A data set. `checksum`, recorded in the provenance, covers the parts that were loaded.

    `test` is None if it was not requested; `validation` is the data set's official validation part, if it has one.
    """

    classes: tuple[str, ...]
    train: Part
    test: Part | None
    image_size: int
    checksum: str
    validation: Part | None = None

    @property
    def description(self) -> Description:
        """The properties that a network depends on. Images decoded from files are RGB."""
        in_chans = self.train.images.shape[1] if isinstance(self.train, Pixels) else 3
        return Description(self.classes, self.image_size, in_chans)


def hold_out(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """(kept, held out): sorted int64 indices into the samples with `labels` (int64 [N]), the same for all seeds.

    Stratified: round(N * fraction) samples are held out, in proportion to class sizes by largest remainder (ties: lower
    labels first), and never all of a class.
    """
    counts = labels.bincount()
    exact = counts.double() * fraction
    num_held_out = torch.minimum(exact.long(), (counts - 1).clamp(min=0))
    for _ in range(round(len(labels) * fraction) - int(num_held_out.sum())):
        remainder = (exact - num_held_out).masked_fill(num_held_out >= counts - 1, -math.inf)
        label = int(remainder.argmax())
        if remainder[label] == -math.inf:
            break
        num_held_out[label] += 1
    # The samples of each class in random order; the first ones are held out.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    order = order[labels[order].argsort(stable=True)]
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    is_held_out = place < num_held_out[labels[order]]
    return order[~is_held_out].sort().values, order[is_held_out].sort().values
