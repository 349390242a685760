"""Optimizers that step some tensors of awkward sizes and values, in one pass or by torch's operations."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from quantizers import QUANTIZERS, ProxConnect, reference
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
"""Rows whose maps are sums, products and comparisons, which have but one way to be rounded."""

IN_CPP = [name for name, row in QUANTIZERS.items() if {row.forward.__name__, row.backward.__name__} <= passes.maps()]


def numbers(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Normal numbers of all SHAPES, the same for a seed each time."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    for tensor in tensors:
        # From far inside to far outside the region where the maps bend, both zeros and the kinks of some.
        tensor.flatten()[:64] *= torch.logspace(-6, 3, tensor.flatten()[:64].numel())
        tensor.flatten()[-4:] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    return [tensor.to(dtype) for tensor in tensors]


class Steps:
    """Parameters and their optimizer, with gradients that are given numbers."""

    def __init__(
        self,
        quantizer: str,
        base: str = "momentum",
        *,
        dtype: torch.dtype = torch.float32,
        fused: bool = True,
        clip_latents: bool = False,
        device: str = "cpu",
    ) -> None:
        self.parameters = [torch.nn.Parameter(tensor.to(device)) for tensor in numbers(0, dtype)]
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
        for p, gradient in zip(self.parameters, gradients(t), strict=True):
            p.grad = gradient.to(p)
        assert bool(self.optimizer._passes()) == self.optimizer.fused, "stepped the other way"
        self.optimizer.step()

    def take(self, other: "Steps") -> None:
        """Go on from where the other is."""
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))


def gradients(t: int) -> list[Tensor]:
    # As steep as B may be at the mu that w was written with.
    return [g / max(1.0, MUS[t % len(MUS) - 1]) for g in numbers(1 + t)]


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


def hand_over_to_the_bit(straight: Steps, resumed: Steps) -> None:
    """Two steps of the one, which is then hardened and softened, and the other goes on from there: w keeps its bits."""
    straight.run(0)
    straight.run(1)
    expected = [w.clone() for w in straight.w]
    straight.optimizer.harden()
    straight.optimizer.soften()
    assert equal(straight.w, expected)
    resumed.take(straight)
    assert equal(resumed.w, expected)
