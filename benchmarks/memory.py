"""Does a training step hold hidden copies? Compares its peak memory with the necessary minimum.

    python benchmarks/memory.py

The limit is 4 bytes per parameter for each of w, gradient and momentum (two moments for AdamW), 4 more for w* of each
quantized parameter, and the activations. The latter are full precision's peak less its own w, gradient and momentum, on
the same network and batch. The excess is counted in copies of the quantized parameters. One copy is expected: a layer
with a gain keeps g W for its backward pass (models.layers), so a transformer, in which all layers have a gain, has 1.
The peak of the optimizer's step, without activations, is shown separately: larger activations would hide its
temporaries.

On a GPU, peaks are torch.cuda.max_memory_allocated. On a CPU, they are the running sum over one step of the memory that
torch's allocator takes and returns, on top of the network's and optimizer's memory before it. Since oneDNN and malloc
have memory of their own, the peak of the whole process less its imports and data is shown as well (Linux).
"""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from machine import describe, verdict
from noise import Stepping, data_set, trainer_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

from suite.data.in_memory import LOADERS
from suite.training.trainer import Trainer

CASES = (("resnet20", 128), ("resnet18@64", 16), ("vit_mini_patch4_32", 32))
QUANTIZERS = ("fp", "bnn++")
BAR = 0.0
"""Unnecessary copies of the parameters, rounded to a tenth."""


def state_bytes(trainer: Trainer) -> int:
    """Bytes of parameters, buffers, latents and the base optimizer's state, i.e. the memory held between steps."""
    tensors: list[Tensor] = [*trainer.engine.model.parameters(), *trainer.engine.model.buffers()]
    tensors += [latent.w_star for latent in trainer.engine.latents()]
    tensors += [value for state in trainer.optimizer.state.values() for value in state.values() if _is_tensor(value)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def peak(call: Callable[[], object]) -> int:
    """Peak bytes that torch holds during the call, less the bytes held before."""
    gc.collect()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    events = [event for event in results.events() if event.name() == "[memory]"] if results is not None else []
    held = highest = 0
    for event in sorted(events, key=lambda event: int(event.start_ns())):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def measure(model: str, quantizer: str, batch_size: int) -> dict[str, float]:
    """Bytes of one cell, in this process. The previous step's gradients are released first, as in training."""
    _warm_up()
    before = _resident()
    trainer = trainer_of(model, quantizer, batch_size)
    stepping = Stepping(trainer)
    for _ in range(3):
        stepping.step()
    process = _resident(peak=True) - before
    trainer.optimizer.zero_grad()
    held = state_bytes(trainer)
    found: dict[str, float] = {"process": process, "state": held, "step": held + peak(stepping.step)}
    gradients = sum(p.grad.nbytes for p in trainer.engine.model.parameters() if p.grad is not None)
    found["optimizer"] = held + gradients + peak(trainer.optimizer.step)
    sizes = trainer.num_parameters
    found["parameters"] = 4 * sum(sizes.values())
    found["quantized"] = 4 * sum(sizes[name] for name in trainer.split.binary)
    moments = 2 if trainer.cell.training.optimizer == "adamw" else 1
    found["needed"] = (2 + moments) * found["parameters"] + found["quantized"]
    return found


def _warm_up() -> None:
    """Loads data, threads and libraries before the measurement begins."""
    for size in {int((model + "@32").split("@")[1]) for model, _ in CASES}:
        LOADERS[data_set(size)](Path(), with_test=True)
    Stepping(trainer_of("resnet8", "bnn++", 8)).step()


def _resident(*, peak: bool = False) -> int:
    """Resident bytes of this process; with `peak`, the maximum since the last call without. 0 if not on Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    if not peak:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
    return 1024 * int(fields["VmHWM" if peak else "VmRSS"].split()[0])


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _report(model: str, batch_size: int, found: dict[str, dict[str, float]], console: Console) -> list[str]:
    fp = found["fp"]
    activations = fp["step"] - fp["needed"]
    table = Table("", *found, title=f"{model}, batch {batch_size}: MB (10^6 bytes)")
    needed = {name: max(one["needed"] + activations, one["needed"]) for name, one in found.items()}
    left = {name: one["step"] - needed[name] for name, one in found.items()}
    left_in_step = {name: one["optimizer"] - one["needed"] for name, one in found.items()}
    rows: list[tuple[str, Callable[[str], float]]] = [
        ("parameters, 4 bytes each", lambda name: found[name]["parameters"]),
        ("of these quantized", lambda name: found[name]["quantized"]),
        ("w, gradient, momentum, w*", lambda name: found[name]["needed"]),
        ("activations, of full precision", lambda _: activations),
        ("peak of a step", lambda name: found[name]["step"]),
        ("  left over", lambda name: left[name]),
        ("peak of the optimizer's step", lambda name: found[name]["optimizer"]),
        ("  over w, gradient, momentum, w*", lambda name: left_in_step[name]),
        ("peak of the process, less imports and data", lambda name: found[name]["process"]),
    ]
    for title, value in rows:
        table.add_row(title, *(f"{value(name) / 1e6:.1f}" for name in found))
    console.print(table)
    lines = []
    for name in QUANTIZERS[1:]:
        copies = round(left[name] / found[name]["quantized"], 1)
        lines.append(verdict(f"{model}, batch {batch_size}, {name}: hidden copies at a step's peak", copies, BAR))
        copies = round((left_in_step[name] - left_in_step["fp"]) / found[name]["quantized"], 1)
        lines.append(f"{model}, {name}: the optimizer's step holds {copies:g} copies more than full precision's")
    return lines


def main(
    model: Annotated[
        str, typer.Option(help="Measure only this model, in this process, and print JSON; default: all models.")
    ] = "",
    quantizer: str = "bnn++",
    batch_size: int = 128,
) -> None:
    """Measures the memory of cells, each in its own process."""
    if model:
        print(json.dumps(measure(model, quantizer, batch_size)))
        return
    print(describe())
    console, lines = Console(), []
    with console.status("") as status:
        for name, size in CASES:
            found = {}
            for row in QUANTIZERS:
                status.update(f"{name}, {row}")
                command = [sys.executable, __file__, "--model", name, "--quantizer", row, "--batch-size", str(size)]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found[row] = json.loads(output.splitlines()[-1])
            lines += _report(name, size, found, console)
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
