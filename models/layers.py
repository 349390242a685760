"""Layers with weights in {-1, +1}, a trainable gain that restores their scale, and optionally binary inputs.

    y = g * a(W q(x)) + b         g: (C_out,) trainable, q(x) = F(x; mu), a(z) = z or c(wrap(z))

Nothing here quantizes weights: ProxConnect writes w = F(w*) into the parameter `weight`. Without a gain (if a batch
norm follows, the scale is immaterial) g = 1; without quantized inputs q(x) = x. If a(z) = z, both layers compute g * W
first, which is the same by linearity, keeps no activation W x for the gain's gradient, and stays in autocast's dtype.
With a low-bit accumulator (see `accumulators`), sums are exact integers, computed in float32.

The gain starts at mean |W| over each output channel, which minimises |W - g sign(W)|^2 (Rastegari et al., XNOR-Net,
2016).

Zero padding pads binary inputs with 0, which is neither of their values; training code in the literature does so too.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.accumulators import Accumulator
from models.inputs import BinaryInput

Layer = TypeVar("Layer", "BinaryLinear", "BinaryConv2d")


class BinaryLinear(nn.Linear):
    """y = g * (W q(x)) + b. g: (out_features,) or None."""

    gain: nn.Parameter | None
    inputs: BinaryInput | None
    accumulator: Accumulator | None

    @classmethod
    def from_layer(
        cls,
        layer: nn.Linear,
        *,
        with_gain: bool = True,
        inputs: BinaryInput | None = None,
        accumulator: Accumulator | None = None,
    ) -> "BinaryLinear":
        """A layer that shares `layer`'s weight and bias; its gain is the weight's mean |W| per output channel."""
        # The meta device: no memory, no initialisation, no random numbers drawn for weights that are replaced anyway.
        new = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        return _adopt(new, layer, with_gain=with_gain, inputs=inputs, accumulator=accumulator)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        x = x if self.inputs is None else self.inputs(x)
        if self.accumulator is not None:
            y: Tensor
            with torch.autocast(x.device.type, enabled=False):
                y = self.accumulator(F.linear(x.float(), self.weight.float()))
            y = y if self.gain is None else y * self.gain
            y = y if self.bias is None else y + self.bias
            return y
        weight = self.weight if self.gain is None else self.gain[:, None] * self.weight
        return F.linear(x, weight, self.bias)


class BinaryConv2d(nn.Conv2d):
    """y = g * (W conv q(x)) + b, any nn.Conv2d. g: (out_channels,) or None."""

    gain: nn.Parameter | None
    inputs: BinaryInput | None
    accumulator: Accumulator | None

    @classmethod
    def from_layer(
        cls,
        layer: nn.Conv2d,
        *,
        with_gain: bool = True,
        inputs: BinaryInput | None = None,
        accumulator: Accumulator | None = None,
    ) -> "BinaryConv2d":
        """A layer that shares `layer`'s weight and bias; its gain is the weight's mean |W| per output channel."""
        new = cls(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]  # torch annotates tuple[int, ...] for a pair
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            bias=layer.bias is not None,
            padding_mode=layer.padding_mode,
            device="meta",
        )
        return _adopt(new, layer, with_gain=with_gain, inputs=inputs, accumulator=accumulator)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        x = x if self.inputs is None else self.inputs(x)
        y: Tensor
        if self.accumulator is not None:
            with torch.autocast(x.device.type, enabled=False):
                y = self.accumulator(self._conv_forward(x.float(), self.weight.float(), None))
            y = y if self.gain is None else y * self.gain[:, None, None]
            return y if self.bias is None else y + self.bias[:, None, None]
        weight = self.weight if self.gain is None else self.gain[:, None, None, None] * self.weight
        y = self._conv_forward(x, weight, self.bias)
        return y


class ClippedConv2d(nn.Conv2d):
    """y = W conv H(x) + b with H the hard tanh: a convolution whose clip will be replaced by a sign.

    The sign of each convolution's inputs is the only nonlinearity of Bi-Real Net's blocks; with real inputs, the clip
    takes its place. `models.binarize` with binary inputs replaces this layer by a BinaryConv2d, and the clip by a sign.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        return super().forward(F.hardtanh(x))


def channel_mean_abs(weight: Tensor) -> Tensor:
    """m_c = mean |W_c|, one per output channel: (C_out, ...) -> (C_out,)."""
    return weight.abs().flatten(1).mean(dim=1)


def _adopt(
    new: Layer,
    layer: nn.Linear | nn.Conv2d,
    *,
    with_gain: bool,
    inputs: BinaryInput | None,
    accumulator: Accumulator | None,
) -> Layer:
    """`new` with the parameters and mode of `layer`."""
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(new, name, parameter)
    with torch.no_grad():
        new.register_parameter("gain", nn.Parameter(channel_mean_abs(layer.weight)) if with_gain else None)
    new.inputs, new.accumulator = inputs, accumulator
    return new.train(layer.training)
