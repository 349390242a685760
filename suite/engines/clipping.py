"""Adaptive gradient clipping: for quantized weights it compares B . grad, the base optimizer's gradient, with w*."""

import torch
from torch import Tensor

from quantizers import ProxConnect
from quantizers.groups import is_quantized

SMALLEST_NORM = 1e-3
"""Lower bound on weight norms, so that weights that start at zero can move (Brock et al., 2021)."""


@torch.no_grad()
def clip_adaptively(optimizer: ProxConnect, factor: float) -> None:
    """Scales gradients in place, output by output, so that |G_i| <= factor max(|W_i|, 1e-3).

    W_i is the weight's row for output i, and G_i the same row of its gradient. For a quantized weight, they are rows of
    w* and of B(w*) . grad; scaling a row of p.grad scales that row of B . grad equally. A bias, a gain or a norm's
    scale counts as one row. Equation 3 of Brock et al. 2021 (arXiv 2102.06171).
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            weight, gradient = p, p.grad
            if is_quantized(group):
                weight, gradient = optimizer.latent(p), optimizer.latent_gradient(p)
            bound = factor * _norms(weight).clamp(min=SMALLEST_NORM)
            p.grad.mul_((bound / _norms(gradient).clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1))


def _norms(tensor: Tensor) -> Tensor:
    """L2 norm per output, (C_out, ...) -> (C_out, 1, ...); of a vector, its single norm []."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if wide.ndim < 2:  # noqa: PLR2004
        norms: Tensor = torch.linalg.vector_norm(wide)
    else:
        norms = torch.linalg.vector_norm(wide, dim=tuple(range(1, wide.ndim)), keepdim=True)
    return norms
