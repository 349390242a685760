"""Pictures: F, B, P and T of a pair with its certificate, the bounds of `convergence`, and paths in the plane.

Colours are Okabe and Ito's and differ in lightness, so they stay distinct in greyscale.
"""

from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from textwrap import fill

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from quantizers.catalog import Quantizer
from quantizers.sharpness import Exponential
from quantizers.theory.certificates import Certificate
from quantizers.theory.convergence import Curve, Quadratic, Trajectory, run

ScalarMap = Callable[[Tensor], Tensor]
FARTHEST = 2.5
"""The largest |w*| in any picture."""
SETTLED = 0.02
"""A map has settled where it varies by less than this share of its range."""
NEGLIGIBLE = 1e-6
"""Changes smaller than this are drawn as constant (absolute; relative to the map's range where noted)."""
NUM_PATH_STEPS = 500
BLUE, ORANGE, BLACK, GREY = "#0072B2", "#E69F00", "#000000", "#999999"


def draw_certificate(quantizer: Quantizer, certificate: Certificate, out: Path) -> None:
    """Write F, B, P and T at the certificate's mu as PNG; if P and T do not exist, F and B with the witness shaded."""
    mu = certificate.mu

    def forward(w: Tensor) -> Tensor:
        return quantizer.forward(w, mu)

    def backward(w: Tensor) -> Tensor:
        return quantizer.backward(w, mu)

    figure = Figure(figsize=(10, 2.7), layout="constrained")
    panels = figure.subplots(1, 4)
    reach = _reach(forward, backward, certificate)
    _draw_map(panels[0], "F(w*)", forward, reach)
    _draw_map(panels[1], "B(w*)", backward, reach)
    if certificate.prox is not None and certificate.transform is not None:
        _draw_map(panels[2], "P(w*)", certificate.prox, reach)
        _draw_transform(panels[3], certificate.prox, certificate.transform, reach)
    else:
        _draw_failure(panels, certificate, reach)
    verdict = "principled" if certificate.decomposes else "not principled"
    at = f" at mu = {mu:g}" if quantizer.uses_mu else ""
    figure.suptitle(f"{certificate.quantizer}{at}: {verdict}", fontsize=11)
    _save(figure, out)


def _reach(forward: ScalarMap, backward: ScalarMap, certificate: Certificate) -> float:
    """How far from 0 to draw: somewhat beyond where F and B become constant, within the checked interval."""
    end = min(-certificate.interval[0], certificate.interval[1], FARTHEST)
    w = torch.linspace(0, end, 4001, dtype=torch.float64)
    reach = 0.0
    for values in (f(side * w) for f in (forward, backward) for side in (1, -1)):
        moving = (values - values[-1]).abs() > SETTLED * float(values.max() - values.min())
        reach = max(reach, float(w[moving].max()) if bool(moving.any()) else 0.0)
    if certificate.witness is not None:
        reach = max(reach, min(abs(certificate.witness.low), abs(certificate.witness.high)))
    return min(1.6 * reach, end) or min(2.0, end)


def _draw_map(axes: Axes, title: str, f: ScalarMap, reach: float) -> None:
    """Draw the graph over [-reach, reach], with dotted lines at jumps."""
    pieces = _pieces(f, -reach, reach)
    for w, values in pieces:
        axes.plot(w, values, color=BLUE, linewidth=2)
    for (w, values), (after, next_values) in pairwise(pieces):
        axes.plot([w[-1], after[0]], [values[-1], next_values[0]], color=BLUE, linewidth=1, linestyle=":")
    _furnish(axes, title, "w*")


def _draw_transform(axes: Axes, prox: ScalarMap, transform: ScalarMap, reach: float) -> None:
    """Draw T over the values that P takes: intervals as lines, isolated values as dots."""
    for _, u in _pieces(prox, -reach, reach):
        style = "o" if bool((u == u[0]).all()) else "-"
        axes.plot(u, transform(u), style, color=BLUE, linewidth=2, markersize=6)
    axes.margins(0.12)
    _furnish(axes, "T(u) on the values u of P", "u")


def _draw_failure(panels: Sequence[Axes], certificate: Certificate, reach: float) -> None:
    witness = certificate.witness
    if witness is None:
        return
    for axes in panels[:2]:
        low, high = max(witness.low, -reach), min(witness.high, reach)
        axes.axvspan(low, high, facecolor=ORANGE, alpha=0.35, hatch="//", edgecolor=GREY, linewidth=0)
    for axes in panels[2:]:
        axes.axis("off")
    low, high = (0.0 if abs(end) < NEGLIGIBLE else end for end in (witness.low, witness.high))
    words = f"No P and T exist.\n\nOn [{low:.3g}, {high:.3g}], shaded:\n{fill(witness.rule, 56)}"
    panels[2].text(0, 0.5, words, transform=panels[2].transAxes, verticalalignment="center", fontsize=10)


def _furnish(axes: Axes, title: str, variable: str) -> None:
    low, high = axes.get_ylim()
    if high - low < NEGLIGIBLE:  # a constant: matplotlib would magnify its rounding
        axes.set_ylim(min(low, 0) - 0.1, high + 0.3)
    axes.axhline(0, color=GREY, linewidth=0.5, zorder=0)
    axes.axvline(0, color=GREY, linewidth=0.5, zorder=0)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(variable, fontsize=9)
    axes.tick_params(labelsize=8)


def _pieces(f: ScalarMap, low: float, high: float) -> list[tuple[Tensor, Tensor]]:
    """(w, f(w)) on an even grid of [low, high], cut in two wherever f jumps."""
    grid = torch.linspace(low, high, 801, dtype=torch.float64)
    left, right = _narrowed(f, grid[:-1], grid[1:])
    rises = f(grid).diff().abs()
    least = rises.clamp(min=NEGLIGIBLE * float(rises.sum())) / 100  # relative to the map's total variation
    jumps = ((f(right) - f(left)).abs() > least).nonzero().flatten().tolist()
    pieces = []
    for first, last in pairwise([-1, *jumps, len(grid) - 1]):
        begin = grid[:0] if first < 0 else right[first : first + 1]
        end = left[last : last + 1] if last in jumps else grid[:0]
        w = torch.cat([begin, grid[first + 1 : last + 1], end])
        pieces.append((w, f(w)))
    return pieces


def _narrowed(f: ScalarMap, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of each interval after bisection, always into the half where f changes more."""
    for _ in range(60):
        middle = (left + right) / 2
        values = f(middle)
        earlier = (values - f(left)).abs() > (f(right) - values).abs()
        left, right = torch.where(earlier, left, middle), torch.where(earlier, middle, right)
    return left, right


def draw_convergence(curves: list[Curve], out: Path) -> None:
    """Write each measured quantity and its bound over T as PNG, log-log, one panel per curve."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    for axes, curve in zip(figure.subplots(2, 2, sharex=True).flat, curves, strict=True):
        # Evenly spaced on the logarithmic axis; more points would only make the file larger.
        steps = sorted({round(len(curve.measured) ** (k / 200)) for k in range(201)})
        at = torch.tensor(steps) - 1
        axes.loglog(steps, curve.bound[at], color=ORANGE, linestyle="--", linewidth=2, label="bound")
        axes.loglog(steps, curve.measured[at], color=BLUE, linewidth=1.5, label="measured")
        axes.set_title(curve.title, fontsize=10)
        axes.set_ylabel(curve.quantity, fontsize=9)
        axes.grid(visible=True, color="#dddddd", linewidth=0.5)
        axes.legend(fontsize=9)
    for axes in figure.axes[-2:]:
        axes.set_xlabel("steps T")
    _save(figure, out)


def draw_paths(out: Path) -> None:
    """Write the paths of w* and w under bc, bnn and bnn++ on one quadratic in the plane, as PNG."""
    curvature = torch.tensor([[1.0, -0.6], [-0.6, 0.8]], dtype=torch.float64)
    loss = Quadratic(curvature, torch.tensor([0.6, -0.5], dtype=torch.float64))
    start = torch.tensor([0.713, 0.787], dtype=torch.float64)  # no latent lands on 0
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    for axes, name in zip(panels, ("bc", "bnn", "bnn++"), strict=True):
        path = run(loss, name, start, [0.05] * NUM_PATH_STEPS, Exponential(1.0, 50.0) if name == "bnn++" else None)
        _draw_path(axes, loss, path)
        axes.set_title(f"{name}, mu from 1 to 50" if name == "bnn++" else name)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8)
    _save(figure, out)


def _draw_path(axes: Axes, loss: Quadratic, path: Trajectory) -> None:
    ticks = torch.linspace(-1.6, 1.6, 161, dtype=torch.float64)
    plane = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=-1)
    axes.contour(ticks, ticks, loss(plane), levels=12, colors="#cccccc", linewidths=0.8)
    axes.add_patch(Rectangle((-1, -1), 2, 2, fill=False, linestyle=":", color=GREY, label="[-1, 1]^2"))
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 2)
    axes.plot(*corners.T, "s", color="white", markeredgecolor=BLACK, markersize=11, label="binary points")
    axes.plot(*path.latents.T, color=BLUE, linewidth=1.5, label="w*, the latents")
    axes.plot(*path.weights.T, ".", color=ORANGE, markersize=7, label="w = F(w*)")
    axes.plot(*path.latents[0], "o", color=BLUE, markersize=6, label="start of w*")
    axes.plot(*loss.centre, "+", color=BLACK, markersize=9, label="minimum of l")
    axes.plot(*path.weights.mean(0), "^", color=ORANGE, markeredgecolor=BLACK, markersize=8, label="mean of w")
    axes.plot(*torch.sign(path.latents[-1]), "*", color=BLACK, markersize=7, label="deployed, sign(w*)")
    axes.set_aspect("equal")


def _save(figure: Figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    drawn = BytesIO()
    figure.savefig(drawn, dpi=100)
    # A palette suffices for lines and text, and saves two thirds of the bytes.
    Image.open(drawn).convert("RGB").quantize(128).save(out, optimize=True)
