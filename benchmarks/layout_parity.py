"""Does a cell train the same on one process, DDP and ZeRO? Compares losses of the first steps and final signs.

    torchrun --nproc-per-node 2 benchmarks/layout_parity.py --out parity.json
    torchrun --nproc-per-node 2 benchmarks/layout_parity.py --quantizers bc bnn++ --steps 20

A ViT without batch norm (vit_mini_patch2_8) on scikit-learn's digits in memory, float32, AdamW at the learning rate of
the digits grid; each quantizer's mu follows its usual schedule over `--steps`. Every layout sees the same global
batches. The first layout, one process, is the reference. Reported for the others: the largest relative difference of a
step's loss, the number of quantized weights with a different sign after the last step, and, for scale, the number of
weights whose sign changed in training.
"""

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantizers import QUANTIZERS, Constant
from suite.data import datasets
from suite.engines.process_group import Layout, joined
from suite.engines.protocol import Engine
from suite.recipe.cell import Cell
from suite.recipe.settings import AS_IS, Execution
from suite.training.build import build_engine, build_loaders, build_lr_schedule, build_model, build_sharpness

ALONE = "1 process"
LAYOUTS: dict[str, dict[str, Any]] = {
    ALONE: {},
    "DDP": {},
    "DDP, accumulation 2": {"micro_batch_size": 6},
    "ZeRO-0": {"engine": "deepspeed", "zero_stage": 0},
    "ZeRO-1": {"engine": "deepspeed", "zero_stage": 1},
    "ZeRO-2": {"engine": "deepspeed", "zero_stage": 2},
    "ZeRO-3": {"engine": "deepspeed", "zero_stage": 3},
}
BATCH_SIZE = 24  # 53 steps per epoch of the digits; 12 images on each of two processes, 6 in a micro-batch


def cell_of(quantizer: str, **training: object) -> Cell:
    """The cell that every layout trains; `training` overrides its recipe."""
    shape = QUANTIZERS[quantizer].usual_mu
    mu: dict[str, Any] = {}
    if isinstance(shape, Constant):
        mu = {quantizer: {"start": shape.mu}}
    elif shape is not None:
        mu = {quantizer: {"shape": type(shape).__name__.lower(), **asdict(shape)}}  # type: ignore[call-overload]
    return Cell.model_validate(
        {
            "dataset": "digits",
            "model": "vit_mini_patch2_8",
            "quantizer": quantizer,
            "seed": 0,
            "data": {},
            "training": {"epochs": 1, "batch_size": BATCH_SIZE, "weight_decay": 1e-4, **training},
            "quantization": {"sharpness": mu},
        }
    )


@dataclass(frozen=True)
class Trained:
    """Loss of each step over the global batch; signs of all latents before the first and after the last step."""

    losses: list[float]
    signs_before: Tensor
    signs: Tensor


def train(cell: Cell, layout: Layout, num_steps: int, execution: Execution = AS_IS) -> Trained:
    """Trains the cell's first steps on a layout."""
    source = datasets.load(cell.dataset, Path("no-data-needed"))
    loaders = build_loaders(cell, source, layout, execution)
    engine = build_engine(cell, *build_model(cell, source.description, None), layout, execution)
    sharpness = build_sharpness(cell, engine.optimizer, num_steps)
    rates = build_lr_schedule(cell.training, engine.optimizer, num_steps)
    engine.model.train()
    losses, signs_before = [], signs_of(engine)
    batches: Iterator[tuple[Tensor, Tensor]] = loaders.train.epoch(0)
    for step, (images, labels) in zip(range(num_steps), batches, strict=False):
        rates.step_update(step)
        if sharpness is not None:
            sharpness.step()
        loss, _ = engine.train_step(images, labels)
        losses.append(float(layout.sum(loss.double()) / layout.world_size))
    return Trained(losses, signs_before, signs_of(engine))


def signs_of(engine: Engine) -> Tensor:
    """w* >= 0 for every quantized weight, bool [number of quantized weights]."""
    signs = [latent.w_star.flatten() >= 0 for latent in engine.latents()]
    return torch.cat(signs) if signs else torch.zeros(0, dtype=torch.bool)


def compare(
    quantizer: str, layout: Layout, num_steps: int, training: dict[str, Any], names: Iterable[str] = LAYOUTS
) -> list[dict[str, Any]]:
    """One row per layout but the first, with its differences from one process."""
    rows = []
    reference = train(cell_of(quantizer, **training), Layout(device=layout.device), num_steps)
    for name in names:
        if name == ALONE:
            continue
        start = time.perf_counter()
        trained = train(cell_of(quantizer, **training), layout, num_steps, Execution.model_validate(LAYOUTS[name]))
        losses, pairs = trained.losses, zip(trained.losses, reference.losses, strict=True)
        differences = [abs(ours - theirs) / abs(theirs) for ours, theirs in pairs]
        row = {
            "quantizer": quantizer,
            "layout": name,
            "loss_difference": max(differences),
            "first_step_over_1e-5": next((step for step, value in enumerate(differences) if value > 1e-5), None),  # noqa: PLR2004
            "num_quantized": len(trained.signs),
            "num_flipped": int((trained.signs != trained.signs_before).sum()),
            "num_other_signs": int((trained.signs != reference.signs).sum()),
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "seconds": time.perf_counter() - start,
        }
        rows.append(row)
        if layout.is_main:
            print(
                f"{quantizer:10}{name:22}loss {row['first_loss']:.4f} -> {row['last_loss']:.4f}"
                f"  largest relative difference {row['loss_difference']:.1e}"
                f"  {row['num_other_signs']} of {row['num_quantized']} signs differ, {row['num_flipped']} flipped"
                f"  {row['seconds']:.1f} s",
                flush=True,
            )
    return rows


def main() -> None:
    """Runs all combinations; rank 0 prints and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantizers", nargs="+", default=list(QUANTIZERS), choices=QUANTIZERS, metavar="NAME")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=0.003)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS, metavar="NAME")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--optimizer", default="adamw", choices=["sgd", "adamw"])
    arguments = parser.parse_args()
    training = {"optimizer": arguments.optimizer, "learning_rate": arguments.learning_rate}
    with joined() as layout:
        rows = [
            row
            for quantizer in arguments.quantizers
            for row in compare(quantizer, layout, arguments.steps, training, arguments.layouts)
        ]
        if layout.is_main and arguments.out is not None:
            arguments.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
