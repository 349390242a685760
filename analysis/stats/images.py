"""Does the difference hold on new test images, too? A two-way bootstrap over seeds and images. Pure functions.

The tests in `stratified` generalise to new seeds on the same test images. All runs are tested on the same images, so
part of a difference may be specific to them. Axes: I images, N seeds of a model.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from analysis.stats.stratified import CONFIDENCE, Array, Interval

NUM_RESAMPLES = 2000


def two_way_interval(
    strata: Sequence[npt.ArrayLike], rng: np.random.Generator, confidence: float = CONFIDENCE
) -> Interval:
    """Interval, for new seeds and new images of the same kind, of the mean over models of the mean difference.

    strata: one array [N, I] per model with the candidate's minus the baseline's correctness (1 right, 0 wrong) by seed
    and image, so -1, 0 or 1; all models share the same images. Each resample draws the images, once for all models, and
    independently the seeds of each model (Owen 2007's pigeonhole bootstrap). It draws N - 1 of a model's N seeds, which
    avoids underestimating the variance over seeds by (N - 1) / N (Rao and Wu 1988). Percentile interval. Both draws
    include the variance that is specific to a seed and an image, so the interval is too wide: docs/statistics.md gives
    its coverage.

    Raises:
        ValueError: no stratum, different numbers of images, or a model with fewer than two seeds.
    """
    arrays = [np.asarray(values, dtype=np.float64) for values in strata]
    if not arrays or any(array.ndim != 2 for array in arrays):  # noqa: PLR2004
        raise ValueError("expected an array [seeds, images] for each model, one at least")
    if len({array.shape[1] for array in arrays}) > 1:
        raise ValueError(f"images: {', '.join(str(array.shape[1]) for array in arrays)}; all models need the same ones")
    if any(len(array) < 2 for array in arrays):  # noqa: PLR2004
        raise ValueError("a model with one seed has no spread over seeds")
    num_images = arrays[0].shape[1]
    # The mean over resampled images is a product with their counts / I.
    counts_BI = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=NUM_RESAMPLES)
    means_B = np.zeros(NUM_RESAMPLES)
    for array in arrays:
        by_seed_BN = counts_BI @ array.T / num_images
        means_B += _mean_of_drawn(by_seed_BN, rng) / len(arrays)
    low, high = np.quantile(means_B, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high), confidence)


def _mean_of_drawn(values_BN: Array, rng: np.random.Generator) -> Array:
    """For each row, the mean of N - 1 of its N values drawn with replacement. [B]"""
    num = values_BN.shape[1]
    drawn = rng.integers(0, num, size=(len(values_BN), num - 1))
    return np.asarray(np.take_along_axis(values_BN, drawn, axis=1).mean(axis=1))
