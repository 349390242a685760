"""Optimizers that step tensors of awkward sizes and values, fused or eagerly, and bounds on their rounding errors."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from quantizers import QUANTIZERS, ProxConnect, maps, reference
from quantizers.fused import passes

BASES: dict[str, tuple[Callable[..., Optimizer], Callable[..., reference.Move], dict[str, Any]]] = {
    "sgd": (SGD, reference.sgd, {"weight_decay": 0.01}),
    "momentum": (SGD, reference.sgd, {"momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (SGD, reference.sgd, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adamw": (AdamW, reference.adamw, {"weight_decay": 0.1}),
}
SHAPES = [(13, 7, 3, 3), (5,), (31, 8)]
MUS = [0.4, 0.7, 1.0, 3.0, 10.0, 100.0, 1e4, 0.0, 0.2]
ROUNDS_AS_TORCH = {"fp", "bc", "pc", "hardtanh", "bnn", "clip++", "bireal", "bireal++"}
"""Rows whose maps consist of sums, products and comparisons, which can be rounded in only one way."""
TORCH_FUSES_MULTIPLY_ADD = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
"""Whether torch's kernels round a x + b once, as ours do on every processor."""

IN_CPP = [name for name, row in QUANTIZERS.items() if {row.forward.__name__, row.backward.__name__} <= passes.MAP_NAMES]
EPS = torch.finfo(torch.float32).eps
ROUNDINGS = 16
"""Bounds the number of roundings between a step's inputs and a result, maps included, each at most EPS / 2 of a term.
The longest path is AdamW's: eight in B, and eight from g to v. Two ways to compute a value differ by twice that."""


def numbers(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Tensors of all SHAPES with normally distributed values, determined by the seed."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    for tensor in tensors:
        # Values from far inside to far outside the region where the maps bend, both zeros, and the kinks of some maps.
        tensor.flatten()[:64] *= torch.logspace(-6, 3, tensor.flatten()[:64].numel())
        tensor.flatten()[-4:] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    return [tensor.to(dtype) for tensor in tensors]


class Steps:
    """Parameters and their optimizer, with prescribed gradients."""

    def __init__(
        self,
        quantizer: str,
        base: str = "momentum",
        *,
        dtype: torch.dtype = torch.float32,
        fused: bool = True,
        clip_latents: bool = False,
    ) -> None:
        self.quantizer, self.parameters = quantizer, [torch.nn.Parameter(tensor) for tensor in numbers(0, dtype)]
        group = {"params": self.parameters, "quantizer": quantizer, "mu": MUS[0]}
        make, _, self.base_options = BASES[base]
        base_optimizer = make([group], lr=0.05, **self.base_options)
        self.optimizer = ProxConnect(base_optimizer, clip_latents=clip_latents, fused=fused)

    @property
    def w_star(self) -> list[Tensor]:
        return [self.optimizer.latent(p) for p in self.parameters]

    @property
    def w(self) -> list[Tensor]:
        return [p.detach() for p in self.parameters]

    def run(self, t: int) -> None:
        mu, lr = MUS[t % len(MUS)], 0.05 / (1 + t)
        self.optimizer.param_groups[0].update(mu=mu, lr=lr)
        self.give(t)
        self.optimizer.step()

    def give(self, t: int) -> None:
        for p, gradient in zip(self.parameters, gradients(t), strict=True):
            p.grad = gradient.to(p)

    def take(self, other: "Steps") -> None:
        """Load the state of the other's optimizer."""
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))

    def terms(self, t: int) -> list[Tensor]:
        """The sum of the moduli of all terms that step t will add into w*, float64; rounding errors are relative to it.

        For SGD, lr (|B g| + decay |w*| + momentum |buffer|, and Nesterov's momentum once more) + |w*|; for AdamW, the
        step size times (|m| + |B g|) / (sqrt(u) / correction + eps), + |w*|.
        """
        group, found = self.optimizer.param_groups[0], []
        for p, w_star, gradient in zip(self.parameters, self.w_star, gradients(t), strict=True):
            v, state = w_star.double().abs(), self.optimizer.state[p]
            g = self._size_of_backward(w_star.double()) * gradient.to(p).double().abs()
            if isinstance(self.optimizer.base, SGD):
                g = g + group["weight_decay"] * v
                kept = state["momentum_buffer"].double().abs() if "momentum_buffer" in state else torch.zeros_like(g)
                momentum = group["momentum"]
                move = momentum * (momentum * kept + g) + g if group["nesterov"] else momentum * kept + g
                found.append(v + group["lr"] * move)
            else:
                beta1, beta2 = group["betas"]
                step = float(state["step"]) + 1 if state else 1.0
                m = state["exp_avg"].double().abs() if state else torch.zeros_like(g)
                u = beta2 * (state["exp_avg_sq"].double() if state else 0.0) + (1 - beta2) * g.square()
                root = (u / (1 - beta2**step)).sqrt() + group["eps"]
                found.append(v + group["lr"] / (1 - beta1**step) * (m + g) / root)
        return found

    def _size_of_backward(self, w_star: Tensor) -> Tensor:
        """|B|; for sign-Swish's B, which changes sign, the sum of the moduli of its two terms."""
        mu: float = self.optimizer.state_dict()["state"][0]["mu"]
        backward = QUANTIZERS[self.quantizer].backward
        if backward is not maps.sign_swish_derivative:
            return backward(w_star, mu).abs()
        a = mu * w_star.abs()
        return 2 * mu * (2 + a) * torch.exp(-a)


def gradients(t: int) -> list[Tensor]:
    # Divided by the steepest that B may be at the mu that w was written with.
    return [g / max(1.0, MUS[t % len(MUS) - 1]) for g in numbers(1 + t)]


def require_within_rounding(ones: Sequence[Tensor], others: Sequence[Tensor], terms: Sequence[Tensor]) -> None:
    """AssertionError where two results differ by more than ROUNDINGS * EPS of the terms that went into them."""
    for one, other, term in zip(ones, others, terms, strict=True):
        excess = (one.double() - other.double()).abs() - ROUNDINGS * EPS * term
        assert excess.max() <= 0, f"beyond rounding by {excess.max():.3g}"


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


def hand_over_to_the_bit(straight: Steps, resumed: Steps) -> None:
    """Step `straight` twice, harden and soften it, and load its state into `resumed`: w keeps its bits each time."""
    straight.run(0)
    straight.run(1)
    expected = [w.clone() for w in straight.w]
    straight.optimizer.harden()
    straight.optimizer.soften()
    assert equal(straight.w, expected)
    resumed.take(straight)
    assert equal(resumed.w, expected)
