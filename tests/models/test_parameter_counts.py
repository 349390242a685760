"""How many weights of each network are binary, derived by hand from the papers' descriptions of the architectures."""

from dataclasses import dataclass

import pytest
import torch

import models

CLASSES = 1000  # of ImageNet


@dataclass(frozen=True)
class Count:
    """Scalars of each kind. A norm has two per channel, a gain or a bias one per output channel."""

    binary: int
    decay: int
    norms: int = 0
    biases: int = 0
    gains: int = 0
    embeddings: int = 0


def cifar_resnet(n: int) -> Count:
    """He et al. 2016, section 4.2: stages of 2n convolutions 3x3 with 16, 32, 64 channels; a norm after each."""
    return Count(
        binary=9 * (2 * n * 16 * 16 + 16 * 32 + (2 * n - 1) * 32 * 32 + 32 * 64 + (2 * n - 1) * 64 * 64),
        decay=9 * 3 * 16 + 64 * 10,
        norms=2 * (16 + 2 * n * (16 + 32 + 64)),
        biases=10,
    )


def transformer(
    d: int, *, depth: int, patch: int, side: int, num_prefix: int, num_classes: int, in_chans: int
) -> Count:
    """Dosovitskiy et al. 2021: per block qkv d x 3d, proj d x d, mlp d x 4d and 4d x d, with biases; two norms."""
    return Count(
        binary=depth * (3 * d * d + d * d + 4 * d * d + 4 * d * d),
        decay=in_chans * patch * patch * d + d * num_classes,
        norms=2 * d * (2 * depth + 1),
        biases=depth * (3 * d + d + 4 * d + d) + d + num_classes,
        gains=depth * (3 * d + d + 4 * d + d),
        embeddings=num_prefix * d + (num_prefix + (side // patch) ** 2) * d,  # class token, positions
    )


RESNET18 = Count(
    # Four 3x3 per stage; stages 2 to 4 begin with one that doubles the channels, beside a 1x1 shortcut.
    binary=9 * (4 * 64 * 64)
    + 9 * (64 * 128 + 3 * 128 * 128)
    + 64 * 128
    + 9 * (128 * 256 + 3 * 256 * 256)
    + 128 * 256
    + 9 * (256 * 512 + 3 * 512 * 512)
    + 256 * 512,
    decay=7 * 7 * 3 * 64 + 512 * CLASSES,
    norms=2 * (64 + 4 * 64 + 5 * 128 + 5 * 256 + 5 * 512),
    biases=CLASSES,
)


def bottlenecks(num_blocks: int, c_in: int, width: int) -> int:
    """1x1 to `width`, 3x3, 1x1 to 4 * width; the first block reads c_in channels and has a 1x1 shortcut."""
    c_out = 4 * width
    return (c_in + (num_blocks - 1) * c_out) * width + num_blocks * (9 * width * width + width * c_out) + c_in * c_out


RESNET50 = Count(
    binary=bottlenecks(3, 64, 64) + bottlenecks(4, 256, 128) + bottlenecks(6, 512, 256) + bottlenecks(3, 1024, 512),
    decay=7 * 7 * 3 * 64 + 2048 * CLASSES,
    # width + width + 4 * width per block, 4 * width for the stage's shortcut
    norms=2 * (64 + (3 * 6 + 4) * 64 + (4 * 6 + 4) * 128 + (6 * 6 + 4) * 256 + (3 * 6 + 4) * 512),
    biases=CLASSES,
)


def imagenet_vit(d: int) -> Count:
    """Patches of 16 pixels, 12 blocks, a class token."""
    return transformer(d, depth=12, patch=16, side=224, num_prefix=1, num_classes=CLASSES, in_chans=3)


EXPECTED = {
    "resnet20": cifar_resnet(3),
    "resnet32": cifar_resnet(5),
    "resnet56": cifar_resnet(9),
    "resnet18": RESNET18,
    "resnet50": RESNET50,
    "deit_tiny_patch16_224": imagenet_vit(192),
    "deit_small_patch16_224": imagenet_vit(384),
    "deit_base_patch16_224": imagenet_vit(768),
    "vit_base_patch16_224": imagenet_vit(768),
    "vit_mini_patch4_32": transformer(192, depth=6, patch=4, side=32, num_prefix=0, num_classes=10, in_chans=3),
    "vit_mini_patch2_8": transformer(64, depth=2, patch=2, side=8, num_prefix=0, num_classes=10, in_chans=1),
}
# Published totals, in millions: table 6 of He et al. for CIFAR, torchvision's model pages for ImageNet.
PUBLISHED_MILLIONS = {
    "resnet20": 0.27,
    "resnet32": 0.46,
    "resnet56": 0.85,
    "resnet18": 11.69,
    "resnet50": 25.56,
    "vit_base_patch16_224": 86.57,
}


def build(name: str) -> torch.nn.Module:
    """The model without memory for its weights."""
    num_classes = 10 if EXPECTED[name].decay < CLASSES * 64 else CLASSES
    in_chans = 1 if name == "vit_mini_patch2_8" else 3
    with torch.device("meta"):
        return models.create(name, num_classes, models.input_size(name), in_chans)


def total(model: torch.nn.Module, names: tuple[str, ...]) -> int:
    return sum(model.get_parameter(name).numel() for name in names)


@pytest.mark.parametrize("name", EXPECTED)
def test_counts_are_those_derived_by_hand(name: str) -> None:
    model, want = build(name), EXPECTED[name]
    split = models.binarize(model)
    assert total(model, split.binary) == want.binary
    assert total(model, split.decay) == want.decay
    assert total(model, split.no_decay) == want.norms + want.biases + want.gains + want.embeddings
    assert total(model, tuple(n for n in split.no_decay if n.endswith(".gain"))) == want.gains


@pytest.mark.parametrize("name", EXPECTED)
def test_the_baseline_has_no_binary_weight_and_decays_the_same_matrices(name: str) -> None:
    model, want = build(name), EXPECTED[name]
    split = models.full_precision(model)
    assert split.binary == ()
    assert total(model, split.decay) == want.binary + want.decay
    assert total(model, split.no_decay) == want.norms + want.biases + want.embeddings


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_sizes_are_the_published_ones(name: str) -> None:
    millions = sum(parameter.numel() for parameter in build(name).parameters()) / 1e6
    assert round(millions, 2) == PUBLISHED_MILLIONS[name]
