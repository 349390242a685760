"""The sharpness mu over training: shapes, which are functions of progress in [0, 1], and a scheduler that follows one.

    sharpness = SharpnessSchedule(optimizer, Exponential(2.0, 500.0), num_steps)
    for batch in batches: ...; optimizer.step(); sharpness.step()

Any function of progress that returns a finite mu >= 0 is a shape; the shapes here are exact at both ends.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # avoids an import cycle: the catalogue imports shapes, and the optimizer the catalogue
    from quantizers.catalog import Quantizer
    from quantizers.proxconnect import ProxConnect

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


class SharpnessSchedule:
    """Schedules mu as a learning-rate scheduler does lr: after k calls of step(), mu = shape(min(k / num_steps, 1)).

    It sets the mu of every quantized group of `optimizer`, or only of groups with `quantizer` if that is given. At
    construction it sets mu = shape(0) and rewrites w, so that w and mu agree from the first gradient on. Afterwards
    `step()` only sets the groups' mu, which takes effect when the optimizer next writes w. Call it once per optimizer
    step. Before `optimizer.step()`, it gives w_t = F(w*_t; shape(t / num_steps)); after it, mu acts one step later.

    To resume, construct it first, then load the optimizer's state and its own, as with torch's schedulers.

    Raises:
        ValueError: num_steps < 1, no group matches, or the shape returns a mu that is NaN, infinite or negative. Then
            nothing is changed, in `step()` and `load_state_dict()` as well.
    """

    def __init__(
        self,
        optimizer: "ProxConnect",
        shape: Shape,
        num_steps: int,
        quantizer: "str | Quantizer | None" = None,
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps}: a schedule needs at least one step")
        self.optimizer, self.shape, self.num_steps, self.quantizer = optimizer, shape, num_steps, quantizer
        self._move_to(0)
        optimizer.quantize()

    def step(self) -> None:
        """Advance one step: set group["mu"] = shape(progress), and nothing else."""
        self._move_to(self._num_steps_done + 1)

    def state_dict(self) -> dict[str, int]:
        """The number of steps done. The shape belongs to the recipe and mu to the optimizer's state."""
        return {"num_steps_done": self._num_steps_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from a saved `state_dict()`. Sets the groups' mu; w, which the optimizer restores, is not touched."""
        self._move_to(state["num_steps_done"])

    def _move_to(self, num_steps_done: int) -> None:
        mu = self.shape(min(num_steps_done / self.num_steps, 1.0))
        require_sharpness(mu)  # the shape may be the user's own
        groups = self._groups()
        self._num_steps_done = num_steps_done
        for group in groups:
            group["mu"] = mu

    def _groups(self) -> list[dict[str, Any]]:
        # Looked up each time: load_state_dict of an optimizer replaces its group dictionaries.
        names = [_name_of(group.get("quantizer")) for group in self.optimizer.param_groups]
        only = _name_of(self.quantizer)
        wanted = [name is not None and only in (None, name) for name in names]
        if not any(wanted):
            raise ValueError(f"no parameter group matches: quantizer={only!r}, the groups have {names}")
        return [group for group, is_wanted in zip(self.optimizer.param_groups, wanted, strict=True) if is_wanted]


def _name_of(quantizer: "str | Quantizer | None") -> str | None:
    return quantizer if quantizer is None or isinstance(quantizer, str) else quantizer.name
