"""Pack tensor addresses and hyperparameters of a group into the C structs that `fused.h` reads.

pair = native.pair("hard_sign", "ones")
pair.run(batch, move)             w*, the base's state and w: each element read once and written once
"""

import struct
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

MAPS, PASSES = (Path(__file__).with_name(name) for name in ("maps.h", "fused.h"))
MAP_NAMES = frozenset(
    {
        *("identity", "ones", "hard_sign", "clip", "clip_derivative", "piecewise_linear"),
        *("sign_swish", "sign_swish_derivative", "sharp_clip", "sharp_clip_derivative"),
        *("approx_sign", "approx_sign_derivative", "tanh", "tanh_derivative"),
        *("decaying_tanh", "decaying_tanh_derivative", "bounded_tanh", "bounded_tanh_derivative"),
        "power_derivative",
    }
)
"""The maps of maps.py that maps.h implements."""
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Supported dtypes of a quantized parameter and its gradient."""
BASES = ("sgd", "momentum", "nesterov", "adamw")
"""SGD without momentum, with it, and with Nesterov's; AdamW."""

_GROUP = struct.Struct("=2q8d")  # the structs of fused.h, members in order
_ROW = struct.Struct("=q6Q3d")


class Batch(NamedTuple):
    """Tensors of one group, in lists of equal length; each parameter's tensors have their elements in the same order.

    products: B(w*) . grad, float32. A step uses them, times `scale`, instead of gradients; the product pass writes
    them. Lists that a pass does not need are empty.
    """

    w_star: Sequence[Tensor]
    gradients: Sequence[Tensor] = ()
    weights: Sequence[Tensor] = ()
    products: Sequence[Tensor] = ()
    written_mus: Sequence[float] = ()
    mu: float = 0.0
    scale: float = 1.0
    clip_latents: bool = False


class Move(NamedTuple):
    """The base optimizer's part of a step. `base` is one of BASES, or "write" or "product" for those passes.

    first: SGD's momentum buffers, or AdamW's means; second: AdamW's squares. step_sizes and root_corrections: AdamW's
    lr / (1 - beta1^step) and sqrt(1 - beta2^step) of each tensor. Fields that a base does not use keep their defaults.
    """

    base: str
    lr: float = 0.0
    weight_decay: float = 0.0
    first: Sequence[Tensor] = ()
    second: Sequence[Tensor] = ()
    momentum: float = 0.0
    step_sizes: Sequence[float] = ()
    root_corrections: Sequence[float] = ()
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0


def table(batch: Batch, move: Move) -> bytes:
    """`Group` of fused.h followed by its `Row`s. It holds addresses, so it is valid only while the tensors live."""
    sizes = [tensor.numel() for tensor in batch.w_star]
    addresses = [
        [tensor.data_ptr() for tensor in tensors]
        for tensors in (batch.w_star, batch.gradients, batch.products, batch.weights, move.first, move.second)
    ]
    numbers = [batch.written_mus, move.step_sizes, move.root_corrections]
    columns: list[Sequence[Any]] = [sizes, *addresses, *numbers]
    rows = zip(*[column or [0] * len(sizes) for column in columns], strict=True)
    shared = (batch.mu, batch.scale, move.lr, move.momentum, move.weight_decay, move.beta1, move.beta2, move.eps)
    return _GROUP.pack(len(sizes), batch.clip_latents, *shared) + b"".join(_ROW.pack(*row) for row in rows)


class Pair:
    """The passes compiled for one pair of maps; they take tensors without gaps, in CPU memory."""

    def __init__(self, call: Callable[[str, bytes], None]) -> None:
        """`call` runs the pass of that name on a table."""
        self._call = call

    def run(self, batch: Batch, move: Move) -> None:
        """Run one pass and notify autograd of every tensor that it writes."""
        uses_products = "_along_products" if batch.products and move.base in BASES else ""
        self._call(f"{move.base}_{DTYPES[batch.weights[0].dtype]}{uses_products}", table(batch, move))
        if move.base == "product":
            written = list(batch.products)
        elif move.base == "write":
            written = list(batch.weights)
        else:
            written = [*batch.weights, *batch.w_star, *move.first, *move.second]
        increment_version(written)


@cache
def warn_once(reason: str) -> None:
    """Warn that there is no fused step, and why: one warning per reason."""
    line = " ".join(reason.split())
    warnings.warn(f"no fused step, so torch's slower operations step the quantized weights: {line}", stacklevel=2)
