"""A row with a real scale: weights in {-s, +s} instead of {-1, +1}, s = mean |w*| of a tensor or of each channel.

    w = s F(w* / s; mu),    the gradient of w is multiplied by B(w* / s; mu)

This rescales the row to the interval [-s, s]: with P_s(w*) = s P(w* / s) and T_s(w) = s T(w / s), F_s = T_s o P_s and
B_s = T_s' o P_s, where s is held fixed in the derivative. So a principled row stays principled. For bc, whose B is 1,
this is the straight-through estimator in PARQ's comparison (Jin et al., 2025, arXiv 2503.15748): w = s sign(w*).
s is the least-squares scale: it minimises |w* - s sign(w*)|^2 (Rastegari et al., XNOR-Net, 2016).

mu is in units of w* / s, whose mean modulus is 1.
"""

from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quantizers.catalog import Map

Scale = Literal["none", "tensor", "channel"]
SCALES: tuple[Scale, ...] = get_args(Scale)


def mean_abs(w_star: Tensor, scale: Scale) -> Tensor:
    """The scale s = mean |w*|, in the dtype of w*: shape () for "tensor", (C_out, 1, ...) for "channel".

    NaN if one of its latents is NaN. ValueError for "channel" if w* has fewer than two dimensions.
    """
    if scale == "tensor":
        return w_star.abs().mean()
    require_channels(w_star, scale)
    return w_star.abs().mean(dim=tuple(range(1, w_star.ndim)), keepdim=True)


def require_channels(w_star: Tensor, scale: Scale) -> None:
    """ValueError if the scale is per channel and w* has fewer than two dimensions."""
    if scale == "channel" and w_star.ndim < 2:  # noqa: PLR2004  (output channels and their inputs)
        raise ValueError(f"scale 'channel' needs output channels, but a parameter has the shape {tuple(w_star.shape)}")


@cache  # so that scaling a row twice gives equal rows
def scaled_forward(f: "Map", scale: Scale) -> "Map":
    """The map w* -> s f(w* / s; mu)."""

    def forward(w_star: Tensor, mu: float) -> Tensor:
        s = mean_abs(w_star, scale)
        return f(w_star / _divisor(s), mu) * s

    return forward


@cache
def scaled_backward(b: "Map", scale: Scale) -> "Map":
    """The map w* -> b(w* / s; mu)."""

    def backward(w_star: Tensor, mu: float) -> Tensor:
        return b(w_star / _divisor(mean_abs(w_star, scale)), mu)

    return backward


def _divisor(s: Tensor) -> Tensor:
    """s, or 1 where s = 0: there all latents are 0, and w* / s must stay 0."""
    return torch.where(s == 0, 1, s)
