"""Compares the engines on two processes; each rank writes its results to FOLDER/<rank>.json, for test_layouts.

torchrun --nproc-per-node 2 tests/suite/layout_worker.py FOLDER
"""

import hashlib
import io
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from layout_parity import LAYOUTS, cell_of, compare
from torch import Tensor, nn

from models import Split
from quantizers import ProxConnect
from quantizers.fused import native
from suite.data import datasets
from suite.engines.process_group import EngineError, Layout, joined
from suite.engines.protocol import Engine
from suite.recipe.cell import Cell
from suite.recipe.settings import Execution
from suite.training.build import build_engine, build_loaders, build_model

NUM_STEPS = 2
RECIPE = {"optimizer": "adamw", "learning_rate": 0.003}
SGD = {"optimizer": "sgd", "learning_rate": 0.1}  # AdamW hardly sees the scale of a gradient
ZERO = ("ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3")
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{f"{name}, clipped": (SGD | {"clip_grad_norm": 0.05}, LAYOUTS[name]) for name in ZERO},
    **{f"{name}, offload": ({}, LAYOUTS[name] | {"offload": True}) for name in ZERO[1:]},
    "ZeRO-2, accumulation 2": ({}, LAYOUTS["ZeRO-2"] | {"micro_batch_size": 6}),
    "ZeRO-3, accumulation 2": ({}, LAYOUTS["ZeRO-3"] | {"micro_batch_size": 6}),
    "ZeRO-3, several shards to a group": (
        {},
        LAYOUTS["ZeRO-3"] | {"deepspeed": {"zero_optimization": {"sub_group_size": 20_000}}},
    ),
    "ZeRO-1, bf16": ({"precision": "bf16"}, LAYOUTS["ZeRO-1"]),
    "ZeRO-3, bf16": ({"precision": "bf16"}, LAYOUTS["ZeRO-3"]),
    **{
        f"ZeRO-{stage}, {update}": ({"update": update}, LAYOUTS[f"ZeRO-{stage}"])
        for stage, update in ((1, "pq"), (3, "rpc"))
    },
}
"""Name -> (changes of the recipe, execution to compare with DDP under that recipe)."""


def cell(quantizer: str, **recipe: Any) -> Cell:  # noqa: ANN401  (of several sections)
    """The parity cell with changes of its recipe. It uses AdamW, whose state has tensors and counts."""
    raw = cell_of(quantizer, optimizer="adamw", learning_rate=1e-3).model_dump()
    for key, value in recipe.items():
        raw["quantization" if key == "update" else "training"][key] = value
    return Cell.model_validate(raw)


class Training:
    """An engine and the batches of its layout."""

    def __init__(self, cell: Cell, layout: Layout, how: dict[str, Any]) -> None:
        source = datasets.load(cell.dataset, Path("no-data-needed"))
        self.layout = layout
        execution = Execution.model_validate(how)
        batches = build_loaders(cell, source, layout, execution).train.epoch(0)
        self.batches = [batch for _, batch in zip(range(3 * NUM_STEPS), batches, strict=False)]
        model, self.split = build_model(cell, source.description, None)
        self.engine: Engine = build_engine(cell, model, self.split, layout, execution)

    def run(self, first: int) -> list[float]:
        """The losses of NUM_STEPS steps over the global batch, from step `first` on; mu changes before each."""
        self.engine.model.train()
        losses = []
        for step in range(first, first + NUM_STEPS):
            for group in self.engine.optimizer.param_groups:
                if "quantizer" in group:
                    group["mu"] = 2.0 + step
            loss, _ = self.engine.train_step(*self.batches[step])
            losses.append(float(self.layout.sum(loss.double()) / self.layout.world_size))
        return losses


def difference(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference between the losses of a step."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    copy: dict[str, Any] = torch.load(buffer, weights_only=True)
    return copy


def digest(state: Any) -> str:  # noqa: ANN401  (a state's parts)
    """Equal digests mean equal bits."""
    if isinstance(state, Tensor):
        flat = state.detach().cpu().contiguous().flatten()
        return hashlib.sha256(str(flat.dtype).encode() + flat.view(torch.uint8).numpy().tobytes()).hexdigest()
    if isinstance(state, dict):
        return hashlib.sha256(repr([(key, digest(state[key])) for key in sorted(state)]).encode()).hexdigest()
    if isinstance(state, list):
        return hashlib.sha256(repr([digest(each) for each in state]).encode()).hexdigest()
    return repr(state)


def used_weights(model: nn.Module, split: Split) -> dict[str, Tensor]:
    """The quantized weights that a forward pass of this process computes with."""
    import deepspeed

    parameters = dict(model.named_parameters())
    sharded = [p for p in parameters.values() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext():
        return {name: parameters[name].detach().clone() for name in split.binary}


def exchange(layout: Layout) -> dict[str, Any]:
    """Resumes each engine's state in every engine: the largest difference, and whether its own layout is bit-exact."""
    trainings = {
        name: Training(cell("bnn++"), Layout(device=layout.device) if name == "1 process" else layout, execution)
        for name, execution in LAYOUTS.items()
        if name != "DDP, accumulation 2"
    }
    start = through_a_file(trainings["DDP"].engine.state_dict())
    differences, same_bits, ranks_agree = {}, {}, {}
    for source, training in trainings.items():
        training.engine.load_state_dict(start)
        training.run(0)
        state = through_a_file(training.engine.state_dict())
        straight = training.run(NUM_STEPS)
        end = digest(training.engine.state_dict())
        ranks_agree[source] = digest(state)
        for target, other in trainings.items():
            other.engine.load_state_dict(state)
            losses = other.run(NUM_STEPS)
            differences[f"{source} -> {target}"] = difference(losses, straight)
            if target == source:
                same_bits[source] = losses == straight and digest(other.engine.state_dict()) == end
    return {"differences": differences, "same_bits": same_bits, "state_digests": ranks_agree}


def binary(layout: Layout) -> dict[str, dict[str, Any]]:
    """Properties of this process's weights, for each ZeRO stage."""
    found = {}
    for name in ZERO:
        bc, soft = (Training(cell(quantizer), layout, LAYOUTS[name]) for quantizer in ("bc", "bnn++"))
        bc.run(0)
        soft.run(0)
        before = used_weights(soft.engine.model, soft.split)
        state_before = digest(soft.engine.state_dict())
        soft.engine.harden()
        hard = used_weights(soft.engine.model, soft.split)
        soft.engine.model.eval()
        logits = soft.engine.logits(soft.batches[0][0])
        state_hard = soft.engine.state_dict()
        soft.engine.soften()
        bc_weights = used_weights(bc.engine.model, bc.split)
        bc_state = bc.engine.state_dict()["model"]
        found[name] = {
            "bc": all(bool((w.abs() == 1).all()) for w in bc_weights.values()),
            "bc as in the state": all(torch.equal(w.cpu(), bc_state[key].cpu()) for key, w in bc_weights.items()),
            "bc digest": digest(bc_weights),
            "num": sum(w.numel() for w in bc_weights.values()),
            "soft before": any(bool((w.abs() != 1).any()) for w in before.values()),
            "hardened": all(bool((w.abs() == 1).all()) for w in hard.values()),
            "hardened digest": digest(hard),
            "state of a hardened model is that of training": digest(state_hard["optimizer"])
            == digest(soft.engine.state_dict()["optimizer"]),
            "soft again to the bit": digest(soft.engine.state_dict()) == state_before,
            "finite logits": bool(logits.isfinite().all()),
            "latents are float32": all(latent.w_star.dtype == torch.float32 for latent in soft.engine.latents()),
            "client": type(soft.engine.optimizer).__name__ == ProxConnect.__name__,
        }
    return found


def variants(layout: Layout) -> dict[str, float]:
    """Differences from DDP with the same recipe."""
    plain: dict[str, list[float]] = {}
    found = {}
    for name, (recipe, execution) in VARIANTS.items():
        key = json.dumps(recipe)
        if key not in plain:
            plain[key] = Training(cell("bnn++", **recipe), layout, {}).run(0)
        found[name] = difference(Training(cell("bnn++", **recipe), layout, execution).run(0), plain[key])
    clipped = plain[json.dumps(SGD | {"clip_grad_norm": 0.05})]
    found["clipping, which changes something"] = difference(clipped, Training(cell("bnn++", **SGD), layout, {}).run(0))
    return found


def disagreement(layout: Layout) -> str:
    """The error message on this process if the second process has no compiler for the fused step."""
    with patch.object(native, "pair", native.pair if layout.is_main else lambda *_names: None):
        try:
            Training(cell("bnn++"), layout, {})
        except EngineError as error:
            return str(error)
    return ""


def main(folder: Path) -> None:
    with joined() as layout:
        found = {
            "exchange": exchange(layout),
            "binary": binary(layout),
            "variants": variants(layout),
            "parity": compare("bnn++", layout, 50, RECIPE),
            "disagreement": disagreement(layout),
        }
        (folder / f"{layout.rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
