"""Compares training interrupted after any step with uninterrupted training, on one process or as a torchrun rank.

torchrun --nproc-per-node 2 tests/suite/interrupted.py FOLDER
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.models import create_model, register_model
from tiny_cells import tiny_cell
from torch import Tensor, nn

from suite.engines.process_group import Layout, joined
from suite.recipe.cell import Cell
from suite.run import checkpoint, journal
from suite.run.directory import RunDir
from suite.run.failures import DivergedError
from suite.training.trainer import Trainer

NOWHERE = Path("no-data-needed")


def vit_mini_patch2_8_dropout(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """The small transformer with dropout, which draws the only random numbers in a step."""
    wanted = {name: value for name, value in kwargs.items() if not name.startswith("pretrained_cfg")}
    model: nn.Module = create_model("vit_mini_patch2_8", pretrained=pretrained, proj_drop_rate=0.3, **wanted)
    return model


register_model(vit_mini_patch2_8_dropout)

_SOFT_INPUTS = {"quantizer": "bnn++", "sharpness": {"shape": "linear", "start": 1.0, "end": 8.0}}
CELLS: dict[str, dict[str, Any]] = {
    "bnn++": {},
    "fp with momentum and clipping": {
        "quantizer": "fp",
        "quantization": {},
        "training__optimizer": "sgd",
        "training__clip_grad_norm": 1.0,
    },
    "average and norms measured anew": {"training__ema_decay": 0.9, "training__reestimate_norm": True},
    "dropout": {"model": "vit_mini_patch2_8_dropout"},
    "rates, another optimizer and loss": {
        "model": "vit_mini_patch2_8",
        "training__optimizer": "lamb",
        "training__betas": [0.9, 0.99],
        "training__layer_decay": 0.8,
        "training__dropout": 0.1,
        "training__drop_path": 0.2,
        "training__loss": "bce",
        "training__clip_grad_adaptive": 0.02,
        "training__ema_decay": 0.9,
        "training__ema_warmup": True,
        "quantization__scale": "channel",
    },
    "sums of few bits": {
        "model": "bireal_resnet8",
        "task": "bwaa",
        "quantization__inputs": _SOFT_INPUTS,
        "quantization__accumulator": {"bits": 5, "penalty": 0.1},
    },
    "binary activations": {"model": "bireal_resnet8", "task": "bwa", "quantization__inputs": _SOFT_INPUTS},
}


def cell_of(name: str) -> Cell:
    """Two epochs of two steps."""
    return tiny_cell(training__batch_size=600, **CELLS[name])


def finish(trainer: Trainer, folder: Path | None = None) -> dict[str, Any]:
    """Trains to the end; returns the content of a journal and result. With a folder, saves after every step."""

    def on_step(number: int, _loss: Tensor) -> None:
        if folder is not None:
            _save(trainer, folder / f"{number:02d}")

    found: dict[str, Any] = {}
    while trainer.epoch < trainer.cell.training.epochs:
        metrics = trainer.train_epoch(on_step)
        found[f"epoch {trainer.epoch}"] = {k: v for k, v in metrics.items() if k[:5] != "time/"}
        if folder is not None:
            _save(trainer, folder / f"{trainer.epoch * trainer.steps_per_epoch - 1:02d}-end")
    found["test"] = [(each.metrics("test"), each.right.tolist()) for each in trainer.test()]
    found["digest"] = trainer.weights_digest()
    return found


def differences(cell: Cell, layout: Layout, folder: Path) -> Iterator[str]:
    """Yields a line for each difference that an interruption after some step makes; there should be none."""
    undisturbed = finish(Trainer(cell, layout, NOWHERE, None), folder)
    places = sorted(folder.iterdir())
    if len(places) != 6:  # four steps, two ends of epochs
        yield f"{len(places)} checkpoints"
    for place in places:
        resumed = Trainer(cell, layout, NOWHERE, None)
        (path,) = place.iterdir()
        resumed.load_state_dict(checkpoint.load(path, cell.id, layout.device))
        for key, value in finish(resumed).items():
            if value != undisturbed[key]:
                yield f"after step {place.name}: {key}: {value} instead of {undisturbed[key]}"


def _save(trainer: Trainer, folder: Path) -> None:
    state = trainer.state_dict()
    if trainer.layout.is_main:
        checkpoint.save(folder, state)
    trainer.layout.wait()


def divergence(layout: Layout) -> str:
    """This process's error message if the last process's images are NaN in its second step."""
    trainer = Trainer(cell_of("bnn++"), layout, NOWHERE, None)

    def poison(_number: int, _loss: Tensor) -> None:
        if layout.rank == layout.world_size - 1:
            trainer._mixed = _to_nan  # type: ignore[method-assign]

    try:
        trainer.train_epoch(poison)
    except DivergedError as error:
        return str(error)
    return "nothing"


def _to_nan(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return torch.full_like(images, float("nan")), labels


def place_of(path: Path) -> tuple[int, int]:
    """(epoch, step) of a checkpoint, from its name."""
    _, epoch, _, step = path.stem.split("-")
    return int(epoch), int(step)


def numbers(run: RunDir) -> dict[int, dict[str, float]]:
    """The journal's metrics by epoch, except for speeds."""
    found = journal.read_metrics(run.journal)
    return {epoch: {k: v for k, v in metrics.items() if k[:5] != "time/"} for epoch, metrics in found.items()}


def _say(line: str) -> None:
    """Writes a line at once. print writes the line end separately, and two processes share the output."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(folder: Path) -> None:
    """Prints a line for each error."""
    with joined(timeout_seconds=60) as layout:
        for name in CELLS:
            for difference in differences(cell_of(name), layout, folder / name):
                _say(f"{name}: process {layout.rank}: {difference}")
        _say(f"process {layout.rank}: {divergence(layout)}")
        layout.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
