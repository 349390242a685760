"""Images decoded from files by worker processes: for data sets that do not fit in memory, without FFCV.

The same processes apply augmentation policies to the images of other readers.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from multiprocessing import popen_forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from suite.data.augmentation import Crops, Normalization, finish, finish_each
from suite.data.decoding import opened, to_rgb
from suite.data.policy import Policy
from suite.data.readers.buffers import Buffers
from suite.data.resize import area_resize
from suite.data.source import Files
from suite.errors import DataError
from suite.recipe.settings import Interpolation


class FolderReader:
    """Windows of image files: decoded by Pillow; resized as uint8 by torch, antialiased, as torchvision does it.

    FFCV's reader gives the same bytes for raw files, except with area, which may differ by one level. A window
    already of the right size is exact.

    Args:
        part: the files.
        workers: decoding processes; readers may share them.
        device: where batches go.
        interpolation: how windows are resized.
    """

    name = "torch"
    changes_pixels: Literal[True] = True

    def __init__(
        self, part: Files, workers: "Workers", device: torch.device, interpolation: Interpolation = "bilinear"
    ) -> None:
        self.labels, self.interpolation, self._device = part.labels, interpolation, device
        self._paths, self._workers = part.paths, workers

    def read(
        self, batches: Sequence[Tensor], crops: Crops, size: int, policy: Policy | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows of the images, changed by the policy, made ahead. Without workers, as they are asked for.

        Raises:
            DataError: an image cannot be decoded; the message names the file.
        """
        decoded = self._workers.results([self._request(batch, crops, size, policy) for batch in batches])
        for batch, images in zip(batches, decoded, strict=True):
            yield images.to(self._device, non_blocking=True), self.labels[batch].to(self._device, non_blocking=True)

    def read_finished(
        self,
        batches: Sequence[Tensor],
        crops: Crops,
        size: int,
        mirrored: Tensor,
        normalization: Normalization,
        policy: Policy | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`read`, then `augmentation.finish`, to the bit. `mirrored`: bool [N], of all samples of the part."""
        read = zip(batches, self.read(batches, crops, size, policy), strict=True)
        if self._device.type != "cpu":
            yield from ((finish(images, mirrored[batch], normalization), labels) for batch, (images, labels) in read)
            return
        buffers = Buffers((max(map(len, batches), default=0), size, size, 3), np.float32)
        for batch, (images, labels) in read:
            finished = torch.from_numpy(buffers.take(len(batch))).permute(0, 3, 1, 2)
            finish_each(images, mirrored[batch], normalization, finished)
            yield finished, labels

    def _request(self, batch: Tensor, crops: Crops, size: int, policy: Policy | None) -> "_Request":
        paths = tuple(self._paths[sample] for sample in batch.tolist())
        return _Request(paths, crops.subset(batch), size, self.interpolation, policy, tuple(batch.tolist()))


class Request(Protocol):
    """A batch to make: everything that it depends on, so that workers have no state."""

    def result(self) -> Tensor:
        """uint8 images [B, 3, H, W], channels last. DataError where they cannot be made."""


class _Request(NamedTuple):
    """A batch to decode. Windows are counted from 0, `samples` as the policy counts them."""

    paths: tuple[str, ...]
    crops: Crops
    size: int
    interpolation: Interpolation
    policy: Policy | None
    samples: tuple[int, ...]

    def result(self) -> Tensor:
        """The images decoded, and changed by the policy."""
        images = _decoded(self)
        return images if self.policy is None else self.policy.apply(images, self.samples)


class Change(NamedTuple):
    """A batch of images to be changed by a policy."""

    images: Tensor
    policy: Policy
    samples: tuple[int, ...]

    def result(self) -> Tensor:
        """The images changed."""
        return self.policy.apply(self.images, self.samples)


class Workers:
    """Processes that make batches. They start with the first pass, serve all passes of all readers, and end with this
    object or this process, however that ends. 0: batches are made here.
    """

    def __init__(self, num_workers: int, device: torch.device) -> None:
        self.num_workers, self._pin_memory = num_workers, device.type == "cuda"
        self._idle: list[tuple[_Requests, DataLoader[Any]]] = []

    def results(self, requests: Iterable[Request]) -> Iterator[Tensor]:
        """The result of each request, in order; some are looked at ahead.

        Raises:
            DataError: an image cannot be decoded; the message names the file.
        """
        if not self.num_workers:
            yield from (request.result() for request in requests)
            return
        # A second pass while the first is under way gets processes of its own: a DataLoader has one pass at a time.
        sampler, loader = self._idle.pop() if self._idle else self._started()
        sampler.requests = requests
        try:
            for batch in loader:
                if isinstance(batch, DataError):
                    raise batch
                yield batch
        finally:
            sampler.requests = ()
            self._idle.append((sampler, loader))

    def close(self) -> None:
        """Ends the processes. The next pass starts others."""
        self._idle.clear()

    def _started(self) -> "tuple[_Requests, DataLoader[Any]]":
        sampler = _Requests()
        loader = DataLoader(
            _Decoded(),
            batch_size=None,  # an item is a batch
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=self._pin_memory,
            multiprocessing_context=_context(),
            worker_init_fn=_begin,
            persistent_workers=True,
        )
        return sampler, loader


class _Requests(Sampler[Request]):
    """Those of the pass under way."""

    def __init__(self) -> None:
        self.requests: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


class _Decoded(Dataset[Tensor | DataError]):
    """Batches by request.

    An image that cannot be decoded is returned as the DataError: one that a worker raises arrives as "Caught DataError
    in DataLoader worker process 0", and the file's name somewhere in a traceback below.
    """

    def __getitem__(self, request: Request) -> Tensor | DataError:
        try:
            return request.result()
        except DataError as error:
            return DataError(str(error))  # without what it came from, which need not survive being sent


def _decoded(request: _Request) -> Tensor:
    images = torch.empty((len(request.paths), request.size, request.size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    for number, path in enumerate(request.paths):
        with opened(path) as image:
            extent = [np.array([length]) for length in (image.height, image.width)]
            top, left, height, width = request.crops.boxes(np.array([number]), *extent)[0].tolist()
            if image.mode == "RGB":
                window = np.array(image.crop((left, top, left + width, top + height)))
            else:
                window = to_rgb(image)[top : top + height, left : left + width]
            images[number] = _resized(window, request.size, request.interpolation)
    return images


def _resized(window: NDArray[np.uint8], size: int, interpolation: Interpolation) -> Tensor:
    """[h, w, 3] -> [3, size, size]."""
    if interpolation == "area":
        return torch.from_numpy(area_resize(window, size, size)).permute(2, 0, 1)
    image = torch.from_numpy(np.ascontiguousarray(window)).permute(2, 0, 1)
    if image.shape[1:] == (size, size):
        return image
    return torch.nn.functional.interpolate(image[None], (size, size), mode=interpolation, antialias=True)[0]


def _begin(_worker: int) -> None:
    from suite.run.processes import obey_the_parent

    # Also if the fork server was already started by code that did not ask for it.
    import suite.data.readers.block_stop_signals  # noqa: F401  # isort: skip  # importing it blocks them

    obey_the_parent()


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
