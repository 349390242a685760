"""A process's rank, world size and device, from torchrun's environment or alone."""

import gc
import importlib
import os
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """One process of the run."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's record."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if self.world_size > 1:
            distributed.all_reduce(values)
        return values

    def agree(self, *values: int) -> list[int]:
        """The largest of each value over the processes."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int32, device=self.device)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return [int(value) for value in tensor.tolist()]

    def gather(self, values: Tensor) -> Tensor:
        """Every process's values [...] as [world_size, ...], on each of them."""
        if self.world_size == 1:
            return values[None].clone()
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        distributed.all_gather(parts, values)
        return torch.stack(parts)

    def broadcast(self, values: Iterable[Tensor]) -> None:
        """Gives every process the main one's values, in place."""
        if self.world_size > 1:
            for value in values:
                distributed.broadcast(value, 0)

    def tell(self, value: T) -> T:
        """The main process's value, which is pickled."""
        if self.world_size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, 0)
        return values[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world_size > 1:
            distributed.barrier()


@contextmanager
def joined(timeout_seconds: float = 600.0) -> Iterator[Layout]:
    """Joins torchrun's process group, if there is one, and leaves it at the end. NCCL on GPUs, gloo elsewhere.

    A process that waits for another one longer than the timeout raises. Afterwards none of gloo's threads is left: one
    that asks for the GIL while Python finalizes aborts the process, so that a finished run would count as failed. For
    this the local variables of an exception's frames are dropped; they hold the model, which holds the group. NCCL's
    group is not left after an exception: that would wait for processes that are gone.
    """
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
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Default arguments of its functions are the group that there is when it is imported. DDP imports it, and would so
    # keep this group for as long as the process lives.
    importlib.import_module("torch.distributed.nn.functional")
    distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        yield Layout(distributed.get_rank(), world_size, device, local_world_size)
    except BaseException as error:
        if backend == "gloo":
            _drop_locals(error)
            _leave()
        raise
    _leave()


def _leave() -> None:
    """Destroys the process group, once nothing else refers to it: its last reference joins gloo's threads.

    DDP's reducer is such a reference, and lives in a reference cycle. It must not be the last: it is freed with the GIL
    held, which the thread to be joined may be waiting for.
    """
    gc.unfreeze()
    gc.collect()
    distributed.destroy_process_group()
    gc.freeze()  # what is left stays: the interpreter's own last collection need not walk it again


def _drop_locals(error: BaseException) -> None:
    """Clears the frames that an exception, and those it came from, refer to; those still running are left alone."""
    found: BaseException | None = error
    while found is not None:
        traceback.clear_frames(found.__traceback__)
        found = found.__cause__ or found.__context__
