"""From sample numbers to batches: order, shares, augmentation and evaluation, independent of how images are stored.

Readers (memory, torch, ffcv) only turn sample numbers into pixels.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from suite.data.augmentation import Crops, Draws, Normalization, draw, finish, padding, shift, side, unchanged
from suite.data.policy import Policy, erase
from suite.data.readers.memory import MemoryReader
from suite.engines.process_group import Layout
from suite.recipe.settings import Data, Interpolation
from suite.training.seeds import stream

if TYPE_CHECKING:
    from suite.data.readers.image_folder import Workers

RUN_BYTES = 4_000_000
"""Bytes of images finished together: enough to keep Python's overhead small, few enough to stay in a cache."""


class Reader(Protocol):
    """Reads one part of a data set. `labels` are int64 [N], on the CPU; `name` is a value of execution.loader."""

    name: str
    labels: Tensor

    def read(self, batches: Sequence[Tensor], crops: Crops, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images [B, C, size, size] and int64 labels [B], on the device, for each batch of sample numbers.

        Each batch is int64 [B]. The caller may keep the results, and may stop iterating early.
        """


@runtime_checkable
class FinishingReader(Reader, Protocol):
    """A reader with a faster way to produce float32 images."""

    def read_finished(
        self, batches: Sequence[Tensor], crops: Crops, size: int, mirrored: Tensor, normalization: Normalization
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Bit-identical to `read`, then `augmentation.finish`; `mirrored` is bool [N], for all samples of the part."""


@runtime_checkable
class ChangingReader(Protocol):
    """A reader that applies the augmentation policy in its own worker processes."""

    changes_pixels: Literal[True]

    def read_finished(
        self,
        batches: Sequence[Tensor],
        crops: Crops,
        size: int,
        mirrored: Tensor,
        normalization: Normalization,
        policy: Policy | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Like FinishingReader.read_finished, with the policy applied to the images first."""


class Loader:
    """Batches of (float32 images [B, C, H, W], int64 labels [B]) on the layout's device.

    Each epoch trains on a new permutation. Each global batch is split evenly over the processes; the last one, if
    smaller, is dropped. A sample's augmentation depends on (seed, epoch, sample), not on the batch, the process or
    their number. `evaluation` reads the samples in order.

    With repeated augmentation, the reader holds `repeats` consecutive copies of a data set. An epoch has as many steps
    as without it but sees 1 / `repeats` of the samples: each appears `repeats` times in a row, augmented differently
    each time (Hoffer et al. 2020, Augment your batch; Touvron et al. 2021, DeiT).

    Args:
        reader: reads the part, or its copies.
        settings: the recipe's data settings.
        size: side of the training images, in pixels.
        normalization: the recipe's.
        batch_size: over all processes.
        seed: the cell's.
        layout: this process's.
        interpolation: for a policy's rotations.
        workers: makes the processes that apply a policy, for readers that cannot.
        repeats: number of copies in the reader's part.
    """

    def __init__(
        self,
        reader: Reader,
        settings: Data,
        size: int,
        normalization: Normalization,
        batch_size: int,
        seed: int,
        layout: Layout,
        interpolation: Interpolation = "bilinear",
        workers: "Callable[[], Workers] | None" = None,
        repeats: int = 1,
    ) -> None:
        self.reader, self.settings, self.size, self.normalization = reader, settings, size, normalization
        self.batch_size, self.seed, self.layout = batch_size, seed, layout
        self.interpolation, self.workers, self.repeats = interpolation, workers, repeats

    def __len__(self) -> int:
        """Optimizer steps per training epoch."""
        return self._num_samples // self.batch_size

    @property
    def _num_samples(self) -> int:
        """Of one copy."""
        return len(self.reader.labels) // self.repeats

    def epoch(self, epoch: int, start: int = 0) -> Generator[tuple[Tensor, Tensor], None, None]:
        """This process's share of each global batch of epoch number `epoch` (from 0), starting at batch `start`."""
        generator = torch.Generator().manual_seed(stream(self.seed, "order", epoch))
        order = torch.randperm(self._num_samples, generator=generator)
        if self.repeats > 1:
            order = (order[:, None] + self._num_samples * torch.arange(self.repeats)).flatten()
        mean = self.normalization.mean.tolist()
        draws = draw(self.settings, len(self.reader.labels), self.seed, epoch, mean, self.interpolation)
        batches = torch.split(order[: len(self) * self.batch_size], self.batch_size)[start:]
        shares = [batch.chunk(self.layout.world_size)[self.layout.rank] for batch in batches]
        size = side(self.settings.progressive_resizing, self.size, epoch)
        yield from self._finished(shares, draws, size, padding(self.settings))

    def evaluation(self, micro_batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of all samples, without augmentation, in batches of a training step's size.

        Over all processes, each sample appears once. Shares have equal size: short ones repeat the last sample.
        """
        num_samples = len(self.reader.labels)
        mine = torch.arange(num_samples)[self.layout.rank :: self.layout.world_size]
        if len(mine) < -(-num_samples // self.layout.world_size):
            mine = torch.cat([mine, torch.tensor([num_samples - 1])])
        share = max(self.batch_size // self.layout.world_size, 1)
        batches = torch.split(mine, min(micro_batch_size or share, share))
        size = self.settings.test_size or self.size
        yield from self._finished(batches, unchanged(num_samples, self.settings.centre_ratio), size, 0)

    def _finished(
        self, batches: Sequence[Tensor], draws: Draws, size: int, num_pixels: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Finished batches; images are zero-padded by `num_pixels` before they are shifted."""
        finished = self._read_finished(batches, draws, size, num_pixels)
        if not draws.erasing:
            yield from finished
            return
        for batch, (images, labels) in zip(batches, finished, strict=True):
            erase(images, batch.tolist(), draws.erasing, draws.seed)
            yield images, labels

    def _read_finished(
        self, batches: Sequence[Tensor], draws: Draws, size: int, num_pixels: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        last = (draws.flips, self.normalization)
        if isinstance(self.reader, ChangingReader) and not num_pixels:
            yield from self.reader.read_finished(batches, draws.crops, size, *last, draws.policy)
            return
        if isinstance(self.reader, FinishingReader) and not num_pixels and draws.policy is None:
            yield from self.reader.read_finished(batches, draws.crops, size, *last)
            return
        runs = self._runs(batches, size)
        together = [torch.cat(list(run)) for run in runs]
        read = self._shifted(together, draws, size, num_pixels)
        if draws.policy is not None:
            read = self._changed(together, read, draws.policy)
        for run, samples, (pixels, labels) in zip(runs, together, read, strict=True):
            images = finish(pixels, draws.flips[samples], self.normalization)
            lengths = [len(batch) for batch in run]
            yield from zip(torch.split(images, lengths), torch.split(labels, lengths), strict=True)

    def _shifted(
        self, together: Sequence[Tensor], draws: Draws, size: int, num_pixels: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for samples, (pixels, labels) in zip(together, self.reader.read(together, draws.crops, size), strict=True):
            yield (shift(pixels, num_pixels, draws.shifts[samples]) if num_pixels else pixels), labels

    def _changed(
        self, together: Sequence[Tensor], read: Iterator[tuple[Tensor, Tensor]], policy: Policy
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The images with the policy applied, in worker processes."""
        from suite.data.readers.image_folder import Change, Workers

        labels_of: deque[Tensor] = deque()

        def changes() -> Iterator[Change]:
            for samples, (pixels, labels) in zip(together, read, strict=True):
                labels_of.append(labels)
                yield Change(pixels.cpu(), policy, tuple(samples.tolist()))

        device = self.layout.device
        workers = Workers(0, device) if self.workers is None else self.workers()
        for images in workers.results(changes()):
            yield images.to(device, non_blocking=True), labels_of.popleft()

    def _runs(self, batches: Sequence[Tensor], size: int) -> list[Sequence[Tensor]]:
        """Groups of batches to read and finish together: RUN_BYTES of small images in memory, else single batches."""
        if not isinstance(self.reader, MemoryReader) or not batches:
            return [[batch] for batch in batches]
        num_bytes = 4 * len(self.normalization.mean) * size**2 * max(len(batches[0]), 1)
        length = max(RUN_BYTES // num_bytes, 1)
        return [batches[start : start + length] for start in range(0, len(batches), length)]
