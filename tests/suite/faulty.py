"""suite.train with a fault in one process of two, at the step given by STEPS.

torchrun --nproc-per-node 2 tests/suite/faulty.py CELL.yaml FAULT

The processes trigger the fault themselves, because a test that watched them could be too late.
"""

import ctypes
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

from torch import Tensor
from torch.distributed import distributed_c10d

from suite.engines import process_group
from suite.run import failures
from suite.train import main
from suite.training.trainer import Trainer

STEPS = {"raise": 3, "block": 3, "stop": 23, "die": 33, "hang": 43}
_train_step = Trainer._train_step


def _stop(trainer: Trainer, rank: int) -> None:
    """Asks torchrun to stop, as a scheduler does; the step continues once torchrun has passed the signal on."""
    if rank == 0:
        os.kill(os.getppid(), signal.SIGTERM)
    while not trainer.wishes.stop:
        time.sleep(0.01)


def _once_it_is_written(trainer: Trainer, rank: int) -> None:
    """Waits until the heartbeat reports the last step that this process has finished."""
    (*_, attempt) = sorted((Path(sys.argv[1]).parent / "attempts").iterdir())
    while failures.beats(attempt)[rank].step != trainer._num_steps_done - 1:
        time.sleep(0.005)


def _die(trainer: Trainer, rank: int) -> None:
    if rank == 1:
        _once_it_is_written(trainer, rank)
        os.kill(os.getpid(), signal.SIGKILL)


def _hang(trainer: Trainer, rank: int) -> None:
    # Set the limit only here: at start-up, such a short one would make a late process count as hung.
    distributed_c10d._set_pg_timeout(timedelta(seconds=3))
    if rank == 1:
        _once_it_is_written(trainer, rank)
        os.kill(os.getpid(), signal.SIGSTOP)


def _raise(_trainer: Trainer, rank: int) -> None:
    if rank == 1:
        raise ValueError("a label of 4711\nand a second line")


def _block(trainer: Trainer, rank: int) -> None:
    if rank == 1:
        _raise(trainer, rank)
    mutex = ctypes.create_string_buffer(64)  # zeros are an unlocked mutex
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)  # the second blocks forever, even on signals


FAULTS = {"block": _block, "stop": _stop, "die": _die, "hang": _hang, "raise": _raise}


def _with_a_fault(self: Trainer, images: Tensor, labels: Tensor) -> Tensor:
    fault = sys.argv[2]
    if self._num_steps_done == STEPS[fault]:
        FAULTS[fault](self, int(os.environ["RANK"]))
    return _train_step(self, images, labels)


if __name__ == "__main__":
    process_group.AGREEMENT_SECONDS = 0.0  # after every step
    Trainer._train_step = _with_a_fault  # type: ignore[method-assign]
    main(Path(sys.argv[1]), checkpoint_steps=1)
