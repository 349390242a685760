"""Layers whose weights are scalars in {-1, +1} times one trainable gain per output channel.

    y = g * (W x) + b          g: (C_out,)

Nothing here quantizes: `weight` is the parameter that ProxConnect holds w = F(w*) in. Both layers compute g * W first,
which is the same by linearity, keeps no activation W x for the gain's gradient, and stays in autocast's dtype.

The gain starts at mean |W| over each output channel, which minimises |W - g sign(W)|^2 (Rastegari et al., XNOR-Net,
2016).
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = TypeVar("Layer", "BinaryLinear", "BinaryConv2d")


class BinaryLinear(nn.Linear):
    """y = g * (W x) + b. g: (out_features,)."""

    gain: nn.Parameter

    @classmethod
    def from_layer(cls, layer: nn.Linear) -> "BinaryLinear":
        """The same weight and bias parameters, not copies, with a gain from the full-precision weight's mean abs."""
        # The meta device: no memory, no initialisation, no random numbers drawn for weights that are replaced anyway.
        new = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        return _adopt(new, layer)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(x, self.gain[:, None] * self.weight, self.bias)


class BinaryConv2d(nn.Conv2d):
    """y = g * (W conv x) + b, any nn.Conv2d. g: (out_channels,)."""

    gain: nn.Parameter

    @classmethod
    def from_layer(cls, layer: nn.Conv2d) -> "BinaryConv2d":
        """The same weight and bias parameters, not copies, with a gain from the full-precision weight's mean abs."""
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
        return _adopt(new, layer)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        y: Tensor = self._conv_forward(x, self.gain[:, None, None, None] * self.weight, self.bias)
        return y


def channel_mean_abs(weight: Tensor) -> Tensor:
    """m_c = mean |W_c|, one per output channel: (C_out, ...) -> (C_out,)."""
    return weight.abs().flatten(1).mean(dim=1)


def _adopt(new: Layer, layer: nn.Linear | nn.Conv2d) -> Layer:
    """`new` with the parameters and mode of `layer`."""
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(new, name, parameter)
    with torch.no_grad():
        new.gain = nn.Parameter(channel_mean_abs(layer.weight))
    return new.train(layer.training)
