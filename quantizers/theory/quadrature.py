"""F(w) = integral of B from 0 to w for a B without a closed form: adaptive quadrature and a cubic interpolant.

Each panel is integrated by 7-node Gauss-Legendre quadrature, both whole and in halves, and gets the Hermite cubic with
the right values and slopes at both ends. A panel is halved while the two integrals, or the cubic and the integral at
the panel's middle, differ by more than a tolerance. Where B keeps one sign, the cubic is made monotone by the condition
of Fritsch and Carlson, "Monotone Piecewise Cubic Interpolation", SIAM J. Numer. Anal. 1980: no slope above three times
the panel's mean slope.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

NUM_NODES = 7
FARTHEST = 2.0**10  # beyond |w| = 1024, F continues along its tangent
NEAREST = 2.0**-20  # panels double in width from here outwards, so that F keeps its digits near 0
PARTS = 16  # panels per doubling: features narrower than a hundredth of their distance from 0 may be missed
TOLERANCE = 1e-10  # error of one panel, relative to |F|
NARROWEST = 2.0**-46  # relative to |w|: a panel around a jump of B is not halved further
MAX_PANELS = 200_000


@lru_cache
def gauss_legendre(num_nodes: int = NUM_NODES) -> tuple[Tensor, Tensor]:
    """Nodes and weights (num_nodes,) on [-1, 1], by the Legendre recurrence's eigenvectors (Golub, Welsch 1969)."""
    k = torch.arange(1, num_nodes, dtype=torch.float64)
    beside = k / (4 * k.square() - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return nodes, 2 * vectors[0].square()


def at_nodes(function: Callable[[Tensor], Tensor], start: Tensor, end: Tensor) -> Tensor:
    """The function's values at the nodes of the panels [start, end], (n, num_nodes); a panel may run backwards."""
    nodes, _ = gauss_legendre()
    return function((start + end)[:, None] / 2 + (end - start)[:, None] / 2 * nodes)


def integrals(values: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The panels' integrals (n,) from their values at the nodes, (n, num_nodes)."""
    return values @ gauss_legendre()[1] * (end - start) / 2


class _Panels(NamedTuple):
    """Panels from `inner`, the end nearer 0, to `outer`, with integral, slopes, and errors of quadrature and cubic.

    `scale` approximates |F| there. All (n,).
    """

    inner: Tensor
    outer: Tensor
    scale: Tensor
    integral: Tensor
    slope_in: Tensor
    slope_out: Tensor
    quadrature: Tensor
    cubic: Tensor

    def where(self, mask: Tensor) -> "_Panels":
        return _Panels(*(field[mask] for field in self))


class Table(NamedTuple):
    """The interpolant: panels in order of `left`, on each the cubic from `inner`, the end nearer 0, over `width`."""

    left: Tensor
    inner: Tensor
    width: Tensor
    value: Tensor
    rise: Tensor
    slope_in: Tensor
    slope_out: Tensor
    error: float

    def to(self, device: torch.device) -> "Table":
        """The same table on a device."""
        return self._replace(**{name: field.to(device) for name, field in self._asdict().items() if name != "error"})

    def __call__(self, w: Tensor) -> Tensor:
        """F(w) in float64; NaN at NaN, the tangent beyond the last panel."""
        inside = w.clamp(-FARTHEST, FARTHEST)
        at = (
            torch.searchsorted(self.left, inside.detach().contiguous(), right=True)
            .sub_(1)
            .clamp_(0, len(self.left) - 1)
        )
        width, rise = self.width[at], self.rise[at]
        t = (inside - self.inner[at]) / width
        s_in, s_out = self.slope_in[at] * width, self.slope_out[at] * width
        # The Hermite cubic in powers of t from the end nearer 0, where its value has the most digits.
        cubic = t * (s_in + t * (3 * rise - 2 * s_in - s_out + t * (s_in + s_out - 2 * rise)))
        return cubic + self.value[at] + self.slope_out[at] * (w - inside)  # in this order, to get the layout of w


def tabulate(backward: Callable[[Tensor], Tensor]) -> Table:
    """The interpolant of F(w) = integral of B from 0 to w on [-1024, 1024], with an estimate of its error.

    ValueError if B is not finite, or needs more than MAX_PANELS panels.
    """
    done, active = [], _start(backward)
    while active.inner.numel():
        error = torch.maximum(active.quadrature, active.cubic)
        ripe = (error <= TOLERANCE * active.scale) | _narrow(active)
        done.append(active.where(ripe))
        if sum(len(panels.inner) for panels in done) + 2 * int((~ripe).sum()) > MAX_PANELS:
            at = active.inner[~ripe].abs()
            raise ValueError(f"B varies too fast for {MAX_PANELS} panels at |w| from {at.min():.6g} to {at.max():.6g}")
        active = _halved(backward, active.where(~ripe))
    return _assembled(_Panels(*(torch.cat(fields) for fields in zip(*done, strict=True))))


def _start(backward: Callable[[Tensor], Tensor]) -> _Panels:
    """Panels on both sides of 0 that double in width outwards, PARTS to a doubling; their scale comes from |B|."""
    powers = 2.0 ** torch.arange(21 + 10, dtype=torch.float64) * NEAREST
    parts = torch.arange(PARTS, dtype=torch.float64) / PARTS
    edges = torch.cat([torch.zeros(1).double(), (powers[:-1, None] * (1 + parts)).flatten(), powers[-1:]])
    inner, outer = torch.stack([edges[:-1], -edges[:-1]]), torch.stack([edges[1:], -edges[1:]])
    size = integrals(at_nodes(backward, inner.flatten(), outer.flatten()).abs(), inner.flatten(), outer.flatten())
    scale = size.abs().reshape(2, -1).cumsum(1)
    # A floor: if B vanishes quickly at 0, relative accuracy of F near 0 would take endlessly many panels.
    floor = 1e-6 * scale[:, edges[1:] <= 1][:, -1:]
    return _measured(backward, inner.flatten(), outer.flatten(), torch.maximum(scale, floor).flatten())


def _halved(backward: Callable[[Tensor], Tensor], panels: _Panels) -> _Panels:
    middle = (panels.inner + panels.outer) / 2
    inner, outer = torch.cat([panels.inner, middle]), torch.cat([middle, panels.outer])
    return _measured(backward, inner, outer, panels.scale.repeat(2))


def _narrow(panels: _Panels) -> Tensor:
    return (panels.outer - panels.inner).abs() <= NARROWEST * panels.outer.abs().clamp(min=NEAREST)


def _measured(backward: Callable[[Tensor], Tensor], inner: Tensor, outer: Tensor, scale: Tensor) -> _Panels:
    """The panels with their integrals, slopes, and the errors of quadrature and of the cubic at the middle."""
    middle, width = (inner + outer) / 2, outer - inner
    whole, first, second = (at_nodes(backward, *ends) for ends in ((inner, outer), (inner, middle), (middle, outer)))
    # Slopes just inside the panel, so that a jump of B on its very edge has no effect.
    at_ends = backward(torch.stack([inner + 2.0**-40 * width, outer - 2.0**-40 * width]))
    values = torch.cat([whole, first, second, at_ends.T], dim=1)
    if not values.isfinite().all():
        where = inner[~values.isfinite().all(1)][0]
        raise ValueError(f"B is not finite near w = {where:.6g}")
    first_half, second_half = integrals(first, inner, middle), integrals(second, middle, outer)
    integral = first_half + second_half
    one_sign = (values >= 0).all(1) | (values <= 0).all(1)
    slope_in, slope_out = (_limited(slope, integral / width, one_sign) for slope in at_ends)
    quadrature = (integral - integrals(whole, inner, outer)).abs()
    cubic = (integral / 2 + width * (slope_in - slope_out) / 8 - first_half).abs()
    return _Panels(inner, outer, scale, integral, slope_in, slope_out, quadrature, cubic)


def _limited(slope: Tensor, mean: Tensor, one_sign: Tensor) -> Tensor:
    """The slope, limited to three times the mean slope where B keeps one sign, which makes the cubic monotone."""
    steepest = 3 * mean.abs()
    return torch.where(one_sign, slope.clamp(-steepest, steepest), slope)


def _assembled(panels: _Panels) -> Table:
    """The panels in order, with F at their inner ends and the error described in `Integral.error`."""
    left = torch.minimum(panels.inner, panels.outer)
    order = left.argsort()
    p = _Panels(*(field[order] for field in panels))
    right = p.outer > 0
    rises = p.integral
    outwards = torch.cat([-_before(-rises[~right].flip(0)).flip(0), _before(rises[right])])
    # Quadrature errors add up outwards; the error of a cubic stays within its panel.
    summed = max(p.quadrature[right].sum().item(), p.quadrature[~right].sum().item())
    largest = (outwards.abs() + rises.abs()).max().item()
    error = summed + 2 * p.cubic.max().item() + 1e-15 * largest
    return Table(left[order], p.inner, p.outer - p.inner, outwards, rises, p.slope_in, p.slope_out, error=error)


def _before(rises: Tensor) -> Tensor:
    """For each entry, the sum of all earlier ones."""
    return torch.cat([rises.new_zeros(1), rises.cumsum(0)[:-1]])
