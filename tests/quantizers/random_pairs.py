"""Random principled pairs for hypothesis to draw, and changes that are certain to break one."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from hypothesis import strategies as st
from torch import Tensor

from quantizers import Quantizer, maps, synthesize
from quantizers.catalog import Map

MU = 2.0  # of every pair; the interval certified is then [-4, 4]
GRID = torch.linspace(-4, 4, 1601, dtype=torch.float64)
WINDOW = 0.4
SIGNIFICANT = 0.02  # of the range of F, or of max |B|


@dataclass(frozen=True)
class Drawn:
    """A map with the words that describe it when a test fails."""

    words: str
    function: Map

    def __repr__(self) -> str:
        return self.words


def _drawn(words: str, function: Callable[[Tensor], Tensor]) -> Drawn:
    return Drawn(words, lambda w, _mu: function(w))


def between(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_subnormal=False).map(lambda x: round(x, 3))


def _staircase(parts: list[tuple[float, float, float]], start: float) -> Drawn:
    """A monotone map: parts of (width, slope, jump at the part's end) from `start` on, with value 0 at `start`."""

    def function(w: Tensor) -> Tensor:
        value, left = torch.zeros_like(w), start
        for width, slope, jump in parts:
            value = value + slope * (w - left).clamp(0, width) + jump * (w >= left + width)
            left += width
        return value

    return _drawn(f"staircase {parts} from {start}", function)


PROXES = st.one_of(
    between(0.5, 1.5).map(lambda a: _drawn(f"{a} sign", lambda w: a * maps.hard_sign(w, MU))),
    st.just(Drawn("outward", maps.outward)),
    between(0.3, 2).map(lambda a: _drawn(f"clip to {a}", lambda w: w.clamp(-a, a))),
    between(0, 1).map(lambda rho: _drawn(f"L({rho})", lambda w: maps.piecewise_linear(w, rho))),
    between(0.1, 1).map(lambda t: _drawn(f"soft threshold {t}", lambda w: w.sign() * (w.abs() - t).clamp(min=0))),
    between(0.1, 1).map(lambda t: _drawn(f"hard threshold {t}", lambda w: w * (w.abs() > t))),
    between(0.4, 1).map(lambda s: _drawn(f"rounding to {s}", lambda w: (w / s).round() * s)),
    st.builds(
        lambda a, b: _drawn(f"{a} w + {b}", lambda w: a * w + b), between(0.2, 1.5), between(-0.5, 0.5)
    ),
    st.builds(
        _staircase,
        st.lists(
            st.tuples(between(0.5, 2), st.just(0.0) | between(0.2, 1), st.just(0.0) | between(0.2, 1)),
            min_size=2,
            max_size=6,
        ),
        between(-3, 0),
    ),
)  # fmt: skip

INCREASING = st.one_of(
    st.builds(lambda a, b: _drawn(f"{a} u + {b}", lambda u: a * u + b), between(0.2, 2), between(-1, 1)),
    between(0.05, 0.5).map(lambda c: _drawn(f"u + {c} u^3", lambda u: u + c * u**3)),
    st.builds(
        lambda a, b, c: _drawn(f"{a} (u + {b}/{c} sin({c} u))", lambda u: a * (u + b / c * torch.sin(c * u))),
        between(0.3, 2), between(-0.9, 0.9), between(0.5, 3),
    ),
    between(0.5, 2).map(lambda k: _drawn(f"tanh({k} u)", lambda u: torch.tanh(k * u))),
)  # fmt: skip
OTHER = st.one_of(
    st.builds(
        lambda a, b, c: _drawn(f"{a} (u + {b}/{c} sin({c} u))", lambda u: a * (u + b / c * torch.sin(c * u))),
        between(0.3, 2), between(1.2, 3), between(0.5, 3),
    ),
    between(0.5, 3).map(lambda k: Drawn(f"SS({k} u)", lambda u, _mu: maps.sign_swish(u, k))),
    st.just(Drawn("H", maps.clip)),
)  # fmt: skip


def pair(prox: Drawn, transform: Drawn) -> Quantizer:
    return synthesize(prox.function, transform.function, name=f"T = {transform}, P = {prox}")


def without_claims(row: Quantizer) -> Quantizer:
    """The same F and B without P and T."""
    return replace(row, prox=None, transform=None)


# Breaking a pair. Each change makes F or B do something in the window's inner part that no P and T allow.


def _part(w: Tensor, low: float) -> Tensor:
    return ((w - low) / WINDOW).clamp(0, 1)


@dataclass(frozen=True)
class Corruption:
    """A change of F or B in the window [low, low + WINDOW]."""

    words: str
    low: float

    def of(self, row: Quantizer) -> Quantizer:
        low, high = self.low, self.low + WINDOW
        f_range = _values(row)[2]

        def forward(w: Tensor, mu: float) -> Tensor:
            f = row.forward(w, mu)
            if self.words == "F is flat where B varies":
                return torch.where((w >= low) & (w <= high), row.forward(torch.full_like(w, low), mu), f)
            if self.words == "F moves where B is 0":
                return f + 0.2 * f_range * _part(w, low)
            return f

        def backward(w: Tensor, mu: float) -> Tensor:
            b, inside = row.backward(w, mu), (w >= low) & (w <= high)
            factors: dict[str, float | Tensor] = {
                "B has the wrong sign where F moves": -1.0,
                "B is 0 where F moves": 0.0,
                "B varies where F is flat": 1 + _part(w, low) / 2,
            }
            return torch.where(inside, b * factors.get(self.words, 1.0), b)

        return replace(row, name=f"{row.name}; {self.words} from {low}", forward=forward, backward=backward)


def corruptions(row: Quantizer) -> list[Corruption]:
    """All corruptions that are certain to break the pair, in windows of 80 grid points, one at every 40th point.

    Negating a B of one sign where F moves: P would fall. Setting that B to 0, or moving F where B = 0: dF = B dP fails.
    Flattening F where B has one sign and varies, or varying B where F is flat: P stays, and B is not a function of it.
    F moves and B varies in the window's inner 60 points.
    """
    f, b, f_range, b_size = _values(row)
    found = []
    for first in range(3, len(GRID) - 90, 40):
        low = GRID[first].item() - 0.001
        inside, inner = slice(first, first + 80), slice(first + 10, first + 70)
        one_sign = max(b[inside].min().item(), -b[inside].max().item()) > SIGNIFICANT * b_size
        moves = _spread(f[inner]) > SIGNIFICANT * f_range > 0
        varies = _spread(b[inner]) > SIGNIFICANT * b_size
        tests = {
            "B has the wrong sign where F moves": one_sign and moves,
            "B is 0 where F moves": one_sign and moves,
            "F is flat where B varies": one_sign and varies,
            "B varies where F is flat": one_sign and _spread(f[inside]) == 0,
            "F moves where B is 0": b[inside].abs().max() == 0 and f_range > 0,
        }
        found += [Corruption(words, low) for words, holds in tests.items() if holds]
    return found


def _values(row: Quantizer) -> tuple[Tensor, Tensor, float, float]:
    """F and B on the grid, the range of F and max |B|."""
    f, b = row.forward(GRID, MU), row.backward(GRID, MU)
    return f, b, _spread(f), b.abs().max().item()


def _spread(values: Tensor) -> float:
    return cast("float", (values.max() - values.min()).item())


def shows(row: Quantizer, mu: float, low: float, high: float, interval: tuple[float, float]) -> str:
    """Which rule of the theory F and B break on [low, high], judged only by their values there; "" if none."""
    everywhere = torch.linspace(*interval, 4001, dtype=torch.float64)
    f_range = _spread(row.forward(everywhere, mu)) or 1.0
    b_size = row.backward(everywhere, mu).abs().max().item() or 1.0
    w = torch.linspace(low, high, 401, dtype=torch.float64)
    f, b = row.forward(w, mu) / f_range, row.backward(w, mu) / b_size
    moved = (f[-1] - f[0]).item()
    if _spread(f) < 1e-6:
        return "flat" if b.abs().min() > 0 and abs(b[-1] - b[0]) > 9e-6 else ""
    if abs(moved) > 1e-6 and b.abs().max() <= 1e-7:
        return "moves where B is 0"
    if abs(moved) > 1e-6 and (b * math.copysign(1, moved)).max() <= 1e-7:
        return "opposes"
    jumps = high - low <= 1e-12 * (interval[1] - interval[0]) and abs(moved) > 1e-6
    return "jumps against B" if jumps and min(b[0] * moved, b[-1] * moved) < 0 else ""
