"""Images decoded by threads from an FFCV file: the fast reader for data sets that do not fit in memory.

FFCV provides the file format, the C JPEG decoder, the thread that decodes ahead, and pinned buffers for a GPU. The
caller chooses samples, order and windows. FFCV's own order is not used: over several processes it repeats samples
until they divide evenly, and its seed defaults to 0. Its augmentation is not used either, because its random state
cannot be seeded. Without a GPU, the decoding threads also mirror and normalise.
"""

import io
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from suite.data.augmentation import Crops, Normalization, finish
from suite.data.beton import Index, read_index
from suite.data.readers import kernels
from suite.data.readers.buffers import Buffers
from suite.data.source import Encoded
from suite.errors import DataError
from suite.recipe.settings import Interpolation

_torch_threads = torch.get_num_threads()
import numba  # noqa: E402
from ffcv.fields.rgb_image import SimpleRGBImageDecoder  # noqa: E402
from ffcv.libffcv import imdecode  # noqa: E402
from ffcv.loader import Loader  # noqa: E402
from ffcv.loader.epoch_iterator import EpochIterator  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.pipeline.state import State  # noqa: E402
from ffcv.reader import Reader  # noqa: E402

STUCK_SECONDS = 300.0
"""A batch that takes longer counts as stuck."""
CLOSING_SECONDS = 10.0
"""How long a reader stopped early waits for the batch being decoded."""
TASKS_PER_THREAD = 4
"""Parts of a batch per decoding thread: few enough to add no overhead, enough to balance the load."""


def _set_num_threads(num_threads: int) -> None:
    """Replaces FFCV's function, which also sets torch's thread count, at import and each epoch, and so its rounding."""
    Compiler.num_threads = max(num_threads, 1)
    numba.set_num_threads(min(Compiler.num_threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]


Compiler.set_num_threads = _set_num_threads
torch.set_num_threads(_torch_threads)


@dataclass(frozen=True)
class Wish:
    """The output of a pass: size x size windows, as bytes or, if `normalized` is given, mirrored and normalised.

    `interpolation` is an index into kernels.INTERPOLATIONS. `mirrored` is bool [N]. `normalized`, float32 [256, 3], has
    the normalised value of each level.
    """

    crops: Crops
    size: int
    interpolation: int
    mirrored: NDArray[np.bool_] | None = None
    normalized: NDArray[np.float32] | None = None

    @property
    def dtype(self) -> type[np.uint8 | np.float32]:
        """Data type of the images."""
        return np.uint8 if self.normalized is None else np.float32


def normalized(normalization: Normalization) -> NDArray[np.float32]:
    """[256, 3]: the normalised value of each level in each channel."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(1, 3, -1, -1)
    return normalization(levels)[0, :, :, 0].T.contiguous().numpy()


class FFCVReader:
    """Windows of an FFCV file's images. A window that already has the right size is exact.

    JPEGs are decoded with TurboJPEG's fast cosine transform, which is within a few levels of Pillow's.

    Args:
        part: the file and its samples to read.
        batch_size: size of every batch passed to `read`; the last may be smaller.
        num_workers: number of decoding threads.
        device: the batches' device.
        interpolation: how windows are resized. Windows of raw images are bit-identical to the torch loader's, except
            with area, which may differ by one level.
    """

    name = "ffcv"

    def __init__(
        self,
        part: Encoded,
        batch_size: int,
        num_workers: int,
        device: torch.device,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        self.labels, self._device = part.labels, device
        self._interpolation = kernels.INTERPOLATIONS.index(interpolation)
        self._decoder = _Decoder(part, num_workers)
        self._loader = _Loader(part.path, batch_size, self._decoder)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def read(self, batches: Sequence[Tensor], crops: Crops, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For each batch (int64 [B]): uint8 images [B, 3, size, size], channels last; int64 labels [B]; on the device.

        Raises:
            DataError: an image cannot be decoded, or no batch arrives for STUCK_SECONDS.
        """
        return self._read(batches, Wish(crops, size, self._interpolation))

    def read_finished(
        self, batches: Sequence[Tensor], crops: Crops, size: int, mirrored: Tensor, normalization: Normalization
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Bit-identical to `read`, then `augmentation.finish`; on the CPU in the decoding threads, six times as fast.

        `mirrored`: bool [N], for all samples of the part.
        """
        if self._stream is None:
            wish = Wish(crops, size, self._interpolation, mirrored.numpy(), normalized(normalization))
            return self._read(batches, wish)
        read = zip(batches, self.read(batches, crops, size), strict=True)
        return ((finish(images, mirrored[batch], normalization), labels) for batch, (images, labels) in read)

    def _read(self, batches: Sequence[Tensor], wish: Wish) -> Iterator[tuple[Tensor, Tensor]]:
        if not batches:
            return
        if any(len(batch) != self._loader.batch_size for batch in batches[:-1]):
            raise ValueError(f"every batch except the last must have {self._loader.batch_size} samples")
        memory = None
        if self._stream is None:
            memory = Buffers((len(batches[0]), wish.size, wish.size, 3), wish.dtype)
        self._decoder.pinned_size = wish.size if memory is None else 0
        decoding = _Decoding(self._loader, torch.cat(list(batches)).numpy(), (wish, memory))
        try:
            for batch in batches:
                yield self._handed_out(torch.from_numpy(decoding.take()).permute(0, 3, 1, 2), self.labels[batch])
        finally:
            decoding.close()

    def _handed_out(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """On a GPU, copies of the images and labels: FFCV reuses its few pinned buffers."""
        if self._stream is None:
            return images, labels
        # Without non_blocking, the copies are complete when .to() returns, so FFCV may reuse its buffer. On a separate
        # stream, they do not wait for the network's kernels.
        with torch.cuda.stream(self._stream):
            copies = images.to(self._device), labels.to(self._device)
        for copy in copies:
            copy.record_stream(torch.cuda.current_stream(self._device))
        return copies


def _decode(
    content: NDArray[np.uint8],
    scratch: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    num_bytes: NDArray[np.int64],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
    is_jpeg: NDArray[np.bool_],
    boxes: NDArray[np.int32],
    interpolation: int,
    mirrored: NDArray[np.bool_],
    doubtful: NDArray[np.bool_],
    normalized: NDArray[np.float32],
    windows: NDArray[np.uint8],
    finished: NDArray[np.float32],
) -> None:
    """Decodes n images of the file's `content`, and resizes and optionally finishes their windows `boxes` [n, 4].

    `scratch` holds one decoded image. `doubtful` [n] is set if TurboJPEG reports a problem with the image. The other
    arguments are passed to `kernels.render`.
    """
    for i in range(len(offsets)):
        image, height, width = (
            content[offsets[i] : offsets[i] + num_bytes[i]],
            np.uint32(heights[i]),
            np.uint32(widths[i]),
        )
        if is_jpeg[i]:
            doubtful[i] = _imdecode(image, scratch, height, width, height, width, 0, 0, 1, 1, False, False) != 0
            image = scratch[: 3 * heights[i] * widths[i]]
        kernels.render(
            i,
            image.reshape((heights[i], 3 * widths[i])),
            boxes[i],
            interpolation,
            mirrored[i],
            normalized,
            windows,
            finished,
        )


# Compiled once per process for all readers, threads and sizes; FFCV itself compiles once per loader.
_imdecode = numba.njit(imdecode)
_decode_fast: Any = numba.njit(nogil=True)(_decode)
_UNFINISHED, _AS_IT_IS = np.empty((0, 0, 0), np.float32), np.empty((0, 3), np.float32)


class _Decoder(SimpleRGBImageDecoder):  # type: ignore[misc]  # FFCV has no types
    """The pipeline's only operation. `pinned_size`: side of the images that FFCV allocates memory for; 0 for none."""

    def __init__(self, part: Encoded, num_workers: int) -> None:
        super().__init__()
        self.path, self.pinned_size = part.path, 0
        self._samples, self._index = part.samples.numpy(), read_index(part.path)
        self._own = threading.local()
        self._threads, self._num_workers = ThreadPoolExecutor(num_workers, "decoder"), num_workers
        if not np.array_equal(self._index.labels[self._samples], part.labels.numpy()):
            raise DataError(f"{part.path}: its labels have changed since it was opened")

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """The memory for FFCV to allocate: a slot for each image of the batches ahead."""
        shape, dtype = (self.pinned_size, self.pinned_size, 3), np.dtype("u1")
        return replace(previous_state, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable[..., NDArray[Any]]:
        """The function that FFCV calls for each batch, in its thread."""
        return self._batch

    def _batch(
        self,
        samples: NDArray[np.int64],
        pinned: NDArray[np.uint8],
        wanted: tuple[Wish, Buffers | None],
        storage: tuple[Any, ...],
    ) -> NDArray[Any]:
        """Images [B, size, size, 3] of the part's samples [B], in `pinned` unless `wanted` has buffers."""
        wish, memory = wanted
        images = pinned if memory is None else memory.take(len(samples))
        rows = _rows(self._index, self._samples[samples])
        boxes = wish.crops.boxes(samples, rows.heights, rows.widths)
        mirrored = np.zeros(len(samples), np.bool_) if wish.mirrored is None else wish.mirrored[samples]
        doubtful, content = np.zeros(len(samples), np.bool_), np.asarray(storage[0])
        stored = (rows.offsets, rows.num_bytes, rows.heights, rows.widths, rows.is_jpeg, boxes)

        def decode(begin: int) -> None:
            mine = slice(begin, begin + step)
            _decode_fast(
                content,
                self._scratch(),
                *(array[mine] for array in stored),
                wish.interpolation,
                mirrored[mine],
                doubtful[mine],
                *self._targets(wish, images[mine]),
            )

        step = -(-len(samples) // (TASKS_PER_THREAD * self._num_workers))
        for _ in self._threads.map(decode, range(0, len(samples), step)):
            pass  # re-raises a thread's exception
        for i in np.flatnonzero(doubtful).tolist():
            encoded = content[rows.offsets[i] : rows.offsets[i] + rows.num_bytes[i]]
            sample = self._samples[samples[i]]
            image = _second_opinion(self.path, sample, encoded.tobytes())
            if image.shape[:2] != (rows.heights[i], rows.widths[i]):
                raise DataError(f"{self.path}: sample {sample} does not have the size in the file's index")
            kernels.render(
                0,
                image.reshape(len(image), -1),
                boxes[i],
                wish.interpolation,
                mirrored[i],
                *self._targets(wish, images[i : i + 1]),
            )
        return images

    def _targets(self, wish: Wish, images: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """The arguments `normalized`, `windows` and `finished` with which `kernels.render` fills `images`."""
        rows = images.reshape(*images.shape[:2], -1)
        if wish.normalized is None:
            return _AS_IT_IS, rows, _UNFINISHED
        window, shape = getattr(self._own, "window", _UNFINISHED), (1, *rows.shape[1:])
        if window.shape != shape:
            window = self._own.window = np.empty(shape, np.uint8)
        return wish.normalized, window, rows

    def _scratch(self) -> NDArray[np.uint8]:
        """This thread's buffer for the file's largest JPEG, reused because new memory would have to be paged in."""
        if not hasattr(self._own, "scratch"):
            self._own.scratch = np.empty(
                (3 * self._index.heights * self._index.widths * self._index.is_jpeg).max(), np.uint8
            )
            self._own.scratch.flags.writeable = False  # only C writes it; numba then sees the file content's type
        scratch: NDArray[np.uint8] = self._own.scratch
        return scratch


def _rows(index: Index, samples: NDArray[np.int64]) -> Index:
    names = ("labels", "heights", "widths", "is_jpeg", "offsets", "num_bytes")
    return Index(*(getattr(index, name)[samples] for name in names))


def _second_opinion(path: Path, sample: int, stored: bytes) -> NDArray[np.uint8]:
    """The sample decoded by Pillow, uint8 [H, W, 3]: like `prepare`, it accepts stray bytes that TurboJPEG rejects."""
    try:
        with Image.open(io.BytesIO(stored)) as image:
            pixels = np.ascontiguousarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"{path}: sample {sample} cannot be decoded ({error}). Has the file changed since it was made? "
            f"Check it with python -m suite.data verify {path}"
        ) from error
    pixels.flags.writeable = False  # numba then sees the file content's type
    return pixels


class _Loader(Loader):  # type: ignore[misc]  # FFCV has no types
    """FFCV's loader, reduced to the images of one file."""

    def __init__(self, path: Path, batch_size: int, decoder: _Decoder) -> None:
        with _nothing_compiled():
            super().__init__(
                str(path),
                batch_size,
                num_workers=1,
                os_cache=True,
                seed=0,
                drop_last=False,
                pipelines={"image": [decoder], "label": None},
            )

    @property
    def reader(self) -> Reader:
        """FFCV's own reader of the file."""
        return self._reader

    @reader.setter
    def reader(self, reader: Reader) -> None:
        # From this table FFCV would make two Python sets per sample: for ImageNet 670 MB and 4 s per loader.
        reader.alloc_table = reader.alloc_table[:0].copy()
        self._reader = reader


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Keeps FFCV from compiling functions: the hot ones are already compiled, and the others run once per batch."""
    Compiler.set_enabled(False)
    try:
        yield
    finally:
        Compiler.set_enabled(True)


class _Decoding(EpochIterator):  # type: ignore[misc]  # FFCV has no types
    """FFCV's thread, which decodes a few batches ahead; `order` is int64 [n], sample numbers of the part."""

    def __init__(self, loader: _Loader, order: NDArray[np.int64], wanted: tuple[Wish, Buffers | None]) -> None:
        self._failure: BaseException | None = None
        self._num_taken = 0
        # FFCV passes this, with the sample numbers, to the decoder of its first field, the image.
        loader.reader.metadata = {"f0": wanted}
        super().__init__(loader, order)

    def run(self) -> None:
        """Decodes all batches. Stores an exception for `take`: raised here, it would leave FFCV's consumer waiting."""
        try:
            super().run()
        except BaseException as error:  # noqa: BLE001
            self._failure = error
            self.output_queue.put(None)

    def take(self) -> NDArray[Any]:
        """The next batch's images [B, size, size, 3]; if pinned, valid only until the next call.

        Raises:
            DataError: an image cannot be decoded, or no batch arrives for STUCK_SECONDS.
        """
        try:
            item = self.output_queue.get(timeout=STUCK_SECONDS)
        except queue.Empty:
            raise DataError(
                f"{self.loader.fname}: batch {self._num_taken} of this pass has not been read for {STUCK_SECONDS:g} s; "
                "does its file system still respond?"
            ) from None
        if item is None:
            raise self._failure or RuntimeError("more batches were asked for than there are samples")
        self._num_taken += 1
        _slot, (images,) = item
        return images  # type: ignore[no-any-return]

    def close(self) -> None:
        """Stops the thread after the batch it is decoding. A stuck thread is abandoned, because it will not end."""
        self.iter_ixes = iter(())
        self.terminate_event.set()
        deadline = time.monotonic() + CLOSING_SECONDS
        while self.is_alive() and time.monotonic() < deadline:
            with suppress(queue.Empty):
                self.output_queue.get_nowait()  # it may be waiting for a free slot
            self.join(0.01)
