"""Where a process stands: rank, world size and device, from torchrun's environment or alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Layout:
    """One process of the run."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's record."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        if self.world_size > 1:
            distributed.all_reduce(values)
        return values


@contextmanager
def joined() -> Iterator[Layout]:
    """Joins torchrun's process group, if there is one, and leaves it at the end. NCCL on GPUs, gloo elsewhere."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS sums in one order only with this
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        torch.cuda.set_device(device)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Layout(device=device)
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Layout(distributed.get_rank(), world_size, device)
    finally:
        distributed.destroy_process_group()
