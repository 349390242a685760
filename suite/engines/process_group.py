"""A process's rank, world size and device, under torchrun or as a single process."""

import gc
import importlib
import os
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from suite.errors import UserError
from suite.recipe.settings import AS_IS, Execution

AGREEMENT_SECONDS = 1.0
"""Approximate time between two exchanges of the processes' requests."""
MAX_INTERVAL = 1000
"""Maximum number of steps between two exchanges."""
T = TypeVar("T")


class EngineError(UserError):
    """The cell cannot run with its `execution` settings, or cannot run on this machine."""


@dataclass(frozen=True)
class Layout:
    """One process of the run."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if self.world_size > 1:
            distributed.all_reduce(values)
        return values

    def agree(self, *values: int) -> list[int]:
        """The maximum of each value over the processes."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)  # over gloo: does not wait for the device
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return [int(value) for value in tensor.tolist()]

    def gather(self, values: Tensor) -> Tensor:
        """Every process's values [...] as [world_size, ...], on every process."""
        if self.world_size == 1:
            return values[None].clone()
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        distributed.all_gather(parts, values)
        return torch.stack(parts)

    def broadcast(self, values: Iterable[Tensor]) -> None:
        """Copies the main process's values to every process, in place."""
        if self.world_size > 1:
            for value in values:
                distributed.broadcast(value, 0)

    def tell(self, value: T) -> T:
        """The main process's value, pickled, on every process."""
        if self.world_size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, 0)
        return values[0]

    def wait(self) -> None:
        """Waits until all processes have arrived."""
        if self.world_size > 1:
            distributed.barrier()


class Agreement:
    """Exchanges the processes' requests in the background, about every AGREEMENT_SECONDS.

    An exchange starts after a step and is read after the next, so that no process waits for it. It also sets, for all
    processes, the number of steps until the next exchange.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._num_left = 1
        self._started = time.monotonic()
        self._interval = 1
        self._under_way: tuple[Any, Tensor] | None = None

    def result(self) -> list[int] | None:
        """The maximum of each value over the processes, from the pending exchange; None if none is pending."""
        if self._under_way is None:
            return None
        (work, values), self._under_way = self._under_way, None
        work.wait()
        *found, self._interval = values.tolist()
        self._num_left = self._interval
        return found

    def start(self, *values: int) -> None:
        """Starts an exchange of the values if one is due. All processes call it after each step."""
        self._num_left -= 1
        if self._num_left > 0:
            return
        now = time.monotonic()
        per_step = (now - self._started) / self._interval
        self._started = now
        # Clocks differ between processes, so only the main one's is used.
        proposal = min(max(round(AGREEMENT_SECONDS / max(per_step, 1e-6)), 1), MAX_INTERVAL)
        tensor = torch.tensor([*values, proposal if self.layout.is_main else 0], dtype=torch.int64)
        self._under_way = distributed.all_reduce(tensor, distributed.ReduceOp.MAX, async_op=True), tensor


@contextmanager
def joined(timeout_seconds: float = 600.0, execution: Execution = AS_IS) -> Iterator[Layout]:
    """Joins torchrun's process group, if there is one, and leaves it at the end.

    GPU tensors use NCCL, CPU tensors gloo. If a process waits for another one longer than the timeout, gloo raises an
    exception; with NCCL, torch aborts the process, unless `failures.Watch` has ended it before.

    No gloo thread remains afterwards: a thread that requests the GIL while Python finalizes would abort the process,
    and a finished run would count as failed. So the local variables of an exception's frames are dropped, because they
    refer to the model, which refers to the group. After an exception, NCCL's group is not destroyed: that would wait
    for processes that no longer exist.

    Raises:
        EngineError: the device that `execution` requests, or that the job was given, does not exist.
    """
    device = _device(execution.device)
    if device.type == "cuda":
        _determine(execution.determinism)
        torch.cuda.set_device(device)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Layout(device=device)
        return
    # Its functions' default arguments refer to the group that exists when it is imported. Import it before there is
    # one: otherwise DDP would import it later and keep this group alive until the process ends.
    importlib.import_module("torch.distributed.nn.functional")
    is_cuda = device.type == "cuda"
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if is_cuda else None,
    )
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        yield Layout(distributed.get_rank(), world_size, device, local_world_size)
    except BaseException as error:
        if not is_cuda:
            _drop_locals(error)
            _leave()
        raise
    _leave()


def _device(wanted: str) -> torch.device:
    """This process's device, chosen by its rank on the node."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu":
        return torch.device("cpu")
    if num_gpus:
        if local_rank >= num_gpus:
            raise EngineError(f"process {local_rank} of this node has no GPU: torch sees {num_gpus} of them here")
        return torch.device("cuda", local_rank)
    given = _gpus_given()
    if wanted == "cuda" or given:
        raise EngineError(
            f"torch {torch.__version__} sees no GPU{given and f', though {given}'}: is its CUDA newer than the driver "
            "(nvidia-smi), or is it a CPU build? To train on the CPU: --set execution.device=cpu"
        )
    return torch.device("cpu")


def _gpus_given() -> str:
    """Evidence that this process was given GPUs; empty if there is none or the user has hidden them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:
        return ""
    for name in ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE"):
        if os.environ.get(name, "0") not in {"", "0"}:
            return f"{name} is {os.environ[name]}"
    gpus = Path("/proc/driver/nvidia/gpus")
    num_gpus = len(list(gpus.iterdir())) if gpus.is_dir() else 0
    return f"the driver has {num_gpus}" if num_gpus else ""


def _determine(determinism: str) -> None:
    """Sets which nondeterministic or TF32 kernels torch may use. Call it before the first use of a GPU."""
    is_strict = determinism == "strict"
    if is_strict:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's summation order is fixed only with this
    # Not warn_only: attention would then use kernels with nondeterministic sums.
    torch.use_deterministic_algorithms(is_strict)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not is_strict
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not is_strict


def _leave() -> None:
    """Destroys the process group once nothing else refers to it: dropping the last reference joins gloo's threads.

    DDP's reducer refers to it from a reference cycle. It must not hold the last reference: it is freed with the GIL
    held, and the thread to be joined may be waiting for the GIL.
    """
    gc.unfreeze()
    gc.collect()
    distributed.destroy_process_group()
    gc.freeze()  # spares the interpreter's final collection the remaining objects


def _drop_locals(error: BaseException) -> None:
    """Clears the frames that an exception and its causes refer to, except running ones."""
    found: BaseException | None = error
    while found is not None:
        traceback.clear_frames(found.__traceback__)
        found = found.__cause__ or found.__context__
