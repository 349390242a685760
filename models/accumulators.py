"""Sums of few bits: what a layer of binary weights and inputs adds up wraps around, and a cyclic activation bears it.

    m = wrap(z) = ((z + M) mod 2 M) - M,  M = 2^(bits - 1)            as an accumulator of that many bits holds z
    c(m) = m where |m| <= Q, k M - k m where m > Q, -k M - k m where m < -Q,  Q = k M / (k + 1)

c is continuous and has the period 2 M, so that a sum that overflows by one changes little (Ni et al., WrapNet, 2021,
arXiv 2007.13242; the formulas as in a third party's code, github.com/azatkariuly/bnn_digital_psum, for the authors
published none). A penalty on max(|z| - M, 0) keeps sums small; WrapNet adds it up, here it is each layer's mean.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def wrap(z: Tensor, bits: int) -> Tensor:
    """What an accumulator of `bits` bits holds of the sum z, in [-M, M): any shape, exact for integers in float32."""
    half = 2 ** (bits - 1)
    held: Tensor = torch.remainder(z + half, 2 * half) - half
    return held


def cyclic(m: Tensor, bits: int, slope: float) -> Tensor:
    """c(m): 1 steep around 0 and -k towards the ends of [-M, M], k the slope, where it is 0. Any shape."""
    half = 2 ** (bits - 1)
    turn = slope * half / (slope + 1)
    return torch.where(m.abs() <= turn, m, m.sign() * slope * half - slope * m)


class Accumulator(nn.Module):
    """c(wrap(z)) of a layer's sums z, in float32; no parameters. Any shape.

    Args:
        bits: of the sums, two's complement.
        slope: k.

    Attributes:
        penalty: mean max(|z| - M, 0) of the last forward pass, differentiable.
        num_sums: sums counted since `reset`, and `num_overflows` of them outside [-M, M); both int64 [], on the sums'
            device: torch.compile would compile the network anew for each value of a Python number.
    """

    def __init__(self, bits: int = 8, slope: float = 2.0) -> None:
        super().__init__()
        self.bits, self.slope = bits, slope
        self.penalty = torch.zeros(())
        self.reset()

    def reset(self) -> None:
        """Counts from 0 again."""
        self.num_sums, self.num_overflows = torch.zeros(2, dtype=torch.int64).unbind()

    def forward(self, z: Tensor) -> Tensor:
        """The activation of the wrapped sums."""
        z, half = z.float(), 2 ** (self.bits - 1)
        self.penalty = (z.abs() - half).clamp(min=0).mean()
        with torch.no_grad():
            outside = (z.round() < -half) | (z.round() > half - 1)
            self.num_overflows = self.num_overflows.to(z.device) + outside.sum()
            self.num_sums = self.num_sums.to(z.device) + z.numel()
        return cyclic(wrap(z, self.bits), self.bits, self.slope)

    def extra_repr(self) -> str:
        """What print(model) shows of it."""
        return f"{self.bits} bits, slope {self.slope:g}"


def accumulators(model: nn.Module) -> Iterator[Accumulator]:
    """Those of the model's layers."""
    return (module for module in model.modules() if isinstance(module, Accumulator))


def num_inexact(accumulator: Accumulator, z: Tensor) -> int:
    """Number of sums z that are not integers, or that `wrap` maps to another value than integer arithmetic does."""
    half, whole = 2 ** (accumulator.bits - 1), z.round().long()
    held = (whole + half).bitwise_and(2 * half - 1) - half
    return int(((whole != z) | (held != wrap(z, accumulator.bits))).sum())


def overflow_penalty(model: nn.Module) -> Tensor:
    """The layers' penalties of the last forward pass, added up: []."""
    return torch.stack([each.penalty for each in accumulators(model)]).sum()


def reset_overflows(model: nn.Module) -> None:
    """Counts from 0 again."""
    for each in accumulators(model):
        each.reset()


def overflows(model: nn.Module) -> tuple[int, int]:
    """(sums that did not fit, all sums) since the counts were reset."""
    found = list(accumulators(model))
    return sum(int(each.num_overflows) for each in found), sum(int(each.num_sums) for each in found)
