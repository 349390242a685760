"""What binarization costs in training: a BNN++ step over a full-precision step of the same model, in one run.

    python benchmarks/step_overhead.py
    python benchmarks/step_overhead.py --models resnet20 --precision bf16 --batch-size 256

Blocks of steps alternate between the two, so that a machine that slows down slows both. The rest is divided into what
the optimizer does more (B times the gradient before the base's step, F of the latents after it), timed by itself in
the same blocks, and what the model does more (gains, copies), the remainder.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from noise import synchronize, trainer_of
from torch import Tensor

from suite.trainer import Trainer


@dataclass
class Timed:
    """Seconds of a trainer's steps, and of the parts of its optimizer's."""

    trainer: Trainer
    steps: list[float] = field(default_factory=list)
    base: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._batches: Iterator[tuple[Tensor, Tensor]] = iter(())
        proxconnect = self.trainer.optimizer
        proxconnect.step = self._timing(proxconnect.step, self.optimizer)  # type: ignore[method-assign]
        proxconnect.base.step = self._timing(proxconnect.base.step, self.base)  # type: ignore[method-assign]

    def run(self, num_steps: int) -> None:
        """So many steps, each timed with its loading."""
        for _ in range(num_steps):
            start = time.perf_counter()
            batch = next(self._batches, None)
            if batch is None:
                self._batches, self.trainer.step = self.trainer.loaders.train.epoch(0), 0
                batch = next(self._batches)
            self.trainer._train_step(*batch)  # noqa: SLF001  (an epoch would be too long)
            synchronize()
            self.steps.append(time.perf_counter() - start)

    def forget(self) -> None:
        """Drops what was measured while the machine warmed up."""
        for seconds in (self.steps, self.base, self.optimizer):
            seconds.clear()

    @staticmethod
    def _timing(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
        def timed(*arguments: object) -> object:
            synchronize()
            start = time.perf_counter()
            result = call(*arguments)
            synchronize()
            seconds.append(time.perf_counter() - start)
            return result

        return timed


def main(
    models: str = "resnet20,vit_mini_patch4_32",
    batch_size: int = 128,
    precision: str = "float32",
    blocks: Annotated[int, typer.Option(help="Blocks of steps of each of the two.")] = 8,
    steps: Annotated[int, typer.Option(help="Steps of a block.")] = 5,
) -> None:
    """Compare training steps of bnn++ and fp."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {batch_size}, {precision}")
    for model in models.split(","):
        fp, binary = (Timed(trainer_of(model, quantizer, batch_size, precision)) for quantizer in ("fp", "bnn++"))
        for each in (fp, binary):
            each.run(3)
            each.forget()
        for _ in range(blocks):
            for each in (fp, binary):
                each.run(steps)
        _report(model, fp, binary)


def _report(model: str, fp: Timed, binary: Timed) -> None:
    ours, theirs = statistics.median(binary.steps), statistics.median(fp.steps)
    base = statistics.median(binary.base)
    more = statistics.median(binary.optimizer) - base - (statistics.median(fp.optimizer) - statistics.median(fp.base))
    base_more = base - statistics.median(fp.base)
    print(
        f"{model}: bnn++ {1e3 * ours:.1f} ms, fp {1e3 * theirs:.1f} ms a step: ratio {ours / theirs:.3f}; of the "
        f"{1e3 * (ours - theirs):+.1f} ms: F and B {1e3 * more:+.1f}, the base optimizer {1e3 * base_more:+.1f}, "
        f"the model {1e3 * (ours - theirs - more - base_more):+.1f}"
    )


if __name__ == "__main__":
    typer.run(main)
