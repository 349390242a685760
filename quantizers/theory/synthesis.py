"""Principled pairs made to order: `synthesize` from P and T, `complete` from B alone.

For any proximal map P and differentiable T the pair F = T o P, B = T' o P makes PC++ the same as ProxConnect with P on
the loss l(T(.)) (Lu et al., "Understanding Neural Network Binarization with Forward and Backward Proximal Quantizers",
NeurIPS 2023). With P the identity, F = T = the integral of B: so every surrogate gradient B has a principled partner,
and BNN++ is that of BNN+.
"""

from functools import lru_cache

import torch
from torch import Tensor

from quantizers import maps
from quantizers.catalog import Map, Quantizer
from quantizers.theory.quadrature import Table, tabulate


def synthesize(
    prox: Map,
    transform: Map,
    backward: Map | None = None,
    *,
    name: str = "synthesized",
    citation: str = "synthesized from P and T",
) -> Quantizer:
    """The pair F = T o P, B = T' o P; B by autograd through T unless `backward` gives it in closed form.

    That P is monotone and that a given B is T' o P is taken on trust: `certify` checks it. Where T has a kink, autograd
    decides (and a `where` with an infinite slope on the branch not taken makes it NaN: then give B). A T that autograd
    does not see through, such as sign, has derivative 0.
    """

    def forward(w_star: Tensor, mu: float) -> Tensor:
        return transform(prox(w_star, mu), mu)

    def slope_at_prox(w_star: Tensor, mu: float) -> Tensor:
        return derivative(transform, prox(w_star, mu), mu)

    return Quantizer(name, forward, backward or slope_at_prox, prox=prox, transform=transform, citation=citation)


def complete(
    backward: Map,
    forward: Map | None = None,
    *,
    name: str = "completed",
    citation: str = "the integral of its B",
) -> Quantizer:
    """The principled partner of a surrogate gradient: F(w) = integral of B from 0 to w, P = identity, T = F.

    `forward` is that integral in closed form; without it F is an `Integral`, and its stated error is in
    `row.forward.error(mu)`.
    """
    integral = forward or Integral(backward)
    return Quantizer(name, integral, backward, prox=maps.identity, transform=integral, citation=citation)


def derivative(transform: Map, u: Tensor, mu: float) -> Tensor:
    """T'(u; mu) by autograd, elementwise: u's shape, dtype and device; 0 where autograd sees no dependence on u."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = u.detach().clone().requires_grad_()
        value = transform(leaf, mu)
        if not value.requires_grad:
            return torch.zeros_like(u)
        (slope,) = torch.autograd.grad(value, leaf, torch.ones_like(value), allow_unused=True, materialize_grads=True)
    return slope


class Integral:
    """F(w) = integral of B(.; mu) from 0 to w, any shape, dtype and device; differentiable in w.

    Quadrature in float64, once for each mu and then kept (the 32 latest), as a piecewise cubic that is monotone where B
    keeps one sign. F(0) = 0; odd if B is even. Beyond |w| = 1024 it goes on along its tangent. NaN at NaN; at infinity
    its value at the dtype's largest number; a value too large for the dtype saturates, as in `maps`. ValueError if B is
    not finite or varies too fast.
    """

    def __init__(self, backward: Map) -> None:
        self.backward = backward
        self._table = lru_cache(maxsize=32)(self._tabulated)
        self._table_on = lru_cache(maxsize=32)(lambda mu, device: self._table(mu).to(device))

    def __call__(self, w_star: Tensor, mu: float) -> Tensor:
        """F(w_star; mu)."""
        largest = torch.finfo(w_star.dtype).max
        w = w_star.double().clamp(-largest, largest)
        return self._table_on(mu, w_star.device)(w).clamp(-largest, largest).to(w_star.dtype)

    def error(self, mu: float) -> float:
        """An estimate from above of |F - integral| on [-1024, 1024], before rounding to the input's dtype.

        All panels' quadrature errors on the worse side of 0, each taken to be the difference of the two integrals (that
        of the finer one is far smaller), and twice the largest misfit of a cubic at its panel's middle.
        """
        return self._table(mu).error

    def _tabulated(self, mu: float) -> Table:
        with torch.no_grad():
            return tabulate(lambda w: self.backward(w, mu).double())
