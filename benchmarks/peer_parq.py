"""Compares ProxConnect's bc with a scale to torchao's PARQ with its hard map: the latents agree at every step.

    python benchmarks/peer_parq.py            compare; needs torchao beside torch, in an environment of its own
    python benchmarks/peer_parq.py --record   also write tests/quantizers/parq_trajectory.npz, for the tests

PARQ's QuantOptimizer (Jin et al., 2025) with ProxHardQuant, one bit and LSBQuantizer keeps latents u and sets w = s
sign(u) after each step, with s = mean |u| of the tensor or of each channel. This is BinaryConnect with a scale, "STE"
in its tables. PARQ takes its first gradient at u, while ours is at w from the start, so here the first gradient is
taken at w for both.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import verdict
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear

from quantizers import ProxConnect
from quantizers.scales import Scale, mean_abs

NUM_STEPS = 100
OPTIONS: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01}
TRAJECTORY = Path(__file__).parents[1] / "tests" / "quantizers" / "parq_trajectory.npz"


class Problem:
    """A network of tanh units fitted to fixed data: u [8, 5] and v [1, 8] quantized, c [8] not quantized."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(7)

        def uniform(*shape: int) -> Tensor:
            return (torch.rand(shape, generator=generator) * 2 - 1).to(dtype)

        self.u, self.v, self.c = (nn.Parameter(uniform(*shape)) for shape in ((8, 5), (1, 8), (8,)))
        self.x, self.y = uniform(32, 5) * 2, uniform(32, 1) * 2

    def backward(self) -> None:
        """Computes the gradients at the current parameters."""
        for p in (self.u, self.v, self.c):
            p.grad = None
        (linear(linear(self.x, self.u, self.c).tanh(), self.v) - self.y).square().mean().backward()  # type: ignore[no-untyped-call]


def ours(scale: Scale, dtype: torch.dtype = torch.float32) -> NDArray[np.floating]:
    """The latents of u and v after each step of ProxConnect, [NUM_STEPS, 48]."""
    problem = Problem(dtype)
    groups: list[dict[str, Any]] = [
        {"params": [problem.u, problem.v], "quantizer": "bc", "scale": scale},
        {"params": [problem.c]},
    ]
    optimizer = ProxConnect(torch.optim.SGD(groups, **OPTIONS))
    found = []
    for _ in range(NUM_STEPS):
        problem.backward()
        optimizer.step()
        found.append(_flat(optimizer.latent(problem.u), optimizer.latent(problem.v)))
    return np.stack(found)


def theirs(scale: Scale, dtype: torch.dtype = torch.float32) -> NDArray[np.floating]:
    """The same for torchao's QuantOptimizer. ImportError without torchao."""
    from torchao.prototype.parq.optim import ProxHardQuant, QuantOptimizer
    from torchao.prototype.parq.quant import LSBQuantizer

    problem = Problem(dtype)
    quantized = [problem.u, problem.v]
    groups: list[dict[str, Any]] = [{"params": quantized, "quant_bits": 1}, {"params": [problem.c]}]
    optimizer = QuantOptimizer(
        torch.optim.SGD(groups, **OPTIONS),
        LSBQuantizer(),
        ProxHardQuant(),
        quant_period=1,
        quant_per_channel=scale == "channel",
    )
    found = []
    for number in range(NUM_STEPS):
        raw = [p.detach().clone() for p in quantized]
        if number == 0:
            for p in quantized:
                p.data.copy_(mean_abs(p.detach(), scale) * torch.where(p >= 0, 1.0, -1.0))
        problem.backward()
        if number == 0:
            for p, value in zip(quantized, raw, strict=True):
                p.data.copy_(value)
        optimizer.step()
        found.append(_flat(*(optimizer.state[p]["latent"] for p in quantized)))
    return np.stack(found)


def _flat(*tensors: Tensor) -> NDArray[np.floating]:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).numpy().copy()


def main() -> None:
    """Compares the trajectories; with --record, also writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    try:
        import torchao
    except ModuleNotFoundError:
        sys.exit("torchao is not installed: pip install torchao, in an environment of its own")
    scales: tuple[Scale, ...] = ("tensor", "channel")
    for dtype in (torch.float32, torch.float64):
        for scale in scales:
            apart = np.abs(ours(scale, dtype) - theirs(scale, dtype)).max()
            print(verdict(f"largest difference of a latent over {NUM_STEPS} steps, {dtype}, {scale}", apart, 1e-6))
    print(f"torch {torch.__version__}, torchao {torchao.__version__}")
    if options.record:
        found = {scale: theirs(scale, torch.float64) for scale in scales}
        np.savez_compressed(TRAJECTORY, **found)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
