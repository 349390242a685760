"""Images held in the device's memory as bytes; batches cropped, flipped and normalised there.

What augmentation does to a sample depends on (seed, epoch, sample) and not on the batch, the process or their number.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from suite.data.sources import Pixels
from suite.distributed import Layout
from suite.seeds import stream


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation (ddof 0) of pixels in [0, 1]; both float32 [C]."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, images: Tensor) -> "Normalization":
        """Measured on uint8 images [N, C, H, W]: the training split's, so nothing leaks from the others."""
        counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
        share, level = counts / counts.sum(1, keepdim=True), torch.arange(256).double() / 255
        mean = share @ level
        return cls(mean.float(), (share @ level**2 - mean**2).sqrt().float())

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float32, mean 0 and deviation 1 per channel over the training set."""
        mean, std = (value.view(-1, 1, 1).to(images.device) for value in (self.mean, self.std))
        return images.float().div_(255).sub_(mean).div_(std)


class MemoryLoader:
    """Batches of (float32 images [B, C, H, W], int64 labels [B]) on the layout's device.

    Training order is a fresh permutation per epoch; each global batch is split evenly over the processes, and the
    last, smaller one is left out. `evaluation` walks the samples once, in order, without padding.
    """

    def __init__(
        self,
        data: Pixels,
        normalization: Normalization,
        batch_size: int,
        seed: int,
        layout: Layout,
        *,
        crop_padding: int = 0,
        horizontal_flip: bool = False,
    ) -> None:
        self.images, self.labels = data.images.to(layout.device), data.labels.to(layout.device)
        self.normalization, self.batch_size, self.seed, self.layout = normalization, batch_size, seed, layout
        self.crop_padding, self.horizontal_flip = crop_padding, horizontal_flip

    def __len__(self) -> int:
        """Optimizer steps of one training epoch."""
        return len(self.labels) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of each global batch of epoch number `epoch` (from 0), from batch `start` on."""
        order = torch.randperm(len(self.labels), generator=self._generator("order", epoch))
        generator = self._generator("augmentation", epoch)
        shifts = torch.randint(0, 2 * self.crop_padding + 1, (len(order), 2), generator=generator)
        flips = torch.rand(len(order), generator=generator) < 0.5  # noqa: PLR2004  (a fair coin)
        for batch in torch.split(order[: len(self) * self.batch_size], self.batch_size)[start:]:
            mine = batch.chunk(self.layout.world_size)[self.layout.rank]
            images = self.images[mine.to(self.images.device)]
            if self.crop_padding:
                images = _crop(images, self.crop_padding, shifts[mine])
            if self.horizontal_flip:
                images = torch.where(flips[mine].to(images.device).view(-1, 1, 1, 1), images.flip(-1), images)
            yield self.normalization(images), self.labels[mine.to(self.labels.device)]

    def evaluation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of all samples, each once over all processes."""
        mine = torch.arange(self.layout.rank, len(self.labels), self.layout.world_size, device=self.labels.device)
        for batch in torch.split(mine, self.batch_size):
            yield self.normalization(self.images[batch]), self.labels[batch]

    def _generator(self, purpose: str, epoch: int) -> torch.Generator:
        # On the CPU whatever the device: the same order on every machine.
        return torch.Generator().manual_seed(stream(self.seed, purpose, epoch))


def _crop(images: Tensor, padding: int, shifts: Tensor) -> Tensor:
    """Window of the original size at row and column `shifts` (int64 [B, 2]) of the zero-padded images."""
    height, width = images.shape[-2:]
    padded = torch.nn.functional.pad(images, [padding] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    rows, columns = shifts.to(images.device).unbind(1)
    return windows[torch.arange(len(images), device=images.device), :, rows, columns]
