"""Windows are inside their images, have the published distribution, and depend only on seed, epoch and sample."""

import numpy as np
import pytest
import torch
from needs import no_ffcv
from PIL import Image

from suite.data.augmentation import (
    ASPECT,
    NUM_UNIFORMS,
    Centre,
    RandomResized,
    draw,
    side,
)
from suite.data.resize import area_resize
from suite.recipe.settings import Data, ProgressiveResizing

NUM = 4000


def _windows(height: int, width: int) -> np.ndarray:
    uniforms = torch.rand((NUM, NUM_UNIFORMS), generator=torch.Generator().manual_seed(0)).numpy()
    return RandomResized(uniforms).boxes(np.arange(NUM), np.full(NUM, height), np.full(NUM, width))


@pytest.mark.parametrize("shape", [(375, 500), (32, 32), (1, 1), (3, 700), (900, 20)])
def test_random_windows_lie_in_the_image(shape: tuple[int, int]) -> None:
    top, left, height, width = _windows(*shape).T
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= shape[0]).all()
    assert (left + width <= shape[1]).all()


def test_random_windows_have_torchvisions_distribution() -> None:
    """Compares area, aspect and position with as many torchvision draws, by the Kolmogorov-Smirnov statistic."""
    from scipy.stats import ks_2samp
    from torchvision.transforms import RandomResizedCrop

    ours = _windows(375, 500)
    torch.manual_seed(0)
    image = torch.empty(3, 375, 500)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], list(ASPECT)) for _ in range(NUM)])
    for quantity, of_ours in _quantities(ours).items():
        assert ks_2samp(of_ours, _quantities(theirs)[quantity]).pvalue > 1e-3, quantity


def _quantities(boxes: np.ndarray) -> dict[str, np.ndarray]:
    top, left, height, width = boxes.T
    return {"top": top, "left": left, "area": height * width, "aspect": width / height}


def test_random_windows_have_the_recipes_share_of_the_area() -> None:
    settings = Data(crop="random_resized", crop_scale=(0.5, 0.6))
    boxes = draw(settings, NUM, 0, 0).crops.boxes(np.arange(NUM), np.full(NUM, 400), np.full(NUM, 400))
    shares = boxes[:, 2] * boxes[:, 3] / 400**2
    assert shares.min() == pytest.approx(0.5, abs=0.01)
    assert shares.max() == pytest.approx(0.6, abs=0.01)


def test_an_image_too_long_for_any_try_keeps_the_largest_permitted_window() -> None:
    top, left, height, width = _windows(10, 1000)[0].tolist()
    assert (height, width) == (10, 13)
    assert (top, left) == (0, (1000 - 13) // 2)


def test_windows_do_not_depend_on_who_asks() -> None:
    crops = draw(Data(image_size=16, crop="random_resized"), 50, seed=3, epoch=2).crops
    heights, widths = np.arange(50) + 20, 90 - np.arange(50)
    every = crops.boxes(np.arange(50), heights, widths)
    some = torch.tensor([7, 49, 0])
    of_some = crops.subset(some).boxes(np.arange(3), heights[some], widths[some])
    assert (of_some == every[some]).all()
    assert (crops.boxes(some.numpy(), heights[some], widths[some]) == of_some).all()


def test_draws_differ_between_epochs_and_seeds() -> None:
    settings = Data(crop="padded", horizontal_flip=True)
    first = draw(settings, 100, seed=0, epoch=0)
    assert torch.equal(draw(settings, 100, seed=0, epoch=0).shifts, first.shifts)
    for other in (draw(settings, 100, seed=0, epoch=1), draw(settings, 100, seed=1, epoch=0)):
        assert not torch.equal(other.shifts, first.shifts)
        assert not torch.equal(other.flips, first.flips)


@pytest.mark.parametrize(("shape", "box"), [((400, 300), [69, 19, 262, 262]), ((224, 224), [14, 14, 196, 196])])
def test_the_centre_crop_is_the_middle(shape: tuple[int, int], box: list[int]) -> None:
    assert Centre(0.875).boxes(np.array([0]), np.array([shape[0]]), np.array([shape[1]]))[0].tolist() == box


@pytest.mark.parametrize(("new", "window"), [((224, 224), 1), ((30, 40), 1), ((75, 100), 4), ((400, 500), 1)])
def test_area_resizing_keeps_the_mean_and_is_opencvs(new: tuple[int, int], window: int) -> None:
    if why := no_ffcv():  # which brings OpenCV
        pytest.skip(why)
    import cv2

    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    ours = area_resize(image, *new)
    theirs = cv2.resize(image, new[::-1], interpolation=cv2.INTER_AREA)
    assert ours.shape == (*new, 3)
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert abs(ours.mean() - image.mean()) < 0.1
    if window > 1:
        assert (np.abs(ours - image.reshape(new[0], window, new[1], window, 3).mean((1, 3))) <= 0.5).all()


def test_area_resizing_to_its_own_size_changes_nothing() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    assert (area_resize(image, 20, 31) == image).all()


def test_area_resizing_is_near_pillows() -> None:
    image = np.tile(np.linspace(0, 255, 400).astype(np.uint8)[None, :, None], (300, 1, 3))
    theirs = np.asarray(Image.fromarray(image).resize((100, 75), Image.Resampling.BOX))
    assert np.abs(area_resize(image, 75, 100).astype(int) - theirs).max() <= 1


def test_progressive_resizing_rises_in_steps_of_32_from_its_start_to_the_final_side() -> None:
    rising = ProgressiveResizing(start=160, from_epoch=5, to_epoch=13)
    sides = [side(rising, 224, epoch) for epoch in range(16)]
    assert sides[:6] == [160] * 6
    assert sides[13:] == [224] * 3
    assert sides == sorted(sides)
    assert set(sides) == {160, 192, 224}
    assert side(None, 224, 0) == 224
    odd = ProgressiveResizing(start=100, to_epoch=4)
    assert [side(odd, 120, epoch) for epoch in range(5)] == [100, 100, 100, 120, 120]
