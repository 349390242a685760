"""Infer P and T from (F, B), or find an interval where none can exist.

(F, B) decomposes if there is a proximal (that is, monotone) P such that dF = B dP and both F and B are functions of P
(Lu et al., NeurIPS 2023). On the points of a mesh this means: where B is not 0, dP = dF / B is not negative, and B is
constant where F is flat. Where B is 0, F is flat and P is free; we let it move at unit rate. At a jump of F, one of B's
limits is not 0 and neither has the opposite sign; there T' is taken to be linear from one limit to the other.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.theory.mesh import NARROW, TOLERANCE, Mesh
from quantizers.theory.quadrature import at_nodes, integrals

ZERO = 1e-8  # relative to max |B|: a smaller |B| counts as 0
FLAT = 1e-7  # relative to F's mean rate: a slower F counts as flat
ROUNDING = 2e-15
APART = 2  # a key that differs from every sign of B

Scalar = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Witness:
    """An interval on which (F, B) breaks a rule, which evaluating both there shows, and the rule in words."""

    low: float
    high: float
    rule: str


class Cells:
    """Per-cell quantities (n,) of a mesh: change of F, integral and sign of B, and whether F is flat."""

    def __init__(self, mesh: Mesh, backward: Scalar) -> None:
        self.mesh, self.x = mesh, mesh.x
        self.f, self.b = mesh.values[0], mesh.values[1]
        self.f_size, self.b_size = mesh.sizes[0].item(), mesh.sizes[1].item()
        self.moved, self.jumps = self.f.diff(), mesh.jumps(0)
        self.narrow = mesh.narrow()
        nodes = at_nodes(backward, self.x[:-1], self.x[1:])
        self.integral = integrals(nodes, self.x[:-1], self.x[1:])
        self.size = integrals(nodes.abs(), self.x[:-1], self.x[1:])
        at_ends = torch.stack([self.b[:-1], self.b[1:]]).abs()
        # Where B drops to 0 inside a cell, the whole cell counts as B = 0: P is unconstrained.
        magnitude = torch.where(self.narrow, at_ends.amin(0), nodes.abs().amax(1))
        self.sign = torch.where(magnitude <= ZERO * self.b_size, 0.0, self.integral.sign())
        self.mixed = (nodes.amin(1) < 0) & (nodes.amax(1) > 0)
        mean_rate = self.moved.abs().sum() / self.size.sum().clamp(min=1e-300)
        still = self.moved.abs() <= FLAT * mean_rate * self.size + ROUNDING * self.f.abs().max()
        self.flat = still & (self.sign != 0) & ~self.jumps

    def witness(self) -> Witness | None:
        """An interval where a rule fails, or None if all hold."""
        return self._varies_on_flat() or self._moves_at_zero() or self._opposes() or self._jumps_wrongly()

    def _runs(self, key: Tensor, apart: Tensor) -> list[tuple[int, int, int]]:
        """Maximal runs of cells with equal key, excluding the cells `apart`: (key, first point, last point)."""
        key = torch.where(apart, APART, key.long())
        edges = [0, *((key.diff() != 0).nonzero().flatten() + 1).tolist(), len(key)]
        values = key[edges[:-1]].tolist()
        return [run for run in zip(values, edges[:-1], edges[1:], strict=True) if run[0] != APART]

    def _varies_on_flat(self) -> Witness | None:
        # Prefer runs where B keeps its sign, which are clearest; among them take the one where B varies most.
        there = self.b.abs() > TOLERANCE * self.b_size
        for key in (self.flat * self.sign, self.flat):
            found = []
            for value, start, end in self._runs(key, self.jumps):
                points = start + there[start : end + 1].nonzero().flatten()
                if value and len(points):
                    lowest, highest = points[self.b[points].argmin()], points[self.b[points].argmax()]
                    spread = (self.b[highest] - self.b[lowest]).item() / self.b_size
                    if spread > TOLERANCE:
                        found.append((round(spread, 3), int(lowest), int(highest)))
            if found:
                return self._between(*max(found)[1:], "F stays at {value}, so P must stay too, but B {b}")
        return None

    def _moves_at_zero(self) -> Witness | None:
        if (self.moved.abs() * (self.sign == 0) * ~self.jumps).sum() <= TOLERANCE * self.f_size:
            return None
        for sign, start, end in self._runs(self.sign, self.narrow):
            f = self.f[start : end + 1]
            if sign == 0 and f.max() - f.min() > TOLERANCE * self.f_size:
                rule = "B is 0, so F must stay, but it {f}"
                return self._between(start + int(f.argmin()), start + int(f.argmax()), rule)
        return None

    def _opposes(self) -> Witness | None:
        against = (-self.moved * self.sign).clamp(min=0) * ~self.jumps
        if against.sum() <= TOLERANCE * self.f_size:
            return None
        for sign, start, end in self._runs(self.sign, self.narrow):
            rising = sign * self.f[start : end + 1]
            fall = rising.cummax(0).values - rising
            if sign != 0 and fall.max() > TOLERANCE * self.f_size:
                bottom = int(fall.argmax())
                top = int(rising[: bottom + 1].argmax())
                rule = f"B is {'positive' if sign > 0 else 'negative'}, but F {{f}}, so P would fall"
                return self._between(start + top, start + bottom, rule)
        return None

    def _jumps_wrongly(self) -> Witness | None:
        limits = torch.stack([self.b[:-1], self.b[1:]])
        there = limits.abs() > ZERO * self.b_size
        opposed = self.jumps & (there & (limits * self.moved < 0)).any(0)
        void = self.jumps & ~there.any(0)
        for cells, why in ((opposed, "against its sign"), (void, "though it is 0 on both sides")):
            if cells.any():
                at = int(cells.nonzero()[0])
                return self._between(at, at + 1, f"B {{b}}, and F jumps {why}: it {{f}}")
        return None

    def _between(self, one: int, other: int, rule: str) -> Witness:
        low, high = sorted((one, other))
        f, b = (f"goes from {y[low]:.6g} to {y[high]:.6g}" for y in (self.f, self.b))
        return Witness(self.x[low].item(), self.x[high].item(), rule.format(f=f, b=b, value=f"{self.f[low]:.6g}"))

    def steps(self) -> Tensor:
        """How far P moves in each cell: dF / B; 0 where F is flat, and dw where B is 0."""
        free = self.sign == 0
        # Where B changes sign both integrals nearly cancel; their moduli do not.
        rate = torch.where(self.mixed, self.moved.abs() / self.size, self.moved / self.integral).clamp(min=0)
        rate = torch.where(free, 1.0, torch.where(self.flat, 0.0, rate))
        over = (self.b[:-1] + self.b[1:]) / 2
        return torch.where(self.jumps, self.moved / over, rate * self.x.diff())


def decomposition(cells: Cells) -> tuple[Scalar, Scalar, Tensor]:
    """P and T as functions of tensors, and P at the mesh's points.

    P is linear between points, and P(0-) + P(0+) = 0 (if the interval excludes 0, P(w) = w at the end nearest 0). T is
    the Hermite cubic through F with slopes B.
    """
    x, steps = cells.x, cells.steps()
    p = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    zero = min(max(0.0, x[0].item()), x[-1].item())
    beside = torch.tensor([-50, 50]).double() * NARROW * cells.mesh.reach + zero
    p = p - (_prox(cells, p)(beside.clamp(x[0], x[-1])).mean() - zero)
    return _prox(cells, p), _hermite(cells, p), p


def _prox(cells: Cells, p: Tensor) -> Scalar:
    """P: linear between the mesh's points and beyond them; a step in each jump's cell (at 0 if the cell contains 0)."""
    x, jumps = cells.x, cells.jumps
    start, end = x[:-1], x[1:]
    step = torch.where((start < 0) & (end >= 0), 0.0, end)

    def function(w: Tensor) -> Tensor:
        v = w.double()
        at = (torch.searchsorted(x, v, right=True) - 1).clamp(0, len(x) - 2)
        part = torch.where(jumps[at], (v >= step[at]).double(), (v - start[at]) / (end - start)[at])
        return (p[at] + part * p.diff()[at]).to(w.dtype)

    return function


def _hermite(cells: Cells, p: Tensor) -> Scalar:
    """T: on each piece over which P moves, the cubic with values F and slopes B at its ends; constant beyond."""
    moves = p.diff() > 1e-14 * (p[-1] - p[0])
    if not moves.any():
        return lambda u: torch.full_like(u, cells.f[0].item())
    start, width = p[:-1][moves], p.diff()[moves]
    value, rise = cells.f[:-1][moves], cells.f.diff()[moves]
    s_in, s_out = cells.b[:-1][moves] * width, cells.b[1:][moves] * width

    def function(u: Tensor) -> Tensor:
        at = (torch.searchsorted(start, u.double(), right=True) - 1).clamp(0, len(start) - 1)
        t = ((u.double() - start[at]) / width[at]).clamp(0, 1)
        bend = 3 * rise[at] - 2 * s_in[at] - s_out[at] + t * (s_in[at] + s_out[at] - 2 * rise[at])
        return (value[at] + t * (s_in[at] + t * bend)).to(u.dtype)

    return function
