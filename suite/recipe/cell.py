"""Cell: one resolved training run, frozen and identified by its content. Nothing here touches a file."""

import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

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
    model_validator,
)

if TYPE_CHECKING:
    from quantizers.sharpness import Shape

Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Task = Literal["bw", "bwa"]
Init = Literal["scratch", "finetune", "pretrained"]
Interpolation = Literal["bilinear", "bicubic", "area"]


RECORDED = "recorded"
"""Validation context for a cell that was checked when it was made: its names are believed, and torch is not imported.

What knows the names imports torch and timm, which cost seconds that `launch status` and --help must not.
"""


def _known_quantizer(name: str, info: ValidationInfo) -> str:
    if info.context == RECORDED:
        return name
    import quantizers

    # The name as it is written, which for the user's own is module:attribute.
    if name != "fp" and not quantizers.get(name).binary:
        raise ValueError(f"{name} is deployed as F(w*), not as sign(w*): a grid's results are those of binary weights")
    return name


def _known_model(name: str, info: ValidationInfo) -> str:
    if info.context == RECORDED:
        return name
    import models

    if not models.is_known(name):
        close = " or ".join(repr(match) for match in models.suggest(name))
        raise ValueError(f"unknown model {name!r}; did you mean {close or 'another'}? (resnet20, ..., any of timm's)")
    return name


def _known_dataset(name: str, info: ValidationInfo) -> str:
    if info.context == RECORDED:
        return name
    from quantizers.catalog import unknown
    from suite.data import datasets

    if not datasets.is_known(name):
        raise ValueError(unknown("data set", name, datasets.names()))
    return name


def _known_policy(name: str, info: ValidationInfo) -> str:
    if info.context != RECORDED:
        import models

        models.kept_by(name)
    return name


QuantizerName = Annotated[str, AfterValidator(_known_quantizer)]
ModelName = Annotated[str, AfterValidator(_known_model)]
DatasetName = Annotated[str, AfterValidator(_known_dataset)]
PolicyName = Annotated[str, AfterValidator(_known_policy)]


class Frozen(BaseModel):
    """Immutable and strict about names: a misspelt key is an error, not a default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ProgressiveResizing(Frozen):
    """Small images first: side `start` to epoch `from_epoch`, then a linear rise to data.image_size at `to_epoch`."""

    start: PositiveInt = Field(description="side of the first epochs' images, in pixels")
    from_epoch: NonNegativeInt = Field(0, description="last epoch, counted from 0, at `start`")
    to_epoch: PositiveInt = Field(description="first epoch, counted from 0, at data.image_size")

    @model_validator(mode="after")
    def _forwards(self) -> "ProgressiveResizing":
        if self.from_epoch >= self.to_epoch:
            raise ValueError(f"from_epoch {self.from_epoch} has to be before to_epoch {self.to_epoch}")
        return self


class Data(Frozen):
    """How images are prepared. Sizes in pixels."""

    image_size: PositiveInt | None = Field(
        None, description="side the images are resized to; default: the data set's own"
    )
    crop: Literal["none", "padded", "random_resized"] = Field(
        "none", description="training crop: padded = zero-pad, then a random window; random_resized = as for ImageNet"
    )
    crop_padding: NonNegativeInt = Field(4, description="zero padding of crop: padded, on each side")
    crop_scale: tuple[Share, Share] | None = Field(
        None, description="range of a random_resized window's share of the image's area; default: [0.08, 1]"
    )
    interpolation: Interpolation | None = Field(
        None,
        description="how image files are resized: bilinear and bicubic are antialiased; area is the mean of what a "
        "pixel covers, as FFCV has it. Default: the published weights' with init: pretrained, else bilinear",
    )
    mean: tuple[Share, ...] | None = Field(
        None,
        description="of each channel, for pixels in [0, 1]; with std. Default: the published weights' with init: "
        "pretrained, else the training set's own for small data sets and ImageNet's for others",
    )
    std: tuple[PositiveFloat, ...] | None = Field(None, description="standard deviation of each channel; with mean")
    horizontal_flip: bool = Field(default=False, description="mirror each training image with probability 1/2")
    validation_fraction: Fraction = Field(
        0.1,
        description="share of the training set held out; the same for all seeds. 0: the data set's own, if it has one",
    )
    test_size: PositiveInt | None = Field(
        None, description="side of the images that are evaluated, where it differs from image_size"
    )
    evaluation_ratio: Share | None = Field(
        None,
        description="side of evaluation's centre crop over the image's shorter side; default: 0.875 (224 / 256) for "
        "crop: random_resized, else 1",
    )
    progressive_resizing: ProgressiveResizing | None = Field(
        None, description="smaller images in early epochs; for crop: random_resized"
    )

    @model_validator(mode="after")
    def _resizing_where_sizes_vary(self) -> "Data":
        if self.progressive_resizing is not None:
            if self.crop != "random_resized" or self.image_size is None:
                raise ValueError("progressive_resizing: needs crop: random_resized and an image_size to rise to")
            if self.progressive_resizing.start > self.image_size:
                start = self.progressive_resizing.start
                raise ValueError(f"progressive_resizing.start {start} is above image_size {self.image_size}")
        return self

    @model_validator(mode="after")
    def _scale_of_random_windows_only(self) -> "Data":
        if self.crop_scale is not None:
            if self.crop != "random_resized":
                raise ValueError(f"crop_scale: only with crop: random_resized, here it is {self.crop}")
            if self.crop_scale[0] > self.crop_scale[1]:
                raise ValueError(f"crop_scale: {list(self.crop_scale)} is no range from small to large")
        return self

    @model_validator(mode="after")
    def _mean_and_std_together(self) -> "Data":
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std: one without the other; give both, or neither")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(f"mean and std: {len(self.mean)} and {len(self.std)} channels")
        return self

    @property
    def area_shares(self) -> tuple[float, float]:
        """`crop_scale`, or its default."""
        return self.crop_scale or (0.08, 1.0)

    @property
    def centre_ratio(self) -> float:
        """`evaluation_ratio`, or its default."""
        if self.evaluation_ratio is not None:
            return self.evaluation_ratio
        return 224 / 256 if self.crop == "random_resized" else 1.0


class Training(Frozen):
    """How the network is optimised."""

    epochs: PositiveInt
    batch_size: PositiveInt = Field(description="images per optimizer step, over all processes")
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: PositiveFloat = Field(description="peak, after warm-up")
    momentum: Fraction = Field(0.9, description="sgd only")
    nesterov: bool = False
    weight_decay: NonNegativeFloat = Field(0.0, description="on weights and latents; norms, biases and gains have none")
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    warmup_epochs: NonNegativeFloat = Field(0.0, description="linear rise of the learning rate from 0")
    decay_epochs: tuple[PositiveInt, ...] = Field((), description="schedule: step multiplies by decay_rate at each")
    decay_rate: PositiveFloat = 0.1
    label_smoothing: Fraction = 0.0
    mixup: NonNegativeFloat = Field(0.0, description="alpha of the Beta distribution that pairs of images are mixed by")
    cutmix: NonNegativeFloat = Field(
        0.0,
        description="alpha of the Beta distribution of the patch's share; with mixup, each batch draws one of the two",
    )
    precision: Literal["float32", "bf16", "fp16"] = Field(
        "float32", description="bf16, fp16: autocast; weights stay float32. fp16 scales the loss"
    )
    clip_grad_norm: PositiveFloat | None = Field(None, description="bound on the norm of what the base optimizer sees")
    ema_decay: Fraction | None = Field(None, description="average of the latents that is evaluated instead of the last")
    reestimate_norm: bool = Field(
        default=False,
        description="after hardening, gather batch-norm statistics anew on training data, for every method",
    )


class Execution(Frozen):
    """How an attempt at a run uses the hardware: no part of its cell, but recorded with the attempt.

    The result depends on it only as far as docs/distributed.md says: rounding, and batch norm over smaller batches.
    """

    engine: Literal["plain", "deepspeed"] = Field("plain", description="plain: one process or DDP; deepspeed: ZeRO")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0,
        description="deepspeed only; what is spread over the processes: 0 nothing, 1 latents and optimizer state, "
        "2 gradients, too, 3 parameters, too",
    )
    offload: bool = Field(default=False, description="deepspeed only: latents and optimizer state in the CPU's memory")
    micro_batch_size: PositiveInt | None = Field(
        None,
        description="most images per forward pass and process; the recipe's batch is made up by accumulating gradients",
    )
    compile: bool = Field(default=False, description="plain only: torch.compile")
    fused: bool | None = Field(
        None,
        description="the optimizer's step in one pass over memory; default: on a CPU, from 65,536 quantized weights on",
    )
    loader: Literal["auto", "memory", "torch", "ffcv"] = Field(
        "auto",
        description="memory: all images as bytes on the device, for small data sets; ffcv: the files of "
        "`suite.data prepare`; torch: image files; auto: the first of these that there is",
    )
    num_workers: PositiveInt | None = Field(
        None, description="decoders of each process (torch: processes, ffcv: threads); default: its share of the cores"
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="deepspeed only: laid over the configuration that it is given"
    )

    @model_validator(mode="after")
    def _keys_of_the_engine_only(self) -> "Execution":
        others = {"plain": ("zero_stage", "offload", "deepspeed"), "deepspeed": ("compile",)}[self.engine]
        for key in others:
            if getattr(self, key):
                engine = "deepspeed" if self.engine == "plain" else "plain"
                raise ValueError(f"{key}: only with engine: {engine}, here it is {self.engine}")
        if self.offload and not self.zero_stage:
            raise ValueError("offload: zero_stage 0 has nothing to offload; take 1, 2 or 3")
        return self


AS_IS: Final = Execution()
"""Every default."""


class Sharpness(Frozen):
    """Schedule of mu over training, a pure function of progress in [0, 1]."""

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
    """How the inputs of binary layers become binary."""

    quantizer: QuantizerName = "bnn"
    sharpness: Sharpness | None = Field(None, description="its mu, if it reads one; bnn and bc do not")

    @model_validator(mode="after")
    def _binary_and_with_mu_where_needed(self, info: ValidationInfo) -> "Inputs":
        if info.context == RECORDED:
            return self
        import quantizers

        row = quantizers.get(self.quantizer)
        if not row.binary:
            raise ValueError(f"{self.quantizer} leaves inputs real, which is task: bw; for task: bwa take bnn, say")
        if row.usual_mu is not None and self.sharpness is None:
            raise ValueError(f"{self.quantizer} needs its mu, for instance sharpness: {_written(row.usual_mu)}")
        return self


class Quantization(Frozen):
    """How weights become binary, and which; for task: bwa also how inputs do."""

    update: Literal["pc++", "pq", "rpc"] = "pc++"
    sharpness: dict[QuantizerName, Sharpness] = Field(
        default_factory=dict, description="mu of each quantizer that reads it; bc, bnn and fp ignore it"
    )
    clip_latents: bool = Field(
        default=False, description="clip w* to [-1, 1] after each step, as BinaryConnect and BinaryNet do"
    )
    full_precision: PolicyName = Field(
        "ends",
        description="layers that stay exact: ends = the first and the classifier; ends+shortcuts = 1x1 convolutions on "
        "shortcuts, too; ends+attention = attention's projections, too",
    )
    inputs: Inputs | None = Field(None, description="for task: bwa only; default: bnn, sign with B = 1 on [-1, 1]")


def require_mu(quantizer: str, quantization: Quantization) -> None:
    """ValueError where the quantizer reads mu and is given none."""
    import quantizers

    usual_mu = quantizers.get(quantizer).usual_mu
    if usual_mu is not None and quantizer not in quantization.sharpness:
        raise ValueError(
            f"quantization.sharpness: {quantizer} needs its mu, for instance {quantizer}: {_written(usual_mu)}"
        )


def _written(shape: "Shape") -> str:
    """The shape as a grid file has it, `{shape: linear, start: 0.0, end: 1.0}`."""
    from quantizers.sharpness import Constant, Cosine, Exponential, Linear

    if isinstance(shape, Constant):
        return f"{{start: {shape.mu}}}"
    if not isinstance(shape, Linear | Exponential | Cosine):  # the user's own: a grid file has straight ones
        shape = Linear(shape(0.0), shape(1.0))
    values = "".join(f", {name}: {value}" for name, value in vars(shape).items())
    return f"{{shape: {type(shape).__name__.lower()}{values}}}"


class Cell(Frozen):
    """One resolved run. `id` identifies everything that changes its result and nothing else."""

    dataset: DatasetName
    model: ModelName
    quantizer: QuantizerName
    seed: NonNegativeInt
    task: Task = "bw"
    init: Init = "scratch"
    parent: str | None = Field(None, description="id of the full-precision cell that a finetune cell starts from")
    data: Data
    training: Training
    quantization: Quantization

    @model_validator(mode="after")
    def _mu_where_needed(self, info: ValidationInfo) -> "Cell":
        if info.context != RECORDED:
            require_mu(self.quantizer, self.quantization)
        return self

    @model_validator(mode="after")
    def _inputs_where_the_task_has_them(self) -> "Cell":
        if self.quantizer == "fp" and self.task == "bwa":
            raise ValueError("task: a full-precision cell has no binary inputs; its task is bw")
        if (self.task == "bwa") != (self.quantization.inputs is not None):
            raise ValueError("quantization.inputs: a cell has them if its task is bwa, and only then")
        return self

    @model_validator(mode="after")
    def _resizing_of_image_files_only(self, info: ValidationInfo) -> "Cell":
        if info.context == RECORDED:
            return self
        from suite.data import datasets

        if datasets.is_small(self.dataset):
            for key in ("image_size", "test_size", "interpolation", "evaluation_ratio"):
                if getattr(self.data, key) is not None:
                    raise ValueError(f"data.{key}: for image files; {self.dataset} stays at its own size")
            if self.data.crop == "random_resized":
                raise ValueError(f"data.crop: random_resized is for image files; {self.dataset} stays at its own size")
        return self

    @model_validator(mode="after")
    def _sizes_that_the_model_takes(self, info: ValidationInfo) -> "Cell":
        if info.context == RECORDED:
            return self
        import models

        for key in ("test_size", "progressive_resizing"):
            other = getattr(self.data, key) not in {None, self.data.image_size}
            if other and models.has_fixed_size(self.model):
                raise ValueError(f"data.{key}: {self.model} takes images of one size only")
        return self

    @property
    def id(self) -> str:
        """First 12 hex digits of SHA-256 over the canonical JSON of the cell."""
        return _digest(self.model_dump(mode="json"))

    @property
    def recipe_id(self) -> str:
        """The same digest without the seed: equal for the cells whose spread is the spread over seeds."""
        return _digest(self.model_dump(mode="json", exclude={"seed", "parent"}))

    @property
    def name(self) -> str:
        """Display name, `cifar10/resnet20/bnn++/s3`; other starts than scratch and other tasks than bw are appended."""
        start = "" if self.init == "scratch" else f"/{self.init}"
        task = "" if self.task == "bw" else f"/{self.task}"
        return f"{self.dataset}/{self.model}/{self.quantizer}/s{self.seed}{start}{task}"


def _digest(value: object) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
