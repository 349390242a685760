"""Convergence of PC++: bounds proven here, checked on convex quadratics run through the real optimizer.

Each bound is for one choice of P, and its proof is in the docstring of the function that computes it:

    lazy_projection_bound   P the projection onto the box [-1, 1]^d (row hardtanh): the gap falls as 1/T
    sign_bound              P = sign (row bc), which is not nonexpansive: the cost of that is a computable sum
    descent_bound           P = id (every completion): gradient descent on the smooth, nonconvex l o T at fixed mu;
                            its smoothness constant is computed on a grid, not proven

The first two follow the pattern of dual averaging (Nesterov, 2009) and of Dockhorn et al. (2021), who bound
ProxConnect for any proximal map; the proofs here are for these maps only.
Throughout y_t = w*_t.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.catalog import Quantizer, get
from quantizers.proxconnect import ProxConnect
from quantizers.sharpness import Constant, Shape, SharpnessSchedule

ROUNDING = 1e-9
"""Relative tolerance: a computed eta = 1/L counts as eta <= 1/L."""


@dataclass(frozen=True)
class Quadratic:
    """l(w) = 1/2 (w - c)' A (w - c), A positive definite. curvature A: (..., d, d), centre c: (..., d).

    Leading dimensions are independent problems; w: (..., d) broadcasts against them.
    """

    curvature: Tensor
    centre: Tensor

    def __call__(self, w: Tensor) -> Tensor:
        """l(w), (...)."""
        return ((w - self.centre) * self.gradient(w)).sum(-1) / 2

    def gradient(self, w: Tensor) -> Tensor:
        """A (w - c), (..., d)."""
        product: Tensor = self.curvature @ (w - self.centre).unsqueeze(-1)
        return product.squeeze(-1)

    @property
    def smoothness(self) -> float:
        """L, the largest eigenvalue of A, over all the problems: |grad l(v) - grad l(w)| <= L |v - w|."""
        return float(torch.linalg.eigvalsh(self.curvature).max())

    def box_minimizer(self) -> Tensor:
        """The minimizer of l over [-1, 1]^d, (..., d); exact, by trying all 3^d sets of coordinates at a bound."""
        dim = self.centre.shape[-1]
        sides = torch.tensor(list(itertools.product((-1, 0, 1), repeat=dim)), dtype=self.centre.dtype)
        sides = sides.view(-1, *[1] * (self.centre.dim() - 1), dim)
        free = (sides == 0).to(sides)
        # At free coordinates the gradient is 0; at the others w equals the bound.
        system = free.unsqueeze(-1) * self.curvature * free.unsqueeze(-2) + torch.diag_embed(1 - free)
        candidates = torch.linalg.solve(system, sides - free * self.gradient(sides))
        feasible = (candidates.abs() <= 1 + 1e-12).all(-1)
        best = torch.where(feasible, self(candidates), torch.inf).argmin(0)
        chosen: Tensor = candidates.gather(0, best[None, ..., None].expand(1, *self.centre.shape)).squeeze(0)
        return chosen.clamp(-1, 1)


def random_quadratics(num: int, dim: int, generator: torch.Generator) -> Quadratic:
    """`num` problems with L = 1, eigenvalues log-uniform from 1/50, and centres inside and outside the box."""
    basis = torch.linalg.qr(torch.randn(num, dim, dim, dtype=torch.float64, generator=generator)).Q
    eigenvalues = 50 ** -torch.rand(num, dim, dtype=torch.float64, generator=generator)
    eigenvalues /= eigenvalues.amax(-1, keepdim=True)
    centre = 3 * torch.rand(num, dim, dtype=torch.float64, generator=generator) - 1.5
    return Quadratic(basis @ torch.diag_embed(eigenvalues) @ basis.mT, centre)


@dataclass(frozen=True)
class Trajectory:
    """A run of T steps: w*_0 .. w*_T and w_0 .. w_T, (T + 1, ..., d), and the learning rates eta_0 .. eta_{T-1}."""

    latents: Tensor
    weights: Tensor
    rates: Tensor


def run(
    loss: Quadratic,
    quantizer: str,
    start: Tensor,
    rates: Sequence[float],
    sharpness: Shape | None = None,
    noise: Tensor | None = None,
) -> Trajectory:
    """Run PC++ on `loss` from w*_0 = start, (..., d), with ProxConnect around SGD, one step per learning rate.

    mu is 1, or follows `sharpness`. noise: (T, ..., d) is added to the gradients.
    """
    w = torch.nn.Parameter(start.clone())
    sgd = torch.optim.SGD([{"params": [w], "quantizer": quantizer}], lr=rates[0])
    optimizer = ProxConnect(sgd)
    schedule = SharpnessSchedule(optimizer, sharpness or Constant(1.0), len(rates))
    latents, weights = [start.clone()], [w.detach().clone()]
    for t, rate in enumerate(rates):
        w.grad = loss.gradient(weights[-1]) + (0 if noise is None else noise[t])
        sgd.param_groups[0]["lr"] = rate
        schedule.step()
        optimizer.step()
        latents.append(optimizer.latent(w).clone())
        weights.append(w.detach().clone())
    return Trajectory(torch.stack(latents), torch.stack(weights), torch.tensor(rates, dtype=start.dtype))


def ergodic_gap(loss: Quadratic, weights: Tensor, rates: Tensor) -> Tensor:
    """l(mean of the first T weights) - min of l over [-1, 1]^d, for T = 1, 2, ...; the mean weighted by the rates.

    weights: (T, ..., d), rates: (T,); the gap: (T, ...). The mean of binary weights is in the box but not binary.
    """
    sums = _along_time(rates, weights).mul(weights).cumsum(0)
    means = sums / _along_time(rates.cumsum(0), weights)
    return loss(means) - loss(loss.box_minimizer())


def lazy_projection_bound(loss: Quadratic, path: Trajectory, w: Tensor, variance: float = 0.0) -> Tensor:
    """A bound on E l(mean of w_1 .. w_T) - l(w) for P the projection onto the box and any w in it, T = 1, 2, ...

        (D_0 + sum_t eta_t^2 variance / (2 (1 - eta_t L))) / sum_t eta_t,   D_0 = (|w - y_0|^2 - |w_0 - y_0|^2) / 2

    for 0 < eta_t <= 1/L (with noise: < 1/L, or the bound is infinite). t runs from 0 to T - 1, and the mean weights
    w_{t+1} by eta_t. The gradients are g_t = grad l(w_t) + noise, the noise having mean 0 given the past and
    E |noise|^2 <= variance. So without noise and at eta = 1/L the gap is at most L |w - y_0|^2 / (2 T). With noise and
    eta_t = eta_0 / sqrt(t + 1) it is O(log T / sqrt T); a constant eta = eta_0 / sqrt(T), for a T fixed beforehand,
    removes the log.

    Proof. psi(y) = max over v in the box of <v, y> - |v|^2 / 2 is attained at P(y). Let D_t = |w|^2 / 2 + psi(y_t) -
    <w, y_t>, which is >= 0. Since psi(y_t) is the maximum, attained at w_t, of a 1-strongly concave function,
    psi(y_t) >= <w_{t+1}, y_t> - |w_{t+1}|^2 / 2 + |s|^2 / 2 with s = w_{t+1} - w_t. With y_{t+1} = y_t - eta_t g_t,
        D_{t+1} - D_t <= eta_t <w - w_{t+1}, g_t> - |s|^2 / 2.
    Smoothness at w_{t+1} and convexity give <w - w_{t+1}, grad l(w_t)> <= l(w) - l(w_{t+1}) + L |s|^2 / 2, so
        eta_t (l(w_{t+1}) - l(w)) <= D_t - D_{t+1} + eta_t <w - w_t - s, noise> - (1 - eta_t L) |s|^2 / 2.
    <w - w_t, noise> has mean 0. By completing the square, the rest of the noise term plus the last term is at most
    eta_t^2 |noise|^2 / (2 (1 - eta_t L)). Sum over t; l is convex, so l of the mean is at most the mean of l. At t = 0,
    psi(y_0) = (|y_0|^2 - |w_0 - y_0|^2) / 2.

    ValueError if a learning rate is too large. w: (..., d); the bound: (T, ...).
    """
    slack = 1 - path.rates * (loss.smoothness * (1 - ROUNDING))
    if bool((slack < 0).any()):
        raise ValueError(f"learning rate {path.rates.max():g}: the bound needs eta <= 1/L = {1 / loss.smoothness:g}")
    start, w_0 = path.latents[0], path.weights[0]
    divergence = ((w - start).square().sum(-1) - (w_0 - start).square().sum(-1)) / 2
    from_noise = (path.rates.square() * variance / (2 * slack)).cumsum(0) if variance > 0 else torch.zeros_like(slack)
    steps = path.rates.cumsum(0)
    return (divergence + _along_time(from_noise, divergence, 1)) / _along_time(steps, divergence, 1)


def sign_bound(path: Trajectory, w: Tensor) -> Tensor:
    """A bound on l(mean of w_0 .. w_{T-1}) - l(w) for P = sign and any w in the box, T = 1, 2, ...

        (|y_0|_1 - <w, y_0> + sum_t D_t) / sum_t eta_t
        D_t = |y_{t+1}|_1 - |y_t|_1 - <sign(y_t), y_{t+1} - y_t> >= 0

    for convex l, any eta_t and gradients without noise. t runs from 0 to T - 1, and the mean weights w_t by eta_t.

    Proof. eta_t <w_t - w, grad l(w_t)> = <w_t - w, y_t - y_{t+1}> = |y_t|_1 - |y_{t+1}|_1 + D_t + <w, y_{t+1} - y_t>.
    The sum over t is |y_0|_1 - <w, y_0> - (|y_T|_1 - <w, y_T>) + sum_t D_t, and the bracket is >= 0 for w in the box.
    Convexity makes the left side at least eta_t (l(w_t) - l(w)), and l of the mean at most the mean of l.

    |.|_1 is the conjugate of the box, as psi is in `lazy_projection_bound`, but not smooth: D_t = 2 |y_{t+1}| for each
    coordinate that changes sign, and is 0 otherwise. While signs keep changing, sum_t D_t grows like sum_t eta_t: the
    bound levels off, and no choice of eta helps, since y scales with it. So the bound does not show convergence; it
    limits how far from optimal the changes of sign can leave the mean. w: (..., d); the bound: (T, ...).
    """
    y, norms = path.latents, path.latents.abs().sum(-1)
    divergences = norms.diff(dim=0) - (path.weights[:-1] * y.diff(dim=0)).sum(-1)
    total = norms[0] - (w * y[0]).sum(-1) + divergences.cumsum(0)
    return total / _along_time(path.rates.cumsum(0), total)


def squared_gradients(loss: Quadratic, quantizer: Quantizer, path: Trajectory, mu: float) -> Tensor:
    """The mean of |grad (l o T)(y_t)|^2 over t = 0 .. T-1, for T = 1, 2, ..., (T, ...). Needs F = T, B = T'."""
    slopes = quantizer.backward(path.latents[:-1], mu)
    squares = (slopes * loss.gradient(path.weights[:-1])).square().sum(-1)
    counts = torch.arange(1, len(squares) + 1, dtype=squares.dtype)
    return squares.cumsum(0) / _along_time(counts, squares)


def descent_bound(loss: Quadratic, path: Trajectory) -> Tensor:
    """A bound on the mean of |grad (l o T)(y_t)|^2, t = 0 .. T-1, for P = id, fixed mu and constant eta <= 1/L':

        2 l(T(y_0)) / (eta T)       where L' is the smoothness of f = l o T.

    The proof takes L' as given. `transformed_smoothness` computes it on a grid, so the bound with that L' is only as
    good as the grid, not proven.

    Proof. y_{t+1} = y_t - eta grad f(y_t), so f(y_{t+1}) <= f(y_t) - eta (1 - eta L' / 2) |grad f(y_t)|^2, which is at
    most f(y_t) - eta / 2 |grad f(y_t)|^2. Sum over t and use f >= min l = 0. So some y_t is nearly stationary for f;
    f is not convex, so this says nothing about a minimum. The bound: (T, ...).
    """
    first = loss(path.weights[0])
    return 2 * first / _along_time(path.rates.cumsum(0), first, 1)


def transformed_smoothness(loss: Quadratic, quantizer: Quantizer, mu: float) -> float:
    """L' with |grad f(u) - grad f(v)| <= L' |u - v| for f = l o T, T = F, over all the problems of `loss`.

    The Hessian of f is diag(T') A diag(T') + diag(T'' . A (T - c)), so L' = L max |T'|^2 + max |T''| max |A (T - c)|.
    The maxima over w are not proven: they are taken on a grid of 80,001 points with |mu w| <= 40, plus 1 % for the
    points in between. ValueError if T' jumps: then f is not smooth.
    """
    coarse, fine = (torch.linspace(-40, 40, num, dtype=torch.float64) / mu for num in (40_001, 80_001))
    curvature, same = (float((quantizer.backward(w, mu).diff() / w.diff()).abs().max()) for w in (fine, coarse))
    if curvature > 1.5 * same:
        raise ValueError(f"{quantizer.name} at mu={mu:g}: B jumps, so l o T has no Lipschitz gradient")
    value, slope = (float(f(fine, mu).abs().max()) for f in (quantizer.forward, quantizer.backward))
    residual = float((loss.curvature.abs() @ (value + loss.centre.abs()).unsqueeze(-1)).max())
    return 1.01 * (loss.smoothness * slope**2 + curvature * residual)


@dataclass(frozen=True)
class Curve:
    """A measured quantity and its bound at T = 1, 2, ..., each (T,) and a mean over several problems; with labels."""

    title: str
    quantity: str
    measured: Tensor
    bound: Tensor


def curves(num_steps: int) -> list[Curve]:
    """The three bounds, the first with and without noise, on eight seeded problems in five dimensions."""
    generator = torch.Generator().manual_seed(0)
    loss = random_quadratics(8, 5, generator)
    start = 2 * torch.rand(8, 5, dtype=torch.float64, generator=generator) - 1
    best, constant = loss.box_minimizer(), [1.0] * num_steps
    gap = "gap of the mean to the best in the box"

    exact = run(loss, "hardtanh", start, constant)
    noise = torch.randint(0, 2, (num_steps, 32, *start.shape), generator=generator).to(start).mul_(2).sub_(1)
    rates = [0.5 / (t + 1) ** 0.5 for t in range(num_steps)]
    noisy = run(loss, "hardtanh", start.expand(noise.shape[1:]), rates, noise=noise)
    binary = run(loss, "bc", start, constant)
    smoothness = transformed_smoothness(loss, get("bnn++"), mu=2.0)
    smooth = run(loss, "bnn++", start, [1 / smoothness] * num_steps, Constant(2.0))
    return [
        Curve(
            "hardtanh: P the projection, eta = 1/L",
            gap,
            ergodic_gap(loss, exact.weights[1:], exact.rates).mean(-1),
            lazy_projection_bound(loss, exact, best).mean(-1),
        ),
        Curve(
            "hardtanh, noisy gradients, eta ~ 1/sqrt(t)",
            gap,
            ergodic_gap(loss, noisy.weights[1:], noisy.rates).mean((-1, -2)),
            lazy_projection_bound(loss, noisy, best, variance=5.0).mean((-1, -2)),
        ),
        Curve(
            "bc: P = sign, not nonexpansive",
            gap,
            ergodic_gap(loss, binary.weights[:-1], binary.rates).mean(-1),
            sign_bound(binary, best).mean(-1),
        ),
        Curve(
            "bnn++ at mu = 2: P = id, eta = 1/L'",
            "mean squared gradient of l o T",
            squared_gradients(loss, get("bnn++"), smooth, mu=2.0).mean(-1),
            descent_bound(loss, smooth).mean(-1),
        ),
    ]


def _along_time(values: Tensor, like: Tensor, extra: int = 0) -> Tensor:
    """values: (T,) shaped to broadcast over the trailing dimensions of `like`: (T, ...), or (...) if extra is 1."""
    return values.view(-1, *[1] * (like.dim() - 1 + extra))
