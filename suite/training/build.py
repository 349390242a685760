"""From a cell to the objects that train it: data, network, optimizer, schedules. Deterministic in the cell."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from quantizers import Constant, Cosine, Exponential, Linear, ProxConnect, SharpnessSchedule
from quantizers.sharpness import Shape
from suite.data.augmentation import IMAGENET, Normalization
from suite.data.datasets import is_small
from suite.data.loader import Loader, Reader
from suite.data.readers.memory import MemoryReader
from suite.data.source import Description, Encoded, Files, Part, Pixels, Source, hold_out
from suite.engines.ddp import PlainEngine
from suite.engines.process_group import EngineError, Layout
from suite.engines.protocol import Engine
from suite.errors import DataError
from suite.recipe.cell import AS_IS, Cell, Execution, Sharpness, Training
from suite.training.mixup import mixes, require_even
from suite.training.seeds import stream


@dataclass(frozen=True)
class Loaders:
    """The parts of a data set; `validation` is None where the recipe holds nothing out."""

    train: Loader
    validation: Loader | None
    test: Loader
    num_train_images: int


def build_loaders(cell: Cell, source: Source, layout: Layout, execution: Execution = AS_IS) -> Loaders:
    """Loaders of the cell's data; order and augmentation come from the cell's seed.

    Validation is on what the recipe holds out of the training set, or on the data set's own part for it.

    Raises:
        DataError: the batch does not divide over the processes, or into pairs to be mixed, or is larger than the
            training set.
    """
    batch_size, fraction = cell.training.batch_size, cell.data.validation_fraction
    if batch_size % layout.world_size:
        raise DataError(f"training.batch_size {batch_size} does not divide over {layout.world_size} processes")
    require_even(cell.training, layout.world_size)
    kept, held_out = hold_out(len(source.train.labels), fraction)
    if batch_size > len(kept):
        raise DataError(f"training.batch_size {batch_size} is more than the {len(kept)} training images")
    train = source.train.subset(kept) if fraction else source.train  # all of it: no second copy of the images
    validation = source.train.subset(held_out) if fraction else source.validation
    size = cell.data.image_size or source.image_size
    normalization = _normalization(cell, train)

    def make(part: Part) -> Loader:
        return Loader(
            _reader(part, cell, layout, execution), cell.data, size, normalization, batch_size, cell.seed, layout
        )

    return Loaders(make(train), None if validation is None else make(validation), make(source.test), len(kept))


def _normalization(cell: Cell, train: Part) -> Normalization:
    """Small data sets' own, of the training part; ImageNet's for the rest."""
    if isinstance(train, Encoded) and is_small(cell.dataset):
        train = train.pixels()
    return Normalization.of(train.images) if isinstance(train, Pixels) else IMAGENET


def _reader(part: Part, cell: Cell, layout: Layout, execution: Execution) -> Reader:
    if isinstance(part, Pixels):
        return MemoryReader(part, layout.device)
    num_workers = execution.num_workers or max(len(os.sched_getaffinity(0)) // layout.local_world_size, 1)
    if isinstance(part, Files):
        from suite.data.readers.image_folder import FolderReader

        return FolderReader(part, num_workers, layout.device)
    from suite.data.readers.ffcv import FFCVReader

    return FFCVReader(part, cell.training.batch_size // layout.world_size, num_workers, layout.device)


def pretrained_weights(cell: Cell, description: Description, data_dir: Path) -> tuple[dict[str, Tensor], str]:
    """(timm's weights for the cell's model, their SHA-256); a head of another number of classes is the seed's.

    Raises:
        PretrainedError: they are neither in DATA/weights nor to be had.
    """
    from suite.training.pretrained import pretrained

    torch.manual_seed(stream(cell.seed, "init"))
    size = cell.data.image_size or description.image_size
    model, checksum = pretrained(cell.model, len(description.classes), size, description.in_chans, data_dir)
    return model.state_dict(), checksum


def build_model(
    cell: Cell, description: Description, parent_weights: dict[str, Tensor] | None
) -> tuple[nn.Module, models.Split]:
    """The network, its quantized weights holding latents, and its parameters' groups.

    The full-precision network is drawn first (or is the parent cell's, or timm's), the same for all methods of a seed;
    binarizing it draws no random numbers.
    """
    torch.manual_seed(stream(cell.seed, "init"))
    size = cell.data.image_size or description.image_size
    model = models.create(cell.model, len(description.classes), size, description.in_chans)
    if parent_weights is not None:
        model.load_state_dict(parent_weights)
    if cell.quantizer == "fp":
        return model, models.full_precision(model)
    inputs = cell.quantization.inputs
    quantized = None if inputs is None else models.InputQuantization(inputs.quantizer)
    return model, models.binarize(model, cell.quantization.full_precision, quantized)


def build_engine(
    cell: Cell, model: nn.Module, split: models.Split, layout: Layout, execution: Execution = AS_IS
) -> Engine:
    """The engine that `execution` names around the model, moved to the layout's device.

    `engine.optimizer` is what schedules move. Collective, as all of an engine's methods are.

    Raises:
        EngineError: the recipe's batch, precision or averaging do not go with how the cell is to run.
    """
    share = cell.training.batch_size // layout.world_size
    size = execution.micro_batch_size or share
    if size < share and share % size:
        raise EngineError(
            f"execution.micro_batch_size {size} does not divide the {share} images of a step and process: "
            f"take {max(part for part in range(1, size) if share % part == 0)}"
        )
    model.to(layout.device)
    parts = (build_criterion(cell.training), layout, cell.training, execution)
    if execution.engine == "plain":
        model.to(memory_format=torch.channels_last)
        return PlainEngine(model, wrap(cell, build_base(cell, model, split), execution), *parts)
    _require_for_deepspeed(cell.training, execution.zero_stage)
    try:
        from suite.engines.deepspeed.engine import DeepSpeedEngine
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise EngineError("execution.engine: deepspeed is not installed: pip install proxbench[deepspeed]") from error
    return DeepSpeedEngine(model, build_base(cell, model, split), partial(wrap, cell, execution=execution), *parts)


def _require_for_deepspeed(training: Training, zero_stage: int) -> None:
    if training.precision == "fp16":
        raise EngineError("training.precision: fp16 is for execution.engine: plain; deepspeed runs float32 and bf16")
    if training.ema_decay is not None:
        raise EngineError("training.ema_decay: deepspeed has the latents in shards; take execution.engine: plain")
    if training.reestimate_norm and zero_stage == 3:  # noqa: PLR2004  (ZeRO's number)
        raise EngineError("training.reestimate_norm: not at execution.zero_stage 3; take 2, or engine: plain")


def build_base(cell: Cell, model: nn.Module, split: models.Split) -> torch.optim.Optimizer:
    """The recipe's base optimizer, around parameters that hold w*; the quantized group names its quantizer and mu."""
    parameters = dict(model.named_parameters())
    training = cell.training
    groups: list[dict[str, Any]] = [
        {"params": [parameters[name] for name in split.decay], "weight_decay": training.weight_decay},
        {"params": [parameters[name] for name in split.no_decay], "weight_decay": 0.0},
    ]
    if split.binary:
        binary = [parameters[name] for name in split.binary]
        sharpness = cell.quantization.sharpness.get(cell.quantizer)
        # The schedule's first value: w is written once, before an engine spreads it over processes.
        mu = {} if sharpness is None else {"mu": sharpness.start}
        groups.append({"params": binary, "weight_decay": training.weight_decay, "quantizer": cell.quantizer, **mu})
    if training.optimizer == "sgd":
        momentum, nesterov = training.momentum or 0.0, bool(training.nesterov)
        return torch.optim.SGD(groups, training.learning_rate, momentum, nesterov=nesterov)
    return torch.optim.AdamW(groups, training.learning_rate)


def wrap(cell: Cell, base: torch.optim.Optimizer, execution: Execution = AS_IS) -> ProxConnect:
    """ProxConnect as the recipe has it around `base`, whose quantized parameters hold w* until now.

    Raises:
        EngineError: `execution.fused: true`, and the fused step cannot be had.
    """
    quantization = cell.quantization
    try:
        return ProxConnect(base, quantization.update, clip_latents=quantization.clip_latents, fused=execution.fused)
    except ValueError as error:
        raise EngineError(f"execution.{error}") from error


def build_sharpness(cell: Cell, optimizer: ProxConnect, num_steps: int) -> SharpnessSchedule | None:
    """The schedule of the cell's own mu; None for a quantizer that has none."""
    sharpness = cell.quantization.sharpness.get(cell.quantizer)
    return None if sharpness is None else SharpnessSchedule(optimizer, _shape(sharpness), num_steps)


def build_input_mu(cell: Cell) -> Shape | None:
    """The mu of the inputs of binary layers, by progress; None where they are real or their quantizer has no mu."""
    inputs = cell.quantization.inputs
    return None if inputs is None or inputs.sharpness is None else _shape(inputs.sharpness)


_SHAPES: dict[str, Callable[[float, float], Shape]] = {"linear": Linear, "exponential": Exponential, "cosine": Cosine}


def _shape(sharpness: Sharpness) -> Shape:
    return (
        Constant(sharpness.start) if sharpness.end is None else _SHAPES[sharpness.shape](sharpness.start, sharpness.end)
    )


def build_lr_schedule(training: Training, optimizer: ProxConnect, steps_per_epoch: int) -> Any:  # noqa: ANN401  (timm)
    """Return timm's scheduler: `step_update(step)` before each step sets lr, a pure function of the step's number."""
    from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler

    warmup_steps = round(training.warmup_epochs * steps_per_epoch)
    settings = {"warmup_t": warmup_steps, "warmup_lr_init": 0.0, "t_in_epochs": False}
    if training.schedule == "cosine":
        num_steps = max(training.epochs * steps_per_epoch - warmup_steps, 1)
        return CosineLRScheduler(optimizer, t_initial=num_steps, warmup_prefix=True, **settings)
    # timm decays at t + 1 >= decay_t; ours is the first step of the named epoch.
    decay_steps = [epoch * steps_per_epoch + 1 for epoch in training.decay_epochs or ()]
    return MultiStepLRScheduler(optimizer, decay_t=decay_steps, decay_rate=training.decay_rate or 1.0, **settings)


def build_criterion(training: Training) -> nn.Module:
    """Mean cross-entropy over the batch, with label smoothing where asked; the labels of mixed images come smoothed."""
    from timm.loss import LabelSmoothingCrossEntropy

    if training.label_smoothing and not mixes(training):
        criterion: nn.Module = LabelSmoothingCrossEntropy(training.label_smoothing)
        return criterion
    return nn.CrossEntropyLoss()
