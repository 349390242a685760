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
    """Windows of image files, decoded by Pillow and resized by torch as antialiased uint8, as in torchvision.

    FFCV's reader gives the same bytes for raw files, except with area, which may differ by one level. A window
    that already has the right size is exact.

    Args:
        part: the files.
        workers: decoding processes; readers may share them.
        device: the batches' device.
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
        """Windows of the images with the policy applied; made ahead by the workers or, without workers, on demand.

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
        """Bit-identical to `read`, then `augmentation.finish`. `mirrored`: bool [N], for all samples of the part."""
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
    """A request for a batch. It contains everything that the batch depends on, so that workers have no state."""

    def result(self) -> Tensor:
        """uint8 images [B, 3, H, W], channels last. Raises DataError if they cannot be made."""


class _Request(NamedTuple):
    """A batch to decode. `crops` numbers the batch's images from 0; `samples` has the sample numbers for the policy."""

    paths: tuple[str, ...]
    crops: Crops
    size: int
    interpolation: Interpolation
    policy: Policy | None
    samples: tuple[int, ...]

    def result(self) -> Tensor:
        """The decoded images with the policy applied."""
        images = _decoded(self)
        return images if self.policy is None else self.policy.apply(images, self.samples)


class Change(NamedTuple):
    """A batch of images to apply a policy to."""

    images: Tensor
    policy: Policy
    samples: tuple[int, ...]

    def result(self) -> Tensor:
        """The images changed."""
        return self.policy.apply(self.images, self.samples)


class Workers:
    """Processes that make batches for all passes of all readers.

    They start with the first pass and end with this object or this process, even if it is killed. With 0 workers,
    batches are made in this process.
    """

    def __init__(self, num_workers: int, device: torch.device) -> None:
        self.num_workers, self._pin_memory = num_workers, device.type == "cuda"
        self._idle: list[tuple[_Requests, DataLoader[Any]]] = []

    def results(self, requests: Iterable[Request]) -> Iterator[Tensor]:
        """The result of each request, in order. Workers compute some results ahead.

        Raises:
            DataError: an image cannot be decoded; the message names the file.
        """
        if not self.num_workers:
            yield from (request.result() for request in requests)
            return
        # A pass that starts during another gets its own processes: a DataLoader supports one pass at a time.
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
        """Ends the processes. The next pass starts new ones."""
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
    """The requests of the current pass."""

    def __init__(self) -> None:
        self.requests: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


class _Decoded(Dataset[Tensor | DataError]):
    """Batches by request.

    If an image cannot be decoded, the DataError is returned. If raised in a worker, it would arrive as "Caught
    DataError in DataLoader worker process 0", with the file's name inside a traceback.
    """

    def __getitem__(self, request: Request) -> Tensor | DataError:
        try:
            return request.result()
        except DataError as error:
            return DataError(str(error))  # without its cause, which may not be picklable


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

    # Needed if other code started the fork server without preloading this module.
    import suite.data.readers.block_stop_signals  # noqa: F401  # isort: skip  # importing it blocks them

    obey_the_parent()


class _Popen(popen_forkserver.Popen):
    """The parent's handle of a worker. Workers block SIGTERM (`block_stop_signals`), so they are ended with SIGKILL.

    With SIGTERM, multiprocessing's exit handler would wait forever for the workers of a failed run.
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
    """Forks workers from a server that has imported this module; a plain fork would copy CUDA's and OpenMP's state."""
    context = _Context()
    context.set_forkserver_preload(["suite.data.readers.block_stop_signals", __name__])
    return context
