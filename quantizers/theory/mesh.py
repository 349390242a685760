"""Adaptive sampling of scalar maps: the points at which `certify` evaluates them.

A cell is cut in four while a map deviates from the straight line across it by more than RESOLUTION of the map's size,
or while B changes sign in it, down to a width below which a change counts as a jump. So kinks and jumps are found by
bisection, in all cells at once. Spikes narrower than the initial spacing are missed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RESOLUTION = 1e-6
TOLERANCE = 1e-5
NARROW = 2e-14  # the width of a jump, relative to the interval
CROSSING = 1e-8  # the width of a sign change, relative to the interval
MAX_POINTS = 200_000
GOLDEN = 0.5 * (5**0.5 - 1)  # irrational: no point falls on a kink or on an isolated value of a map


@dataclass(frozen=True)
class Facts:
    """A map on an interval: monotone (a proximal map); also nonexpansive (of a convex function); its jumps."""

    monotone: bool
    nonexpansive: bool
    jumps: tuple[float, ...]


@dataclass(frozen=True)
class Mesh:
    """Increasing points x (n,) and the maps' values there, (maps, n). A map's size is its range; B's is max |B|."""

    x: Tensor
    values: Tensor
    sizes: Tensor

    @property
    def reach(self) -> float:
        """Length of the interval, if it is symmetric; in general twice the modulus of its farthest point."""
        return 2 * self.x.abs().max().item()

    def narrow(self) -> Tensor:
        """The cells (n - 1,) so narrow that any change of a map within one counts as a jump."""
        return self.x.diff() <= NARROW * self.reach

    def jumps(self, index: int) -> Tensor:
        """The cells (n - 1,) in which map `index` jumps."""
        return self.narrow() & (self.values[index].diff().abs() > RESOLUTION * self.sizes[index])

    def facts(self, index: int) -> Facts:
        """Facts about map `index`."""
        return facts(self, self.values[index], self.sizes[index].item())


def facts(mesh: Mesh, values: Tensor, size: float) -> Facts:
    """Facts about a map of the given size, from its values (n,) at the mesh's points."""
    moved, width = values.diff(), mesh.x.diff()
    jumps = mesh.narrow() & (moved.abs() > RESOLUTION * size)
    expansion = moved.abs() - (1 + TOLERANCE) * width
    middles = (mesh.x[:-1] + mesh.x[1:])[jumps] / 2
    return Facts(
        monotone=bool((values.cummax(0).values - values).max() <= TOLERANCE * size),
        nonexpansive=not jumps.any() and bool(expansion.max() <= 1e-9 * size),
        jumps=tuple(0.0 if abs(x) <= NARROW * mesh.reach else x for x in middles.tolist()),
    )


def sample(maps: list[Callable[[Tensor], Tensor]], low: float, high: float) -> Mesh:
    """The mesh of the maps on [low, high]; the second map is B.

    ValueError if a map is not finite there or varies too fast to be sampled.
    """

    def evaluate(x: Tensor) -> Tensor:
        values = torch.stack([f(x) for f in maps])
        if not values.isfinite().all():
            raise ValueError(f"not finite at w = {x[~values.isfinite().all(0)][0].item():.6g}")
        return values

    x = _first_points(low, high)
    y = evaluate(x)
    sizes = y.amax(1) - y.amin(1)
    sizes[1] = y[1].abs().max()
    sizes[sizes == 0] = 1.0
    xs, ys, num_points = [x], [y], len(x)
    start, end, at_start, at_end = x[:-1], x[1:], y[:, :-1], y[:, 1:]
    reach = 2 * max(abs(low), abs(high))
    parts = torch.arange(1, 4, dtype=torch.float64)[:, None] / 4
    while start.numel():
        width = end - start
        x = start + width * parts
        y = evaluate(x.flatten()).reshape(len(maps), 3, -1)
        xs.append(x.flatten())
        ys.append(y.flatten(1))
        num_points += x.numel()
        if num_points > MAX_POINTS:
            raise ValueError(f"F or B varies too fast near w = {x[0, 0].item():.6g} to be sampled")
        straight = at_start[:, None] + (at_end - at_start)[:, None] * parts
        bent = ((y - straight).abs() > RESOLUTION * sizes[:, None, None]).any(0).any(0)
        crossed = (at_start[1] * at_end[1] < 0) & (width > CROSSING * reach)
        split = (bent | crossed) & (width > NARROW * reach)
        edges = torch.cat([start[None], x, end[None]])[:, split]
        at_edges = torch.cat([at_start[:, None], y, at_end[:, None]], 1)[:, :, split]
        start, end = edges[:-1].flatten(), edges[1:].flatten()
        at_start, at_end = at_edges[:, :-1].flatten(1), at_edges[:, 1:].flatten(1)
    x, order = torch.cat(xs).sort()
    return Mesh(x, torch.cat(ys, 1)[:, order], sizes)


def _first_points(low: float, high: float) -> Tensor:
    """200 equally spaced points, 60 on each side of 0 in equal ratios from 1e-5 to 1, none round; and both ends."""
    even = low + (high - low) * (torch.arange(200, dtype=torch.float64) + GOLDEN) / 200
    ratios = GOLDEN * torch.logspace(-5, 0, 60, dtype=torch.float64) * max(abs(low), abs(high))
    points = torch.cat([even, ratios, -ratios * (1 + GOLDEN / 100)])
    ends = torch.tensor([low, high], dtype=torch.float64)
    return torch.cat([points[(points > low) & (points < high)], ends]).sort().values
