"""The sections of a recipe, their keys, and which of them fit together. Nothing here accesses files."""

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from suite.errors import SettingError
from suite.recipe.optimizers import traits

if TYPE_CHECKING:
    from quantizers.sharpness import Shape

Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Task = Literal["bw", "bwa", "ba", "bwaa"]
Init = Literal["scratch", "finetune", "pretrained"]
Interpolation = Literal["bilinear", "bicubic", "area"]


RECORDED = "recorded"
"""Validation context for a cell that was checked when it was created, so that its names are not checked again.

Checking names imports torch and timm, which takes seconds: too slow for `launch status` and --help.
"""


def known_quantizer(name: str, info: ValidationInfo) -> str:
    """Pydantic's validator of a name: a row of the catalogue, fp, or a user's own. Raises ValueError for others."""
    if info.context == RECORDED:
        return name
    import quantizers

    # Look the name up as written: a user's own quantizer is module:attribute.
    if name != "fp" and not quantizers.get(name).binary:
        raise ValueError(f"{name} is deployed as F(w*), not as sign(w*), but a grid measures binary weights")
    return name


def _known_model(name: str, info: ValidationInfo) -> str:
    if info.context == RECORDED:
        return name
    import models
    from quantizers.names import is_own

    if not models.is_known(name):
        close = " or ".join(repr(match) for match in models.suggest(name))
        raise ValueError(
            f"unknown model {name!r}; did you mean {close or 'another'}? (resnet20, ..., timm's, module:function)"
        )
    if is_own(name):
        models.skeleton(name)
    return name


def _known_dataset(name: str, info: ValidationInfo) -> str:
    if info.context == RECORDED:
        return name
    from quantizers.names import unknown
    from suite.data import datasets

    if not datasets.is_known(name):
        raise ValueError(unknown("data set", name, datasets.names()))
    return name


def _known_optimizer(name: str, info: ValidationInfo) -> str:
    if info.context != RECORDED:
        traits(name)
    return name


def _known_notation(notation: str, info: ValidationInfo) -> str:
    if info.context != RECORDED:
        from suite.data.policy import require_notation

        require_notation(notation)
    return notation


Notation = Annotated[str, AfterValidator(_known_notation)]
OptimizerName = Annotated[str, AfterValidator(_known_optimizer)]
QuantizerName = Annotated[str, AfterValidator(known_quantizer)]
ModelName = Annotated[str, AfterValidator(_known_model)]
DatasetName = Annotated[str, AfterValidator(_known_dataset)]


_NO = ("false", "no", "off")
_YES = ("true", "yes", "on")


class Frozen(BaseModel):
    """Immutable and strict: a misspelt key is an error; numbers must be finite, and a boolean is not a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401  (not yet checked)
        field = cls.model_fields[str(info.field_name)]
        for each in value if isinstance(value, list | tuple) else (value,):
            word = str(each).lower() if isinstance(each, bool | str) else ""
            if word in _NO + _YES and _takes_numbers(field.annotation):
                hint = ", leave it out" if word in _NO and not field.is_required() else ""
                raise ValueError(f"{word} is no number{hint}")
        return value


def _takes_numbers(annotation: object) -> bool:
    """Whether the type is a number, a choice of numbers or a list of numbers, and does not also allow booleans."""
    parts = get_args(annotation)
    is_number = annotation in (int, float) or isinstance(annotation, int)  # a Literal's arguments are values
    return is_number or (bool not in parts and any(_takes_numbers(part) for part in parts))


def _only_with(key: str, value: Any, default: Any, info: ValidationInfo, needed: str) -> Any:  # noqa: ANN401  (any key's)
    """The value, or `default`, of a field that is only used with `key: needed`; None with any other value of `key`.

    So a field that would change nothing is rejected, and its default is not part of a cell's id.
    """
    found = info.data.get(key, needed)  # an invalid `key` is reported separately
    if found != needed and value is not None:
        raise ValueError(
            f"changes nothing: only with {key}: {needed}, here it is {found}; "
            f"leave it out, or unset it with {info.field_name}: null"
        )
    return default if found == needed and value is None else value


def _refuse(value: Any, info: ValidationInfo, lack: str) -> None:  # noqa: ANN401  (any key's)
    """Raises ValueError if a setting that the optimizer does not have is given."""
    if value is not None:
        raise ValueError(
            f"changes nothing: {info.data['optimizer']} {lack}; leave it out, or unset it with {info.field_name}: null"
        )


class ProgressiveResizing(Frozen):
    """Side `start` until epoch `from_epoch`, then a linear increase to data.image_size at `to_epoch`."""

    start: PositiveInt = Field(description="side of the first epochs' images, in pixels")
    from_epoch: NonNegativeInt = Field(0, description="last epoch, counted from 0, at `start`")
    to_epoch: PositiveInt = Field(description="first epoch, counted from 0, at data.image_size")

    @model_validator(mode="after")
    def _forwards(self) -> "ProgressiveResizing":
        if self.from_epoch >= self.to_epoch:
            raise SettingError("from_epoch", f"{self.from_epoch} must be before to_epoch {self.to_epoch}")
        return self


class Data(Frozen):
    """How images are prepared. Sizes in pixels."""

    image_size: PositiveInt | None = Field(
        None, description="side that images are resized to; default: the data set's own"
    )
    crop: Literal["none", "padded", "random_resized"] = Field(
        "none", description="training crop: padded: zero-pad, then a random window; random_resized: as for ImageNet"
    )
    crop_padding: PositiveInt | None = Field(
        None, validate_default=True, description="zero padding on each side, for crop: padded only; default: 4"
    )
    crop_scale: tuple[Share, Share] | None = Field(
        None, description="range of the fraction of the image's area in a random_resized window; default: [0.08, 1]"
    )
    interpolation: Interpolation | None = Field(
        None,
        description="how image files are resized: bilinear and bicubic are antialiased; area averages the pixels that "
        "each new one covers, as in FFCV. Default: as for the published weights with init: pretrained, else bilinear",
    )
    mean: tuple[Share, ...] | None = Field(
        None,
        description="mean of each channel, for pixels in [0, 1]; requires std. Default: the published weights' with "
        "init: pretrained, else the training set's for small data sets and ImageNet's for others",
    )
    std: tuple[PositiveFloat, ...] | None = Field(None, description="standard deviation of each channel; requires mean")
    horizontal_flip: bool = Field(default=False, description="mirror each training image with probability 1/2")
    auto_augment: Notation | None = Field(
        None,
        description="policy for training images, in timm's notation: rand-m9-mstd0.5-inc1 (RandAugment as in DeiT), "
        "original, v0 (AutoAugment), 3a, augmix-m5-w4-d2",
    )
    color_jitter: NonNegativeFloat = Field(
        0.0, description="x: brightness, contrast and saturation are each multiplied by a factor in [1 - x, 1 + x]"
    )
    random_erasing: Fraction = Field(
        0.0,
        description="probability of replacing a rectangle of a training image by noise (Zhong et al. 2020; timm's mode "
        "pixel)",
    )
    repeated_augmentation: PositiveInt = Field(
        1, description="copies of each sample in a batch, each augmented differently; an epoch then uses fewer samples"
    )
    validation_fraction: Fraction = Field(
        0.1,
        description="fraction of the training set held out, the same samples for all seeds. 0: the data set's own "
        "validation part, if it has one",
    )
    test_size: PositiveInt | None = Field(None, description="side of the images in evaluation; default: image_size")
    evaluation_ratio: Share | None = Field(
        None,
        validate_default=True,
        description="side of evaluation's centre crop / the image's shorter side, for image files only; "
        "default: 0.875 (224 / 256) for crop: random_resized, else 1",
    )
    progressive_resizing: ProgressiveResizing | None = Field(
        None, description="smaller images in early epochs; for crop: random_resized"
    )

    @field_validator("crop_padding")
    @classmethod
    def _padding_of_padded_crops(cls, value: int | None, info: ValidationInfo) -> int | None:
        padding: int | None = _only_with("crop", value, 4, info, "padded")
        return padding

    @field_validator("evaluation_ratio")
    @classmethod
    def _one_ratio_for_one_crop(cls, value: float | None, info: ValidationInfo) -> float | None:
        if info.data.get("crop") == "random_resized":
            return 224 / 256 if value is None else value
        return None if value == 1 else value  # the whole image, as for a data set in memory

    @model_validator(mode="after")
    def _resizing_where_sizes_vary(self) -> "Data":
        if self.progressive_resizing is not None:
            if self.crop != "random_resized" or self.image_size is None:
                raise SettingError(
                    "progressive_resizing", "needs crop: random_resized and an image_size to increase to"
                )
            if (start := self.progressive_resizing.start) >= self.image_size:
                raise SettingError("progressive_resizing.start", f"{start} is not below image_size {self.image_size}")
        return self

    @model_validator(mode="after")
    def _scale_of_random_windows_only(self) -> "Data":
        if self.crop_scale is not None:
            if self.crop != "random_resized":
                raise SettingError("crop_scale", f"only with crop: random_resized, here it is {self.crop}")
            if self.crop_scale[0] > self.crop_scale[1]:
                raise SettingError("crop_scale", f"{list(self.crop_scale)} is not an increasing range")
        return self

    @model_validator(mode="after")
    def _mean_and_std_together(self) -> "Data":
        if (self.mean is None) != (self.std is None):
            raise SettingError("mean", "needs std, and std needs mean: give both or neither")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise SettingError("mean", f"has {len(self.mean)} channels, std {len(self.std)}")
        return self

    @property
    def area_shares(self) -> tuple[float, float]:
        """`crop_scale`, or its default."""
        return self.crop_scale or (0.08, 1.0)

    @property
    def centre_ratio(self) -> float:
        """`evaluation_ratio`, or 1 where it is None."""
        return 1.0 if self.evaluation_ratio is None else self.evaluation_ratio


class Training(Frozen):
    """How the network is optimised."""

    epochs: PositiveInt
    batch_size: PositiveInt = Field(description="images per optimizer step, over all processes")
    optimizer: OptimizerName = Field(
        "sgd", description="a timm name: sgd, adamw, adam, lamb, lion, ...; sgd and adamw are torch's implementations"
    )
    learning_rate: PositiveFloat = Field(description="peak, after warm-up")
    momentum: Fraction | None = Field(
        None, validate_default=True, description="for optimizers that have one, such as sgd and lars; default: 0.9"
    )
    nesterov: bool | None = Field(None, validate_default=True, description="for sgd only; default: false")
    betas: tuple[Fraction, ...] | None = Field(
        None, description="for optimizers that have them, such as adamw and lion; default: the optimizer's own"
    )
    eps: PositiveFloat | None = Field(
        None, description="for optimizers that have one, such as adamw and lamb; default: the optimizer's own"
    )
    layer_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="each layer's learning rate is this times the next layer's, with timm's numbering of layers "
        "(ELECTRA, Clark et al. 2020; BEiT)",
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="for weights and latents, not for norms, biases and gains")
    schedule: Literal["constant", "cosine", "linear", "step"] = Field(
        "cosine", description="cosine, linear: decrease from learning_rate to min_learning_rate at the end"
    )
    warmup_epochs: NonNegativeFloat = Field(0.0, description="epochs of linear increase of the learning rate from 0")
    min_learning_rate: NonNegativeFloat | None = Field(
        None, validate_default=True, description="final learning rate, for schedule: cosine and linear only; default: 0"
    )
    cooldown_epochs: NonNegativeFloat | None = Field(
        None,
        validate_default=True,
        description="for cosine and linear only: number of last epochs at min_learning_rate",
    )
    decay_epochs: tuple[PositiveInt, ...] | None = Field(
        None,
        validate_default=True,
        description="for schedule: step only: epochs at which the learning rate is multiplied by decay_rate",
    )
    decay_rate: PositiveFloat | None = Field(
        None, validate_default=True, description="for schedule: step only; default: 0.1"
    )
    loss: Literal["cross_entropy", "bce"] = Field(
        "cross_entropy",
        description="bce: a binary cross-entropy per class, mean over images and classes (ResNet strikes back, "
        "Wightman et al. 2021)",
    )
    label_smoothing: Fraction = 0.0
    mixup: NonNegativeFloat = Field(
        0.0, description="alpha of the Beta distribution of the mixing weights of two images"
    )
    cutmix: NonNegativeFloat = Field(
        0.0,
        description="alpha of the Beta distribution of the patch's area; with mixup, each batch uses one of the two at "
        "random",
    )
    precision: Literal["float32", "bf16", "fp16"] = Field(
        "float32", description="bf16, fp16: autocast; weights stay float32. fp16 scales the loss"
    )
    dropout: Fraction = Field(
        0.0, description="dropout, timm's drop_rate: before the classifier, and elsewhere if the model uses it"
    )
    drop_path: Fraction = Field(
        0.0, description="stochastic depth (Huang et al. 2016): skip rate of the last block, linear from 0 at the first"
    )
    clip_grad_norm: PositiveFloat | None = Field(None, description="bound on the norm of the base optimizer's gradient")
    clip_grad_value: PositiveFloat | None = Field(None, description="bound on each element of the loss's gradient")
    clip_grad_adaptive: PositiveFloat | None = Field(
        None,
        description="bound on each output's gradient norm over its weight norm, w* for quantized weights "
        "(Brock et al. 2021)",
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of an average of the latents, which is evaluated instead of the last ones"
    )
    ema_warmup: bool = Field(
        default=False, description="limits the decay at step t to (1 + t) / (10 + t), so that the initial weights fade"
    )
    reestimate_norm: bool = Field(
        default=False,
        description="after hardening, re-estimate batch-norm statistics on training data, for every method",
    )

    @field_validator("momentum")
    @classmethod
    def _momentum_where_there_is_one(cls, value: float | None, info: ValidationInfo) -> float | None:
        if info.context == RECORDED or "optimizer" not in info.data:
            return value
        if not traits(info.data["optimizer"]).has_momentum:
            _refuse(value, info, "has no momentum")
            return None
        return 0.9 if value is None else value

    @field_validator("nesterov")
    @classmethod
    def _nesterov_of_momentum(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        nesterov: bool | None = _only_with("optimizer", value, False, info, "sgd")
        if nesterov and info.data.get("momentum") == 0:
            raise ValueError("true needs a momentum above 0")
        return nesterov

    @field_validator("betas")
    @classmethod
    def _betas_where_there_are_some(
        cls, value: tuple[float, ...] | None, info: ValidationInfo
    ) -> tuple[float, ...] | None:
        if value is None or info.context == RECORDED or "optimizer" not in info.data:
            return value
        num_betas = traits(info.data["optimizer"]).num_betas
        if not num_betas:
            _refuse(value, info, "has no betas")
        if len(value) != num_betas:
            raise ValueError(f"{list(value)}: {info.data['optimizer']} has {num_betas}")
        return value

    @field_validator("eps")
    @classmethod
    def _eps_where_there_is_one(cls, value: float | None, info: ValidationInfo) -> float | None:
        if info.context == RECORDED or "optimizer" not in info.data or traits(info.data["optimizer"]).has_eps:
            return value
        _refuse(value, info, "has no eps")
        return None

    @field_validator("clip_grad_value", "clip_grad_adaptive")
    @classmethod
    def _clipped_in_one_way(cls, value: float | None, info: ValidationInfo) -> float | None:
        others = [key for key in ("clip_grad_norm", "clip_grad_value") if info.data.get(key) is not None]
        if value is not None and others:
            raise ValueError(f"only one clipping method is allowed, and {others[0]} is given: leave one out")
        return value

    @field_validator("ema_warmup")
    @classmethod
    def _warmup_of_an_average(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("ema_decay") is None:
            raise ValueError("true needs an ema_decay")
        return value

    @field_validator("warmup_epochs")
    @classmethod
    def _warmup_that_ends(cls, value: float, info: ValidationInfo) -> float:
        epochs = info.data.get("epochs")
        if epochs is not None and value >= epochs:
            raise ValueError(f"{value:g} of {epochs} epochs: learning_rate is never reached; take fewer")
        return value

    @field_validator("min_learning_rate", "cooldown_epochs")
    @classmethod
    def _end_of_falling_schedules(cls, value: float | None, info: ValidationInfo) -> float | None:
        schedule = info.data.get("schedule", "cosine")
        if schedule in {"cosine", "linear"}:
            last = value or 0.0
            rate, epochs = info.data.get("learning_rate", last), info.data.get("epochs", 1)
            if info.field_name == "min_learning_rate" and last > rate:
                raise ValueError(f"{last:g} is above learning_rate {rate:g}")
            if info.field_name == "cooldown_epochs" and last + info.data.get("warmup_epochs", 0.0) >= epochs:
                raise ValueError(f"{last:g} of {epochs} epochs: with warm-up, none remain for the decay; take fewer")
            return last
        if value is not None:
            raise ValueError(
                f"changes nothing: only with schedule: cosine or linear, here it is {schedule}; leave it out"
            )
        return None

    @field_validator("decay_epochs")
    @classmethod
    def _decay_of_steps(cls, value: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        steps: tuple[int, ...] | None = _only_with("schedule", value, (), info, "step")
        if info.data.get("schedule") != "step" or steps is None:
            return steps
        if not steps:
            raise ValueError("schedule: step needs them, for instance [30, 60]")
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise ValueError(f"{list(steps)} must increase")
        if (epochs := info.data.get("epochs", steps[-1] + 1)) <= steps[-1]:
            raise ValueError(f"{steps[-1]} is never reached: the last of {epochs} epochs is {epochs - 1}")
        return steps

    @field_validator("decay_rate")
    @classmethod
    def _rate_of_steps(cls, value: float | None, info: ValidationInfo) -> float | None:
        rate: float | None = _only_with("schedule", value, 0.1, info, "step")
        return rate


class Execution(Frozen):
    """How an attempt at a run uses the hardware: not part of the cell, but recorded with the attempt.

    It affects the result only as described in docs/distributed.md: rounding, and batch norm over smaller batches.
    """

    engine: Literal["plain", "deepspeed"] = Field("plain", description="plain: one process or DDP; deepspeed: ZeRO")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0,
        description="deepspeed only: the parts sharded over the processes: 0: none, 1: latents and optimizer state, "
        "2: also gradients, 3: also parameters",
    )
    offload: bool = Field(default=False, description="deepspeed only: keep latents and optimizer state in CPU memory")
    micro_batch_size: PositiveInt | None = Field(
        None,
        description="maximum images per forward pass and process; gradients are accumulated over the recipe's batch",
    )
    checkpoint_activations: bool = Field(
        default=False,
        description="recompute activations in the backward pass: less memory, a third slower; not with batch norm, "
        "whose statistics would count each batch twice",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU if torch sees one; an error if the job was given a GPU that torch does not see"
    )
    determinism: Literal["strict", "fast"] = Field(
        "strict",
        description="on GPUs: strict: a resumed run is bit-identical to an uninterrupted one, and float32 excludes "
        "TF32; fast: the fastest kernels, with TF32 instead of float32",
    )
    compile: bool = Field(
        default=False, description="plain only: torch.compile; not with binary inputs whose mu changes"
    )
    fused: bool | None = Field(
        None,
        description="optimizer step in one pass over memory; default: true on a CPU with at least 65,536 quantized "
        "weights",
    )
    loader: Literal["auto", "memory", "torch", "ffcv"] = Field(
        "auto",
        description="memory: all images as bytes on the device, for small data sets; ffcv: files made by "
        "`suite.data prepare`; torch: image files; auto: the first of these that is available",
    )
    num_workers: PositiveInt | None = Field(
        None, description="decoders per process (torch: processes, ffcv: threads); default: its share of the cores"
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="deepspeed only: overrides of DeepSpeed's configuration"
    )

    @model_validator(mode="after")
    def _keys_of_the_engine_only(self) -> "Execution":
        others = {"plain": ("zero_stage", "offload", "deepspeed"), "deepspeed": ("compile",)}[self.engine]
        for key in others:
            if getattr(self, key):
                engine = "deepspeed" if self.engine == "plain" else "plain"
                raise SettingError(key, f"only with engine: {engine}, here it is {self.engine}")
        if self.offload and not self.zero_stage:
            raise SettingError("offload", "zero_stage 0 has nothing to offload; take 1, 2 or 3")
        return self


AS_IS: Final = Execution()
"""Every default."""


class Sharpness(Frozen):
    """Schedule of mu, a pure function of training progress in [0, 1]."""

    shape: Literal["constant", "linear", "exponential", "cosine"] = "constant"
    start: NonNegativeFloat
    end: NonNegativeFloat | None = Field(None, description="value at the last step; not for constant")

    @model_validator(mode="after")
    def _end_where_needed(self) -> "Sharpness":
        if (self.shape == "constant") != (self.end is None):
            raise ValueError(f"shape {self.shape} {'takes no' if self.shape == 'constant' else 'needs an'} 'end'")
        if self.shape == "exponential" and (self.start == 0 or self.end == 0):
            raise ValueError("shape exponential needs start > 0 and end > 0")
        return self


class Inputs(Frozen):
    """How inputs of binary layers are binarized."""

    quantizer: QuantizerName = "bnn"
    sharpness: Sharpness | None = Field(None, description="mu, if the quantizer reads it; bnn and bc do not")

    @model_validator(mode="after")
    def _binary_and_with_mu_where_needed(self, info: ValidationInfo) -> "Inputs":
        if info.context == RECORDED:
            return self
        import quantizers

        row = quantizers.get(self.quantizer)
        if not row.binary:
            raise ValueError(
                f"{self.quantizer} leaves inputs real, as in task: bw; for task: bwa use, for instance, bnn"
            )
        if row.usual_mu is not None and self.sharpness is None:
            raise ValueError(f"{self.quantizer} needs its mu, for instance sharpness: {_written(row.usual_mu)}")
        if row.usual_mu is None and self.sharpness is not None:
            raise SettingError("sharpness", f"changes nothing: {self.quantizer} reads no mu; leave it out")
        return self


class Accumulator(Frozen):
    """Sums of few bits in layers of binary weights and inputs (WrapNet, Ni et al. 2021)."""

    bits: Annotated[int, Field(ge=2, le=16)] = Field(8, description="bits of a sum, which wraps around")
    slope: PositiveFloat = Field(
        2.0, description="k of the cyclic activation: its slope is 1 around 0 and -k towards the ends"
    )
    penalty: NonNegativeFloat = Field(
        0.01, description="weight in the loss of each layer's mean of max(|z| - 2^(bits - 1), 0); the default is ours"
    )


class Quantization(Frozen):
    """How weights are binarized, and which; for tasks other than bw, also how inputs are."""

    update: Literal["pc++", "pq", "rpc"] = "pc++"
    sharpness: dict[QuantizerName, Sharpness] = Field(
        default_factory=dict, description="mu of each quantizer that reads it; bc, bnn and fp do not"
    )
    clip_latents: bool = Field(
        default=False, description="clip w* to [-1, 1] after each step, as BinaryConnect and BinaryNet do"
    )
    full_precision: tuple[str, ...] = Field(
        ("ends",),
        description="layers kept in full precision, by name (ends: the first and the classifier; shortcuts: 1x1 "
        "convolutions on shortcuts; attention: attention's projections) or by pattern, such as blocks.*.attn.qkv; "
        "[]: none",
    )
    scale: Literal["none", "tensor", "channel"] = Field(
        "none",
        description="none: weights are -1 and +1, and a layer not followed by a batch norm has a trainable gain; "
        "tensor, channel: they are -s and +s, with s the mean |w*| of the layer or of each output channel "
        "(XNOR-Net, Rastegari et al. 2016; PARQ, Jin et al. 2025), and mu is in units of w* / s",
    )
    inputs: Inputs | None = Field(
        None, description="for task: bwa, ba and bwaa only; default: bnn, sign with B = 1 on [-1, 1]"
    )
    accumulator: Accumulator | None = Field(None, description="for task: bwaa only; default: 8 bits")

    @field_validator("full_precision", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:  # noqa: ANN401  (not yet checked)
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _latents_in_units_of_one(self) -> "Quantization":
        if self.scale != "none" and self.clip_latents:
            raise SettingError("clip_latents", f"clips to [-1, 1], so it needs scale: none, here it is {self.scale}")
        return self


def reads_mu(quantizer: str) -> bool:
    """Whether the named quantizer uses a sharpness mu."""
    import quantizers

    return quantizers.get(quantizer).uses_mu


def require_mu(quantizer: str, quantization: Quantization) -> None:
    """Raises SettingError if the quantizer reads mu but none is given."""
    import quantizers

    usual_mu = quantizers.get(quantizer).usual_mu
    if usual_mu is not None and quantizer not in quantization.sharpness:
        raise SettingError(
            "quantization.sharpness", f"{quantizer} needs its mu, for instance {quantizer}: {_written(usual_mu)}"
        )


Section: TypeAlias = Data | Training | Quantization


def require_fitting(section: Section, dataset: str, names: tuple[str, ...]) -> None:
    """Raises SettingError if a key is impossible, or changes nothing, with the data set or one of the models."""
    if isinstance(section, Data):
        _require_images(section, dataset, names)
    elif isinstance(section, Training):
        _require_rates(section, names)
    else:
        _require_layers(section, names)


def _require_images(data: Data, dataset: str, names: tuple[str, ...]) -> None:
    import models
    from suite.data.datasets import GREY, is_small

    if is_small(dataset):
        own = f"{dataset} is held in memory and stays at its own size"
        for key in ("image_size", "test_size", "interpolation", "evaluation_ratio"):
            if getattr(data, key) is not None and data.crop != "random_resized":
                raise SettingError(key, f"is for image files; {own}")
        if data.crop == "random_resized":
            raise SettingError("crop", f"random_resized is for image files; {own}")
    if dataset in GREY and (data.auto_augment or data.color_jitter):
        key = "auto_augment" if data.auto_augment else "color_jitter"
        raise SettingError(key, f"is for colour images; {dataset}'s are grey")
    for key in ("test_size", "progressive_resizing"):
        has_other_sizes = getattr(data, key) not in {None, data.image_size}
        if has_other_sizes and (fixed := [name for name in names if not models.takes_any_size(name)]):
            raise SettingError(key, f"{fixed[0]} takes images of one size only")


def _require_rates(training: Training, names: tuple[str, ...]) -> None:
    """Raises SettingError if the recipe uses dropout or stochastic depth and one of the models does not support it."""
    if not (training.dropout or training.drop_path):
        return
    import models

    for name in names:
        try:
            models.skeleton(name, dropout=training.dropout, drop_path=training.drop_path)
        except ValueError as error:
            key, _, reason = str(error).partition(": ")
            raise SettingError(key, reason) from error


def _require_layers(quantization: Quantization, names: tuple[str, ...]) -> None:
    """Raises SettingError if `full_precision` cannot be applied to one of the models.

    timm's metadata always names the ends, so its models are only made for patterns.
    """
    import models
    from quantizers.names import is_own

    kept = quantization.full_precision
    patterns = [item for item in kept if item not in models.POLICIES]
    for name in names:
        try:
            if patterns or is_own(name):
                models.kept_layers(models.skeleton(name), kept if is_own(name) else patterns)
        except ValueError as error:
            raise SettingError("full_precision", f"{error}") from error


def _written(shape: "Shape") -> str:
    """The shape as written in a grid file, `{shape: linear, start: 0.0, end: 1.0}`."""
    from quantizers.sharpness import Constant, Cosine, Exponential, Linear

    if isinstance(shape, Constant):
        return f"{{start: {shape.mu}}}"
    if not isinstance(shape, Linear | Exponential | Cosine):  # a user's own shape, which a grid file cannot express
        shape = Linear(shape(0.0), shape(1.0))
    values = "".join(f", {name}: {value}" for name, value in vars(shape).items())
    return f"{{shape: {type(shape).__name__.lower()}{values}}}"


class Distillation(Frozen):
    """Soft targets: loss = (1 - share) l(z, y) + share T^2 KL(softmax(t / T) | softmax(z / T)), z ours, t a teacher's.

    Hinton et al. 2015 (arXiv 1503.02531). With share 1 and temperature 1, it has the same gradient as ReActNet's
    distributional loss, -sum softmax(t) log softmax(z) (Liu et al. 2020, arXiv 2003.03488).
    """

    weights: ModelName | None = Field(
        None,
        description="the teacher as a timm model with published weights, or DATA/weights/NAME.safetensors (or .pth)",
    )
    share: Share = Field(0.5, description="the teacher's share of the loss; 1: labels are not used")
    temperature: PositiveFloat = Field(1.0, description="T, which softens the probabilities of both networks")
