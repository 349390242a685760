import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from needs import no_ffcv
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

if why := no_ffcv():
    pytest.skip(why, allow_module_level=True)

from ffcv.loader.epoch_iterator import EpochIterator

from suite.data.augmentation import IMAGENET, NUM_UNIFORMS, Centre, RandomResized, finish
from suite.data.beton import BetonWriter, Sample, read_index
from suite.data.loader import Reader
from suite.data.readers import ffcv as module
from suite.data.readers import kernels
from suite.data.readers.ffcv import FFCVReader
from suite.data.resize import area_resize
from suite.data.source import Encoded
from suite.errors import DataError
from suite.recipe.settings import Interpolation

CPU = torch.device("cpu")
SIDES = ((48, 64), (64, 48), (20, 20), (100, 30), (31, 90), (64, 64), (50, 80), (17, 23))
JPEG_BOUND, JPEG_MEAN_BOUND = 16, 2.0
"""Levels out of 255 between TurboJPEG's fast transform and Pillow's exact one, at quality 90."""


def picture(number: int, height: int, width: int) -> NDArray[np.uint8]:
    """Waves and some noise, uint8 [height, width, 3]: as hard for JPEG as a photograph."""
    random = np.random.default_rng(number)
    y, x, c = np.mgrid[:height, :width, :3]
    waves = 128 + 90 * np.sin(y / 7 + number + c) * np.cos(x / (5 + number % 4))
    return np.asarray(np.clip(waves + random.normal(0, 8, waves.shape), 0, 255), np.uint8)


def jpeg(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return file.getvalue()


def raw(image: NDArray[np.uint8], label: int) -> Sample:
    return Sample(is_jpeg=False, height=len(image), width=image.shape[1], label=label, content=image.tobytes())


def compressed(image: NDArray[np.uint8], label: int, content: bytes | None = None) -> Sample:
    stored = jpeg(image) if content is None else content
    return Sample(is_jpeg=True, height=len(image), width=image.shape[1], label=label, content=stored)


def written(path: Path, samples: list[Sample]) -> Encoded:
    with BetonWriter(path, len(samples)) as writer:
        for sample in samples:
            writer.append(sample)
    labels = torch.from_numpy(read_index(path).labels)
    return Encoded(path, torch.arange(len(labels)), labels)


def reader(part: Encoded, batch_size: int = 4, num_workers: int = 2) -> FFCVReader:
    return FFCVReader(part, batch_size, num_workers, CPU)


def in_order(part: Encoded, batch_size: int = 4) -> tuple[Tensor, ...]:
    return torch.split(torch.arange(len(part.labels)), batch_size)


def decoding_threads() -> int:
    return sum(isinstance(thread, EpochIterator) for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert decoding_threads() == 0


@pytest.fixture(scope="module")
def images() -> list[NDArray[np.uint8]]:
    """Three of each size."""
    return [picture(number, *SIDES[number % len(SIDES)]) for number in range(3 * len(SIDES))]


@pytest.fixture(scope="module")
def uncompressed(images: list[NDArray[np.uint8]], tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    folder = tmp_path_factory.mktemp("raw")
    return written(folder / "train.beton", [raw(image, number % 5) for number, image in enumerate(images)])


@pytest.fixture(scope="module")
def mixed(images: list[NDArray[np.uint8]], tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    """The images in a file, every other one as a JPEG."""
    samples = [(raw, compressed)[number % 2](image, number % 5) for number, image in enumerate(images)]
    return written(tmp_path_factory.mktemp("mixed") / "train.beton", samples)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoded, Tensor]:
    """(20 raw images of one size in a file, the same images as uint8 [20, 3, 32, 32])."""
    pictures = [picture(number, 32, 32) for number in range(20)]
    part = written(
        tmp_path_factory.mktemp("small") / "train.beton", [raw(image, number) for number, image in enumerate(pictures)]
    )
    return part, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def windows(part: Encoded, seed: int = 0) -> RandomResized:
    generator = torch.Generator().manual_seed(seed)
    return RandomResized(torch.rand((len(part.labels), NUM_UNIFORMS), generator=generator).numpy())


def test_whole_raw_images_come_exactly_and_in_the_order_asked_for(small: tuple[Encoded, Tensor]) -> None:
    part, pixels = small
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    batches = list(reader(part, 8).read(torch.split(order, 8), Centre(1.0), 32))
    assert [len(labels) for _, labels in batches] == [8, 8, 4]
    # Compare batches only after the last one has arrived: no buffer may have been reused.
    assert torch.equal(torch.cat([found for found, _ in batches]), pixels[order])
    assert torch.equal(torch.cat([labels for _, labels in batches]), part.labels[order])
    assert all(found.is_contiguous(memory_format=torch.channels_last) for found, _ in batches)


def test_a_part_is_numbered_from_zero(small: tuple[Encoded, Tensor]) -> None:
    part, pixels = small
    chosen = torch.tensor([17, 3, 5, 11])
    ((found, labels),) = reader(part.subset(chosen)).read([torch.tensor([2, 0])], Centre(1.0), 32)
    assert torch.equal(found, pixels[[5, 17]])
    assert labels.tolist() == [5, 17]


@pytest.mark.parametrize("interpolation", kernels.INTERPOLATIONS)
def test_windows_of_raw_images_are_resized_as_torch_does_it_and_by_area_within_one_level(
    uncompressed: Encoded, images: list[NDArray[np.uint8]], interpolation: Interpolation
) -> None:
    crops, numbers = windows(uncompressed), np.arange(len(images))
    boxes = crops.boxes(numbers, *(np.array([image.shape[axis] for image in images]) for axis in (0, 1))).tolist()
    one, grows = FFCVReader(uncompressed, 4, 2, CPU, interpolation), set()
    for size in (16, 40, 56):
        found = torch.cat([batch for batch, _ in one.read(in_order(uncompressed), crops, size)])
        for image, (top, left, height, width), window in zip(images, boxes, found, strict=True):
            expected = resized(image[top : top + height, left : left + width], size, interpolation)
            bound = 1 if interpolation == "area" else 0
            assert np.abs(window.permute(1, 2, 0).numpy().astype(int) - expected).max() <= bound
            grows.add((height < size, width < size))
    assert len(grows) == 4


def resized(image: NDArray[np.uint8], size: int, interpolation: Interpolation) -> NDArray[np.uint8]:
    """Resizes without numba: [h, w, 3] -> [size, size, 3]."""
    if interpolation == "area":
        return area_resize(image, size, size)
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    found = torch.nn.functional.interpolate(pixels, (size, size), mode=interpolation, antialias=True)
    return found[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("interpolation", kernels.INTERPOLATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (500, 2), (224, 100), (100, 224), (300, 400), (900, 700)])
def test_resizing_is_torchs_to_the_bit_whatever_the_shape(shape: tuple[int, int], interpolation: Interpolation) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    box, method = np.array([0, 0, *shape], np.int32), kernels.INTERPOLATIONS.index(interpolation)
    for size in (7, 32, 224):
        found = np.empty((size, 3 * size), np.uint8)
        kernels.resize(image.reshape(shape[0], -1), box, method, found)
        difference = np.abs(found.reshape(size, size, 3).astype(int) - resized(image, size, interpolation))
        assert difference.max() <= (1 if interpolation == "area" else 0)


def test_an_old_pixel_that_begins_with_a_new_one_is_not_taken_for_its_neighbour(tmp_path: Path) -> None:
    image = picture(0, 150, 200)  # 140 / 224 of 200 is 125 up to rounding: OpenCV takes column 124
    one = FFCVReader(written(tmp_path / "a.beton", [raw(image, 0)]), 1, 1, CPU, "area")
    ((found, _),) = one.read([torch.zeros(1).long()], Whole(), 224)
    assert np.abs(found[0].permute(1, 2, 0).numpy().astype(int) - area_resize(image, 224, 224)).max() <= 1


class Whole(Centre):
    """Whole images with any aspect ratio."""

    def __init__(self) -> None:
        super().__init__(1.0)

    def boxes(
        self, samples: NDArray[np.int64], heights: NDArray[np.int64], widths: NDArray[np.int64]
    ) -> NDArray[np.int32]:
        del samples
        return np.stack([0 * heights, 0 * widths, heights, widths], 1).astype(np.int32)


def test_jpegs_are_what_pillow_decodes_within_the_bound(images: list[NDArray[np.uint8]], tmp_path: Path) -> None:
    part = written(tmp_path / "train.beton", [compressed(image, 0) for image in images])
    differences = []
    for number, image in enumerate(images):
        side = min(image.shape[:2])
        ((found, _),) = reader(part).read([torch.tensor([number])], Centre(1.0), side)
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        expected = np.asarray(Image.open(io.BytesIO(jpeg(image))))[top : top + side, left : left + side]
        differences.append(np.abs(found[0].permute(1, 2, 0).numpy().astype(int) - expected))
    assert max(int(difference.max()) for difference in differences) <= JPEG_BOUND
    assert max(float(difference.mean()) for difference in differences) <= JPEG_MEAN_BOUND


def test_images_do_not_depend_on_the_number_of_workers_or_the_batch(mixed: Encoded) -> None:
    crops = windows(mixed)
    found = [
        torch.cat([batch for batch, _ in reader(mixed, size, workers).read(in_order(mixed, size), crops, 24)])
        for size, workers in ((4, 1), (4, 2), (7, 5), (24, 3), (1, 2))
    ]
    assert all(torch.equal(other, found[0]) for other in found[1:])


def test_reading_again_with_the_same_windows_gives_the_same_and_with_others_does_not(mixed: Encoded) -> None:
    one = reader(mixed)
    first, again, other = (
        torch.cat([batch for batch, _ in one.read(in_order(mixed), windows(mixed, seed), 24)]) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_all_readers_and_sizes_share_what_was_compiled_once(mixed: Encoded, uncompressed: Encoded) -> None:
    for part, size in ((mixed, 24), (uncompressed, 24), (mixed, 40)):
        for found, _ in reader(part).read(in_order(part), Centre(0.875), size):
            assert found.shape[1:] == (3, size, size)
    assert len(module._decode_fast.signatures) == 1


def test_readers_can_be_read_in_turns(mixed: Encoded, small: tuple[Encoded, Tensor]) -> None:
    part, pixels = small
    one, two = reader(mixed), reader(part)
    alone = [batch for batch, _ in one.read(in_order(mixed), Centre(1.0), 24)]
    turns = zip(
        one.read(in_order(mixed)[:5], Centre(1.0), 24),
        two.read(in_order(part), Centre(1.0), 32),
        one.read(in_order(mixed)[:5], Centre(1.0), 40),
        strict=True,
    )
    for number, ((first, _), (second, _), (third, _)) in enumerate(turns):
        assert torch.equal(first, alone[number])
        assert torch.equal(second, pixels[4 * number : 4 * number + 4])
        assert third.shape[-1] == 40


@pytest.mark.parametrize("num_taken", [0, 1, 3, 5, 6])
def test_one_who_leaves_off_leaves_no_thread_behind(mixed: Encoded, num_taken: int) -> None:
    batches = reader(mixed).read(in_order(mixed), Centre(1.0), 24)
    for _ in range(num_taken):
        next(batches)
    assert decoding_threads() == 1 or num_taken != 1  # with 1, five are decoded, and the sixth is not
    batches.close()  # type: ignore[attr-defined]
    assert decoding_threads() == 0


def test_no_batches_are_no_error(mixed: Encoded) -> None:
    assert list(reader(mixed).read([], Centre(1.0), 24)) == []


def test_batches_of_different_sizes_are_refused(mixed: Encoded) -> None:
    with pytest.raises(ValueError, match="must have 4"):
        next(iter(reader(mixed).read(torch.split(torch.arange(10), [4, 3, 3]), Centre(1.0), 24)))


def stray(content: bytes) -> bytes:
    """The content with meaningless bytes before its end."""
    return content[:-2] + bytes(range(1, 33)) + content[-2:]


def _damaged(image: NDArray[np.uint8], how: str) -> bytes:
    content = jpeg(image)
    return {
        "cut": content[: len(content) // 2],
        "zeros": bytes(len(content)),
        "text": b"no image at all",
        "stray bytes, another size": stray(jpeg(image[:-9, :-9])),
    }[how]


@pytest.mark.parametrize("how", ["cut", "zeros", "text", "stray bytes, another size"])
def test_a_damaged_jpeg_is_an_error_that_names_file_and_sample(tmp_path: Path, how: str) -> None:
    pictures = [picture(number, 60, 70) for number in range(8)]
    samples = [
        compressed(image, 0, _damaged(image, how) if number == 5 else None) for number, image in enumerate(pictures)
    ]
    part = written(tmp_path / "train.beton", samples)
    batches = reader(part).read(in_order(part), Centre(1.0), 24)
    next(batches)
    with pytest.raises(DataError, match=rf"^{part.path}: sample 5 [^\n]*$"):
        next(batches)


def test_stray_bytes_in_a_jpeg_are_forgiven_as_pillow_forgives_them(tmp_path: Path) -> None:
    content = stray(jpeg(picture(0, 60, 60)))
    part = written(tmp_path / "train.beton", [compressed(picture(0, 60, 60), 0, content)])
    ((found, _),) = reader(part).read([torch.tensor([0])], Centre(1.0), 60)
    assert np.array_equal(found[0].permute(1, 2, 0).numpy(), np.asarray(Image.open(io.BytesIO(content))))


class Failing(Centre):
    """Windows that fail after the first batch."""

    def boxes(
        self, samples: NDArray[np.int64], heights: NDArray[np.int64], widths: NDArray[np.int64]
    ) -> NDArray[np.int32]:
        if samples[0] > 0:
            raise ArithmeticError("in the decoding thread")
        return super().boxes(samples, heights, widths)


def test_an_exception_in_the_decoding_thread_reaches_the_reader(mixed: Encoded) -> None:
    batches = reader(mixed).read(in_order(mixed), Failing(1.0), 24)
    next(batches)
    with pytest.raises(ArithmeticError, match="in the decoding thread"):
        next(batches)


def test_a_batch_that_never_comes_is_an_error_that_names_the_file(
    mixed: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STUCK_SECONDS", 0.3)
    monkeypatch.setattr(module, "CLOSING_SECONDS", 0.1)
    answer = threading.Event()

    class Stuck(Centre):
        def boxes(
            self, samples: NDArray[np.int64], heights: NDArray[np.int64], widths: NDArray[np.int64]
        ) -> NDArray[np.int32]:
            if samples[0] > 0:
                answer.wait(60)
            return super().boxes(samples, heights, widths)

    batches = reader(mixed).read(in_order(mixed), Stuck(1.0), 24)
    next(batches)
    with pytest.raises(DataError, match=rf"^{mixed.path}: batch 1 [^\n]*0\.3 s[^\n]*$"):
        next(batches)
    answer.set()
    for thread in threading.enumerate():
        if isinstance(thread, EpochIterator):
            thread.join(60)


def test_labels_that_are_not_the_files_are_refused(mixed: Encoded) -> None:
    with pytest.raises(DataError, match="labels have changed"):
        reader(Encoded(mixed.path, mixed.samples, mixed.labels + 1))


def test_torch_keeps_its_number_of_threads(mixed: Encoded) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        for _ in reader(mixed, num_workers=1).read(in_order(mixed), Centre(1.0), 24):
            assert torch.get_num_threads() == before + 1
        inside: list[int] = []
        thread = threading.Thread(target=lambda: inside.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert [torch.get_num_threads(), *inside] == [before + 1, before + 1]
    finally:
        torch.set_num_threads(before)


def test_importing_the_module_leaves_torch_its_number_of_threads() -> None:
    code = "import torch; torch.set_num_threads(3); import suite.data.readers.ffcv; print(torch.get_num_threads())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["3"]


def test_it_is_a_reader(small: tuple[Encoded, Tensor]) -> None:
    one: Reader = reader(small[0])
    assert torch.equal(one.labels, small[0].labels)


def test_images_are_finished_to_the_bits_that_torch_gives(mixed: Encoded) -> None:
    one, batches, crops = reader(mixed, 7), in_order(mixed, 7), windows(mixed)
    mirrored = torch.arange(len(mixed.labels)) % 3 == 0
    pixels, finished = one.read(batches, crops, 24), one.read_finished(batches, crops, 24, mirrored, IMAGENET)
    for batch, (images, labels), (found, found_labels) in zip(batches, pixels, finished, strict=True):
        assert torch.equal(found, finish(images, mirrored[batch], IMAGENET))
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found_labels, labels)


def test_finished_images_may_be_kept_and_need_not_be(mixed: Encoded) -> None:
    one, batches, mirrored = reader(mixed, 2), in_order(mixed, 2), torch.zeros(len(mixed.labels), dtype=torch.bool)
    expected = [finish(images, mirrored[:2], IMAGENET) for images, _ in one.read(batches, Centre(1.0), 24)]
    parts, addresses = [], set()
    for number, (images, _) in enumerate(one.read_finished(batches, Centre(1.0), 24, mirrored, IMAGENET)):
        addresses.add(images.data_ptr())
        if number % 3 == 0:
            parts.append(images[1, 2].numpy())  # an array that shares memory keeps it alive
    assert len(parts) == 4
    for number, part in enumerate(parts):
        assert np.array_equal(part, expected[3 * number][1, 2].numpy())
    assert len(parts) < len(addresses) < len(batches)


def test_a_window_one_pixel_wide_is_that_pixel_everywhere(tmp_path: Path) -> None:
    image = picture(0, 9, 1)
    ((found, _),) = reader(written(tmp_path / "a.beton", [raw(image, 0)])).read([torch.zeros(1).long()], Whole(), 4)
    assert np.array_equal(found[0].permute(1, 2, 0).numpy(), resized(image, 4, "bilinear"))
