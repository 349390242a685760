"""Augmentation of a sample's pixels: windows, shifts, flips, normalisation; drawn only from (seed, epoch, sample).

So a sample's augmentation does not depend on the batch, process or loader that delivers it. Augmentation that changes
colours or shapes is in `policy`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from suite.data.policy import Policy
from suite.recipe.settings import Data, Interpolation, ProgressiveResizing
from suite.training.seeds import stream

ASPECT, NUM_TRIES = (3 / 4, 4 / 3), 10
"""Random windows: range of width / height, and number of tries. Szegedy et al. 2015, as in torchvision."""
NUM_UNIFORMS = 2 * NUM_TRIES + 2
RESIZING_STEP = 32
"""Progressive resizing uses multiples of this side, in pixels, as in ffcv-imagenet: networks halve it five times."""


class Crops(Protocol):
    """Chooses the window of an image that is resized to the network's input."""

    def boxes(
        self, samples: NDArray[np.int64], heights: NDArray[np.int64], widths: NDArray[np.int64]
    ) -> NDArray[np.int32]:
        """[n, 4]: each sample's window (top, left, height, width), in pixels, in an image of the given size."""

    def subset(self, samples: Tensor) -> "Crops":
        """The crops of `samples` (int64 [M]), renumbered from 0, to be sent to a worker."""


@dataclass(frozen=True)
class Centre:
    """The central square whose side is `ratio` times the image's shorter side."""

    ratio: float

    def boxes(
        self, samples: NDArray[np.int64], heights: NDArray[np.int64], widths: NDArray[np.int64]
    ) -> NDArray[np.int32]:
        """The same window for all images of one size."""
        del samples
        side = np.maximum((self.ratio * np.minimum(heights, widths)).astype(np.int64), 1)
        return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], 1).astype(np.int32)

    def subset(self, samples: Tensor) -> "Centre":
        """Itself."""
        del samples
        return self


@dataclass(frozen=True)
class RandomResized:
    """Windows of random area and aspect ratio, from uniform numbers in [0, 1), float32 [N, NUM_UNIFORMS].

    `area_shares` are the smallest and largest fraction of the image's area.
    """

    uniforms: NDArray[np.float32]
    area_shares: tuple[float, float] = (0.08, 1.0)

    def boxes(
        self, samples: NDArray[np.int64], heights: NDArray[np.int64], widths: NDArray[np.int64]
    ) -> NDArray[np.int32]:
        """The first of NUM_TRIES windows that fits in the image; if none does, the largest with an allowed aspect."""
        uniforms = self.uniforms[samples].astype(np.float64)
        least, largest = self.area_shares
        area = (heights * widths)[:, None] * (least + (largest - least) * uniforms[:, :-2:2])
        low, high = np.log(ASPECT)
        aspect = np.exp(low + (high - low) * uniforms[:, 1:-2:2])
        tried_h, tried_w = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
        fits = (tried_h > 0) & (tried_h <= heights[:, None]) & (tried_w > 0) & (tried_w <= widths[:, None])
        found, first = fits.any(1), fits.argmax(1)[:, None]
        height = np.where(
            found, np.take_along_axis(tried_h, first, 1)[:, 0], np.rint(widths / ASPECT[0]).clip(max=heights)
        )
        width = np.where(
            found, np.take_along_axis(tried_w, first, 1)[:, 0], np.rint(heights * ASPECT[1]).clip(max=widths)
        )
        top = np.where(found, np.floor(uniforms[:, -2] * (heights - height + 1)), (heights - height) // 2)
        left = np.where(found, np.floor(uniforms[:, -1] * (widths - width + 1)), (widths - width) // 2)
        return np.stack([top, left, height, width], 1).astype(np.int32)

    def subset(self, samples: Tensor) -> "RandomResized":
        """The rows of `samples`."""
        return RandomResized(self.uniforms[samples.numpy()], self.area_shares)


@dataclass(frozen=True)
class Draws:
    """An epoch's changes to N samples: `shifts` int64 [N, 2] of zero-padded images, `flips` bool [N], and windows.

    `policy`, if any, changes pixels. With probability `erasing`, drawn from `seed`, a rectangle of a sample is erased.
    """

    shifts: Tensor
    flips: Tensor
    crops: Crops
    policy: Policy | None = None
    erasing: float = 0.0
    seed: int = 0


def draw(
    settings: Data,
    num_samples: int,
    seed: int,
    epoch: int,
    mean: Sequence[float] = (),
    interpolation: Interpolation = "bilinear",
) -> Draws:
    """The epoch's draws, always on the CPU, so that they are the same on every machine.

    `mean` and `interpolation` come from the recipe and are used by a policy.
    """
    epoch_seed = stream(seed, "augmentation", epoch)
    generator = torch.Generator().manual_seed(epoch_seed)
    shifts = torch.randint(0, 2 * padding(settings) + 1, (num_samples, 2), generator=generator)
    flips = (torch.rand(num_samples, generator=generator) < 0.5) & settings.horizontal_flip  # noqa: PLR2004  (a coin)
    crops: Crops = Centre(1.0)
    if settings.crop == "random_resized":
        uniforms = torch.rand((num_samples, NUM_UNIFORMS), generator=generator).numpy()
        crops = RandomResized(uniforms, settings.area_shares)
    elif settings.evaluation_ratio is not None:
        crops = Centre(settings.evaluation_ratio)
    policy = None
    if settings.auto_augment or settings.color_jitter:
        red, green, blue = (round(255 * level) for level in mean)
        policy = Policy(settings.auto_augment, settings.color_jitter, (red, green, blue), interpolation, epoch_seed)
    return Draws(shifts, flips, crops, policy, settings.random_erasing, epoch_seed)


def unchanged(num_samples: int, centre_ratio: float) -> Draws:
    """Evaluation's draws: the centre of each image, neither shifted nor mirrored."""
    shifts, flips = torch.zeros((num_samples, 2), dtype=torch.int64), torch.zeros(num_samples, dtype=torch.bool)
    return Draws(shifts, flips, Centre(centre_ratio))


def padding(settings: Data) -> int:
    """Width of the zero padding around each training image, in pixels."""
    return settings.crop_padding or 0


def side(progressive: ProgressiveResizing | None, final: int, epoch: int) -> int:
    """Side of the training images in epoch number `epoch` (from 0), in pixels: `final`, or smaller in early epochs."""
    if progressive is None or epoch >= progressive.to_epoch:
        return final
    progress = max(epoch - progressive.from_epoch, 0) / (progressive.to_epoch - progressive.from_epoch)
    exact = progressive.start + progress * (final - progressive.start)
    return min(max(round(exact / RESIZING_STEP) * RESIZING_STEP, progressive.start), final)


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation (ddof 0) of pixels in [0, 1]; both float32 [C]."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, images: Tensor) -> "Normalization":
        """Measured on uint8 images [N, C, H, W]. Pass the training split only, so nothing leaks from the others."""
        counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
        share, level = counts / counts.sum(1, keepdim=True), torch.arange(256).double() / 255
        mean = share @ level
        return cls(mean.float(), (share @ level**2 - mean**2).sqrt().float())

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float32, with mean 0 and standard deviation 1 per channel over the training set."""
        mean, std = (value.view(-1, 1, 1).to(images.device) for value in (self.mean, self.std))
        return images.float().div_(255).sub_(mean).div_(std)


IMAGENET = Normalization(torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))
"""The normalization of torchvision's and timm's ImageNet networks."""


def finish(images: Tensor, mirrored: Tensor, normalization: Normalization) -> Tensor:
    """uint8 [B, C, H, W] -> float32, mirrored horizontally where `mirrored` (bool [B]), and normalised."""
    which = mirrored.nonzero().squeeze(1).to(images.device)
    if len(which):  # only these: reversing a row is the slowest part
        images = images.index_copy(0, which, images[which].flip(-1))
    return normalization(images)


def finish_each(images: Tensor, mirrored: Tensor, normalization: Normalization, finished: Tensor) -> None:
    """Bit-identical to `finish`, but written into `finished` (float32 [B, C, H, W]), image by image, on the CPU.

    Five times as fast on batches of large images: an image stays in the processor's cache between operations, and the
    existing output memory need not be faulted in. `images` and `finished` are channels-last.
    """
    # Shaped and laid out like one image, so that the operations traverse memory sequentially.
    mean, std = (
        value.view(1, -1, 1, 1).expand(1, *images.shape[1:]).contiguous(memory_format=torch.channels_last)
        for value in (normalization.mean, normalization.std)
    )
    for number, is_mirrored in enumerate(mirrored.tolist()):
        image, result = images[number : number + 1], finished[number : number + 1]
        result.copy_(image.flip(-1) if is_mirrored else image).div_(255).sub_(mean).div_(std)


def shift(images: Tensor, num_pixels: int, shifts: Tensor) -> Tensor:
    """Zero-pad the images by `num_pixels`; crop to their old size at row and column `shifts` (int64 [B, 2])."""
    height, width = images.shape[-2:]
    padded = torch.nn.functional.pad(images, [num_pixels] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    rows, columns = shifts.to(images.device).unbind(1)
    return windows[torch.arange(len(images), device=images.device), :, rows, columns]
