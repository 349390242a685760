"""An optimizer step at ImageNet ResNet-18's size: ours, fused and eager, against torch's own and PARQ's.

    python benchmarks/optimizer_step.py
    python benchmarks/optimizer_step.py --threads 1 --repeats 50

11.7 million parameters in 62 tensors, all quantized, with gradients already present; nothing else runs. In every repeat
each optimizer makes one step, so a machine that slows down slows all of them. Times are medians; ratios are to torch's
fused SGD (AdamW's to torch's fused AdamW) in the same repeats. PARQ's optimizer (torchao.prototype.parq) needs torchao
on PYTHONPATH; without it, a line says that PARQ is left out.

Bytes are the memory traffic of the arithmetic per parameter: known by construction for our and torch's fused steps,
otherwise counted from the operands of each of torch's operations. GB/s are those bytes over the time; for comparison, a
copy of one large tensor is timed, which reads and writes 4 bytes per element each.

A clipped step is `clip_grad_norm_` and the step; its ratio is to the step without clipping. At the end: the number of
operations that an eager step of a whole ResNet-56 dispatches (base with foreach=True, as on a GPU, where each operation
is one kernel or more).
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from machine import describe, verdict
from noise import synchronize
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import models
from quantizers import ProxConnect

MU = 5.0
SGD_OPTIONS: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
ADAMW_OPTIONS: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.05}
NUM_PARAMETERS = 11_689_512
"""ResNet-18's for ImageNet."""
PARQ = "PARQ, hard map, 1 bit"
BARS = {"bc": 1.6, "bnn": 1.6, "bnn++": 3.0}
"""Upper limits for the time of a step over torch's fused SGD's."""
PARQ_BAR = 10.0
CLIPPED_BAR = 1.6
"""Upper limit for clipping: the time of a clipped fused step of bnn++ over an unclipped one."""
OPERATIONS_BARS = {"bc": 60, "bnn++": 80}
"""Upper limits for the operations that an eager step of ResNet-56 dispatches."""
COPIED = 2**26
"""Elements of the copied tensor: 256 MB, far more than any cache."""
VIEWS = {"aten::detach", "aten::view", "aten::expand", "aten::slice", "aten::unsqueeze", "aten::squeeze", "aten::alias"}


@dataclass
class Way:
    """A way to step all tensors; its time is divided by `peer`'s. `seconds` are per step, one entry per repeat."""

    name: str
    step: Callable[[], Any]
    peer: str
    bytes_moved: float | None = None
    seconds: list[float] = field(default_factory=list)

    def run(self, num_steps: int = 1) -> None:
        """One turn of num_steps steps; records their mean time."""
        synchronize()
        start = time.perf_counter()
        for _ in range(num_steps):
            self.step()
        synchronize()
        self.seconds.append((time.perf_counter() - start) / num_steps)

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """Bytes per second that the arithmetic touches."""
        return (self.bytes_moved or 0.0) * NUM_PARAMETERS / self.median


class OperandBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that torch's operations read and write, as if there were no cache."""

    total = 0
    num_operations: int = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401  (torch's)
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Adds the operands of one operation."""
        result = func(*args, **(kwargs or {}))
        self.num_operations += 1
        if func._schema.name not in VIEWS:  # noqa: SLF001
            # The tensors that copy_, zero_ and empty fill are not read.
            read = args[1:] if func._schema.name in {"aten::copy_", "aten::zero_"} else args  # noqa: SLF001
            made = () if func._schema.name.startswith("aten::empty") else (result,)  # noqa: SLF001
            self.total += sum(tensor.numel() * tensor.element_size() for tensor in _tensors((*read, *made)))
        return result


def _tensors(values: Any) -> list[Tensor]:  # noqa: ANN401
    if isinstance(values, Tensor):
        return [values]
    return [tensor for value in values for tensor in _tensors(value)] if isinstance(values, list | tuple) else []


def shapes() -> list[tuple[int, ...]]:
    """Shapes of ResNet-18's parameters for ImageNet."""
    import timm

    return [tuple(p.shape) for p in timm.create_model("resnet18").parameters()]


def parameters(device: str = "cpu") -> list[torch.nn.Parameter]:
    """Tensors of those shapes with gradients: normally distributed, the same each time."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter((0.3 * torch.randn(shape, generator=generator)).to(device)) for shape in shapes()]
    for p in made:
        p.grad = (0.01 * torch.randn(p.shape, generator=generator)).to(device)
    return made


def ways(device: str = "cpu") -> list[Way]:
    """All optimizers to compare, after two steps that create the state and compile. On a GPU ours are eager."""
    found = _ways(device)
    for way in found:
        for _ in range(2):
            way.step()
        if way.bytes_moved is None:
            with OperandBytes() as operands:  # type: ignore[no-untyped-call]
                way.step()
            way.bytes_moved = operands.total / NUM_PARAMETERS
    return found


def _ways(device: str) -> list[Way]:
    sgd, adamw, kinds = "torch SGD fused", "torch AdamW fused", (True, False) if device == "cpu" else (False,)
    found = [
        Way(sgd, SGD(parameters(device), **SGD_OPTIONS, fused=True).step, sgd, 20),
        Way("torch SGD foreach", SGD(parameters(device), **SGD_OPTIONS, foreach=True).step, sgd),
        Way(adamw, AdamW(parameters(device), **ADAMW_OPTIONS, fused=True).step, adamw, 28),
    ]

    def ours(quantizer: str, base: str, *, fused: bool) -> Way:
        base_name, peer, num_bytes = ("SGD", sgd, 24) if base == "sgd" else ("AdamW", adamw, 32)
        name = f"{quantizer} {base_name}, {'fused' if fused else 'eager'}"
        step = _ours(quantizer, base, device, fused=fused).step
        return Way(name, step, peer, num_bytes if fused else None)

    found += [ours(quantizer, "sgd", fused=fused) for quantizer in ("bc", "bnn", "bnn++") for fused in kinds]
    for quantizer in ("bc", "bnn++"):
        kind, num_bytes = ("fused", 44) if kinds[0] else ("eager", None)
        step = _clipped(_ours(quantizer, "sgd", device, fused=kinds[0]))
        found.append(Way(f"{quantizer} SGD, clipped", step, f"{quantizer} SGD, {kind}", num_bytes))
    found += [ours("bnn++", "adamw", fused=fused) for fused in kinds]
    parq = _parq(device)
    if parq is None:
        print("PARQ is left out: torchao is not installed (pip install --target DIRECTORY torchao, on PYTHONPATH)")
    else:
        found.append(Way(PARQ, parq.step, sgd))
    return found


def _ours(quantizer: str, base: str, device: str, *, fused: bool) -> ProxConnect:
    groups = [{"params": parameters(device), "quantizer": quantizer, "mu": MU}]
    made: Optimizer = SGD(groups, **SGD_OPTIONS) if base == "sgd" else AdamW(groups, **ADAMW_OPTIONS)
    return ProxConnect(made, fused=fused)


def _clipped(optimizer: ProxConnect) -> Callable[[], None]:
    """A step with clipping that scales the gradients every time."""
    maximum = float(optimizer.clip_grad_norm_(1e30))
    optimizer.step()

    def step() -> None:
        nonlocal maximum
        maximum *= 0.999  # below the norm that the previous call left
        optimizer.clip_grad_norm_(maximum)
        optimizer.step()

    return step


def _parq(device: str) -> Optimizer | None:
    """PARQ's QuantOptimizer with the hard map on one bit, around torch's fused SGD; None without torchao."""
    if importlib.util.find_spec("torchao") is None:
        return None
    from torchao.prototype import parq  # type: ignore[import-not-found,unused-ignore]

    base = SGD([{"params": parameters(device), "quant_bits": 1}], **SGD_OPTIONS, fused=True)
    made: Optimizer = parq.QuantOptimizer(base, parq.LSBQuantizer(), parq.ProxHardQuant())
    return made


def num_operations(model: str, quantizer: str) -> int:
    """Operations dispatched by an eager step around SGD with momentum, for a whole model with norms and head."""
    network = models.create(model, 10, 32, 3)
    split = models.binarize(network)
    named = dict(network.named_parameters())
    for p in named.values():
        p.grad = torch.ones_like(p)
    groups: list[dict[str, Any]] = [
        {"params": [named[name] for name in split.binary], "quantizer": quantizer, "mu": MU},
        {"params": [named[name] for name in split.decay]},
        {"params": [named[name] for name in split.no_decay], "weight_decay": 0.0},
    ]
    optimizer = ProxConnect(SGD(groups, **SGD_OPTIONS, foreach=True), fused=False)
    for _ in range(2):
        optimizer.step()
    with OperandBytes() as counted:  # type: ignore[no-untyped-call]
        optimizer.step()
    return int(counted.num_operations)


def copy_rate(repeats: int, device: str = "cpu") -> float:
    """Median bytes per second that a copy of COPIED float32 elements reads and writes."""
    source, target = torch.ones(COPIED, device=device), torch.zeros(COPIED, device=device)
    way = Way("copy", lambda: target.copy_(source), "copy")
    for _ in range(repeats):
        way.run()
    return 8 * COPIED / way.median


def main(
    threads: Annotated[str, typer.Option(help="Numbers of threads, measured separately.")] = "1,2",
    repeats: int = 25,
) -> None:
    """Times the steps of the optimizers."""
    print(f"{describe()}: medians of {repeats} interleaved repeats")
    found = ways()
    for number in threads.split(","):
        torch.set_num_threads(int(number))
        _measure(found, f"threads: {number}", repeats)
        _judge({way.name: way.median for way in found}, int(number))
    for quantizer, limit in OPERATIONS_BARS.items():
        number_of = num_operations("resnet56", quantizer)
        print(verdict(f"operations of an eager step of ResNet-56, {quantizer}", number_of, limit))


def _measure(found: list[Way], what: str, repeats: int) -> None:
    """Prints the time of each optimizer."""
    copied = copy_rate(repeats)
    for way in found:
        way.seconds.clear()
    for _ in range(repeats):
        for way in found:
            way.run()
    print(f"\n{what}; {NUM_PARAMETERS / 1e6:.1f} million parameters; a copy moves {copied / 1e9:.1f} GB/s")
    print(f"{'':24}{'ms':>8}{'ratio':>8}{'bytes':>8}{'GB/s':>8}")
    medians = {way.name: way.median for way in found}
    for way in found:
        ratio = way.median / medians[way.peer]
        print(f"{way.name:24}{1e3 * way.median:8.2f}{ratio:8.2f}{way.bytes_moved:8.0f}{way.rate / 1e9:8.1f}")


def _judge(medians: dict[str, float], num_threads: int) -> None:
    for name, limit in BARS.items():
        ours = medians[f"{name} SGD, fused"]
        what = f"{num_threads} threads: {name}, fused / torch's fused SGD"
        print(verdict(what, ours / medians["torch SGD fused"], limit))
        if PARQ in medians:
            what = f"{num_threads} threads: PARQ's step / {name}, fused"
            print(verdict(what, medians[PARQ] / ours, PARQ_BAR, at_least=True))
    ratio = medians["bnn++ SGD, clipped"] / medians["bnn++ SGD, fused"]
    print(verdict(f"{num_threads} threads: bnn++, clipped / the step alone", ratio, CLIPPED_BAR))


if __name__ == "__main__":
    typer.run(main)
