"""Exports a run's tested network to a file with one bit per binary weight; docs/export.md has the format.

    python -m suite.export runs/digits/<id>              write runs/digits/<id>/packed.safetensors
    python -m suite.export runs/digits/<id> --check      also read it back: sizes, logits, accuracy
    python -m suite.export runs/digits/<id> --format timm    plain weights, for timm.create_model(checkpoint_path=)

Exit status: 0 written, 1 the file read back differs from the network (--check), 2 bad input.
"""

import copy
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml

from suite.errors import UserError
from suite.export.one_bit import ExportError, Origin, Sizes, load_packed, measure, reason, write
from suite.recipe.cell import Cell
from suite.run.atomic import write_bytes
from suite.run.directory import RunDir

if TYPE_CHECKING:  # they import torch and timm, which would delay --help
    from rich.table import Table
    from torch import Tensor, nn

    from suite.engines.process_group import Layout
    from suite.training.trainer import Network

EXIT_DIFFERS, EXIT_BAD_INPUT = 1, 2
PATIENCE_SECONDS = 2.0
"""A comparison that takes longer gets a progress bar."""

app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)


def export(run: RunDir, out: Path, data_dir: Path) -> "Network":
    """Writes the network measured in the run's result.json to `out`; returns the deployed network.

    Needs the data set only if the recipe re-estimates batch-norm statistics.

    Raises:
        ExportError: the run is not done, has nothing binary, or its network could not be rebuilt bit-exactly.
    """
    cell, result = _finished(run)
    if cell.quantizer == "fp":
        raise ExportError(f"{run.path}: nothing binary: {cell.name} is full-precision; --format timm exports it")
    network = _tested(run, data_dir)
    commit = run.provenance().get("code", {}).get("commit")
    classes = network.description.classes
    origin = Origin(cell=cell, classes=classes, top1_hard=result["top1_hard"], commit=commit)
    write(out, network.engine.model, network.split, origin)
    return network


def _tested(run: RunDir, data_dir: Path) -> "Network":
    """The network measured in the run's result.json, deployed. ExportError if it cannot be rebuilt bit-exactly."""
    from suite.engines.process_group import joined

    cell, result = _finished(run)
    with joined() as layout:
        network = _deployed(run, cell, layout, data_dir)
    if network.weights_digest() != result["weights_sha256"]:
        raise ExportError(f"{run.path}: not the tested network, its weights_sha256 differs: {_why(cell)}")
    return network


def _finished(run: RunDir) -> tuple[Cell, dict[str, Any]]:
    """The cell and result of a run. ExportError unless the run is done and its network was tested."""
    try:
        cell, result = run.cell(), run.result()
    except OSError as error:
        raise ExportError(f"{run.path}: not a run directory: {error.filename}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ExportError(f"{run.path}: its cell.yaml or result.json is damaged: {reason(error)}") from error
    if cell.trial:
        raise ExportError(f"{run.path}: {cell.name} is a tuning trial, whose network is not tested")
    if result is None:
        raise ExportError(
            f"{run.path}: {cell.name} is not done ({run.state().state}); only a tested network is exported"
        )
    return cell, result


def _deployed(run: RunDir, cell: Cell, layout: "Layout", data_dir: Path) -> "Network":
    """The deployed network, rebuilt from the run's last checkpoint."""
    from quantizers.names import is_own, module_of
    from suite.data.source import Description
    from suite.run import checkpoint
    from suite.training.trainer import Network, Trainer

    for name in filter(is_own, (cell.model, cell.quantizer)):
        try:
            module_of(name)
        except ValueError as error:
            raise ExportError(f"{error}; run this where its module is, or in {run.path.parent}/code/*") from error
    found = checkpoint.load_newest(run.checkpoints, cell.id, layout.device)
    if found is None:
        raise ExportError(f"{run.checkpoints}: no checkpoint")
    state = found[1]
    if state["epoch"] != cell.training.epochs:
        raise ExportError(
            f"{run.checkpoints}: the newest intact checkpoint is from epoch {state['epoch']}, "
            f"the tested network from epoch {cell.training.epochs}"
        )
    network: Network
    if cell.training.reestimate_norm:
        network = Trainer(cell, layout, data_dir, None, is_resumed=True)
    else:
        network = Network(cell, Description.of(state["description"]), layout)
    network.load_state_dict(state)
    network.deploy()
    return network


def _why(cell: Cell) -> str:
    if cell.training.reestimate_norm:
        return (
            "its batch-norm statistics were re-estimated after hardening, which gives the same bits only with the "
            "device, numbers of processes and threads, and versions listed in provenance.json"
        )
    return "the checkpoint or result.json was changed, or the code that deploys a network has changed since"


@dataclass(frozen=True)
class Comparison:
    """Two networks compared on a test set: for `num_equal` of `num_images` images, the logits are bit-identical.

    `num_inexact` counts sums, in layers with an accumulator of few bits, that integers of that size cannot represent.
    """

    num_images: int
    num_equal: int
    top1: float
    num_inexact: int = 0


def compare(network: "Network", loaded: "nn.Module", data_dir: Path) -> Comparison:
    """Compares the network read back with the deployed one on the test set, in the recipe's precision.

    `top1` is the accuracy of the network read back.
    """
    import torch

    import models
    from suite.data import datasets
    from suite.training.build import build_loaders

    engine, other = network.engine, copy.copy(network.engine)
    other.model = loaded.to(network.layout.device)
    inexact: list[int] = []
    for accumulator in models.accumulators(other.model):
        accumulator.register_forward_pre_hook(lambda own, sums: inexact.append(models.num_inexact(own, sums[0])))
    engine.model.eval()
    test = build_loaders(network.cell, datasets.load(network.cell.dataset, data_dir), network.layout).final
    counts = torch.zeros(3, dtype=torch.int64)
    for images, labels in _shown(test.evaluation(), len(test.reader.labels)):
        ours, theirs = engine.logits(images), other.logits(images)
        same = (ours.contiguous().view(torch.uint8) == theirs.contiguous().view(torch.uint8)).all(1).sum()
        correct = (theirs.argmax(1) == labels).sum()
        counts += torch.tensor([len(labels), int(same), int(correct)])
    num_images, num_equal, num_correct = counts.tolist()
    return Comparison(num_images, num_equal, num_correct / num_images, sum(inexact))


def _shown(batches: "Iterator[tuple[Tensor, Tensor]]", num_images: int) -> "Iterator[tuple[Tensor, Tensor]]":
    """The batches, with a progress bar on the terminal once they take long."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    task, start = bar.add_task("comparing logits", total=num_images), time.monotonic()
    try:
        for images, labels in batches:
            if not bar.live.is_started and time.monotonic() - start > PATIENCE_SECONDS:
                bar.start()
            yield images, labels
            bar.advance(task, len(labels))
    finally:
        if bar.live.is_started:
            bar.stop()


def _check(network: "Network", path: Path, top1_hard: float, data_dir: Path) -> bool:
    """Whether the network read back gives bit-identical logits; prints the comparison.

    Accuracy is shown but not checked: it equals the recorded one only if measured on the same kind of device.
    """
    from rich.console import Console

    sizes, comparison = measure(path, network.engine.model), compare(network, load_packed(path), data_dir)
    console = Console(highlight=False)
    console.print(_table(sizes))
    num_equal, num_images = comparison.num_equal, comparison.num_images
    console.print(f"logits: bit-identical on {num_equal} of {num_images} test images")
    console.print(f"hard test accuracy: {comparison.top1:.2%} read back, {top1_hard:.2%} in result.json")
    if network.cell.quantization.accumulator is not None:
        bits = network.cell.quantization.accumulator.bits
        console.print(f"sums: {comparison.num_inexact} do not fit integers of {bits} bits")
    if num_equal != num_images or comparison.num_inexact:
        console.print("[bold red]the file is not the tested network[/]")
    return num_equal == num_images and not comparison.num_inexact


def _table(sizes: Sizes) -> "Table":
    from rich.table import Table

    table = Table()
    table.add_column("bytes")
    for column in ("float32", "1 bit", "ratio"):
        table.add_column(column, justify="right")
    for name, before, after, ratio in (
        ("binary tensors", sizes.binary_float32_bytes, sizes.binary_packed_bytes, sizes.binary_ratio),
        ("whole file", sizes.file_float32_bytes, sizes.file_packed_bytes, sizes.file_ratio),
    ):
        table.add_row(name, f"{before:,}", f"{after:,}", f"{ratio:.2f}")
    return table


def export_for_timm(run: RunDir, out: Path, data_dir: Path) -> "Network":
    """Writes the network measured in the run's result.json to `out`, for `timm.create_model` to load.

    Each layer's gain is multiplied into its weight, so the tensors match the plain architecture and the logits are
    bit-identical. Full-precision networks are written unchanged.

    Raises:
        ExportError: the run is not done, or its network could not be rebuilt bit-exactly, or has binary inputs, which
            plain layers do not support.
    """
    from safetensors.torch import save

    cell, _ = _finished(run)
    if cell.task != "bw":
        raise ExportError(f"{run.path}: task {cell.task}: timm's layers have no binary inputs; omit --format")
    network = _tested(run, data_dir)
    tensors = {name: value.cpu().contiguous() for name, value in _plain(network.engine.model).items()}
    metadata = {"model": cell.model, "cell": cell.id, "num_classes": str(len(network.description.classes))}
    try:
        write_bytes(out, save(tensors, metadata))
    except OSError as error:
        raise ExportError(f"{out}: cannot be written: {error.strerror}") from error
    return network


def _plain(model: "nn.Module") -> "dict[str, Tensor]":
    """The model's tensors with each gain multiplied into its layer's weight."""
    state = model.state_dict()
    for name in [name for name in state if name.endswith(".gain")]:
        weight, gain = f"{name.removesuffix('gain')}weight", state.pop(name)
        state[weight] = gain.view(-1, *[1] * (state[weight].ndim - 1)) * state[weight]
    return dict(state)


def _tell_how_to_load(path: Path, network: "Network") -> None:
    from models.catalog import OURS, metadata
    from quantizers.names import is_own

    cell, description = network.cell, network.description
    in_chans, size, _ = metadata(network.engine.model)["input_size"]
    if is_own(cell.model):
        module, _, function = cell.model.partition(":")
        print(
            f"{module}.{function}(...).load_state_dict(safetensors.torch.load_file({str(path)!r}))  "
            f"# num_classes={len(description.classes)}, in_chans={in_chans}"
        )
        return
    fixed = "" if cell.model in OURS or not _is_of_one_size(cell.model) else f", img_size={size}"
    channels = "" if in_chans == 3 else f", in_chans={in_chans}"  # noqa: PLR2004  (timm's default)
    if cell.model in OURS:
        print("import models.catalog; models.catalog.names()  # registers this project's architectures with timm")
    print(
        f"timm.create_model({cell.model!r}, num_classes={len(description.classes)}{channels}{fixed}, "
        f"checkpoint_path={str(path)!r})"
    )


def _is_of_one_size(name: str) -> bool:
    import models

    return not models.takes_any_size(name)


@app.command()
def main(
    run: Annotated[Path, typer.Argument(help="Directory of a done run, for instance runs/digits/<id>.", metavar="RUN")],
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: packed.safetensors or timm.safetensors in RUN.")
    ] = None,
    format_: Annotated[
        Literal["packed", "timm"],
        typer.Option(
            "--format", help="packed: one bit per binary weight; timm: for timm.create_model(checkpoint_path=)."
        ),
    ] = "packed",
    check: Annotated[
        bool,
        typer.Option("--check", help="Read the file back; compare sizes, logits and accuracy. Status 1 if it differs."),
    ] = False,
    data_dir: Annotated[Path, typer.Option(envvar="PROXBENCH_DATA", help="Folder of the data sets.")] = Path("data"),
) -> None:
    """Write the tested network of a run as one safetensors file with one bit per binary weight.

    [bold]python -m suite.export runs/digits/<id> --check[/]
    [bold]python -m suite.export runs/digits/<id> --format timm[/]

    The network is rebuilt from the run's last checkpoint, and must be
    bit-identical to the one measured in result.json. Everything that is not
    binary (first layer, classifier, norms, gains) is kept unchanged.

    In Python, [bold]suite.export.one_bit.load_packed(path)[/] loads the network.
    """
    import torch

    source = RunDir(run)
    path = run / f"{format_}.safetensors" if out is None else out
    if check and format_ != "packed":
        print("--check: only for --format packed; to check a timm file, load it with the printed line", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)
    try:
        # Sums are split over threads: the same number as in training gives the same statistics and logits.
        if num_threads := source.provenance().get("num_threads"):
            torch.set_num_threads(num_threads)
        network = (export if format_ == "packed" else export_for_timm)(source, path, data_dir)
        print(f"{path}: {network.cell.name}, {path.stat().st_size:,} bytes")
        if format_ == "timm":
            _tell_how_to_load(path, network)
        if check and not _check(network, path, _finished(source)[1]["top1_hard"], data_dir):
            raise SystemExit(EXIT_DIFFERS)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from error


if __name__ == "__main__":
    app()
