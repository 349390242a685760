"""Cost of binarization in training: a BNN++ step over a full-precision step of the same model, in one run.

    python benchmarks/step_overhead.py
    python benchmarks/step_overhead.py --models resnet20,resnet18@64 --precision bf16 --batch-size 256

The two take turns step by step, so a machine that slows down slows both. A ratio is the median over the turns, with
quartiles. The extra time has three parts: in the optimizer (B times the gradient before the base's step, F of the
latents after it) and in its base, timed separately in the same steps, and the rest in the model (gains, copies).
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from machine import describe, verdict
from noise import Stepping, synchronize, trainer_of
from rich.console import Console
from rich.table import Table

from suite.training.trainer import Trainer

BAR = 1.05


@dataclass
class Timed:
    """Seconds of a trainer's steps, of its optimizer's steps, and of the base optimizer's steps."""

    trainer: Trainer
    steps: list[float] = field(default_factory=list)
    base: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stepping = Stepping(self.trainer)
        proxconnect = self.trainer.optimizer
        proxconnect.step = self._timing(proxconnect.step, self.optimizer)  # type: ignore[method-assign]
        proxconnect.base.step = self._timing(proxconnect.base.step, self.base)  # type: ignore[method-assign]

    def run(self) -> None:
        """One step, timed including its loading."""
        self.steps.append(self._stepping.step())

    def forget(self) -> None:
        """Discards the measurements of the warm-up."""
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
    models: str = "resnet20,resnet18@64,vit_mini_patch4_32",
    batch_size: int = 128,
    precision: str = "float32",
    turns: Annotated[int, typer.Option(min=2, help="Measured steps of each of the two.")] = 40,
) -> None:
    """Compares training steps of bnn++ and fp."""
    print(describe())
    console, lines = Console(), []
    table = Table(
        "model", "bnn++, ms", "fp, ms", "ratio (quartiles)", "F and B, ms", "base optimizer, ms", "the model, ms"
    )
    table.title = f"a step of {batch_size} images, {precision}; what it takes more, in three parts"
    for model in models.split(","):
        with console.status(model):
            fp, binary = (Timed(trainer_of(model, quantizer, batch_size, precision)) for quantizer in ("fp", "bnn++"))
            for turn in range(-2, turns):
                for each in (fp, binary) if turn % 2 else (binary, fp):
                    each.run()
                    if turn < 0:
                        each.forget()
        lines.append(_report(model, fp, binary, table))
    console.print(table)
    print("\n".join(lines))


def _report(model: str, fp: Timed, binary: Timed, table: Table) -> str:
    """Adds the model's row; returns its verdict."""
    ours, theirs = statistics.median(binary.steps), statistics.median(fp.steps)
    base = statistics.median(binary.base)
    more = statistics.median(binary.optimizer) - base - (statistics.median(fp.optimizer) - statistics.median(fp.base))
    base_more = base - statistics.median(fp.base)
    parts = (more, base_more, ours - theirs - more - base_more)
    # Pair neighbouring steps, which see the same load on the machine.
    ratios = [one / other for one, other in zip(binary.steps, fp.steps, strict=True)]
    low, ratio, high = statistics.quantiles(ratios)
    milliseconds = [f"{1e3 * part:+.1f}" for part in parts]
    described = f"{ratio:.3f} ({low:.2f} to {high:.2f})"
    table.add_row(model, f"{1e3 * ours:.1f}", f"{1e3 * theirs:.1f}", described, *milliseconds)
    return verdict(f"{model}: a step of bnn++ / of full precision", ratio, BAR)


if __name__ == "__main__":
    typer.run(main)
