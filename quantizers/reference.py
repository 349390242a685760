"""The iterations written literally, in float64, one tensor at a time: slow and obvious, the oracle of the tests.

Nothing here uses torch.optim, `proxconnect` or `maps`. It is meant to be checked against the papers by eye.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Map = Callable[[Tensor, float], Tensor]
Gradient = Callable[[list[Tensor]], list[Tensor]]
"""The gradient of the loss at a list of tensors: grad l."""
Move = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]
"""One step of a base optimizer: (v, g, state of this tensor, updated in place) -> the updated tensor."""


# The maps, formula by formula. NaN stays NaN, except in B = 1.


def sign(w: Tensor, _mu: float) -> Tensor:
    """+1 where w >= 0, -1 where w < 0; NaN at NaN."""
    return torch.where(w >= 0, 1.0, torch.where(w < 0, -1.0, w)).to(torch.float64)


def hard_tanh(w: Tensor, _mu: float) -> Tensor:
    """H(w) = min(max(w, -1), 1)."""
    return torch.minimum(torch.maximum(w, torch.tensor(-1.0)), torch.tensor(1.0))


def piecewise_linear(w: Tensor, mu: float) -> Tensor:
    """L(w) = sign(w) where |w| >= 1 - rho, else sign(w) (varrho + |w| (1 - varrho) / (1 - rho)); rho = varrho = mu."""
    rho = varrho = min(max(mu, 0.0), 1.0)
    if rho == 1:
        return sign(w, mu)
    inside = sign(w, mu) * (varrho + w.abs() * (1 - varrho) / (1 - rho))
    return torch.where(w.abs() >= 1 - rho, sign(w, mu), inside)


def sign_swish(w: Tensor, mu: float) -> Tensor:
    """SS(w) = 2 s(mu w) (1 + mu w (1 - s(mu w))) - 1, s the logistic function."""
    s = torch.sigmoid(mu * w)
    return 2 * s * (1 + mu * w * (1 - s)) - 1


def sign_swish_derivative(w: Tensor, mu: float) -> Tensor:
    """SS'(w) = mu (2 - mu w tanh(mu w / 2)) / (1 + cosh(mu w))."""
    return mu * (2 - mu * w * torch.tanh(mu * w / 2)) / (1 + torch.cosh(mu * w))


def approx_sign(w: Tensor, mu: float) -> Tensor:
    """a(mu w): a(x) = 2x + x^2 on [-1, 0), 2x - x^2 on [0, 1), sign elsewhere (Bi-Real Net)."""
    x = mu * w
    inside = torch.where(x < 0, 2 * x + x * x, 2 * x - x * x)
    return torch.where(x.abs() < 1, inside, sign(x, mu))


def approx_sign_derivative(w: Tensor, mu: float) -> Tensor:
    """B = mu a'(mu w): a'(x) = 2 + 2x on [-1, 0), 2 - 2x on [0, 1), 0 elsewhere."""
    x = mu * w
    inside = torch.where(x < 0, 2 + 2 * x, 2 - 2 * x)
    return mu * torch.where(x.abs() >= 1, 0.0, inside)


def tanh(w: Tensor, mu: float) -> Tensor:
    """F = hyperbolic tangent of mu w."""
    return torch.tanh(mu * w)


def tanh_derivative(w: Tensor, mu: float) -> Tensor:
    """B = mu (1 - tanh(mu w)^2), computed as mu / cosh^2 to avoid cancellation."""
    return mu / torch.cosh(mu * w) ** 2


def decaying_tanh(w: Tensor, mu: float) -> Tensor:
    """F = k tanh(t w), t = mu, k = max(1 / t, 1); at t = 0 its limit w (IR-Net)."""
    return w if mu == 0 else max(1 / mu, 1.0) * torch.tanh(mu * w)


def decaying_tanh_derivative(w: Tensor, mu: float) -> Tensor:
    """B = k t (1 - tanh(t w)^2), where k t = max(1, t)."""
    return max(1.0, mu) / torch.cosh(mu * w) ** 2


def bounded_tanh(w: Tensor, mu: float) -> Tensor:
    """tanh(k w) / tanh(k) on [-1, 1], k = mu, sign beyond; at k = 0 its limit H (DSQ, one bit)."""
    if mu == 0:
        return hard_tanh(w, mu)
    return torch.where(w.abs() <= 1, torch.tanh(mu * w) / math.tanh(mu), sign(w, mu))


def bounded_tanh_derivative(w: Tensor, mu: float) -> Tensor:
    """B = k (1 - tanh(k w)^2) / tanh(k) on [-1, 1], 0 beyond; at k = 0 its limit H'."""
    if mu == 0:
        return _inside(w, mu)
    return _inside(w, mu) * mu / torch.cosh(mu * w) ** 2 / math.tanh(mu)


def power_derivative(w: Tensor, mu: float) -> Tensor:
    """(1/o) |w|^(1/o) / |w|; 0.1^(1/o) / 0.1 on [-0.1, 0.1], 0 beyond 1.5 (ReSTE); o = max(mu, 1)."""
    o = max(mu, 1.0)
    m, t = 0.1, 1.5
    near = torch.full_like(w, m ** (1 / o) / m)
    between = torch.where(w.abs() > t, 0.0, w.abs() ** (1 / o) / w.abs() / o)
    return torch.where(w.abs() <= m, near, between)


def sharp_clip(w: Tensor, mu: float) -> Tensor:
    """H(mu w)."""
    return hard_tanh(mu * w, mu)


def sharp_clip_derivative(w: Tensor, mu: float) -> Tensor:
    """B = mu where |mu w| <= 1, 0 elsewhere."""
    return mu * _inside(mu * w, mu)


def one(w: Tensor, _mu: float) -> Tensor:
    """B = 1."""
    return torch.full_like(w, 1.0)


def _inside(w: Tensor, _mu: float) -> Tensor:
    return torch.where(w.abs() <= 1, 1.0, torch.where(w.abs() > 1, 0.0, w)).to(torch.float64)


PAIRS: dict[str, tuple[Map, Map]] = {
    "fp": (lambda w, _mu: w, one),
    "bc": (sign, one),
    "pc": (piecewise_linear, one),
    "hardtanh": (hard_tanh, one),
    "bnn": (sign, _inside),
    "clip++": (sharp_clip, sharp_clip_derivative),
    "bnn+": (sign, sign_swish_derivative),
    "bnn++": (sign_swish, sign_swish_derivative),
    "bireal": (sign, approx_sign_derivative),
    "bireal++": (approx_sign, approx_sign_derivative),
    "ede": (sign, decaying_tanh_derivative),
    "ede++": (decaying_tanh, decaying_tanh_derivative),
    "reste": (sign, power_derivative),
    "tanh": (sign, tanh_derivative),
    "tanh++": (tanh, tanh_derivative),
    "dsq": (sign, bounded_tanh_derivative),
    "dsq++": (bounded_tanh, bounded_tanh_derivative),
}
"""name -> (F, B)."""


# Base optimizers.


def sgd(*, lr: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0) -> Move:
    """SGD: g <- g + weight_decay v; b <- momentum b + g; v <- v - lr b.

    With Nesterov's momentum v <- v - lr (g + momentum b) (Sutskever et al., 2013).
    """

    def move(v: Tensor, g: Tensor, state: dict[str, Any]) -> Tensor:
        g = g + weight_decay * v
        b: Tensor = momentum * state.get("b", torch.zeros_like(v)) + g
        state["b"] = b
        return v - lr * (g + momentum * b if nesterov else b)

    return move


def adamw(
    *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
) -> Move:
    """AdamW: v <- v - lr weight_decay v - lr (m / (1 - beta1^t)) / (sqrt(u / (1 - beta2^t)) + eps).

    m <- beta1 m + (1 - beta1) g and u <- beta2 u + (1 - beta2) g^2 (Loshchilov and Hutter, 2019).
    """
    beta1, beta2 = betas

    def move(v: Tensor, g: Tensor, state: dict[str, Any]) -> Tensor:
        t: int = state.get("t", 0) + 1
        m: Tensor = beta1 * state.get("m", torch.zeros_like(v)) + (1 - beta1) * g
        u: Tensor = beta2 * state.get("u", torch.zeros_like(v)) + (1 - beta2) * g * g
        state.update(t=t, m=m, u=u)
        m_hat = m / (1 - beta1**t)
        u_hat = u / (1 - beta2**t)
        moved: Tensor = v - lr * weight_decay * v - lr * m_hat / (u_hat.sqrt() + eps)
        return moved

    return move


# The iterations. All take the latents w*, the name of each one's pair (F, B), the mu of each step, a base optimizer and
# its state for each tensor (initially {}; updated in place), and return the latents after len(mus) steps.


def pc_plus_plus(
    w_star: list[Tensor],
    gradient: Gradient,
    quantizers: Sequence[str],
    mus: Sequence[float],
    move: Move,
    states: list[dict[str, Any]],
) -> list[Tensor]:
    """w_t = F(w*_t; mu_t);  w*_{t+1} = base(w*_t, B(w*_t; mu_t) . grad l(w_t))."""
    for mu in mus:
        w = _forward(w_star, quantizers, mu)
        b = _backward(w_star, quantizers, mu)
        g = gradient(w)
        w_star = [move(w_star[i], b[i] * g[i], states[i]) for i in range(len(w_star))]
    return w_star


def prox_quant(
    w_star: list[Tensor],
    gradient: Gradient,
    quantizers: Sequence[str],
    mus: Sequence[float],
    move: Move,
    states: list[dict[str, Any]],
) -> list[Tensor]:
    """w_t = F(w*_t; mu_t);  w*_{t+1} = base(w_t, B(w*_t; mu_t) . grad l(w_t))."""
    for mu in mus:
        w = _forward(w_star, quantizers, mu)
        b = _backward(w_star, quantizers, mu)
        g = gradient(w)
        w_star = [move(w[i], b[i] * g[i], states[i]) for i in range(len(w_star))]
    return w_star


def reverse_prox_connect(
    w_star: list[Tensor],
    gradient: Gradient,
    quantizers: Sequence[str],
    mus: Sequence[float],
    move: Move,
    states: list[dict[str, Any]],
) -> list[Tensor]:
    """w_t = F(w*_t; mu_t);  w*_{t+1} = base(w_t, B(w*_t; mu_t) . grad l(w*_t))."""
    for mu in mus:
        w = _forward(w_star, quantizers, mu)
        b = _backward(w_star, quantizers, mu)
        g = gradient(w_star)
        w_star = [move(w[i], b[i] * g[i], states[i]) for i in range(len(w_star))]
    return w_star


def _pair(name: str) -> tuple[Map, Map]:
    """(F, B) of the row `name`, or of "bc x tensor" and "bc x channel" with a scale."""
    row, _, scale = name.partition(" x ")
    return scaled(PAIRS[row], scale) if scale else PAIRS[row]


def scaled(pair: tuple[Map, Map], scale: str) -> tuple[Map, Map]:
    """F_s(w) = s F(w / s), B_s(w) = B(w / s); s = mean |w| of the tensor, or of each of its first indices."""
    f, b = pair

    def mean(w: Tensor) -> Tensor:
        if scale == "tensor":
            return w.abs().sum() / w.numel()
        rows = [row.abs().sum() / row.numel() for row in w]
        return torch.stack(rows).reshape(len(w), *[1] * (w.ndim - 1))

    return lambda w, mu: mean(w) * f(w / mean(w), mu), lambda w, mu: b(w / mean(w), mu)


def _forward(w_star: list[Tensor], quantizers: Sequence[str], mu: float) -> list[Tensor]:
    return [_pair(name)[0](u, mu) for u, name in zip(w_star, quantizers, strict=True)]


def _backward(w_star: list[Tensor], quantizers: Sequence[str], mu: float) -> list[Tensor]:
    return [_pair(name)[1](u, mu) for u, name in zip(w_star, quantizers, strict=True)]


ITERATIONS = {"pc++": pc_plus_plus, "pq": prox_quant, "rpc": reverse_prox_connect}
"""update -> iteration."""
