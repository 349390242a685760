"""The iterations written literally, in float64, one tensor at a time: slow, obvious, the oracle of the tests.

Nothing here knows of torch.optim, of `proxconnect` or of `maps`. It is meant to be checked against the papers by eye.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Map = Callable[[Tensor, float], Tensor]
Gradient = Callable[[list[Tensor]], list[Tensor]]
"""The gradient of the loss at a list of tensors: grad l."""
Move = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]
"""One step of a base optimizer: (v, g, state of this tensor, updated in place) -> the tensor moved."""


# The maps of theory.md, section 2, formula by formula.


def sign(w: Tensor, _mu: float) -> Tensor:
    """+1 where w >= 0, -1 elsewhere."""
    return torch.where(w >= 0, 1.0, -1.0).to(torch.float64)


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


def _one(w: Tensor, _mu: float) -> Tensor:
    return torch.full_like(w, 1.0)


def _inside(w: Tensor, _mu: float) -> Tensor:
    return torch.where(w.abs() <= 1, 1.0, 0.0).to(torch.float64)


PAIRS: dict[str, tuple[Map, Map]] = {
    "fp": (lambda w, _mu: w, _one),
    "bc": (sign, _one),
    "pc": (piecewise_linear, _one),
    "bnn": (sign, _inside),
    "bnn+": (sign, sign_swish_derivative),
    "bnn++": (sign_swish, sign_swish_derivative),
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


# The iterations. All take the latents w*, the name of each one's pair (F, B), the mu of each step and a base optimizer,
# and return the latents after len(mus) steps.


def pc_plus_plus(
    w_star: list[Tensor], gradient: Gradient, quantizers: Sequence[str], mus: Sequence[float], move: Move
) -> list[Tensor]:
    """w_t = F(w*_t; mu_t);  w*_{t+1} = base(w*_t, B(w*_t; mu_t) . grad l(w_t))."""
    states: list[dict[str, Any]] = [{} for _ in w_star]
    for mu in mus:
        w = _forward(w_star, quantizers, mu)
        b = _backward(w_star, quantizers, mu)
        g = gradient(w)
        w_star = [move(w_star[i], b[i] * g[i], states[i]) for i in range(len(w_star))]
    return w_star


def prox_quant(
    w_star: list[Tensor], gradient: Gradient, quantizers: Sequence[str], mus: Sequence[float], move: Move
) -> list[Tensor]:
    """w_t = F(w*_t; mu_t);  w*_{t+1} = base(w_t, B(w*_t; mu_t) . grad l(w_t))."""
    states: list[dict[str, Any]] = [{} for _ in w_star]
    for mu in mus:
        w = _forward(w_star, quantizers, mu)
        b = _backward(w_star, quantizers, mu)
        g = gradient(w)
        w_star = [move(w[i], b[i] * g[i], states[i]) for i in range(len(w_star))]
    return w_star


def reverse_prox_connect(
    w_star: list[Tensor], gradient: Gradient, quantizers: Sequence[str], mus: Sequence[float], move: Move
) -> list[Tensor]:
    """w_t = F(w*_t; mu_t);  w*_{t+1} = base(w_t, B(w*_t; mu_t) . grad l(w*_t))."""
    states: list[dict[str, Any]] = [{} for _ in w_star]
    for mu in mus:
        w = _forward(w_star, quantizers, mu)
        b = _backward(w_star, quantizers, mu)
        g = gradient(w_star)
        w_star = [move(w[i], b[i] * g[i], states[i]) for i in range(len(w_star))]
    return w_star


def _forward(w_star: list[Tensor], quantizers: Sequence[str], mu: float) -> list[Tensor]:
    return [PAIRS[name][0](u, mu) for u, name in zip(w_star, quantizers, strict=True)]


def _backward(w_star: list[Tensor], quantizers: Sequence[str], mu: float) -> list[Tensor]:
    return [PAIRS[name][1](u, mu) for u, name in zip(w_star, quantizers, strict=True)]


ITERATIONS = {"pc++": pc_plus_plus, "pq": prox_quant, "rpc": reverse_prox_connect}
"""update -> iteration."""
