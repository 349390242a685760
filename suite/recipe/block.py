"""Block: models x quantizers x seeds under one recipe, with optional tuning."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import (
    Field,
    NonNegativeInt,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from suite.errors import SettingError
from suite.recipe.cell import Cell
from suite.recipe.choices import Setting, Trial
from suite.recipe.faults import first_fault
from suite.recipe.settings import (
    RECORDED,
    Accumulator,
    Data,
    DatasetName,
    Distillation,
    Execution,
    Frozen,
    Init,
    Inputs,
    ModelName,
    Quantization,
    QuantizerName,
    Section,
    Task,
    Training,
    reads_mu,
    require_fitting,
    require_mu,
)
from suite.recipe.tune import SCHEMA, Scalar, Tune, location, normalised


class CellOf(Frozen):
    """Selects the cell of the grid that is another's parent or teacher, with the same data set and seed."""

    model: ModelName | None = Field(None, description="default: the same")
    quantizer: QuantizerName = "fp"
    task: Task = "bw"
    init: Init | None = Field(None, description="default: any, with finetune only if there is no other")


class DistillationFrom(Distillation):
    """Soft targets and their teacher: a cell of this grid, or published weights."""

    teacher: CellOf | None = Field(None, description="default without weights: the full-precision cell of the model")

    @model_validator(mode="after")
    def _one_teacher(self) -> "DistillationFrom":
        if self.teacher is not None and self.weights is not None:
            raise SettingError("weights", "only one teacher is allowed, and a cell is given; leave one out")
        return self


class Block(Frozen):
    """Models x quantizers x seeds under one recipe. A grid file is one block, plus blocks that override it."""

    dataset: DatasetName
    models: tuple[ModelName, ...] = Field(
        min_length=1, description="architectures of timm or of this project, or module:function of your own"
    )
    quantizers: tuple[QuantizerName, ...] = Field(
        min_length=1, description="rows of the catalogue, or module:attribute of your own Quantizer"
    )
    seeds: tuple[NonNegativeInt, ...] = Field(min_length=1)
    task: Task = Field(
        "bw",
        description="bw: binary weights; bwa: also binary inputs of these layers; bwaa: also sums of few bits; fp is "
        "not affected. ba, for fp only: binary inputs and real weights, the first of two stages",
    )
    init: Init = Field(
        "scratch",
        description="finetune: from the weights of another cell of the same seed, which runs first (see parent); "
        "pretrained: from the timm weights named by the model's tag, or DATA/weights/MODEL.safetensors (or .pth)",
    )
    parent: CellOf | None = Field(
        None, description="for init: finetune only, the cell to start from; default: the full-precision one"
    )
    distillation: DistillationFrom | None = Field(None, description="also learn from a teacher's outputs")
    data: Data = Data()
    training: Training
    quantization: Quantization = Quantization()
    execution: Execution = Execution()
    tune: Annotated[Tune | None, WithJsonSchema(SCHEMA)] = Field(
        None, description="trials before these cells, which are then trained with the best values"
    )

    @field_validator("tune", mode="before")
    @classmethod
    def _knobs_gathered(cls, written: Any) -> Any:  # noqa: ANN401  (not yet checked)
        return normalised(written)

    @field_validator("models", "quantizers", "seeds")
    @classmethod
    def _each_once(cls, values: tuple[str | int, ...]) -> tuple[str | int, ...]:
        seen: set[str | int] = set()
        for index, value in enumerate(values):
            if value in seen:
                raise SettingError(f"{index}", f"{value} is given twice")
            seen.add(value)
        return values

    @field_validator("data", "training", "quantization")
    @classmethod
    def _fits_the_models(cls, section: Section, info: ValidationInfo) -> Section:
        # If they are invalid, that is reported separately.
        if info.context != RECORDED and {"dataset", "models"} <= info.data.keys():
            require_fitting(section, info.data["dataset"], info.data["models"])
        return section

    @model_validator(mode="after")
    def _mu_where_needed(self, info: ValidationInfo) -> "Block":
        if info.context == RECORDED:
            return self
        for name in self.quantizers:
            require_mu(name, self.quantization)
        for name in self.quantization.sharpness:
            if not reads_mu(name):
                raise SettingError(
                    f"quantization.sharpness.{name}", f"changes nothing: {name} reads no mu; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _parent_of_finetune_cells(self) -> "Block":
        if self.parent is not None and self.init != "finetune":
            raise SettingError("parent", f"changes nothing: only with init: finetune, here it is {self.init}")
        if self.parent is not None and self.parent.model not in {None, *self.models}:
            raise SettingError("parent.model", "a parent always has the same architecture: leave it out")
        return self

    @model_validator(mode="after")
    def _real_weights_of_ba(self) -> "Block":
        if self.task == "ba" and (others := [name for name in self.quantizers if name != "fp"]):
            raise SettingError("task", f"ba leaves weights real, for quantizers: [fp]; {others[0]} makes them binary")
        return self

    @property
    def origins(self) -> "tuple[CellOf | None, CellOf | None]":
        """Selectors of the cells that this block's cells start from and learn from, if any."""
        parent = (self.parent or CellOf()) if self.init == "finetune" else None
        distillation = self.distillation
        teacher = None if distillation is None or distillation.weights else distillation.teacher or CellOf()
        return parent, teacher

    @model_validator(mode="after")
    def _tunable(self, info: ValidationInfo) -> "Block":
        if self.tune is None or info.context == RECORDED:
            return self
        if common := set(self.seeds) & set(self.tune.seeds):
            raise SettingError("tune.seeds", f"{min(common)} is one of the grid's own seeds; take others")
        if not self.data.validation_fraction and not self.dataset.startswith(("folder/", "hf/")):
            raise SettingError(
                "data.validation_fraction", "trials are scored on the held-out part, so it must not be 0"
            )
        for quantizer in self.quantizers:
            try:
                drawn = self.tune.draw(quantizer, self.quantizers)
            except SettingError as error:
                raise SettingError(("tune", *error.location), error.reason) from error
            for values in drawn:
                self._require_valid(quantizer, values, self.tune.epochs)
        return self

    def _require_valid(self, quantizer: str, values: Mapping[str, Scalar], epochs: int | None) -> None:
        """Raises SettingError if no cell can have the values; at the offending knob, if it can be identified."""
        try:
            self.narrowed(self.models, quantizer, self.seeds, values, epochs)
        except ValidationError as error:
            where = error.errors()[0]["loc"]
            blamed = next((key for key in values if where[: len(location(key))] == location(key)), None)
            told = "" if blamed is None else f"{values[blamed]}: "
            raise SettingError(("tune", blamed) if blamed else ("tune",), f"{told}{first_fault(error)}") from error

    def narrowed(
        self,
        models: Sequence[str],
        quantizer: str,
        seeds: Sequence[int],
        values: Mapping[str, Scalar],
        epochs: int | None = None,
    ) -> "Block":
        """A block of one quantizer with other values and seeds, shortened to `epochs` if it has more.

        Shortening scales warm-up, cool-down, decays and resizing in proportion.

        Raises:
            ValidationError: no cell can have these values.
        """
        raw = self.model_dump(exclude={"tune"}, exclude_unset=True)
        raw |= {"models": models, "quantizers": [quantizer], "seeds": seeds}
        for key, value in values.items():
            section = raw
            *parents, name = location(key)
            for parent in parents:
                inner = section.get(parent)
                section[parent] = dict(inner) if isinstance(inner, dict) else {}
                section = section[parent]
            section[name] = value
        if epochs is not None and epochs < self.training.epochs:
            _shorten(raw, epochs)
        return Block.model_validate(raw)

    def settings(self) -> Iterator[Setting]:
        """The settings of the block's cells, models outermost."""
        for model in self.models:
            for quantizer in self.quantizers:
                yield Setting(self.dataset, model, quantizer, self._task_of(quantizer), self.init)

    def _task_of(self, quantizer: str) -> Task:
        return "bw" if quantizer == "fp" and self.task != "ba" else self.task

    def trials_of(self, setting: Setting, tune: Tune) -> list[Trial]:
        """The setting's trials, without parents and teachers."""
        found = []
        for values in tune.draw(setting.quantizer, self.quantizers):
            own = self.narrowed([setting.model], setting.quantizer, tune.seeds, values, tune.epochs)
            found.append(Trial(setting, values, tuple(own.cells(trial=True))))
        return found

    def cells(self, *, trial: bool = False) -> list[Cell]:
        """The block's runs, without parents and teachers, models outermost."""
        return [
            Cell(
                dataset=self.dataset,
                model=model,
                quantizer=quantizer,
                seed=seed,
                task=self._task_of(quantizer),
                init=self.init,
                data=self.data,
                training=self.training,
                quantization=self._quantization_of(quantizer),
                distillation=None if self.distillation is None else Distillation(**_without_teacher(self.distillation)),
                trial=trial,
            )
            for model in self.models
            for quantizer in self.quantizers
            for seed in self.seeds
        ]

    def _quantization_of(self, quantizer: str) -> Quantization:
        # Other methods' mu, or any mu under fp, cannot change this cell's result, so it is not part of its id.
        if self.task == "ba":
            kept = self.quantization.full_precision
            return Quantization(inputs=self.quantization.inputs or Inputs(), full_precision=kept)
        if quantizer == "fp":
            return Quantization()
        own = {name: sharpness for name, sharpness in self.quantization.sharpness.items() if name == quantizer}
        inputs = None if self.task == "bw" else self.quantization.inputs or Inputs()
        sums = (self.quantization.accumulator or Accumulator()) if self.task == "bwaa" else None
        return self.quantization.model_copy(update={"sharpness": own, "inputs": inputs, "accumulator": sums})


def _without_teacher(distillation: DistillationFrom) -> dict[str, Any]:
    """The keys that a cell keeps; it refers to its teacher by id."""
    return {key: value for key, value in dict(distillation).items() if key != "teacher"}


def _shorten(raw: dict[str, Any], epochs: int) -> None:
    """Reduces the number of epochs, and scales settings given in epochs in proportion."""
    training, share = raw["training"], epochs / raw["training"]["epochs"]
    training["epochs"] = epochs
    for key in ("warmup_epochs", "cooldown_epochs"):
        if training.get(key):
            training[key] = training[key] * share
    if training.get("decay_epochs"):
        training["decay_epochs"] = [max(1, round(epoch * share)) for epoch in training["decay_epochs"]]
    if resizing := raw.get("data", {}).get("progressive_resizing"):
        for key in ("from_epoch", "to_epoch"):
            if key in resizing:
                resizing[key] = round(resizing[key] * share)
