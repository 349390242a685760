"""The scheduler that moves an optimizer's mu along a shape."""

from typing import Any

from quantizers.proxconnect import ProxConnect
from quantizers.shapes import Shape


class SharpnessSchedule:
    """Moves mu as a learning-rate scheduler moves lr: `step()` after k calls leaves mu = shape(min(k / num_steps, 1)).

    It moves every group of `optimizer` that names a quantizer, or those that name `quantizer` if that is given. At
    construction it sets mu = shape(0) and rewrites w, so that w and mu agree from the first gradient on; from then on
    `step()` only sets the group's mu, which takes effect when the optimizer next writes w. Call it before or after
    `optimizer.step()`, once per optimizer step: before, w_t = F(w*_t; shape(t / num_steps)); after, one step later.

    To resume, construct it first and load the optimizer's state and its own afterwards, as with torch's schedulers.
    ValueError if num_steps < 1 or if no group is to be moved.
    """

    def __init__(self, optimizer: ProxConnect, shape: Shape, num_steps: int, quantizer: str | None = None) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps}: a schedule needs at least one step")
        self.optimizer, self.shape, self.num_steps, self.quantizer = optimizer, shape, num_steps, quantizer
        self._num_steps_done = 0
        self._set_mu()
        optimizer.quantize()

    def step(self) -> None:
        """One step further: group["mu"] = shape(progress), and nothing else."""
        self._num_steps_done += 1
        self._set_mu()

    def state_dict(self) -> dict[str, int]:
        """How many steps were done; the shape is the recipe's, mu the optimizer's."""
        return {"num_steps_done": self._num_steps_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there. Sets the groups' mu; w, which the optimizer restores, is not touched."""
        self._num_steps_done = state["num_steps_done"]
        self._set_mu()

    def _set_mu(self) -> None:
        mu = self.shape(min(self._num_steps_done / self.num_steps, 1.0))
        for group in self._groups():
            group["mu"] = mu

    def _groups(self) -> list[dict[str, Any]]:
        # Looked up each time: load_state_dict of an optimizer replaces its group dictionaries.
        names = [group.get("quantizer") for group in self.optimizer.param_groups]
        wanted = {name for name in names if name is not None and self.quantizer in (None, name)}
        if not wanted:
            raise ValueError(f"no parameter group to move: quantizer={self.quantizer!r}, the groups have {names}")
        return [group for group in self.optimizer.param_groups if group.get("quantizer") in wanted]
