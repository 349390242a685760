"""What tuning with a smaller budget would have found (Dodge et al. 2019, Show Your Work)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Expected:
    """mean, sd: float64 [B], of the best of n trials, for each budget n."""

    mean: Array
    sd: Array


def expected_best(scores: npt.ArrayLike, budgets: Sequence[int] | None = None) -> Expected:
    """Mean and standard deviation of the best score of n trials drawn with replacement from these N.

    With V(1) <= ... <= V(N) sorted, P(best of n <= V(i)) = (i / N)^n, so that

        E[best of n] = sum_i V(i) ((i / N)^n - ((i - 1) / N)^n),

    and sd^2 = E[best^2] - E[best]^2. scores: [N], finite; a failed trial scores 0. budgets: the values of n; default:
    1 .. N. The formula assumes independent trials; Sobol' points cover a space more evenly.

    Raises:
        ValueError: no score, or one that is not finite.
    """
    values = np.sort(np.asarray(scores, dtype=np.float64))
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError("expected_best takes one finite score or more, in one dimension")
    num = len(values)
    chosen = np.arange(1, num + 1) if budgets is None else np.asarray(budgets)
    share = np.arange(num + 1) / num
    probability = np.diff(share ** chosen[:, None], axis=1)  # [B, N]
    mean = probability @ values
    variance = (probability * (values - mean[:, None]) ** 2).sum(axis=1)
    return Expected(mean, np.sqrt(variance))
