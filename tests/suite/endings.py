"""One of two processes: trains four times with different endings, and prints the gloo threads that each leaves behind.

Then it joins a group and keeps it, as DeepSpeed does, and exits like suite.train.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost python tests/suite/endings.py CELL.yaml FIVE_PORTS...
"""

import atexit
import gc
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from torch import Tensor, distributed

from suite.engines.process_group import joined
from suite.run.directory import RunDir
from suite.train import _leave, first_steps, main
from suite.training.trainer import Trainer

ENDINGS = ("done", "first steps", "preempted", "failed")
NOWHERE = Path("no-data-needed")
_train_step = Trainer._train_step


def _gloo_threads() -> list[str]:
    """Names of the process's threads that belong to gloo's process group."""
    names = [path.read_text(encoding="utf-8").strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if name.startswith("pt_gloo")]


def _preempt(self: Trainer, images: Tensor, labels: Tensor) -> Tensor:
    signal.raise_signal(signal.SIGTERM)
    return _train_step(self, images, labels)


def _fail(self: Trainer, images: Tensor, labels: Tensor) -> Tensor:
    if os.environ["RANK"] == "1":
        raise ValueError("a label of 4711")
    return _train_step(self, images, labels)


def _train_to(ending: str, folder: Path) -> None:
    run = RunDir.create(folder / ending / CELL.id, CELL)
    if ending == "first steps":
        first_steps(run, NOWHERE, max_steps=2)
        return
    Trainer._train_step = {"preempted": _preempt, "failed": _fail}.get(ending, _train_step)  # type: ignore[method-assign]
    with suppress(SystemExit):
        main(run.cell_path, timeout_seconds=60)


if __name__ == "__main__":
    gc.disable()  # as suite.train does at start-up
    CELL = RunDir(Path(sys.argv[1]).parent).cell()
    left = {}
    *ports, last_port = sys.argv[2:]
    for ending, port in zip(ENDINGS, ports, strict=True):
        os.environ["MASTER_PORT"] = port
        _train_to(ending, Path(sys.argv[1]).parents[1])
        left[ending] = _gloo_threads()
    sys.stdout.write(f"\n{json.dumps(left)}\n")
    os.environ["MASTER_PORT"] = last_port
    with joined():
        kept = distributed.distributed_c10d._get_default_group()
    atexit.register(sys.stdout.write, "finalized\n")
    _leave(5)
