"""Builds the objects that train a cell: data, network, optimizer, schedules. A deterministic function of the cell."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import models
from quantizers import Constant, Cosine, Exponential, Linear, ProxConnect, SharpnessSchedule
from quantizers.latents import is_elementwise
from quantizers.sharpness import Shape
from suite.data import datasets
from suite.data.augmentation import IMAGENET, Normalization
from suite.data.datasets import is_small
from suite.data.loader import Loader, Reader
from suite.data.readers.memory import MemoryReader
from suite.data.source import Description, Files, Part, Pixels, Source, hold_out
from suite.engines.ddp import PlainEngine
from suite.engines.process_group import EngineError, Layout
from suite.engines.protocol import Engine
from suite.errors import DataError
from suite.recipe.cell import Cell
from suite.recipe.settings import AS_IS, Execution, Interpolation, Sharpness, Training
from suite.training.losses import build_criterion
from suite.training.mixup import require_even
from suite.training.seeds import stream

if TYPE_CHECKING:
    from suite.data.readers.image_folder import Workers


@dataclass(frozen=True)
class Loaders:
    """Loaders of a data set's parts; `validation` is None if there is no validation part.

    The result is measured on `final`: the test part or, for a trial, the validation part.
    """

    train: Loader
    validation: Loader | None
    final: Loader
    num_train_images: int


def load_source(cell: Cell, layout: Layout, data_dir: Path, execution: Execution = AS_IS) -> Source:
    """The cell's data set; for a trial, without the test part.

    The main process loads first: only it downloads files, and it lists class folders for all processes.

    Raises:
        DataError: as `datasets.load`; only in the main process if loading failed there.
    """
    load = partial(datasets.load, cell.dataset, data_dir, execution.loader, with_test=not cell.trial)
    found = load() if layout.is_main else None
    listed = layout.tell(found if found is not None and isinstance(found.train, Files) else None)
    return found or listed or load()


def build_loaders(cell: Cell, source: Source, layout: Layout, execution: Execution = AS_IS) -> Loaders:
    """Loaders of the cell's data; order and augmentation come from the cell's seed.

    Validation uses the samples that the recipe holds out of the training set, or the data set's own validation part.

    Raises:
        DataError: the batch cannot be divided over the processes or into pairs to be mixed, or is larger than the
            training set; the held-out part is empty; the recipe and the images have different numbers of channels; a
            trial has no validation part.
    """
    batch_size, fraction = cell.training.batch_size, cell.data.validation_fraction
    if batch_size % layout.world_size:
        raise DataError(f"training.batch_size {batch_size} does not divide over {layout.world_size} processes")
    require_even(cell.training, layout.world_size)
    kept, held_out = split_training_set(cell, source)
    train = source.train.subset(kept) if fraction else source.train  # without a second copy of the images
    validation = source.train.subset(held_out) if fraction else source.validation
    final = validation if cell.trial else source.test
    if final is None:
        raise DataError(
            f"{cell.dataset} has no validation part, which trials are scored on: set data.validation_fraction"
        )
    size = cell.data.image_size or source.image_size
    normalization = _normalization(cell, train, source.description.in_chans)
    make_reader, changers = _readers(cell, layout, execution)

    def make(part: Part, repeats: int = 1) -> Loader:
        if repeats > 1:
            part = part.subset(torch.arange(len(part.labels)).repeat(repeats))
        settings = (cell.data, size, normalization, batch_size, cell.seed, layout, _interpolation(cell))
        return Loader(make_reader(part), *settings, changers, repeats)

    made = None if validation is None else make(validation)
    training = make(train, cell.data.repeated_augmentation)
    return Loaders(training, made, made if made is not None and cell.trial else make(final), len(kept))


def split_training_set(cell: Cell, source: Source) -> tuple[Tensor, Tensor]:
    """(training, validation): sorted int64 indices into the data set's training part.

    Raises:
        DataError: there are fewer training images than in a batch, or the held-out part is empty.
    """
    batch_size, fraction = cell.training.batch_size, cell.data.validation_fraction
    kept, held_out = hold_out(source.train.labels, fraction)
    if fraction and not len(held_out):
        raise DataError(
            f"data.validation_fraction {fraction:g} holds out none of {cell.dataset}'s {len(kept)} images in "
            f"{len(source.classes)} classes: use a larger fraction, or 0 for no validation"
        )
    if batch_size > len(kept):
        raise DataError(f"training.batch_size {batch_size} is more than the {len(kept)} training images")
    return kept, held_out


def _normalization(cell: Cell, train: Part, in_chans: int) -> Normalization:
    """The normalization of the images.

    The recipe's; else the published weights' if the cell starts from them; else the training part's for small data
    sets, and ImageNet's for others.
    """
    if cell.data.mean is not None and cell.data.std is not None:
        if len(cell.data.mean) != in_chans:
            raise DataError(f"data.mean has {len(cell.data.mean)} channels, the images of {cell.dataset} {in_chans}")
        return Normalization(torch.tensor(cell.data.mean), torch.tensor(cell.data.std))
    if cell.init == "pretrained":
        from suite.training.pretrained import preprocessing

        published = preprocessing(cell.model)
        if len(published.mean) == in_chans:
            return Normalization(torch.tensor(published.mean), torch.tensor(published.std))
    if not isinstance(train, Pixels) and is_small(cell.dataset):
        train = train.pixels()
    return Normalization.of(train.images) if isinstance(train, Pixels) else IMAGENET


def _interpolation(cell: Cell) -> Interpolation:
    if cell.data.interpolation is None and cell.init == "pretrained":
        from suite.training.pretrained import preprocessing

        return preprocessing(cell.model).interpolation
    return cell.data.interpolation or "bilinear"


def _readers(
    cell: Cell, layout: Layout, execution: Execution
) -> "tuple[Callable[[Part], Reader], Callable[[], Workers]]":
    """(a function that makes the reader of a part, a function that makes processes that apply policies for readers).

    Readers of image files share their workers.
    """
    num_workers = execution.num_workers or max(len(os.sched_getaffinity(0)) // layout.local_world_size, 1)
    interpolation, device = _interpolation(cell), layout.device

    @cache
    def workers() -> "Workers":
        from suite.data.readers.image_folder import Workers

        return Workers(num_workers, device)

    def make(part: Part) -> Reader:
        if isinstance(part, Pixels):
            return MemoryReader(part, device)
        if isinstance(part, Files):
            from suite.data.readers.image_folder import FolderReader

            return FolderReader(part, workers(), device, interpolation)
        from suite.data.readers.ffcv import FFCVReader

        share = cell.training.batch_size // layout.world_size
        return FFCVReader(part, share, num_workers, device, interpolation)

    @cache
    def changers() -> "Workers":
        from suite.data.readers.image_folder import Workers

        return Workers(num_workers if num_workers > 1 else 0, device)

    return make, changers


def pretrained_weights(
    cell: Cell, description: Description, layout: Layout, data_dir: Path
) -> tuple[dict[str, Tensor], str]:
    """(timm's weights for the cell's model, their SHA-256). If the number of classes differs, the seed draws the head.

    If the weights must be downloaded, the main process does so before the others read them.

    Raises:
        PretrainedError: the weights are not in DATA/weights and cannot be downloaded.
    """
    from suite.training.pretrained import pretrained

    size = cell.data.image_size or description.image_size

    def load() -> tuple[nn.Module, str]:
        torch.manual_seed(stream(cell.seed, "init"))
        return pretrained(cell.model, len(description.classes), size, description.in_chans, data_dir)

    found = load() if layout.is_main else None
    layout.wait()
    model, checksum = found or load()
    return model.state_dict(), checksum


@dataclass(frozen=True)
class Weights:
    """Initial weights by parameter name; `are_latents`: they come from a binary network, with latents if quantized."""

    values: dict[str, Tensor]
    are_latents: bool = False


def build_model(cell: Cell, description: Description, weights: Weights | None) -> tuple[nn.Module, models.Split]:
    """The network, with latents in its quantized weights, and the groups of its parameters.

    The full-precision network is created first, at random or from the given weights: the same for all methods of a
    seed. Binarizing it draws no random numbers. A binary parent's latents are used unchanged.
    """
    torch.manual_seed(stream(cell.seed, "init"))
    size = cell.data.image_size or description.image_size
    rates = {"dropout": cell.training.dropout, "drop_path": cell.training.drop_path}
    model = models.create(cell.model, len(description.classes), size, description.in_chans, **rates)
    if weights is not None and not weights.are_latents:
        model.load_state_dict(weights.values)
    quantization = cell.quantization
    inputs = None if quantization.inputs is None else models.InputQuantization(quantization.inputs.quantizer)
    if cell.quantizer == "fp":
        if inputs is not None:
            models.binarize_inputs(model, quantization.full_precision, inputs)
        return model, models.full_precision(model)
    sums = None
    if quantization.accumulator is not None:
        sums = models.SumQuantization(quantization.accumulator.bits, quantization.accumulator.slope)
    split = models.binarize(model, quantization.full_precision, inputs, quantization.scale, sums)
    if weights is not None and weights.are_latents:
        model.load_state_dict(weights.values)
    return model, split


def build_engine(
    cell: Cell, model: nn.Module, split: models.Split, layout: Layout, execution: Execution = AS_IS
) -> Engine:
    """The engine named by `execution`, with the model on the layout's device.

    Schedules change `engine.optimizer`. Collective, like all methods of an engine.

    Raises:
        EngineError: the recipe's batch, precision, averaging etc. are incompatible with the execution.
    """
    share = cell.training.batch_size // layout.world_size
    size = execution.micro_batch_size or share
    if size < share and share % size:
        raise EngineError(
            f"execution.micro_batch_size {size} does not divide the {share} images of a step and process: "
            f"take {max(part for part in range(1, size) if share % part == 0)}"
        )
    if execution.compile:
        _require_for_compile(cell)
    if execution.checkpoint_activations:
        if cell.quantization.accumulator is not None:
            raise EngineError(
                "execution.checkpoint_activations: task bwaa's overflow penalty has no gradient then; leave it out"
            )
        _checkpoint_activations(cell.model, model)
    model.to(layout.device)
    parts = (build_criterion(cell), layout, cell.training, execution)
    if execution.engine == "plain":
        model.to(memory_format=torch.channels_last)
        penalty = cell.quantization.accumulator.penalty if cell.quantization.accumulator else 0.0
        return PlainEngine(
            model, wrap(cell, build_base(cell, model, split), execution), *parts, overflow_penalty=penalty
        )
    _require_for_deepspeed(cell, execution.zero_stage)
    try:
        from suite.engines.deepspeed.engine import DeepSpeedEngine
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise EngineError("execution.engine: deepspeed is not installed: pip install proxbench[deepspeed]") from error
    base = build_base(cell, model, split)
    if not is_elementwise(base):
        raise EngineError(
            f"training.optimizer: {cell.training.optimizer} looks at whole parameters, which deepspeed has in shards; "
            "take execution.engine: plain, or sgd or adamw"
        )
    return DeepSpeedEngine(model, base, partial(wrap, cell, execution=execution), *parts)


def _checkpoint_activations(name: str, model: nn.Module) -> None:
    """Turns on activation checkpointing; EngineError if the model lacks it or has batch norms, which count twice."""
    key = "execution.checkpoint_activations"
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):  # noqa: SLF001  (the norms' base)
        raise EngineError(f"{key}: {name} has batch norms, whose statistics would count each batch twice; leave it out")
    try:
        model.set_grad_checkpointing(enable=True)  # type: ignore[operator]  # a method of most timm models
    except (AttributeError, AssertionError) as error:
        raise EngineError(f"{key}: {name} does not support it in timm; leave it out") from error


def _require_for_compile(cell: Cell) -> None:
    """Raises EngineError if each step would recompile the network, because torch treats a layer's mu as constant."""
    inputs = cell.quantization.inputs
    if inputs is not None and inputs.sharpness is not None and inputs.sharpness.shape != "constant":
        raise EngineError(
            "execution.compile: the mu of quantization.inputs changes at each step, so each step would recompile the "
            "network; leave it out, or use inputs with quantizer: bnn or a constant sharpness"
        )


def _require_for_deepspeed(cell: Cell, zero_stage: int) -> None:
    training = cell.training
    if cell.quantization.accumulator is not None:
        raise EngineError("task: bwaa: its penalty is for execution.engine: plain")
    if cell.quantization.scale != "none":
        raise EngineError(
            f"quantization.scale: {cell.quantization.scale} is the mean of a layer's latents, which deepspeed has in "
            "shards; take execution.engine: plain"
        )
    for key in ("clip_grad_value", "clip_grad_adaptive"):
        if getattr(training, key) is not None:
            raise EngineError(f"training.{key}: deepspeed has the gradients in shards; take execution.engine: plain")
    if training.precision == "fp16":
        raise EngineError("training.precision: fp16 is for execution.engine: plain; deepspeed runs float32 and bf16")
    if training.ema_decay is not None:
        raise EngineError("training.ema_decay: deepspeed has the latents in shards; take execution.engine: plain")
    if training.reestimate_norm and zero_stage == 3:  # noqa: PLR2004  (ZeRO's number)
        raise EngineError("training.reestimate_norm: not at execution.zero_stage 3; take 2, or engine: plain")


def build_base(cell: Cell, model: nn.Module, split: models.Split) -> torch.optim.Optimizer:
    """The recipe's base optimizer over parameters that hold w*; the quantized group has its quantizer and mu."""
    from timm.optim import create_optimizer_v2

    training = cell.training
    kinds: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        (split.decay, {"weight_decay": training.weight_decay}),
        (split.no_decay, {"weight_decay": 0.0}),
    ]
    if split.binary:
        sharpness = cell.quantization.sharpness.get(cell.quantizer)
        # Use the schedule's first value, because w is written once before an engine distributes it.
        mu = {} if sharpness is None else {"mu": sharpness.start}
        row = {"quantizer": cell.quantizer, "scale": cell.quantization.scale}
        kinds.append((split.binary, {"weight_decay": training.weight_decay, **row, **mu}))
    groups = [group for names, settings in kinds for group in _by_layer(model, names, settings, training.layer_decay)]
    given = {"momentum": training.momentum, "betas": training.betas, "eps": training.eps}
    if training.optimizer == "sgd":
        given["nesterov"] = bool(training.nesterov)  # timm's default is true
    settings = {key: value for key, value in given.items() if value is not None}
    base: torch.optim.Optimizer = create_optimizer_v2(
        groups, training.optimizer, lr=training.learning_rate, weight_decay=training.weight_decay, **settings
    )
    return base


def _by_layer(
    model: nn.Module, names: tuple[str, ...], settings: dict[str, Any], layer_decay: float | None
) -> list[dict[str, Any]]:
    """One group with the named parameters; with layer decay, one group per layer, with its `lr_scale`."""
    parameters = dict(model.named_parameters())
    if layer_decay is None:
        return [{"params": [parameters[name] for name in names], **settings}]
    from timm.optim import param_groups_layer_decay

    scales = {
        parameter: group["lr_scale"]
        for group in param_groups_layer_decay(model, 0.0, layer_decay=layer_decay)
        for parameter in group["params"]
    }
    by_scale: dict[float, list[nn.Parameter]] = {}
    for name in names:
        by_scale.setdefault(scales[parameters[name]], []).append(parameters[name])
    return [{"params": own, **settings, "lr_scale": scale} for scale, own in by_scale.items()]


def wrap(cell: Cell, base: torch.optim.Optimizer, execution: Execution = AS_IS) -> ProxConnect:
    """Wraps `base`, whose quantized parameters still hold w*, in the recipe's ProxConnect.

    Raises:
        EngineError: `execution.fused` is true, but the fused step is not available.
    """
    quantization = cell.quantization
    try:
        return ProxConnect(base, quantization.update, clip_latents=quantization.clip_latents, fused=execution.fused)
    except ValueError as error:
        raise EngineError(f"execution.{error}") from error


def build_sharpness(cell: Cell, optimizer: ProxConnect, num_steps: int) -> SharpnessSchedule | None:
    """The schedule of the cell's own mu; None if its quantizer has none."""
    sharpness = cell.quantization.sharpness.get(cell.quantizer)
    return None if sharpness is None else SharpnessSchedule(optimizer, _shape(sharpness), num_steps)


def build_input_mu(cell: Cell) -> Shape | None:
    """The inputs' mu in binary layers, by progress; None if inputs are real or their quantizer has no mu."""
    inputs = cell.quantization.inputs
    return None if inputs is None or inputs.sharpness is None else _shape(inputs.sharpness)


_SHAPES: dict[str, Callable[[float, float], Shape]] = {"linear": Linear, "exponential": Exponential, "cosine": Cosine}


def _shape(sharpness: Sharpness) -> Shape:
    return (
        Constant(sharpness.start) if sharpness.end is None else _SHAPES[sharpness.shape](sharpness.start, sharpness.end)
    )


def build_lr_schedule(training: Training, optimizer: ProxConnect, steps_per_epoch: int) -> Any:  # noqa: ANN401  (timm)
    """A timm scheduler; call `step_update(step)` before each step. lr is a pure function of the step number."""
    from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler

    warmup_steps = round(training.warmup_epochs * steps_per_epoch)
    settings = {"warmup_t": warmup_steps, "warmup_lr_init": 0.0, "t_in_epochs": False}
    if training.schedule in {"cosine", "linear"}:
        cooldown_steps = round((training.cooldown_epochs or 0.0) * steps_per_epoch)
        num_steps = max(training.epochs * steps_per_epoch - warmup_steps - cooldown_steps, 1)
        settings |= {"t_initial": num_steps, "lr_min": training.min_learning_rate or 0.0, "warmup_prefix": True}
        if training.schedule == "cosine":
            return CosineLRScheduler(optimizer, **settings)
        return PolyLRScheduler(optimizer, power=1.0, **settings)
    # timm decays at t + 1 >= decay_t; we decay at the first step of the named epoch.
    decay_steps = [epoch * steps_per_epoch + 1 for epoch in training.decay_epochs or ()]
    return MultiStepLRScheduler(optimizer, decay_t=decay_steps, decay_rate=training.decay_rate or 1.0, **settings)
