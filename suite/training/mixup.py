"""Mixup and CutMix on a batch, by timm: mixes pairs of images, and their labels in the same proportion.

mixup (Zhang et al., 2018):    x = lam x_i + (1 - lam) x_j
CutMix (Yun et al., 2019):     x = x_i with a patch of x_j over the share 1 - lam of its area
both:                          y = lam y_i + (1 - lam) y_j,    lam ~ Beta(alpha, alpha)

There is one lam per batch, and the partners are the batch in reverse order. If both are on, each batch uses one of them
at random with equal probability. These are DeiT's settings (Touvron et al., 2021). Labels are smoothed here, so the
criterion must not smooth them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from suite.errors import DataError
from suite.recipe.settings import Training


def mixes(training: Training) -> bool:
    """Whether the recipe mixes images, so that labels are probabilities."""
    return training.mixup > 0 or training.cutmix > 0


def require_even(training: Training, world_size: int) -> None:
    """Raises DataError if images must be mixed in pairs but a process's share of a batch is odd."""
    share = training.batch_size // world_size
    if mixes(training) and share % 2:
        raise DataError(
            f"training.batch_size {training.batch_size}: mixup and cutmix pair the images of a step and process, but "
            f"{share} is an odd number; use, for instance, {(share + 1) * world_size}"
        )


def mix(images: Tensor, labels: Tensor, training: Training, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """The batch mixed as `training` specifies; deterministic in the seed.

    Args:
        images: float [B, C, H, W], B even; not changed.
        labels: int64 [B].
        training: settings with mixes(training).
        num_classes: number of classes of the labels.
        seed: 63 bits, from its own stream. torch's and numpy's generators are unaffected.

    Returns:
        Images of the same shape, dtype and memory format, and probabilities, float32 [B, num_classes].
    """
    from timm.data import Mixup

    mixup = Mixup(
        mixup_alpha=training.mixup,
        cutmix_alpha=training.cutmix,
        prob=1.0,
        switch_prob=0.5,
        mode="batch",
        label_smoothing=training.label_smoothing,
        num_classes=num_classes,
    )
    with _numpy_seeded(seed):
        mixed, probabilities = mixup(images.clone(), labels)
    return mixed, probabilities


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Seeds numpy's global generator, which timm uses, inside the block, and restores it afterwards."""
    before = np.random.get_state()  # noqa: NPY002  (timm uses it)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
