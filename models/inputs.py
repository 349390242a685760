"""Binary activations: the inputs of a binary layer, quantized by a forward-backward pair.

    x_b = F(x; mu)          grad x = B(x; mu) . grad x_b

F and B come from any binary row that `quantizers.get` finds; "bnn", sign with B = 1 on [-1, 1], is BinaryNet's
(Courbariaux et al., 2016). If F is not yet sign (a ++ row at finite mu), inputs become binary when hardened.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import quantizers
from quantizers import Quantizer, maps
from quantizers.sharpness import require_sharpness


@dataclass(frozen=True)
class InputQuantization:
    """How the inputs of a model's binary layers are quantized.

    Args:
        quantizer: a row's name, module:attribute, or a Quantizer.
        mu: its initial sharpness; `set_input_mu` changes it later.

    Raises:
        ValueError: the row is unknown or not binary, or mu is negative or not finite.
    """

    quantizer: str | Quantizer = "bnn"
    mu: float = 1.0

    def __post_init__(self) -> None:
        row = quantizers.get(self.quantizer)
        if not row.binary:
            raise ValueError(f"{row.name!r} leaves inputs real; for binary inputs use bnn, for example")
        require_sharpness(self.mu)


class BinaryInput(nn.Module):
    """x -> F(x; mu), or sign(x) exactly while `hard`; no parameters. Any shape; keeps dtype and memory format.

    mu is a Python number and not part of the state: like a learning rate, it is a function of the training step.
    """

    def __init__(self, quantization: InputQuantization) -> None:
        super().__init__()
        self.quantizer, self.mu, self.hard = quantization.quantizer, quantization.mu, False

    def forward(self, x: Tensor) -> Tensor:
        """F(x; mu), whose gradient is multiplied by B(x; mu)."""
        return quantize(x, self.quantizer, self.mu, hard=self.hard)

    def extra_repr(self) -> str:
        """The settings shown by print(model)."""
        name = self.quantizer if isinstance(self.quantizer, str) else self.quantizer.name
        return f"{name}, mu={self.mu:g}{', hard' * self.hard}"


def quantize(x: Tensor, quantizer: str | Quantizer, mu: float, *, hard: bool = False) -> Tensor:
    """F(x; mu) of `quantizer`, or sign(x) if `hard`; backward: grad . B(x; mu). Any shape. Keeps x for backward."""
    y: Tensor = _Quantize.apply(x, quantizer, mu, hard)
    return y


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: str | Quantizer, mu: float, hard: bool) -> Tensor:  # noqa: ANN401  (torch's)
        ctx.save_for_backward(x)
        ctx.quantizer, ctx.mu = quantizer, mu
        return maps.hard_sign(x, mu) if hard else quantizers.get(quantizer).forward(x, mu)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        (x,) = ctx.saved_tensors
        return grad * quantizers.get(ctx.quantizer).backward(x, ctx.mu), None, None, None


def set_input_mu(model: nn.Module, mu: float) -> None:
    """Set the sharpness of all binary inputs of the model to mu. ValueError if it is negative or not finite."""
    require_sharpness(mu)
    for inputs in _binary_inputs(model):
        inputs.mu = mu


def harden_inputs(model: nn.Module) -> None:
    """Make every binary layer see sign(x), as in deployment."""
    for inputs in _binary_inputs(model):
        inputs.hard = True


def soften_inputs(model: nn.Module) -> None:
    """Make every binary layer see F(x; mu) again, as in training."""
    for inputs in _binary_inputs(model):
        inputs.hard = False


def _binary_inputs(model: nn.Module) -> Iterator[BinaryInput]:
    return (module for module in model.modules() if isinstance(module, BinaryInput))
