"""Augmentation policies on pixels, by timm: RandAugment, AutoAugment, AugMix; colour jitter; and random erasing.

Like the window and flip, a policy's effect on a sample depends only on (seed, epoch, sample), so results are
bit-identical for any batch size, number of processes or loader, and in a resumed run.

Worker processes import this module, so timm is imported only when a policy is first applied.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from suite.recipe.settings import Interpolation
from suite.training.seeds import stream

ERASED_AREA, ERASED_ASPECT, NUM_TRIES = (0.02, 1 / 3), (0.3, 1 / 0.3), 10
"""Random erasing, as in timm: ranges of the rectangle's share of the image and of height / width; number of tries.

Zhong et al. 2020 (arXiv 1708.04896) use 0.02 to 0.4 and 0.3 to 1 / 0.3.
"""

Transform = Callable[[Image.Image], Image.Image]


class Policy(NamedTuple):
    """An epoch's policy. Sent to worker processes with the samples it applies to.

    Attributes:
        auto_augment: in timm's notation, such as `rand-m9-mstd0.5-inc1`, or None.
        color_jitter: brightness, contrast and saturation are each multiplied by a factor in
            [1 - color_jitter, 1 + color_jitter].
        fill: colour of areas uncovered by a rotation or shift; the recipe's `mean`.
        interpolation: for rotations and shears.
        seed: the epoch's.
    """

    auto_augment: str | None
    color_jitter: float
    fill: tuple[int, int, int]
    interpolation: Interpolation
    seed: int

    def apply(self, images: Tensor, samples: Sequence[int]) -> Tensor:
        """Applies the policy to the samples' images: uint8 [B, 3, H, W] -> the same shape, channels last."""
        result = torch.empty((len(images), *images.shape[2:], 3), dtype=torch.uint8)
        transform = _transform(self.auto_augment, self.fill, self.interpolation, min(images.shape[2:]))
        with _generators_restored():
            for image, changed, sample in zip(images.permute(0, 2, 3, 1), result, samples, strict=True):
                seed = stream(self.seed, "policy", sample)
                random.seed(seed)
                np.random.seed([seed & 0xFFFFFFFF, seed >> 32])  # noqa: NPY002  (what timm draws from)
                augmented = transform(Image.fromarray(image.numpy()))
                changed.copy_(torch.from_numpy(np.array(self._jittered(augmented))))
        return result.permute(0, 3, 1, 2)

    def _jittered(self, image: Image.Image) -> Image.Image:
        if not self.color_jitter:
            return image
        enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
        random.shuffle(enhancers)
        for enhancer in enhancers:
            image = enhancer(image).enhance(random.uniform(max(1 - self.color_jitter, 0), 1 + self.color_jitter))  # noqa: S311
        return image


@cache
def _transform(notation: str | None, fill: tuple[int, int, int], interpolation: Interpolation, side: int) -> Transform:
    """A transform by timm, with timm's default maximum shift of 0.45 of the shorter side."""
    if notation is None:
        return lambda image: image
    from timm.data import auto_augment as timms

    resampling = Image.Resampling.BICUBIC if interpolation == "bicubic" else Image.Resampling.BILINEAR
    settings = {"translate_const": int(0.45 * side), "img_mean": fill, "interpolation": resampling}
    kind = notation.partition("-")[0]
    if kind == "rand":
        made = timms.rand_augment_transform(notation, settings)
    elif kind == "augmix":
        made = timms.augment_and_mix_transform(notation, {**settings, "translate_pct": 0.3})
    else:
        made = timms.auto_augment_transform(notation, settings)
    operations = chain.from_iterable(made.policy) if hasattr(made, "policy") else made.ops
    for operation in operations:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterized
    transform: Transform = made
    return transform


def _posterized(image: Image.Image, bits: int, **_settings: object) -> Image.Image:
    """The image with the top `bits` bits of each level; black for 0 bits, which timm requests but Pillow 13 rejects."""
    if bits >= 8:  # noqa: PLR2004  (all of them)
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def require_notation(notation: str) -> None:
    """Raises ValueError unless timm can parse the notation."""
    try:
        _transform(notation, (0, 0, 0), "bilinear", 32)
    except Exception as error:  # timm asserts, and looks up names in dictionaries
        raise ValueError(
            f"{notation!r} is not a timm policy: rand-m9-mstd0.5-inc1 is DeiT's RandAugment; or original, v0 "
            "(AutoAugment), 3a, augmix-m5-w4-d2"
        ) from error


@contextmanager
def _generators_restored() -> Iterator[None]:
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


def erase(images: Tensor, samples: Sequence[int], probability: float, seed: int) -> None:
    """Covers a random rectangle of some images, in place, with standard normal noise (timm's mode `pixel`).

    Args:
        images: normalised, float32 [B, C, H, W], on any device.
        samples: sample numbers of the B images.
        probability: of each image being chosen.
        seed: the epoch's.
    """
    _, channels, height, width = images.shape
    for image, sample in zip(images, samples, strict=True):
        generator = np.random.default_rng(stream(seed, "erasing", sample))
        if generator.random() >= probability:
            continue
        for _ in range(NUM_TRIES):
            area = generator.uniform(*ERASED_AREA) * height * width
            aspect = math.exp(generator.uniform(math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])))
            tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if tall < height and wide < width:
                top, left = generator.integers(height - tall + 1), generator.integers(width - wide + 1)
                noise = generator.standard_normal((channels, tall, wide), np.float32)
                image[:, top : top + tall, left : left + wide] = torch.from_numpy(noise).to(images.device)
                break
