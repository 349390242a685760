"""Construct principled pairs: `synthesize` from P and T, `complete` from B.

For any proximal map P and differentiable T the pair F = T o P, B = T' o P makes PC++ the same as ProxConnect with P on
the loss l(T(.)) (Lu et al., "Understanding Neural Network Binarization with Forward and Backward Proximal Quantizers",
NeurIPS 2023). With P the identity, F = T = the integral of B: so every surrogate gradient B has a principled partner;
BNN+'s partner is BNN++.

Both kinds of rows can be pickled and copied if their maps can, that is, if these are functions of a module, not
lambdas.
"""

from dataclasses import dataclass, field

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

    This does not check that P is monotone or that a given B is T' o P; `certify` does. At a kink of T, autograd chooses
    the slope. If T contains a `where` whose untaken branch has infinite slope, autograd returns NaN: then give B. A T
    that autograd cannot differentiate, such as sign, has derivative 0.
    """
    forward, slope = _Composition(prox, transform), _SlopeAtProx(prox, transform)
    return Quantizer(name, forward, backward or slope, prox=prox, transform=transform, citation=citation)


@dataclass(frozen=True)
class _Composition:
    """T o P."""

    prox: Map
    transform: Map

    def __call__(self, w_star: Tensor, mu: float) -> Tensor:
        return self.transform(self.prox(w_star, mu), mu)


@dataclass(frozen=True)
class _SlopeAtProx:
    """T' o P by autograd."""

    prox: Map
    transform: Map

    def __call__(self, w_star: Tensor, mu: float) -> Tensor:
        return derivative(self.transform, self.prox(w_star, mu), mu)


def complete(
    backward: Map,
    forward: Map | None = None,
    *,
    scales: bool = False,
    name: str = "completed",
    citation: str = "the integral of its B",
) -> Quantizer:
    """The principled partner of a surrogate gradient: F(w) = integral of B from 0 to w, P = identity, T = F.

    `forward` is that integral in closed form; without it F is an `Integral`, whose error is `row.forward.error(mu)`.
    `scales` promises that mu only scales B, B(w; mu) = mu B(mu w; 1); then F(w; mu) = F(mu w; 1), and one quadrature
    serves all mu. Without it each new mu costs a quadrature, a fraction of a second at every step of a schedule.

    ValueError if `scales` is promised but not true.
    """
    integral = forward or Integral(backward, scales=scales)
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


MAX_TABLES = 32


@dataclass(frozen=True)
class Integral:
    """F(w) = integral of B(.; mu) from 0 to w, any shape, dtype and device; differentiable in w.

    Computed by quadrature in float64, once per mu (once for all mu if B `scales`, see `complete`), as a piecewise cubic
    that is monotone where B keeps one sign; the latest MAX_TABLES are kept. F(0) = 0; F is odd if B is even. Beyond
    |w| = 1024 (|mu w| = 1024 if B scales), F continues along its tangent. F is NaN at NaN; at infinity it has its value
    at the dtype's largest number; a value too large for the dtype saturates, as in `maps`.

    Copies and pickles contain B but no tables.

    Raises:
        ValueError: B is not finite or varies too fast; or, when constructed, `scales` is not true of B.
    """

    backward: Map
    scales: bool = False
    _tables: dict[tuple[float, torch.device], Table] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.scales:
            w = torch.linspace(-3.1, 2.9, 101, dtype=torch.float64)
            for mu in (0.3, 1.7):
                b, expected = self.backward(w, mu), mu * self.backward(mu * w, 1.0)
                if not torch.allclose(b, expected, rtol=1e-6, atol=1e-9):
                    at = w[(b - expected).abs().argmax()].item()
                    raise ValueError(f"scales=True, but B(w; mu) is not mu B(mu w; 1) at w={at:g}, mu={mu}")

    def __call__(self, w_star: Tensor, mu: float) -> Tensor:
        """F(w_star; mu)."""
        largest = torch.finfo(w_star.dtype).max
        w = w_star.double().clamp(-largest, largest)
        if self.scales:
            w, mu = (w * min(mu, torch.finfo(w.dtype).max)).clamp(-largest, largest), 1.0
        return self._table(mu, w.device)(w).clamp(-largest, largest).to(w_star.dtype)

    def error(self, mu: float) -> float:
        """An upper estimate of |F - integral| for |w| <= 1024 (|mu w| if B scales), before rounding to w's dtype.

        The sum of the panels' quadrature errors, on the side of 0 where it is larger, plus twice the largest error of a
        panel's cubic at its middle. A panel's quadrature error is estimated as the difference between its integral as a
        whole and in two halves; the true error of the halves is far smaller.
        """
        return self._table(1.0 if self.scales else mu, torch.device("cpu")).error

    def _table(self, mu: float, device: torch.device) -> Table:
        key = (mu, device)
        if key not in self._tables:
            on_cpu = self._tables.get((mu, torch.device("cpu"))) or self._tabulated(mu)
            while len(self._tables) >= MAX_TABLES:
                del self._tables[next(iter(self._tables))]
            self._tables[key] = on_cpu.to(device)
        return self._tables[key]

    def _tabulated(self, mu: float) -> Table:
        with torch.no_grad():
            return tabulate(lambda w: self.backward(w, mu).double())

    def __reduce__(self) -> tuple[type["Integral"], tuple[Map, bool]]:
        return Integral, (self.backward, self.scales)
