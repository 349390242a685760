"""Is (F, B) principled? `certify` finds P and T with F = T o P, B = T' o P, or an interval where none can exist.

    print(certify(get("bnn+"), 5.0).verdict())

A certificate is numerical: it holds on a mesh of an interval, to a tolerance (docs/decisions/004-certificates.md).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.catalog import Map, Quantizer
from quantizers.theory.inference import Cells, Scalar, Witness, decomposition
from quantizers.theory.mesh import GOLDEN, TOLERANCE, Facts, Mesh, facts, sample
from quantizers.theory.synthesis import derivative


@dataclass(frozen=True)
class Certificate:
    """The result of `certify` for a quantizer at one mu on an interval.

    `prox` and `transform` are P and T at this mu, or None if the pair does not decompose. `claimed` is True if they are
    the row's own and were verified, False if they were inferred from F and B. A map is proximal if it is monotone, and
    the proximal map of a convex function if it is also nonexpansive. `tolerance` is relative to the range of F and to
    max |B|; `error` is max |T(P(w)) - F(w)| (nan if the pair does not decompose).
    """

    quantizer: str
    mu: float
    decomposes: bool
    prox: Scalar | None
    transform: Scalar | None
    claimed: bool
    forward_facts: Facts
    prox_facts: Facts | None
    witness: Witness | None
    interval: tuple[float, float]
    tolerance: float
    error: float

    @property
    def proximal(self) -> bool:
        """Whether F itself is a proximal map, that is monotone."""
        return self.forward_facts.monotone

    def verdict(self) -> str:
        """The certificate in words, several short lines."""
        low, high = self.interval
        where = f"Checked on [{low:g}, {high:g}] to {self.tolerance:g} of the range of F and of max |B|"
        lines = [f"{self.quantizer} at mu = {self.mu:g}"]
        if self.prox_facts:
            origin = "as its row states" if self.claimed else "inferred from F and B"
            lines += [
                f"(F, B) decomposes: F = T o P, B = T' o P, with P and T {origin}.",
                f"P is {_kind(self.prox_facts)}.",
            ]
            where += f"; |T(P(w)) - F(w)| is at most {self.error:.1e}"
        if self.witness:
            lines += [
                "(F, B) does not decompose into F = T o P, B = T' o P with a proximal P.",
                f"On [{self.witness.low:.6g}, {self.witness.high:.6g}] {self.witness.rule}.",
            ]
        return "\n".join([*lines, f"F is {_kind(self.forward_facts)}.", f"{where}."])


def certify(quantizer: Quantizer, mu: float, interval: tuple[float, float] | None = None) -> Certificate:
    """Whether (F, B) decomposes at mu on the interval, by default [-R, R] with R = 8 / mu clamped to [4, 100].

    The row's own P and T are checked first: P monotone, F = T o P, B = T' o P. If it states none, or the check fails,
    the rules of `inference` either infer P and T from F and B or find a witness. ValueError, and no verdict, if the
    interval is empty, or a map is not finite on it or varies too fast to be sampled.
    """
    low, high = interval or _default_interval(mu)
    if not low < high:
        raise ValueError(f"interval=({low}, {high}): the lower end comes first")
    row, prox, transform = quantizer, quantizer.prox, quantizer.transform
    maps = [_at(f, mu) for f in (row.forward, row.backward, prox) if f is not None]
    with torch.no_grad():
        mesh = sample(maps, low, high)
        if prox is not None and transform is not None:
            error = _claim_error(row, _at(prox, mu), transform, mu, mesh)
            if error is not None:
                found: _Found = (_at(prox, mu), _at(transform, mu), mesh.facts(2), None, error)
                return _certificate(row.name, mu, mesh, found, claimed=True)
        return _certificate(row.name, mu, mesh, _inferred(maps[0], maps[1], mesh), claimed=False)


_Found = tuple[Scalar | None, Scalar | None, Facts | None, Witness | None, float]  # P, T, facts of P, witness, error


def _certificate(name: str, mu: float, mesh: Mesh, found: _Found, *, claimed: bool) -> Certificate:
    prox, transform, prox_facts, witness, error = found
    return Certificate(
        quantizer=name,
        mu=mu,
        decomposes=witness is None,
        prox=prox,
        transform=transform,
        claimed=claimed,
        forward_facts=mesh.facts(0),
        prox_facts=prox_facts,
        witness=witness,
        interval=(mesh.x[0].item(), mesh.x[-1].item()),
        tolerance=TOLERANCE,
        error=error,
    )


def _default_interval(mu: float) -> tuple[float, float]:
    radius = min(max(4.0, 8 / mu), 100.0) if mu > 0 else 100.0
    return -radius, radius


def _at(f: Map, mu: float) -> Scalar:
    return lambda w: f(w, mu).to(w.dtype)


def _between(mesh: Mesh) -> Tensor:
    """One new point, off the middle, in each cell of the mesh that is not narrow."""
    open_cells = ~mesh.narrow()
    return (mesh.x[:-1] + (1 - GOLDEN) * mesh.x.diff())[open_cells]


def _claim_error(row: Quantizer, prox: Scalar, transform: Map, mu: float, mesh: Mesh) -> float | None:
    """Max |T(P(w)) - F(w)| if P is monotone, F = T o P and B = T' o P on the mesh and between its points; else None."""
    fresh = _between(mesh)
    w = torch.cat([mesh.x, fresh])
    f = torch.cat([mesh.values[0], _at(row.forward, mu)(fresh)])
    b = torch.cat([mesh.values[1], _at(row.backward, mu)(fresh)])
    u = torch.cat([mesh.values[2], prox(fresh)])
    order = w.argsort()
    error = (transform(u, mu) - f).abs().max().item()
    # At a kink of T any slope between its two one-sided slopes is accepted.
    near = 1e-9 * (1 + u.abs())
    slopes = torch.stack([derivative(transform, v, mu) for v in (u - near, u, u + near)])
    lowest, highest = slopes.nan_to_num(nan=math.inf).amin(0), slopes.nan_to_num(nan=-math.inf).amax(0)
    slack = TOLERANCE * mesh.sizes[1]
    holds = (
        (u[order].cummax(0).values - u[order]).max() <= TOLERANCE * mesh.sizes[2]
        and error <= TOLERANCE * mesh.sizes[0]
        and ((b >= lowest - slack) & (b <= highest + slack)).all()
        and _largest_spread(u[order], b[order]) <= slack
    )
    return error if holds else None


def _largest_spread(u: Tensor, b: Tensor) -> Tensor:
    """The largest range of B over a run of equal u: B must be a function of P, even at the kinks of T."""
    flat = torch.cat([u.new_zeros(1), (u.diff() != 0).to(u.dtype)]).cumsum(0).long()
    empty = b.new_zeros(len(b))
    highest, lowest = (empty.scatter_reduce(0, flat, b, how, include_self=False) for how in ("amax", "amin"))
    return (highest - lowest).max()


def _inferred(forward: Scalar, backward: Scalar, mesh: Mesh) -> _Found:
    """P, T and P's facts, inferred on the mesh, or a witness. ValueError if T o P misses F between its points."""
    cells = Cells(mesh, backward)
    witness = cells.witness()
    if witness:
        return None, None, None, witness, math.nan
    prox, transform, p = decomposition(cells)
    fresh = _between(mesh)
    misses = (transform(prox(fresh)) - forward(fresh)).abs()
    error = misses.max().item()
    if error > TOLERANCE * cells.f_size:
        raise ValueError(f"F or B varies too fast near w = {fresh[misses.argmax()].item():.6g} to be sampled")
    return prox, transform, facts(mesh, p, (p[-1] - p[0]).item()), None, error


def _kind(of: Facts) -> str:
    """The facts in words."""
    if not of.monotone:
        return "not monotone, so no proximal map"
    if of.nonexpansive:
        return "monotone and nonexpansive: the proximal map of a convex function"
    jumps = ""
    if of.jumps:
        jumps = " with a jump at " if len(of.jumps) == 1 else f" with {len(of.jumps)} jumps, at "
        jumps += ", ".join(f"{w:.6g}" for w in of.jumps)
    return f"monotone{jumps} but not nonexpansive: the proximal map of a nonconvex function"
