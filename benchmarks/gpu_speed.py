"""Speed on a GPU of optimizer steps, training steps and cells that share it, as ratios within one run.

The two sides of a ratio take turns. A turn is many steps, queued without waiting for the GPU, as in training. Ratios
are medians over the turns. `gpu.py` runs this; on a CPU it is only a rehearsal, whose numbers mean nothing.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from noise import Stepping, synchronize, trainer_of
from optimizer_step import PARQ, OperandBytes, Way, copy_rate, num_operations, ways
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import models
from quantizers import ProxConnect
from suite.engines.process_group import joined
from suite.recipe.settings import Execution

LOOP_BAR, BINARY_BAR = 1.1, 1.05
GRACE_SECONDS = 60.0
SOURCE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurement, and the kind of device."""

    device: Literal["cuda", "cpu"] = "cuda"
    turns: int = 9
    steps: int = 20
    networks: tuple[str, ...] = ("resnet20", "resnet18@224", "resnet50@224", "deit_small_patch16_224@224")
    batch_size: int = 128
    ways_to_run: tuple[str, ...] = ("eager", "compiled")
    at_once: tuple[int, ...] = (1, 2, 4, 8)
    cell: tuple[str, int] = ("resnet20", 30)
    num_images: int = 5000


REHEARSAL = Sizes("cpu", 2, 1, ("resnet8",), 8, ("eager",), (1, 2), ("resnet8", 1), 400)


@dataclass(frozen=True)
class Measured:
    """A `quantity` of `what`; `bar` is its upper (or lower) limit. `problem` says why there is no value."""

    part: str
    what: str
    quantity: str
    value: float | None
    bar: float | None = None
    at_least: bool = False
    problem: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the bar is met; None if there is no bar or no value."""
        if self.bar is None or self.value is None:
            return None
        return self.value >= self.bar if self.at_least else self.value <= self.bar


def measure(sizes: Sizes, until: float, say: Callable[[str], None]) -> Iterator[Measured]:
    """All measurements. None starts after `until` (seconds of time.monotonic); a failed one reports its reason."""
    steps = [
        (f"{STEP}: {network}, {how}", partial(_training_steps, network, how, sizes))
        for how in sizes.ways_to_run
        for network in sizes.networks
    ]
    parts: list[tuple[str, Callable[[], Iterator[Measured]]]] = [
        (OPTIMIZER, partial(_optimizer_steps, sizes)),
        (LOOP, partial(_loop, sizes)),
        (CELLS, partial(_cells_at_once, sizes)),
        *steps,
    ]
    for title, measuring in parts:
        part, _, what = title.partition(": ")
        if time.monotonic() > until:
            yield Measured(part, what, "", None, problem=NO_TIME)
            continue
        say(f"{part} {what}")
        try:
            with joined(execution=Execution(determinism="fast")):
                yield from measuring()
        except Exception as error:  # noqa: BLE001  (one failed measurement must not stop the others)
            last = (str(error).strip() or "no message").splitlines()[0]
            yield Measured(part, what, "", None, problem=f"{type(error).__name__}: {last}")
        if sizes.device == "cuda":
            torch.cuda.empty_cache()


OPTIMIZER = "A step of the optimizer, ResNet-18's parameters"
LOOP = "Our training loop over thirty lines of torch, ResNet-20"
STEP = "A training step of bnn++ over full precision's"
CELLS = "Cells that share a GPU"
NO_TIME = "no time was left"
PER_HOUR = "cells an hour"
LAUNCHES = {"cuda": "kernels launched", "cpu": "operations dispatched"}


def _optimizer_steps(sizes: Sizes) -> Iterator[Measured]:
    found = ways(sizes.device)
    copied = copy_rate(sizes.turns, sizes.device)
    for way in found:
        way.seconds.clear()
    for _ in range(sizes.turns):
        for way in found:
            way.run(sizes.steps)
    seconds = {way.name: way.seconds for way in found}
    for way in found:
        yield Measured(OPTIMIZER, way.name, "ms", 1e3 * way.median)
        if way.name != way.peer:
            yield Measured(OPTIMIZER, way.name, f"time / {way.peer}", ratio(way.seconds, seconds[way.peer]))
        yield Measured(OPTIMIZER, way.name, "bytes touched a second / a copy's", way.rate / copied)
        yield Measured(OPTIMIZER, way.name, LAUNCHES[sizes.device], num_launches(way, sizes.device))
    if PARQ in seconds:
        for name in ("bc", "bnn++"):
            ours = next(each for each in seconds if each.startswith(f"{name} SGD, "))
            value = ratio(seconds[PARQ], seconds[ours])
            yield Measured(OPTIMIZER, PARQ, f"time / {ours}", value, bar=1.0, at_least=True)
    for name in ("bc", "bnn++"):
        yield Measured(OPTIMIZER, f"{name} SGD, all of ResNet-56", LAUNCHES["cpu"], num_operations("resnet56", name))


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over turns of ours / theirs, both from the same turn."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def num_launches(way: Way, device: str) -> int:
    """Kernels that one step launches; on a CPU, operations that torch dispatches, including views."""
    if device == "cpu":
        with OperandBytes() as counted:  # type: ignore[no-untyped-call]
            way.step()
        return int(counted.num_operations)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        way.step()
        synchronize()
    return sum(event.count for event in profile.key_averages() if event.key.startswith(("cudaLaunch", "cuLaunch")))


def _training_steps(network: str, how: str, sizes: Sizes) -> Iterator[Measured]:
    execution = Execution(determinism="fast", compile=how == "compiled")
    precision = "bf16" if sizes.device == "cuda" else "float32"
    seconds: dict[str, list[float]] = {"fp": [], "bnn++": []}
    running = {name: Stepping(trainer_of(network, name, sizes.batch_size, precision, execution)) for name in seconds}
    for turn in range(-1, sizes.turns):  # the first turn compiles and selects kernels
        for name, stepping in running.items():
            taken = stepping.step(sizes.steps)
            if turn >= 0:
                seconds[name].append(taken)
    what = f"{network}, batch {sizes.batch_size}, {precision}, {how}"
    rate = sizes.batch_size / statistics.median(seconds["bnn++"])
    yield Measured(STEP, what, "time of bnn++ / fp", ratio(seconds["bnn++"], seconds["fp"]), bar=BINARY_BAR)
    yield Measured(STEP, what, "images of bnn++ a second", rate)


def plain_loop(network: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Tensor], None]:
    """The obvious training step, as the baseline for ours."""

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        loss = cross_entropy(network(images.contiguous(memory_format=torch.channels_last)), labels)
        torch.autograd.backward(loss)
        optimizer.step()

    return step


def _loop(sizes: Sizes) -> Iterator[Measured]:
    trainer = trainer_of(sizes.cell[0], "bnn++", sizes.batch_size, execution=Execution(determinism="fast"))
    network = models.create(sizes.cell[0], 10, 32, 3)
    split = models.binarize(network)
    network = network.to(sizes.device).to(memory_format=torch.channels_last)
    parameters = dict(network.named_parameters())
    rest: list[dict[str, Any]] = [
        {"params": [parameters[name] for name in split.decay]},
        {"params": [parameters[name] for name in split.no_decay], "weight_decay": 0.0},
        {"params": [parameters[name] for name in split.binary], "quantizer": "bnn++", "mu": 2.0},
    ]
    plain = plain_loop(network, ProxConnect(torch.optim.SGD(rest, 0.05, 0.9, weight_decay=1e-4)))
    batches = list(trainer.loaders.train.epoch(0))[: sizes.steps]
    steps: dict[str, Callable[[Tensor, Tensor], object]] = {"ours": trainer._train_step, "plain": plain}  # noqa: SLF001
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-1, sizes.turns):
        for name, step in steps.items():
            trainer.step = 0
            synchronize()
            start = time.perf_counter()
            for batch in batches:
                step(*batch)
            synchronize()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    value = ratio(seconds["ours"], seconds["plain"])
    yield Measured(LOOP, f"batch {sizes.batch_size}, float32", "time of ours / plain", value, bar=LOOP_BAR)


def _cells_at_once(sizes: Sizes) -> Iterator[Measured]:
    """One grid for each number of cells at a time, timed from command to exit: includes start-up and records."""
    model, epochs = sizes.cell
    with tempfile.TemporaryDirectory(prefix="gpu-") as name:
        folder = Path(name)
        noise_folder(folder / "data" / "cifar10", sizes.num_images)
        for number in sizes.at_once:
            seconds = cells_seconds(folder, model, epochs, max(sizes.at_once), number, sizes.device)
            what = f"{number} at a time: {model}, {epochs} epochs of {sizes.num_images:,} images"
            yield Measured(CELLS, what, PER_HOUR, 3600 * max(sizes.at_once) / seconds)


def cells_seconds(folder: Path, model: str, epochs: int, num_cells: int, at_once: int, device: str) -> float:
    """Seconds of `launch grid`, from command to exit, for cells on the CIFAR images in folder/data."""
    grid = {
        "name": f"at-once-{at_once}",
        "dataset": "cifar10",
        "models": [model],
        "quantizers": ["bnn++"],
        "seeds": list(range(num_cells)),
        "data": {"crop": "padded", "crop_padding": 4, "horizontal_flip": True},
        "training": {"epochs": epochs, "batch_size": 128, "learning_rate": 0.1, "weight_decay": 0.0001},
        "quantization": {"sharpness": {"bnn++": {"shape": "exponential", "start": 2.0, "end": 500.0}}},
    }
    path = folder / f"{grid['name']}.yaml"
    path.write_text(yaml.safe_dump(grid), encoding="utf-8")
    start = time.perf_counter()
    launch(path, folder / "runs", folder / "data", at_once, device)
    return time.perf_counter() - start


def launch(
    grid: Path, root: Path, data_dir: Path, at_once: int, device: str, *more: str, seconds: float | None = None
) -> None:
    """Runs `launch grid --local` with `at_once` cells at a time; interrupts it after `seconds`.

    Raises:
        RuntimeError: the launch failed; includes its message about the first failed cell.
    """
    share = ["--cells-per-gpu", str(at_once)] if device == "cuda" else ["--workers", str(at_once)]
    command = [sys.executable, "-m", "launch", "grid", str(grid), "--local", "--root", str(root)]
    path = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    command += ["--data-dir", str(data_dir), "--yes", *share, *more]
    status, said = run_for(command, os.environ | {"PYTHONPATH": path}, seconds)
    if status:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        why = next((line for line in lines if "failed:" in line and "(" in line), (lines or ["nothing said"])[-1])
        raise RuntimeError(f"launch grid: exit status {status}: {why}")


def run_for(command: Sequence[str], environment: dict[str, str], seconds: float | None) -> tuple[int | None, str]:
    """Runs a command, interrupts it after `seconds`, and kills it if that does not end it.

    Returns:
        Its exit status, or None if it was interrupted; and its output.
    """
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in background jobs; the command would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, cwd=SOURCE, env=environment, **streams) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                said, _ = process.communicate(timeout=GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                said, _ = process.communicate()
            return None, said
    return process.returncode, said


def noise_folder(place: Path, num_images: int) -> None:
    """Writes class folders of random 32-pixel JPEGs; the test set has a fifth as many."""
    generator = np.random.default_rng(0)
    for split, number in (("train", num_images), ("test", num_images // 5)):
        for label in range(10):
            folder = place / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(number // 10):
                pixels = generator.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.jpg")
