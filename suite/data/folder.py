"""Images decoded from files by worker processes: the torch loader, for what does not fit in memory.

Augmentation of a sample depends on (seed, epoch, sample) and not on the number of workers or processes.
"""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.context import BaseContext

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from suite.config import Data
from suite.data.sources import Files, read_image
from suite.distributed import Layout
from suite.seeds import stream

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EVALUATION_RATIO = 224 / 256
"""Side of the centre crop over the resized image's shorter side, ImageNet's usual one."""


class FolderLoader:
    """Same contract as MemoryLoader: `epoch(k)`, `evaluation()` and `len`; RGB at ImageNet's normalisation."""

    def __init__(
        self, data: Files, settings: Data, batch_size: int, seed: int, layout: Layout, num_workers: int
    ) -> None:
        self.batch_size, self.seed, self.layout, self.num_workers = batch_size, seed, layout, num_workers
        self.train, self.eval = (_Decoded(data, seed, transform) for transform in _transforms(settings))

    def __len__(self) -> int:
        """Optimizer steps of one training epoch."""
        return len(self.train.data.labels) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of each global batch of epoch number `epoch` (from 0), from batch `start` on."""
        generator = torch.Generator().manual_seed(stream(self.seed, "order", epoch))
        order = torch.randperm(len(self.train.data.labels), generator=generator)
        batches = torch.split(order[: len(self) * self.batch_size], self.batch_size)[start:]
        shares = [batch.chunk(self.layout.world_size)[self.layout.rank] for batch in batches]
        yield from self._load(self.train, [[(epoch, i) for i in share.tolist()] for share in shares])

    def evaluation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of all samples, each once over all processes."""
        mine = torch.arange(self.layout.rank, len(self.eval.data.labels), self.layout.world_size)
        yield from self._load(
            self.eval, [[(0, i) for i in batch.tolist()] for batch in torch.split(mine, self.batch_size)]
        )

    def _load(self, dataset: "_Decoded", batches: list[list[tuple[int, int]]]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            pin_memory=self.layout.device.type == "cuda",
            multiprocessing_context=_context() if self.num_workers else None,
            worker_init_fn=_leave_signals_alone,
        )
        for images, labels in loader:
            yield images.to(self.layout.device, non_blocking=True), labels.to(self.layout.device, non_blocking=True)


def _leave_signals_alone(worker: int) -> None:
    from suite.data.deaf import become_deaf  # to import it is to become so

    become_deaf(worker)


def _context() -> BaseContext:
    """Workers forked from a server that has this module imported; a plain fork would copy CUDA's and OpenMP's state."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["suite.data.deaf", __name__])
    return context


class _Decoded(Dataset[tuple[Tensor, int]]):
    """Items are asked for as (epoch, sample), so that a worker needs no state to augment reproducibly."""

    def __init__(self, data: Files, seed: int, transform: v2.Transform) -> None:
        self.data, self.seed, self.transform = data, seed, transform

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, sample = key
        image = read_image(self.data.paths[sample])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(self.seed, "augmentation", epoch, sample))
            return self.transform(image), int(self.data.labels[sample])


def _transforms(settings: Data) -> tuple[v2.Transform, v2.Transform]:
    """(training, evaluation)."""
    size = settings.image_size or 224
    finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    whole = [v2.Resize(round(size / EVALUATION_RATIO), antialias=True), v2.CenterCrop(size)]
    crops = {
        "none": whole,
        "padded": [v2.Resize((size, size), antialias=True), v2.RandomCrop(size, padding=settings.crop_padding)],
        "random_resized": [v2.RandomResizedCrop(size, antialias=True)],
    }
    flip = [v2.RandomHorizontalFlip()] if settings.horizontal_flip else []
    return v2.Compose([*crops[settings.crop], *flip, *finish]), v2.Compose([*whole, *finish])
