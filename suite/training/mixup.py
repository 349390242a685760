"""Mixup and CutMix on a batch, by timm: images of two classes, and labels that say how much of each.

mixup (Zhang et al., 2018):    x = lam x_i + (1 - lam) x_j
CutMix (Yun et al., 2019):     a patch of x_j, of share 1 - lam, lies on x_i
both:                          y = lam y_i + (1 - lam) y_j,    lam ~ Beta(alpha, alpha)

One lam for the batch, whose partners are the batch in reverse; where both are on, a fair coin takes one of them for
each batch: DeiT's settings (Touvron et al., 2021). Labels are smoothed here, so the criterion must not smooth them.
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
    """DataError where images are to be mixed in pairs and a process's share of a batch is odd."""
    share = training.batch_size // world_size
    if mixes(training) and share % 2:
        raise DataError(
            f"training.batch_size {training.batch_size}: mixup and cutmix pair the images of a step and process, "
            f"which are {share}, an odd number; take {(share + 1) * world_size}, say"
        )


def mix(images: Tensor, labels: Tensor, training: Training, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """A batch mixed as `training` says, the same for the same seed.

    Args:
        images: float [B, C, H, W], B even; not changed.
        labels: int64 [B].
        training: mixes(training) holds.
        num_classes: of the labels.
        seed: 63 bits, of a stream of its own. torch's and numpy's generators are left as they are.

    Returns:
        Images of the same shape, type and memory format, and probabilities, float32 [B, num_classes].
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
    """Numpy's global generator, which timm draws from: inside it starts at `seed`, afterwards it is where it was."""
    before = np.random.get_state()  # noqa: NPY002  (what timm reads)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
