"""Each epoch has every sample once, in an order and with augmentation that depend only on the seed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from suite.data.augmentation import IMAGENET, Centre, Normalization, draw, finish, shift
from suite.data.loader import Loader
from suite.data.readers.image_folder import FolderReader, Workers
from suite.data.readers.memory import MemoryReader
from suite.data.source import Files, Pixels
from suite.engines.process_group import Layout
from suite.errors import DataError
from suite.recipe.settings import Data, Interpolation

IDENTITY = Normalization(torch.zeros(1), torch.full((1,), 1 / 255))
"""Leaves the bytes unchanged."""


def _loader(
    num: int = 60,
    batch_size: int = 12,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    padding: int = 0,
    flip: bool = False,
) -> Loader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num, 1, 6, 6), dtype=torch.uint8, generator=generator)
    data = Pixels(images, torch.arange(num))
    settings = Data(crop="padded" if padding else "none", crop_padding=padding or None, horizontal_flip=flip)
    reader = MemoryReader(data, torch.device("cpu"))
    return Loader(reader, settings, 6, IDENTITY, batch_size, seed, Layout(rank, world_size))


def _images(loader: Loader) -> Tensor:
    """The loader's unaugmented images: uint8 [N, 1, 6, 6]."""
    return torch.cat([images for images, _ in loader.evaluation()]).round().to(torch.uint8)


def _labels(loader: Loader, epoch: int) -> list[int]:
    return [int(label) for _, labels in loader.epoch(epoch) for label in labels]


def test_an_epoch_shows_every_sample_once() -> None:
    assert sorted(_labels(_loader(), 0)) == list(range(60))


def test_the_last_smaller_batch_is_left_out() -> None:
    loader = _loader(num=65)
    assert len(loader) == 5
    assert len(_labels(loader, 0)) == 60


def test_order_is_repeatable_and_differs_between_epochs_and_seeds() -> None:
    assert _labels(_loader(), 3) == _labels(_loader(), 3)
    assert _labels(_loader(), 3) != _labels(_loader(), 4)
    assert _labels(_loader(seed=1), 3) != _labels(_loader(), 3)


@pytest.mark.parametrize(("num_bytes", "num_reads"), [(1, 7), (4 * 36 * 12 * 2, 4), (10**6, 2)])
def test_small_images_are_read_several_batches_at_a_time_with_the_bits_of_one_at_a_time(
    num_bytes: int, num_reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, shifted = _loader(num=65, padding=1, flip=True), []

    def noted(images: Tensor, num_pixels: int, shifts: Tensor) -> Tensor:
        shifted.append(len(images))
        return shift(images, num_pixels, shifts)

    monkeypatch.setattr("suite.data.loader.shift", noted)
    batches = {}
    for most in (1, num_bytes):
        monkeypatch.setattr("suite.data.loader.RUN_BYTES", most)
        shifted.clear()
        batches[most] = [*loader.epoch(2), *loader.epoch(2, start=3)]  # five batches, then the last two of them
    assert len(shifted) == num_reads
    for (images, labels), (others, their_labels) in zip(batches[1], batches[num_bytes], strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, their_labels)


def test_processes_share_each_global_batch_out_with_the_same_augmentation() -> None:
    alone = list(_loader(padding=1, flip=True).epoch(2))
    ranks = [list(_loader(rank=rank, world_size=3, padding=1, flip=True).epoch(2)) for rank in range(3)]
    for step, (images, labels) in enumerate(alone):
        assert torch.equal(torch.cat([rank[step][0] for rank in ranks]), images)
        assert torch.equal(torch.cat([rank[step][1] for rank in ranks]), labels)


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_evaluation_shows_every_sample_and_to_make_shares_equal_the_last_one_again(world_size: int) -> None:
    seen = [
        int(label)
        for rank in range(world_size)
        for _, labels in _loader(rank=rank, world_size=world_size, padding=2, flip=True).evaluation()
        for label in labels
    ]
    assert sorted(seen) == [*range(60), *[59] * (-60 % world_size)]


def test_evaluation_shows_images_as_they_are() -> None:
    assert torch.equal(_images(_loader(padding=2, flip=True)), _images(_loader()))


def test_each_crop_is_a_window_of_the_padded_image() -> None:
    loader = _loader(padding=2)
    originals = _images(loader)
    windows = set()
    for images, labels in loader.epoch(0):
        for image, label in zip(images.round().to(torch.uint8), labels, strict=True):
            padded = torch.nn.functional.pad(originals[label], [2] * 4)
            found = [(r, c) for r in range(5) for c in range(5) if torch.equal(padded[:, r : r + 6, c : c + 6], image)]
            assert len(found) == 1
            windows.update(found)
    assert len(windows) > 15  # of 25, among 60 draws


def test_about_half_of_the_images_are_mirrored() -> None:
    loader = _loader(num=600, flip=True)
    originals = _images(loader)
    mirrored = 0
    for images, labels in loader.epoch(0):
        for image, label in zip(images.round().to(torch.uint8), labels, strict=True):
            original = originals[label]
            assert torch.equal(image, original) or torch.equal(image, original.flip(-1))
            mirrored += int(not torch.equal(image, original))
    assert 240 < mirrored < 360


def test_normalised_training_images_have_mean_0_and_deviation_1_per_channel() -> None:
    images = torch.randint(0, 200, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    normal = Normalization.of(images)(images).transpose(0, 1).flatten(1)
    assert torch.allclose(normal.mean(1), torch.zeros(3), atol=1e-5)
    assert torch.allclose(normal.std(1, correction=0), torch.ones(3), atol=1e-5)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    generator = torch.Generator().manual_seed(0)
    for index in range(10):
        image = torch.randint(0, 256, (20 + index, 24, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(image.numpy()).save(tmp_path / f"{index}.png")
    return Files(tuple(str(tmp_path / f"{index}.png") for index in range(10)), torch.arange(10))


SETTINGS = Data(image_size=16, crop="random_resized", horizontal_flip=True)


ALONE = Layout()


def _folder(files: Files, batch_size: int, layout: Layout = ALONE, num_workers: int = 0) -> Loader:
    return Loader(
        FolderReader(files, Workers(num_workers, layout.device), layout.device),
        SETTINGS,
        16,
        IMAGENET,
        batch_size,
        0,
        layout,
    )


def _epoch(loader: Loader, epoch: int) -> tuple[Tensor, list[int]]:
    batches = list(loader.epoch(epoch))
    return torch.cat([images for images, _ in batches]), [int(i) for _, labels in batches for i in labels]


@pytest.mark.slow
def test_folder_augmentation_does_not_depend_on_the_number_of_workers(files: Files) -> None:
    alone = _epoch(_folder(files, 5), 1)
    two = _epoch(_folder(files, 5, num_workers=2), 1)
    assert torch.equal(alone[0], two[0])
    assert alone[1] == two[1]
    assert sorted(alone[1]) == list(range(10))


@pytest.mark.slow
def test_workers_leave_signals_to_stop_to_the_process_that_can_save(files: Files) -> None:
    command = [sys.executable, str(Path(__file__).with_name("signalled.py")), str(Path(files.paths[0]).parent)]
    assert subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split() == ["10", "2"]


def test_folder_images_differ_between_epochs_and_not_between_calls(files: Files) -> None:
    loader = _folder(files, 5)
    first, labels = _epoch(loader, 0)
    assert first.shape == (10, 3, 16, 16)
    assert torch.equal(_epoch(loader, 0)[0], first)
    second, second_labels = _epoch(loader, 1)
    assert not torch.equal(first[labels.index(3)], second[second_labels.index(3)])


def test_folder_evaluation_covers_every_file_once_over_processes(files: Files) -> None:
    loaders = [_folder(files, 4, Layout(rank, 3)) for rank in range(3)]
    seen = sorted(int(i) for loader in loaders for _, labels in loader.evaluation() for i in labels)
    assert seen == [*range(10), 9, 9]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_folder_images_are_torchvisions_windows(files: Files, interpolation: Interpolation) -> None:
    reader = FolderReader(files, Workers(0, ALONE.device), ALONE.device, interpolation)
    crops = draw(SETTINGS, 10, seed=0, epoch=0).crops
    ((images, _),) = reader.read([torch.arange(10)], crops, 16)
    for number, (path, image) in enumerate(zip(files.paths, images, strict=True)):
        original = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        extent = (np.array([length]) for length in original.shape[1:])
        box = crops.boxes(np.array([number]), *extent)[0].tolist()
        mode = InterpolationMode(interpolation)
        expected = resized_crop(original, *box, size=[16, 16], interpolation=mode, antialias=True)
        # Without vector instructions, torch may round to the other level, depending on the window's memory layout.
        most = 0 if torch.backends.cpu.get_cpu_capability() != "DEFAULT" else 1
        assert (image.int() - expected.int()).abs().max() <= most


def test_area_shows_the_mean_of_what_a_pixel_covers(files: Files) -> None:
    reader = FolderReader(files, Workers(0, ALONE.device), ALONE.device, "area")
    ((images, _),) = reader.read([torch.tensor([4])], Centre(1.0), 8)  # 24 x 24
    original = torch.from_numpy(np.array(Image.open(files.paths[4]))).float()
    means = original.view(8, 3, 8, 3, 3).mean((1, 3)).permute(2, 0, 1)
    assert ((images[0] - means).abs() <= 0.5).all()


def test_folder_images_are_finished_to_the_bits_that_finish_gives(files: Files) -> None:
    reader, batches = FolderReader(files, Workers(0, ALONE.device), ALONE.device), torch.split(torch.arange(10), 4)
    mirrored, crops = torch.arange(10) % 3 == 0, draw(SETTINGS, 10, seed=0, epoch=0).crops
    read, finished = reader.read(batches, crops, 16), reader.read_finished(batches, crops, 16, mirrored, IMAGENET)
    kept = list(finished)  # no buffer may be reused
    for batch, (images, labels), (found, found_labels) in zip(batches, read, kept, strict=True):
        assert torch.equal(found, finish(images, mirrored[batch], IMAGENET))
        assert torch.equal(found_labels, labels)


def test_images_are_evaluated_at_their_own_size_where_the_recipe_says_so(files: Files) -> None:
    settings = SETTINGS.model_copy(update={"test_size": 24})
    reader = FolderReader(files, Workers(0, ALONE.device), ALONE.device)
    loader = Loader(reader, settings, 16, IMAGENET, 5, 0, ALONE)
    assert {images.shape[-1] for images, _ in loader.evaluation()} == {24}
    assert {images.shape[-1] for images, _ in loader.epoch(0)} == {16}


@pytest.mark.slow
def test_one_pool_of_workers_serves_all_passes_also_after_one_that_was_left_half_way(files: Files) -> None:
    workers = Workers(1, ALONE.device)
    train, test = FolderReader(files, workers, ALONE.device), FolderReader(files, workers, ALONE.device)
    batches, mine = torch.split(torch.arange(10), 1), set(multiprocessing.active_children())

    def pids() -> set[int | None]:
        return {process.pid for process in set(multiprocessing.active_children()) - mine}

    first = train.read(batches, Centre(1.0), 16)
    images, _ = next(first)
    started = pids()
    assert len(started) == 1
    first.close()  # type: ignore[attr-defined]
    again = [images for images, _ in test.read(batches, Centre(1.0), 16)]
    assert (len(again), torch.equal(again[0], images)) == (10, True)
    assert pids() == started
    turns = zip(train.read(batches, Centre(1.0), 16), test.read(batches, Centre(1.0), 8), strict=True)
    assert all(one.shape[-1] == 16 and other.shape[-1] == 8 for (one, _), (other, _) in turns)
    del turns
    workers.close()
    assert not pids()


@pytest.mark.slow
def test_workers_end_with_their_parent_however_that_ends(files: Files) -> None:
    code = f"""
import multiprocessing, os, torch
from suite.data.augmentation import Centre
from suite.data.readers.image_folder import FolderReader, Workers
from suite.data.source import Files
if __name__ == "__main__":
    cpu = torch.device("cpu")
    reader = FolderReader(Files({files.paths!r}, torch.zeros(10)), Workers(1, cpu), cpu)
    next(reader.read(torch.arange(10).split(1), Centre(1.0), 8))
    print(*[process.pid for process in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), 9)
"""
    program = Path(files.paths[0]).with_name("parent.py")
    program.write_text(code, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, str(program)], env=environment, check=False, stdout=subprocess.PIPE)
    assert result.returncode == -signal.SIGKILL
    (pid,) = result.stdout.split()
    deadline = time.monotonic() + 10
    while (place := Path("/proc") / pid.decode()).exists() and "Z" not in (place / "stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda content: content[: len(content) // 2],
    "HTML": lambda _: b"<!DOCTYPE html><html></html>",
    "empty": lambda _: b"",
    "HEIC": lambda _: b"\0\0\0\x18ftypheic" + bytes(100),
    "macOS": lambda _: b"\0\x05\x16\x07" + bytes(78),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_file_that_cannot_be_decoded_is_named(files: Files, how: str) -> None:
    path = Path(files.paths[0])
    path.write_bytes(BROKEN[how](path.read_bytes()))
    with pytest.raises(DataError, match=r"0\.png: cannot be decoded \([^\n]+\)$"):
        list(_folder(files, 5).evaluation())


def test_a_link_to_nothing_is_named(files: Files) -> None:
    path = Path(files.paths[0])
    path.unlink()
    path.symlink_to("nothing")
    with pytest.raises(DataError, match=r"0\.png: cannot be decoded \(.*No such file"):
        list(_folder(files, 5).evaluation())


@pytest.mark.parametrize("error", [MemoryError(), SystemError("a\nb"), RecursionError("deep"), ValueError()])
def test_a_file_is_named_whatever_its_decoder_raises(
    files: Files, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Image.Image, "crop", fail)
    with pytest.raises(DataError, match=r"0\.png: cannot be decoded \([^\n]+\)$"):
        list(_folder(files, 5).evaluation())
