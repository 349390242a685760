"""Images decoded from files by worker processes: the way without FFCV, for what does not fit in memory."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from multiprocessing import popen_forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from suite.data.augmentation import Crops
from suite.data.decoding import read_rgb
from suite.data.resize import area_resize
from suite.data.source import Files
from suite.errors import DataError


class FolderReader:
    """RGB; decoded by Pillow, resized by area as FFCV does."""

    name = "torch"

    def __init__(self, data: Files, num_workers: int, device: torch.device) -> None:
        self.labels, self.num_workers, self.device = data.labels, num_workers, device
        self._data = data

    def read(self, batches: Sequence[Tensor], crops: Crops, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows of the images, decoded ahead. Without workers, as they are asked for.

        Raises:
            DataError: an image cannot be decoded; the message names the file.
        """
        loader = DataLoader(
            _Decoded(self._data, size),
            batch_size=None,  # an item is a batch
            sampler=_requests(batches, crops),
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            multiprocessing_context=_context() if self.num_workers else None,
            worker_init_fn=_leave_signals_alone,
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            images, labels = batch
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class _Request(NamedTuple):
    """What a worker is asked for: sample numbers, and the windows of those samples, counted from 0."""

    samples: Tensor
    crops: Crops


def _requests(batches: Sequence[Tensor], crops: Crops) -> Iterable[_Request]:
    return (_Request(batch, crops.subset(batch)) for batch in batches)


class _Decoded(Dataset[tuple[Tensor, Tensor] | DataError]):
    """Batches by request, so that a worker needs no state to augment reproducibly.

    An image that cannot be decoded is returned as the DataError: one that a worker raises arrives as "Caught DataError
    in DataLoader worker process 0", and the file's name somewhere in a traceback below.
    """

    def __init__(self, data: Files, size: int) -> None:
        self.data, self.size = data, size

    def __getitem__(self, request: _Request) -> tuple[Tensor, Tensor] | DataError:
        """(uint8 [B, 3, size, size], int64 [B])."""
        try:
            return self._batch(request)
        except DataError as error:
            return error

    def _batch(self, request: _Request) -> tuple[Tensor, Tensor]:
        images = np.empty((len(request.samples), self.size, self.size, 3), np.uint8)
        for number, sample in enumerate(request.samples.tolist()):
            image = read_rgb(self.data.paths[sample])
            extent = [np.array([length]) for length in image.shape[:2]]
            top, left, height, width = request.crops.boxes(np.array([number]), *extent)[0].tolist()
            images[number] = area_resize(image[top : top + height, left : left + width], self.size, self.size)
        return torch.from_numpy(images).permute(0, 3, 1, 2), self.data.labels[request.samples]


def _leave_signals_alone(_worker: int) -> None:
    """Also where the server was started before, by someone who did not ask for it."""
    import suite.data.readers.block_stop_signals  # noqa: F401  # to import it is to become so


class _Popen(popen_forkserver.Popen):
    """A worker as its parent knows it. Workers block SIGTERM (`block_stop_signals`), so they are ended with SIGKILL.

    With SIGTERM, multiprocessing's exit handler would wait for ever for the workers of a run that failed.
    """

    def terminate(self) -> None:
        self.kill()


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process: BaseProcess) -> _Popen:  # noqa: N802  (multiprocessing's name)
        return _Popen(process)


class _Context(ForkServerContext):
    Process = _Process


@cache
def _context() -> _Context:
    """Workers forked from a server that has this module imported; a plain fork would copy CUDA's and OpenMP's state."""
    context = _Context()
    context.set_forkserver_preload(["suite.data.readers.block_stop_signals", __name__])
    return context
