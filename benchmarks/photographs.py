"""Synthetic photographs in place of real ones: JPEG files of ImageNet's usual dimensions and file size."""

from pathlib import Path

import numpy as np
from PIL import Image

NUM_CLASSES, NUM_PER_CLASS = 4, 16
WIDTH, HEIGHT, QUALITY = 500, 375, 92
GRAIN = 10.0
"""Standard deviation of the noise on the smooth picture, in levels; it gives files ImageNet's 110 kB or so."""


def photographs(folder: Path) -> Path:
    """Writes FOLDER/CLASS/NUMBER.jpg, smooth colours with grain, the same every time; returns the folder."""
    rng = np.random.default_rng(0)
    for number in range(NUM_CLASSES * NUM_PER_CLASS):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float64)
        grained = smooth + rng.normal(0, GRAIN, smooth.shape)
        path = folder / f"class{number % NUM_CLASSES}" / f"{number:04d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.clip(np.rint(grained), 0, 255).astype(np.uint8)).save(path, quality=QUALITY)
    return folder
