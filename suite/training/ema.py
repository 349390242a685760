"""Exponential moving average of latents, of parameters without latents, and of norm statistics.

An average of w itself would not be in {-1, +1}; the sign of the average of w* is deployed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quantizers import ProxConnect


class MovingAverage:
    """a <- decay a + (1 - decay) x after each step, in x's dtype; integers (step counters of norms) are copied.

    With warm-up, the decay at step t, counted from 0, is at most (1 + t) / (10 + t).
    """

    def __init__(
        self, model: nn.Module, optimizer: ProxConnect, binary: frozenset[str], decay: float, *, warmup: bool = False
    ) -> None:
        self.model, self.optimizer, self.binary, self.decay, self.warmup = model, optimizer, binary, decay, warmup
        self.averages = {name: value.clone() for name, value in self._live()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Updates the averages after step number `step`, counted from 0 over all epochs."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        pairs = [(self.averages[name], value) for name, value in self._live()]
        moving = [pair for pair in pairs if pair[1].is_floating_point()]
        torch._foreach_lerp_([a for a, _ in moving], [x for _, x in moving], 1 - decay)
        for average, value in pairs:
            if not value.is_floating_point():
                average.copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the averages into the latents and the rest of the model inside the block; restores them bit-exactly."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Swaps the averages with the current values, and rewrites w."""
        for name, value in self._live():
            held = value.clone()
            value.copy_(self.averages[name])
            self.averages[name].copy_(held)
        self.optimizer.soften()

    def _live(self) -> Iterator[tuple[str, Tensor]]:
        parameters = dict(self.model.named_parameters())
        for name, value in self.model.state_dict().items():
            yield name, self.optimizer.latent(parameters[name]) if name in self.binary else value
