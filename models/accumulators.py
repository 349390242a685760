"""Low-bit accumulators: sums of binary weights times binary inputs wrap around; a cyclic activation tolerates it.

    m = wrap(z) = ((z + M) mod 2 M) - M,  M = 2^(bits - 1)            the value of z in an accumulator of `bits` bits
    c(m) = m where |m| <= Q, k M - k m where m > Q, -k M - k m where m < -Q,  Q = k M / (k + 1)

c is continuous with period 2 M, so c changes little when a sum overflows by one (Ni et al., WrapNet, 2021, arXiv
2007.13242; the formulas are from third-party code, github.com/azatkariuly/bnn_digital_psum, since the authors published
none). A penalty on max(|z| - M, 0) keeps sums small; WrapNet sums it, here it is the mean over each layer.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def wrap(z: Tensor, bits: int) -> Tensor:
    """The value of the sum z in an accumulator of `bits` bits, in [-M, M). Any shape; exact for integers in float32."""
    half = 2 ** (bits - 1)
    held: Tensor = torch.remainder(z + half, 2 * half) - half
    return held


def cyclic(m: Tensor, bits: int, slope: float) -> Tensor:
    """c(m): slope 1 around 0, slope -k towards the ends of [-M, M], where c is 0; k is `slope`. Any shape."""
    half = 2 ** (bits - 1)
    turn = slope * half / (slope + 1)
    return torch.where(m.abs() <= turn, m, m.sign() * slope * half - slope * m)


class Accumulator(nn.Module):
    """c(wrap(z)) of a layer's sums z, in float32; no parameters. Any shape.

    Args:
        bits: width of the sums, in two's complement.
        slope: k.

    Attributes:
        penalty: mean max(|z| - M, 0) of the last forward pass, differentiable.
        num_sums: number of sums since `reset`; `num_overflows` of them were outside [-M, M). Both are int64 [] tensors
            on the sums' device: for Python numbers, torch.compile would recompile the network for each value.
    """

    def __init__(self, bits: int = 8, slope: float = 2.0) -> None:
        super().__init__()
        self.bits, self.slope = bits, slope
        self.penalty = torch.zeros(())
        self.reset()

    def reset(self) -> None:
        """Set the counts to 0."""
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
        """The settings shown by print(model)."""
        return f"{self.bits} bits, slope {self.slope:g}"


def accumulators(model: nn.Module) -> Iterator[Accumulator]:
    """The accumulators of the model's layers."""
    return (module for module in model.modules() if isinstance(module, Accumulator))


def num_inexact(accumulator: Accumulator, z: Tensor) -> int:
    """Number of sums z that are not integers, or for which `wrap` differs from integer arithmetic."""
    half, whole = 2 ** (accumulator.bits - 1), z.round().long()
    held = (whole + half).bitwise_and(2 * half - 1) - half
    return int(((whole != z) | (held != wrap(z, accumulator.bits))).sum())


def overflow_penalty(model: nn.Module) -> Tensor:
    """The sum of the layers' penalties in the last forward pass: []."""
    return torch.stack([each.penalty for each in accumulators(model)]).sum()


def reset_overflows(model: nn.Module) -> None:
    """Set the counts of all accumulators to 0."""
    for each in accumulators(model):
        each.reset()


def overflows(model: nn.Module) -> tuple[int, int]:
    """(number of sums that overflowed, number of sums) since the counts were reset."""
    found = list(accumulators(model))
    return sum(int(each.num_overflows) for each in found), sum(int(each.num_sums) for each in found)
