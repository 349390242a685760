"""A small non-convex problem: a network of tanh units fitted to fixed data. Its loss costs a few hundred flops."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim import Optimizer

from quantizers import QUANTIZERS

UPDATES = ("pc++", "pq", "rpc")
eager_and_fused = pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
every_row = pytest.mark.parametrize("quantizer", QUANTIZERS)
every_update = pytest.mark.parametrize("update", UPDATES)


class TanhNetwork(nn.Module):
    """l = mean (v . tanh(U x + c) - y)^2: U and v are quantized, c is not. The same values each time."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def uniform(*shape: int) -> Tensor:
            return (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1).to(dtype)

        self.u, self.v, self.c = (nn.Parameter(uniform(*shape)) for shape in ((6, 4), (1, 6), (6,)))
        self.x, self.y = uniform(16, 4), uniform(16, 1)

    def loss_at(self, u: Tensor, v: Tensor, c: Tensor) -> Tensor:
        """The loss at any tensors in place of the parameters."""
        return (linear(linear(self.x, u, c).tanh(), v) - self.y).square().mean()

    def forward(self) -> Tensor:
        return self.loss_at(self.u, self.v, self.c)

    def groups(self, quantizer: str, **options: float) -> list[dict[str, Any]]:
        """The parameter groups for training with `quantizer`; c has its own group, left to the base optimizer."""
        return [{"params": [self.u, self.v], "quantizer": quantizer, **options}, {"params": [self.c]}]

    def bits(self) -> list[Tensor]:
        """A copy of the parameters, to be compared bit for bit."""
        return [p.detach().clone() for p in self.parameters()]


def dtype_of(*, fused: bool) -> torch.dtype:
    """The fused step is for float32; elsewhere float64 leaves less to rounding."""
    return torch.float32 if fused else torch.float64


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    """Whether two lists of tensors are equal in dtype and to the last bit (except for the sign of zero)."""
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ones, others, strict=True))


def grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def train(model: TanhNetwork, optimizer: Optimizer, num_steps: int = 10) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
