"""Policies, jitter, erasing and repeats depend only on (seed, epoch, sample), so they are the same for all loaders."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from needs import no_ffcv
from PIL import Image
from pydantic import ValidationError
from tiny_cells import tiny_cell
from torch import Tensor

from suite.data.augmentation import IMAGENET, Draws, draw
from suite.data.loader import Loader, Reader
from suite.data.policy import NUM_TRIES, Policy, erase
from suite.data.readers.image_folder import FolderReader, Workers
from suite.data.readers.memory import MemoryReader
from suite.data.source import Encoded, Files, Pixels
from suite.engines.process_group import Layout
from suite.recipe.settings import Data

CPU = torch.device("cpu")
NUM, SIDE = 24, 32
NOTATIONS = ["rand-m9-mstd0.5-inc1", "rand-m6-n3-tweights", "original-mstd0.5", "v0", "3a", "augmix-m5-w4-d2"]
EVERYTHING: dict[str, Any] = {
    "auto_augment": NOTATIONS[0],
    "color_jitter": 0.4,
    "random_erasing": 0.5,
    "horizontal_flip": True,
}


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Smooth pictures with an edge, uint8 [NUM, 3, SIDE, SIDE], channels last."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (NUM, 4, 4, 3), np.uint8)
    smooth = [np.array(Image.fromarray(each).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for each in coarse]
    pictures = np.stack(smooth)
    pictures[:, 10:20, 8:24] = 255 - pictures[:, 10:20, 8:24]
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def _policy(notation: str | None = NOTATIONS[0], jitter: float = 0.0, seed: int = 1) -> Policy:
    return Policy(notation, jitter, (124, 116, 104), "bilinear", seed)


def _loader(images: Tensor, num_workers: int | None = None, batch_size: int = 8, **settings: Any) -> Loader:  # noqa: ANN401
    repeats = settings.get("repeated_augmentation", 1)
    part = Pixels(images, torch.arange(NUM)).subset(torch.arange(NUM).repeat(repeats))
    workers = None if num_workers is None else lambda: Workers(num_workers, CPU)
    data = Data(**settings)
    return Loader(MemoryReader(part, CPU), data, SIDE, IMAGENET, batch_size, 0, Layout(), "bilinear", workers, repeats)


def _all(loader: Loader, epoch: int = 0, start: int = 0) -> Tensor:
    return torch.cat([images for images, _ in loader.epoch(epoch, start)])


def _numpys_state() -> str:
    return str(np.random.get_state())  # noqa: NPY002  (what timm draws from)


@pytest.mark.parametrize("notation", NOTATIONS)
def test_a_policy_depends_on_seed_and_sample_alone(images: Tensor, notation: str) -> None:
    policy, order = _policy(notation), list(range(NUM))
    together = policy.apply(images, order)
    assert together.shape == images.shape
    assert together.dtype == torch.uint8
    backwards = policy.apply(images.flip(0), order[::-1]).flip(0)
    assert torch.equal(together, backwards)
    alone = torch.cat([policy.apply(images[n : n + 1], [n]) for n in order])
    assert torch.equal(together, alone)
    other = _policy(notation, seed=2).apply(images, order)
    assert not torch.equal(together, other)
    changed = (together != images).flatten(1).any(1)
    assert changed.sum() > NUM / 3, "a policy that does nothing"


def test_a_policy_leaves_the_random_generators_as_they_were(images: Tensor) -> None:
    before = random.getstate(), _numpys_state(), torch.get_rng_state()
    _policy(jitter=0.3).apply(images, range(NUM))
    assert random.getstate() == before[0]
    assert _numpys_state() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_no_bits_are_a_black_image(images: Tensor) -> None:
    """RandAugment with DeiT's magnitude, 9 with deviation 0.5, requests no bits whenever it draws 10 or more."""
    from timm.data import auto_augment as timms

    from suite.data.policy import _posterized, _transform

    transform: Any = _transform("rand-m10-mstd0-inc1", (0, 0, 0), "bilinear", SIDE)
    operation = next(each for each in transform.ops if each.name == "PosterizeIncreasing")
    assert operation.level_fn(10.0, {}) == (0,)
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    assert not np.array(_posterized(picture, 0)).any()
    assert _posterized(picture, 3) == timms.posterize(picture, 3)
    operation.prob = 1.0
    assert not np.array(operation(picture)).any()


def test_a_policy_is_timms_on_the_same_draws(images: Tensor) -> None:
    from timm.data.auto_augment import rand_augment_transform

    from suite.training.seeds import stream

    policy = _policy()
    settings = {
        "translate_const": int(0.45 * SIDE),
        "img_mean": policy.fill,
        "interpolation": Image.Resampling.BILINEAR,
    }
    transform = rand_augment_transform(NOTATIONS[0], settings)
    for sample in range(NUM):
        seed = stream(policy.seed, "policy", sample)
        random.seed(seed)
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])  # noqa: NPY002  (what timm draws from)
        theirs = np.array(transform(Image.fromarray(images[sample].permute(1, 2, 0).numpy())))
        ours = policy.apply(images[sample : sample + 1], [sample])[0].permute(1, 2, 0).numpy()
        assert np.array_equal(ours, theirs)


def test_jitter_of_zero_changes_nothing_and_of_some_keeps_within_its_factor() -> None:
    grey = torch.full((64, 3, 8, 8), 100, dtype=torch.uint8)
    assert torch.equal(_policy(None, 0.0).apply(grey, range(64)), grey)
    # Contrast and saturation do not change a uniform grey; brightness multiplies it by 0.8 to 1.2, rounded.
    jittered = _policy(None, 0.2).apply(grey, range(64)).flatten(1)
    levels = jittered[:, 0].float()
    assert torch.equal(jittered, jittered[:, :1].expand_as(jittered))
    assert 79 <= levels.min() < 90
    assert 110 < levels.max() <= 121


def test_erasing_covers_one_rectangle_of_the_share_that_timm_draws() -> None:
    blank = torch.zeros(400, 3, 40, 30)
    erase(blank, range(400), 0.5, seed=3)
    chosen = [image for image in blank if bool(image.any())]
    assert 160 < len(chosen) < 240  # 4 standard deviations of a fair coin, 10 each
    values = []
    for image in chosen:
        covered = image.ne(0).any(0)
        rows, columns = covered.any(1).nonzero().flatten(), covered.any(0).nonzero().flatten()
        box = image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert bool(box.ne(0).all()), "a rectangle"
        share = box[0].numel() / (40 * 30)
        assert 0.015 < share < 0.35
        assert 0.25 < box.shape[1] / box.shape[2] < 4
        values.append(box.flatten())
    noise = torch.cat(values)
    assert abs(float(noise.mean())) < 5 / len(noise) ** 0.5
    assert float(noise.std()) == pytest.approx(1, abs=5 / len(noise) ** 0.5)
    assert NUM_TRIES == 10


def test_erasing_is_the_same_whatever_the_batch_and_off_in_evaluation(images: Tensor) -> None:
    whole = torch.zeros(NUM, 3, SIDE, SIDE)
    parts = [part.clone() for part in torch.split(whole, 5)]
    erase(whole, range(NUM), 0.5, seed=1)
    for part, samples in zip(parts, torch.split(torch.arange(NUM), 5), strict=True):
        erase(part, samples.tolist(), 0.5, seed=1)
    assert torch.equal(torch.cat(parts), whole)
    shown = [
        torch.cat([found for found, _ in _loader(images, **settings).evaluation()]) for settings in ({}, EVERYTHING)
    ]
    assert torch.equal(*shown)


@pytest.mark.parametrize("settings", [EVERYTHING, EVERYTHING | {"crop": "padded", "crop_padding": 3}])
def test_epochs_resume_in_the_middle_to_the_bit_with_everything_on(images: Tensor, settings: dict[str, Any]) -> None:
    whole = _all(_loader(images, **settings), 1)
    assert torch.equal(_all(_loader(images, **settings), 1, start=1), whole[8:])
    assert not torch.equal(_all(_loader(images, **settings), 2), whole)


def test_workers_give_the_pixels_that_this_process_gives(images: Tensor) -> None:
    here, there = (_all(_loader(images, num_workers, **EVERYTHING), 1) for num_workers in (None, 2))
    assert torch.equal(here, there)


def test_processes_share_a_batch_out_with_everything_on(images: Tensor) -> None:
    alone, halves = _loader(images, **EVERYTHING), [_loader(images, **EVERYTHING) for _ in range(2)]
    for rank, half in enumerate(halves):
        half.layout = Layout(rank, 2)
    for (whole, _), *shares in zip(alone.epoch(0), *(half.epoch(0) for half in halves), strict=True):
        assert torch.equal(torch.cat([share for share, _ in shares]), whole)


def test_repeats_are_copies_in_a_row_that_are_changed_each_in_its_own_way(images: Tensor) -> None:
    loader = _loader(images, batch_size=6, repeated_augmentation=3, auto_augment=NOTATIONS[0])
    assert len(loader) == NUM // 6
    seen: list[int] = []
    for batch, labels in loader.epoch(0):
        copies = batch.reshape(2, 3, 3, SIDE, SIDE)
        assert torch.equal(labels.reshape(2, 3), labels[::3, None].expand(2, 3))
        seen += labels[::3].tolist()
        # RandAugment applies each of its two operations with probability 1/2: copies may be equal.
        assert any(not torch.equal(first, later) for first, later in zip(copies[:, 0], copies[:, 2], strict=True))
    assert len(seen) == len(set(seen)) == NUM // 3
    assert torch.equal(_all(loader, 0, start=2), _all(loader, 0)[12:])


def _jpegs(images: Tensor, folder: Path) -> Files:
    """The pictures as PNG files, read by Pillow as raw pixels."""
    paths = []
    for number, image in enumerate(images):
        path = folder / f"{number:02d}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        paths.append(str(path))
    return Files(tuple(paths), torch.arange(len(images)))


@pytest.mark.skipif(no_ffcv() is not None, reason=no_ffcv() or "")
@pytest.mark.parametrize("crop", ["random_resized", "none"])
def test_ffcv_torch_and_memory_loaders_give_the_same_pixels_with_everything_on(
    images: Tensor,
    tmp_path: Path,
    crop: Any,  # noqa: ANN401
) -> None:
    """Bit-identical for raw images, because the windows are, and the policy depends on nothing else."""
    from test_ffcv import raw, written

    from suite.data.readers.ffcv import FFCVReader

    samples = [raw(image.permute(1, 2, 0).numpy(), number) for number, image in enumerate(images)]
    encoded: Encoded = written(tmp_path / "train.beton", samples)
    files = _jpegs(images, tmp_path)
    data = Data(crop=crop, **EVERYTHING, **({"image_size": SIDE} if crop == "random_resized" else {}))
    workers: Callable[[], Workers] = lambda: Workers(2, CPU)  # noqa: E731
    readers: list[Reader] = [FFCVReader(encoded, 8, 2, CPU), FolderReader(files, Workers(0, CPU), CPU)]
    if crop == "none":
        readers.append(MemoryReader(Pixels(images, torch.arange(NUM)), CPU))
    loaders = [Loader(each, data, SIDE, IMAGENET, 8, 0, Layout(), "bilinear", workers) for each in readers]
    first, *others = (_all(loader, 3) for loader in loaders)
    assert all(torch.equal(first, other) for other in others)
    assert all(torch.equal(_all(loader, 3, start=1), first[8:]) for loader in loaders)


def test_draws_of_windows_shifts_and_flips_are_what_they_were_without_a_policy() -> None:
    plain = draw(Data(horizontal_flip=True), 50, 0, 0)
    rich: Draws = draw(Data(**EVERYTHING), 50, 0, 0, (0.5, 0.5, 0.5))
    assert torch.equal(plain.flips, rich.flips)
    assert rich.policy is not None
    assert rich.policy.fill == (128, 128, 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__auto_augment": "rand-m9-x3", "dataset": "cifar10"}, "'rand-m9-x3' is not a timm policy"),
        ({"data__auto_augment": "originl", "dataset": "cifar10"}, "'originl' is not a timm policy"),
        ({"data__auto_augment": "v0"}, "is for colour images; digits's are grey"),
        ({"data__color_jitter": 0.4}, "is for colour images; digits's are grey"),
    ],
)
def test_policies_that_cannot_be_applied_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        tiny_cell(**changes)


def test_a_run_with_erasing_and_repeats_trains(tmp_path: Path) -> None:
    from suite.training.trainer import Trainer

    cell = tiny_cell(data__random_erasing=0.3, data__repeated_augmentation=2, training__epochs=1)
    trainer = Trainer(cell, Layout(), tmp_path, None)
    assert trainer.loaders.num_train_images == 1294
    assert trainer.steps_per_epoch == 1294 // 256
    assert trainer.train_epoch(lambda _step, _loss: None)["train/loss"] > 0
