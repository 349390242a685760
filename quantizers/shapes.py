"""Shapes of a sharpness schedule: mu as a pure function of training progress in [0, 1]."""

import math
from collections.abc import Callable
from dataclasses import dataclass

Shape = Callable[[float], float]
"""Progress in [0, 1] -> mu >= 0."""


@dataclass(frozen=True)
class Constant:
    """mu(p) = mu. ValueError if mu is negative or not finite."""

    mu: float

    def __post_init__(self) -> None:
        require_sharpness(self.mu)

    def __call__(self, progress: float) -> float:
        """The mu at `progress` in [0, 1]; ValueError outside."""
        _require_progress(progress)
        return self.mu


@dataclass(frozen=True)
class _Rise:
    """mu at the start and the end of training. ValueError if one is negative or not finite."""

    start: float
    end: float

    def __post_init__(self) -> None:
        require_sharpness(self.start)
        require_sharpness(self.end)


@dataclass(frozen=True)
class Linear(_Rise):
    """mu(p) = (1 - p) start + p end, exact at both ends. ValueError if an end is negative or not finite."""

    def __call__(self, progress: float) -> float:
        """The mu at `progress` in [0, 1]; ValueError outside."""
        _require_progress(progress)
        return (1 - progress) * self.start + progress * self.end


@dataclass(frozen=True)
class Exponential(_Rise):
    """mu(p) = start^(1 - p) end^p, exact at both ends. ValueError unless both ends are positive and finite."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 in (self.start, self.end):
            raise ValueError(f"an exponential never touches 0: start={self.start}, end={self.end}; use Linear")

    def __call__(self, progress: float) -> float:
        """The mu at `progress` in [0, 1]; ValueError outside."""
        _require_progress(progress)
        return float(self.start ** (1 - progress) * self.end**progress)


@dataclass(frozen=True)
class Cosine(_Rise):
    """mu(p) = c start + (1 - c) end with c = cos(pi p / 2), flat at first, exact at both ends. ValueError as Linear."""

    def __call__(self, progress: float) -> float:
        """The mu at `progress` in [0, 1]; ValueError outside."""
        _require_progress(progress)
        c = math.sin(math.pi * (1 - progress) / 2)  # not cos(pi p / 2), which is 6e-17 at p = 1
        return c * self.start + (1 - c) * self.end


def require_sharpness(mu: float) -> None:
    """ValueError unless mu is finite and not negative."""
    if not (math.isfinite(mu) and mu >= 0):
        raise ValueError(f"mu={mu}: a sharpness is finite and not negative")


def _require_progress(progress: float) -> None:
    if not 0 <= progress <= 1:
        raise ValueError(f"progress={progress} is outside [0, 1]")
