"""Images and labels are mixed in the same proportion, and other random generators are unaffected."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from suite.errors import DataError
from suite.recipe.cell import Cell
from suite.recipe.settings import Training
from suite.training.losses import build_criterion
from suite.training.mixup import mix, mixes, require_even

NUM_CLASSES = 6
RECIPES = {"mixup": {"mixup": 0.8}, "cutmix": {"cutmix": 1.0}, "both": {"mixup": 0.8, "cutmix": 1.0}}


def _training(**changes: float) -> Training:
    return Training.model_validate({"epochs": 1, "batch_size": 6, "learning_rate": 0.1, **changes})


def _batch() -> tuple[Tensor, Tensor]:
    """Six images of different classes, each filled with its class number."""
    labels = torch.arange(NUM_CLASSES)
    return labels.float().view(-1, 1, 1, 1).expand(-1, 3, 32, 32).contiguous(), labels


def _colours(image: Tensor) -> set[float]:
    return set(image.flatten().tolist())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("seed", [0, 1, 2, 2**63 - 1])
def test_a_label_is_the_share_of_each_class_in_the_pixels(recipe: str, seed: int) -> None:
    images, labels = _batch()
    mixed, probabilities = mix(images, labels, _training(**RECIPES[recipe]), NUM_CLASSES, seed)
    assert torch.allclose(mixed.mean(dim=(1, 2, 3)), probabilities @ labels.float(), atol=1e-4)
    assert torch.allclose(probabilities.sum(1), torch.ones(6))
    assert not torch.equal(mixed, images)


def test_mixup_fades_whole_images_and_cutmix_pastes_a_patch() -> None:
    images, labels = _batch()
    faded, _ = mix(images, labels, _training(mixup=0.8), NUM_CLASSES, 3)
    assert all(len(_colours(image)) == 1 for image in faded)
    pasted, _ = mix(images, labels, _training(cutmix=1.0), NUM_CLASSES, 3)
    assert [_colours(image) for image in pasted] == [{i, 5 - i} for i in range(6)]


def test_with_both_on_batches_get_the_one_or_the_other() -> None:
    images, labels = _batch()
    mixed = [mix(images, labels, _training(**RECIPES["both"]), NUM_CLASSES, seed)[0] for seed in range(40)]
    num_faded = sum(len(_colours(batch[0])) == 1 for batch in mixed)
    assert 10 <= num_faded <= 30


def test_smoothing_spreads_its_share_over_all_classes() -> None:
    images, labels = _batch()
    sharp = mix(images, labels, _training(mixup=0.8), NUM_CLASSES, 5)[1]
    smooth = mix(images, labels, _training(mixup=0.8, label_smoothing=0.3), NUM_CLASSES, 5)[1]
    assert torch.allclose(smooth, 0.7 * sharp + 0.3 / NUM_CLASSES)


def test_the_seed_alone_decides() -> None:
    images, labels = _batch()
    training = _training(**RECIPES["both"])
    first = mix(images, labels, training, NUM_CLASSES, 7)
    np.random.seed(99)  # noqa: NPY002  (timm's source of randomness)
    torch.manual_seed(99)
    again = mix(images, labels, training, NUM_CLASSES, 7)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    # Seeds that differ only in their upper half are different seeds.
    assert not torch.equal(mix(images, labels, training, NUM_CLASSES, 7 + 2**40)[1], first[1])


def test_nothing_outside_moves() -> None:
    images, labels = _batch()
    before = images.clone(), labels.clone(), torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    mixed, _ = mix(images.contiguous(memory_format=torch.channels_last), labels, _training(mixup=1.0), NUM_CLASSES, 0)
    mix(images, labels, _training(**RECIPES["both"]), NUM_CLASSES, 0)
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert np.array_equal(np.random.get_state()[1], before[3])  # type: ignore[index]  # noqa: NPY002
    assert mixed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("batch_size", "world_size", "fix"), [(7, 1, 8), (6, 2, 8), (12, 4, 16)])
def test_an_odd_share_of_a_batch_is_refused_before_it_is_mixed(batch_size: int, world_size: int, fix: int) -> None:
    with pytest.raises(DataError, match=rf"batch_size {batch_size}: .* use, for instance, {fix}"):
        require_even(_training(batch_size=batch_size, mixup=0.2), world_size)
    require_even(_training(batch_size=fix, mixup=0.2), world_size)
    require_even(_training(batch_size=batch_size), world_size)


def test_a_recipe_mixes_if_either_is_on() -> None:
    assert not mixes(_training())
    assert all(mixes(_training(**recipe)) for recipe in RECIPES.values())


def test_the_criterion_smooths_once(make_cell: Callable[..., Cell]) -> None:
    cell = make_cell(training__mixup=0.8, training__label_smoothing=0.1)
    images, labels = _batch()
    _, probabilities = mix(images, labels, cell.training, NUM_CLASSES, 1)
    logits = torch.randn(6, NUM_CLASSES, generator=torch.Generator().manual_seed(0))
    expected = -(probabilities * logits.log_softmax(1)).sum(1).mean()
    assert build_criterion(cell)(logits, probabilities).item() == pytest.approx(expected.item(), rel=1e-6)
