"""Would the difference hold on new test images, too? A two-way bootstrap over seeds and images. Pure functions.

The tests of `stratified` are about new seeds on the same test images. All runs read the same images, so that part of a
difference may be theirs. Axes: I images, N seeds of a model.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from analysis.stats.stratified import CONFIDENCE, Array, Interval

NUM_RESAMPLES = 2000


def two_way_interval(
    strata: Sequence[npt.ArrayLike], rng: np.random.Generator, confidence: float = CONFIDENCE
) -> Interval:
    """Interval of the mean over models of the mean difference, for new seeds and new images of the same kind.

    strata: one array [N, I] for each model: candidate minus baseline, right (1) or wrong (0), so -1, 0 or 1, by seed
    and image; the images are the same for all. Each resample draws the images, once for all models, and the seeds of
    each model, independently (Owen 2007's pigeonhole bootstrap), but N - 1 of its N seeds: the variance over seeds is
    then not too small by (N - 1) / N (Rao and Wu 1988). Percentile interval. What a seed changes about single images is
    in both draws, so that the interval is too wide: docs/statistics.md has its coverage.

    Raises:
        ValueError: no stratum, numbers of images that differ, or a model with fewer than two seeds.
    """
    arrays = [np.asarray(values, dtype=np.float64) for values in strata]
    if not arrays or any(array.ndim != 2 for array in arrays):  # noqa: PLR2004
        raise ValueError("expected an array [seeds, images] for each model, one at least")
    if len({array.shape[1] for array in arrays}) > 1:
        raise ValueError(f"images: {', '.join(str(array.shape[1]) for array in arrays)}; all models need the same ones")
    if any(len(array) < 2 for array in arrays):  # noqa: PLR2004
        raise ValueError("a model with one seed has no spread over seeds")
    num_images = arrays[0].shape[1]
    # Sum over resampled images / I is a product with the images' counts.
    counts_BI = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=NUM_RESAMPLES)
    means_B = np.zeros(NUM_RESAMPLES)
    for array in arrays:
        by_seed_BN = counts_BI @ array.T / num_images
        means_B += _mean_of_drawn(by_seed_BN, rng) / len(arrays)
    low, high = np.quantile(means_B, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high), confidence)


def _mean_of_drawn(values_BN: Array, rng: np.random.Generator) -> Array:
    """Of each row the mean of N - 1 of its N values, drawn with replacement. [B]"""
    num = values_BN.shape[1]
    drawn = rng.integers(0, num, size=(len(values_BN), num - 1))
    return np.asarray(np.take_along_axis(values_BN, drawn, axis=1).mean(axis=1))
