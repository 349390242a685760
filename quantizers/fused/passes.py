"""What the passes of fused.h are told, on a CPU or a GPU: the tensors of a group and the numbers of a step, as a table.

    pair.write(w_star, weight, mu)     w <- F(w*; mu)
    pair.step(batch, move)             w*, the base's state and w, each element read once and written once

`native.pair` makes pairs for CPUs, `cuda.pair` for GPUs.
"""

import re
import struct
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAPS, PASSES = (Path(__file__).with_name(name) for name in ("maps.h", "fused.h"))
"""What fused.cpp and fused.cu include."""
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Of a quantized parameter and its gradient."""
BASES = ("sgd", "momentum", "nesterov", "adamw")
"""SGD without momentum, with it, and with Nesterov's; AdamW."""
FUNCTIONS = tuple(f"{name}_{dtype}" for name in ("write", *BASES) for dtype in DTYPES.values())
"""What fused.h exports for a pair of maps."""
CHUNK = 4096
"""Elements of one tensor that one block of a GPU moves."""

_GROUP = struct.Struct("=2q7d")  # of fused.h, in the order of its members
_ROW = struct.Struct("=2q5Q3d")


class Batch(NamedTuple):
    """What is stepped: tensors of a group, in lists of one length; each one's elements are in the same order."""

    w_star: Sequence[Tensor]
    gradients: Sequence[Tensor]
    weights: Sequence[Tensor]
    written_mus: Sequence[float]
    mu: float
    clip_latents: bool


class Move(NamedTuple):
    """The base optimizer's part of a step. `base` is one of BASES; what that one does not have is left out.

    first: SGD's buffers of momentum, or AdamW's means; second: AdamW's squares. step_sizes and root_corrections:
    AdamW's lr / (1 - beta1^step) and sqrt(1 - beta2^step) of each tensor.
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


class Table(NamedTuple):
    """`Group` of fused.h and its `Row`s as they lie in memory; the chunks of all rows together."""

    content: bytes
    num_chunks: int


def table(batch: Batch, move: Move) -> Table:
    """The table of a step; of addresses, so good for as long as the tensors live."""
    sizes = [tensor.numel() for tensor in batch.w_star]
    chunks_before = [0, *accumulate(-(-size // CHUNK) for size in sizes)]
    num_chunks = chunks_before.pop()
    addresses = [
        [tensor.data_ptr() for tensor in tensors]
        for tensors in (batch.w_star, batch.gradients, batch.weights, move.first, move.second)
    ]
    numbers = [batch.written_mus, move.step_sizes, move.root_corrections]
    columns: list[Sequence[Any]] = [chunks_before, sizes, *addresses, *numbers]
    rows = zip(*[column or [0] * len(sizes) for column in columns], strict=True)
    shared = (batch.mu, move.lr, move.momentum, move.weight_decay, move.beta1, move.beta2, move.eps)
    head = _GROUP.pack(len(sizes), batch.clip_latents, *shared)
    return Table(head + b"".join(_ROW.pack(*row) for row in rows), num_chunks)


class Pair:
    """The passes of one pair of maps over tensors of one device, which have no gaps."""

    def __init__(self, run: Callable[[str, Table], None]) -> None:
        """`run` calls the function of that name, one of FUNCTIONS, on a table."""
        self._run = run

    def write(self, w_star: Tensor, weight: Tensor, mu: float) -> None:
        """Write w = F(w*; mu), to the bits of a step's."""
        self.step(Batch([w_star], [], [weight], [], mu, clip_latents=False), Move("write"))

    def step(self, batch: Batch, move: Move) -> None:
        """One step; moves w* and the base's state, and writes the weights."""
        self._run(f"{move.base}_{DTYPES[batch.weights[0].dtype]}", table(batch, move))


@cache
def maps() -> frozenset[str]:
    """The names of the maps that are written in C++."""
    _, _, section = MAPS.read_text(encoding="utf-8").partition("\n// Maps\n")
    return frozenset(re.findall(r"^struct (\w+) \{", section, flags=re.MULTILINE))


@cache
def warn_once(reason: str) -> None:
    """Say that there is no pass, and why: one warning for each reason."""
    line = " ".join(reason.split())
    warnings.warn(f"quantized weights are stepped by torch's operations, more slowly: {line}", stacklevel=2)
