"""suite.train with a fault in one process of several, in its third step.

torchrun --nproc-per-node 2 tests/suite/failing_process.py CELL.yaml
"""

import os
import sys
from pathlib import Path

from torch import Tensor

from suite.engine.plain import PlainEngine
from suite.train import main

_num_calls = 0
_train_step = PlainEngine.train_step


def _fail_in_the_third(self: PlainEngine, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    global _num_calls  # noqa: PLW0603  (a program of one purpose)
    _num_calls += 1
    if _num_calls == 3 and os.environ["RANK"] == "1":
        raise ValueError("a label of 4711\nand a second line")
    return _train_step(self, images, labels)


if __name__ == "__main__":
    PlainEngine.train_step = _fail_in_the_third  # type: ignore[method-assign]
    main(Path(sys.argv[1]))
