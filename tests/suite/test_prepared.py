"""Prepared files give the same batches: compares FFCV's loader with the memory and torch loaders."""

import importlib.util
import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from needs import no_ffcv
from PIL import Image
from rich.console import Console
from torch import Tensor

from suite.data import datasets
from suite.data.decoding import Storage
from suite.data.loader import Loader
from suite.data.source import Encoded, Files, Pixels
from suite.engines.process_group import Layout
from suite.errors import DataError
from suite.prepare.pipeline import prepare
from suite.recipe.cell import Cell
from suite.recipe.settings import Execution
from suite.run import journal
from suite.run.directory import RunDir
from suite.run.failures import Heartbeat, PreemptedError
from suite.train import train
from suite.training.build import Loaders, build_loaders

needs_ffcv = pytest.mark.skipif(no_ffcv() is not None, reason=str(no_ffcv()))
MakeCell = Callable[..., Cell]
RAW = Storage.of(None, 90, 0.0)
ALONE = Layout()


def _write_images(folder: Path, sizes: list[tuple[int, int]], num_classes: int, suffix: str) -> None:
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(sizes):
        # Smooth like photographs, on which JPEG decoders differ little.
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        place = folder / f"class{number % num_classes}"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number:03}{suffix}")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cifar10 with 40 + 8 images, and folder/pets with 30 + 7 of many sizes; both as image files and prepared."""
    root = tmp_path_factory.mktemp("data")
    for split, num in (("train", 40), ("test", 8)):
        _write_images(root / "cifar10" / split, [(32, 32)] * num, 4, ".png")
    for split, num in (("train", 30), ("test", 7), ("val", 5)):
        sizes = [(40 + 3 * i % 50, 90 - 2 * i) for i in range(num)]
        _write_images(root / "folder" / split, sizes, 5, ".jpg")
    console = Console(quiet=True)
    prepare("cifar10", root / "cifar10", root / "cifar10", RAW, 1, console)
    for name, storage in (("pets", RAW), ("jpegs", Storage.of(None, 90, 1.0))):
        (root / name).mkdir()
        for split in ("train", "test", "val"):
            (root / name / split).symlink_to(root / "folder" / split)
        prepare("imagefolder", root / "folder", root / name, storage, 1, console)
    return root


@pytest.fixture
def load(data_dir: Path, make_cell: MakeCell) -> Callable[..., Loaders]:
    def build(dataset: str, loader: str, layout: Layout = ALONE, **changes: object) -> Loaders:
        data = {"crop": "padded", "horizontal_flip": True} if dataset == "cifar10" else PHOTOGRAPHS
        cell = make_cell(dataset=dataset, **{"data": data, "training__batch_size": 6, **changes})
        execution = Execution.model_validate({"loader": loader, "num_workers": 1})
        return build_loaders(cell, datasets.load(dataset, data_dir, execution.loader), layout, execution)

    return build


PHOTOGRAPHS = {"crop": "random_resized", "image_size": 32, "horizontal_flip": True, "validation_fraction": 0.0}


def _epoch(loader: Loader, epoch: int, start: int = 0) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader.epoch(epoch, start), strict=True)
    return torch.cat(images), torch.cat(labels)


def _evaluated(loader: Loader) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader.evaluation(), strict=True)
    return torch.cat(images), torch.cat(labels)


def _levels(images: Tensor) -> Tensor:
    """Undoes ImageNet's normalisation: pixels in [0, 255]."""
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return images * std * 255


@needs_ffcv
def test_cifar_through_ffcv_is_what_it_is_from_memory_to_the_bit(load: Callable[..., Loaders]) -> None:
    memory, ffcv = load("cifar10", "memory"), load("cifar10", "ffcv")
    assert memory.validation is not None
    assert ffcv.validation is not None
    for ours, theirs in zip(_epoch(ffcv.train, 3), _epoch(memory.train, 3), strict=True):
        assert torch.equal(ours, theirs)
    for part, other in ((ffcv.validation, memory.validation), (ffcv.final, memory.final)):
        assert all(torch.equal(*pair) for pair in zip(_evaluated(part), _evaluated(other), strict=True))


def test_cifar_through_the_torch_loader_is_what_it_is_from_memory_to_the_bit(load: Callable[..., Loaders]) -> None:
    memory, folders = load("cifar10", "memory"), load("cifar10", "torch")
    assert memory.validation is not None
    assert folders.validation is not None
    assert folders.train.size == 32
    for ours, theirs in zip(_epoch(folders.train, 3), _epoch(memory.train, 3), strict=True):
        assert torch.equal(ours, theirs)
    for part, other in ((folders.validation, memory.validation), (folders.final, memory.final)):
        assert all(torch.equal(*pair) for pair in zip(_evaluated(part), _evaluated(other), strict=True))


@needs_ffcv
@pytest.mark.parametrize(
    ("dataset", "interpolation", "bound"),
    [
        ("folder/pets", "bilinear", 0),
        ("folder/pets", "bicubic", 0),
        ("folder/pets", "area", 1.01),
        ("folder/jpegs", "bilinear", 6.01),
    ],
)
def test_ffcv_and_the_torch_loader_show_the_same_windows(
    load: Callable[..., Loaders], dataset: str, interpolation: str, bound: float
) -> None:
    """Raw pixels are bit-identical, except with area, whose sums differ; JPEGs differ by their decoders' rounding."""
    data = {**PHOTOGRAPHS, "interpolation": interpolation}
    torchs, ffcvs = load(dataset, "torch", data=data), load(dataset, "ffcv", data=data)
    for (ours, labels), (theirs, other_labels) in (
        (_epoch(ffcvs.train, 1), _epoch(torchs.train, 1)),
        (_evaluated(ffcvs.final), _evaluated(torchs.final)),
    ):
        assert torch.equal(labels, other_labels)
        assert (_levels(ours) - _levels(theirs)).abs().max() <= bound


@needs_ffcv
def test_an_epochs_order_is_the_union_over_processes_differs_by_seed_and_can_be_entered_half_way(
    load: Callable[..., Loaders],
) -> None:
    images, labels = _epoch(load("folder/pets", "ffcv").train, 2)
    again, _ = _epoch(load("folder/pets", "ffcv").train, 2)
    assert torch.equal(images, again)
    ranks = [_epoch(load("folder/pets", "ffcv", Layout(rank, 2)).train, 2) for rank in range(2)]
    shares = [parts[0].view(-1, 3, *images.shape[1:]) for parts in ranks]
    assert torch.equal(torch.cat(shares, 1).flatten(0, 1), images)
    other, _ = _epoch(load("folder/pets", "ffcv", seed=1).train, 2)
    assert not torch.equal(other, images)
    rest, rest_labels = _epoch(load("folder/pets", "ffcv").train, 2, start=3)
    assert torch.equal(rest, images[18:])
    assert torch.equal(rest_labels, labels[18:])


@needs_ffcv
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_through_ffcv_counts_every_sample_once(load: Callable[..., Loaders], world_size: int) -> None:
    seen = [
        image
        for rank in range(world_size)
        for image in _evaluated(load("folder/pets", "ffcv", Layout(rank, world_size)).final)[0]
    ]
    expected, _ = _evaluated(load("folder/pets", "torch").final)
    assert (len(seen), len(expected)) == (-(-7 // world_size) * world_size, 7)
    nearest = [int((expected - image).abs().amax((1, 2, 3)).argmin()) for image in seen]
    assert set(nearest) == set(range(7))


@needs_ffcv
def test_early_epochs_show_smaller_images_where_the_recipe_says_so(load: Callable[..., Loaders]) -> None:
    resizing = {"start": 32, "from_epoch": 0, "to_epoch": 2}
    data = {**PHOTOGRAPHS, "image_size": 96, "progressive_resizing": resizing}
    loaders = load("folder/pets", "ffcv", data=data)
    assert [_epoch(loaders.train, epoch)[0].shape[-1] for epoch in range(4)] == [32, 64, 96, 96]
    assert _evaluated(loaders.final)[0].shape[-1] == 96


@pytest.mark.parametrize("loader", ["torch", pytest.param("ffcv", marks=needs_ffcv)])
def test_a_data_sets_own_validation_part_is_used_where_nothing_is_held_out(
    load: Callable[..., Loaders], loader: str
) -> None:
    own = load("folder/pets", loader)
    assert own.validation is not None
    assert (own.num_train_images, len(own.validation.reader.labels)) == (30, 5)
    held_out = load("folder/pets", loader, data={**PHOTOGRAPHS, "validation_fraction": 0.2})
    assert held_out.validation is not None
    assert (held_out.num_train_images, len(held_out.validation.reader.labels)) == (24, 6)


@needs_ffcv
def test_a_run_through_ffcv_that_is_stopped_half_way_ends_with_the_undisturbed_ones_bits(
    data_dir: Path, make_run: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    resizing = {"start": 32, "from_epoch": 0, "to_epoch": 1}
    keys = {
        "dataset": "folder/pets",
        "data": {**PHOTOGRAPHS, "image_size": 64, "progressive_resizing": resizing},
        "training__batch_size": 6,
        "training__mixup": 0.8,
        "training__cutmix": 1.0,
    }
    undisturbed, run = make_run("undisturbed", **keys), make_run("stopped", **keys)
    train(undisturbed, data_dir)
    beat = Heartbeat.beat

    def stop_after_the_third_step(self: Heartbeat, step: int, epoch: int) -> None:
        beat(self, step, epoch)
        if step == 2:
            signal.raise_signal(signal.SIGUSR2)

    monkeypatch.setattr(Heartbeat, "beat", stop_after_the_third_step)
    with pytest.raises(PreemptedError):
        train(run, data_dir)
    monkeypatch.setattr(Heartbeat, "beat", beat)
    train(run, data_dir)
    assert run.result() == undisturbed.result()
    stalls = [metrics["time/loader_stall_share"] for metrics in journal.read_metrics(run.journal).values()]
    assert len(stalls) == 2
    assert all(0 < stall < 1 for stall in stalls)


@needs_ffcv
def test_prepared_files_are_taken_by_themselves_and_their_checksum_is_in_the_source(data_dir: Path) -> None:
    source = datasets.load("folder/pets", data_dir)
    assert isinstance(source.train, Encoded)
    assert isinstance(datasets.load("folder/pets", data_dir, "torch").train, Files)
    assert isinstance(datasets.load("cifar10", data_dir).train, Pixels)
    assert source.checksum != datasets.load("folder/jpegs", data_dir).checksum


def test_what_cannot_be_loaded_is_refused_with_what_to_do(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"memory holds digits, .*; for folder/pets take ffcv or torch"):
        datasets.load("folder/pets", data_dir, "memory")
    with pytest.raises(DataError, match=r"imagenet/train\.beton: not there; python -m suite\.data prepare imagenet"):
        datasets.load("imagenet", tmp_path, "ffcv")


def test_without_ffcv_the_error_says_how_to_install_it(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(DataError, match=r"pip install proxbench\[ffcv\].*libturbojpeg.*execution\.loader=torch"):
        datasets.load("folder/pets", data_dir)


@needs_ffcv
def test_a_file_that_is_not_its_manifests_is_refused(data_dir: Path, tmp_path: Path) -> None:
    place = tmp_path / "pets"
    place.mkdir()
    for path in [*(data_dir / "pets").glob("*.beton"), *(data_dir / "pets").glob("*.json")]:
        (place / path.name).write_bytes(path.read_bytes())
    with (place / "test.beton").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=r"test\.beton: \d+ bytes, its manifest says \d+"):
        datasets.load("folder/pets", tmp_path)
    (place / "test.beton").write_bytes((data_dir / "pets" / "test.beton").read_bytes())
    manifest = json.loads((place / "test.json").read_text())
    manifest["classes"][0] = "dog"
    (place / "test.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="the splits have different classes"):
        datasets.load("folder/pets", tmp_path)


def test_pixels_of_a_file_with_jpegs_are_refused(data_dir: Path) -> None:
    part = Encoded(data_dir / "jpegs" / "train.beton", torch.arange(3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(DataError, match="prepare it again with --jpeg-share 0"):
        part.pixels()
