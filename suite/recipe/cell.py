"""Cell: one resolved training run, frozen and identified by its content. Nothing here accesses files."""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from pydantic import Field, NonNegativeInt, ValidationInfo, field_validator, model_validator

from suite.errors import SettingError
from suite.recipe.settings import (
    RECORDED,
    Data,
    DatasetName,
    Distillation,
    Frozen,
    Init,
    ModelName,
    Quantization,
    QuantizerName,
    Section,
    Task,
    Training,
    require_fitting,
    require_mu,
)


class Cell(Frozen):
    """One resolved run. `id` identifies everything that changes its result and nothing else."""

    dataset: DatasetName
    model: ModelName
    quantizer: QuantizerName
    seed: NonNegativeInt
    task: Task = "bw"
    init: Init = "scratch"
    parent: str | None = Field(None, description="id of the cell whose weights a finetune cell starts from")
    teacher: str | None = Field(None, description="id of the cell that a distilled one learns from")
    data: Data
    training: Training
    quantization: Quantization
    distillation: Distillation | None = None
    trial: bool = Field(
        default=False,
        exclude_if=lambda is_trial: not is_trial,
        description="a tuning trial: its result is validation accuracy, and the test part is never loaded",
    )

    @field_validator("data", "training", "quantization")
    @classmethod
    def _fits_the_model(cls, section: Section, info: ValidationInfo) -> Section:
        is_unused = section == Quantization() and info.data.get("quantizer") == "fp"
        if not is_unused and info.context != RECORDED and {"dataset", "model"} <= info.data.keys():
            require_fitting(section, info.data["dataset"], (info.data["model"],))
        return section

    @model_validator(mode="after")
    def _mu_where_needed(self, info: ValidationInfo) -> "Cell":
        if info.context != RECORDED:
            require_mu(self.quantizer, self.quantization)
        return self

    @model_validator(mode="after")
    def _inputs_where_the_task_has_them(self) -> "Cell":
        if self.quantizer == "fp" and self.task in {"bwa", "bwaa"}:
            raise SettingError("task", "a full-precision cell has no binary weights; its task is bw, or ba")
        if self.quantizer != "fp" and self.task == "ba":
            raise SettingError("task", f"ba leaves weights real: its quantizer is fp, here it is {self.quantizer}")
        if (self.task != "bw") != (self.quantization.inputs is not None):
            raise SettingError("quantization.inputs", "a cell has them if and only if its task is bwa, ba or bwaa")
        if (self.task == "bwaa") != (self.quantization.accumulator is not None):
            raise SettingError("quantization.accumulator", "a cell has one if and only if its task is bwaa")
        if self.task == "bwaa" and self.quantization.scale != "none":
            raise SettingError("quantization.scale", "bwaa sums integers, so weights must be -1 and +1: scale: none")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        """Ids of the cells that must be done first: its parent and its teacher."""
        return tuple(each for each in (self.parent, self.teacher) if each is not None)

    @cached_property
    def id(self) -> str:
        """First 12 hex digits of SHA-256 over the canonical JSON of the cell."""
        return _digest(self.model_dump(mode="json"))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> "Cell":
        """A copy with other values and therefore another id."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("id", None)
        return copied

    @property
    def recipe_id(self) -> str:
        """The same digest without the seed: equal for cells that differ only in their seeds."""
        return _digest(self.model_dump(mode="json", exclude={"seed", "parent", "teacher"}))

    @property
    def name(self) -> str:
        """Display name, `cifar10/resnet20/bnn++/s3`, followed by an init other than scratch and a task other than bw.

        A trial's name ends in `/trial-3f2a91`, the same for all its seeds.
        """
        start = "" if self.init == "scratch" else f"/{self.init}"
        task = "" if self.task == "bw" else f"/{self.task}"
        trial = f"/trial-{self.recipe_id[:6]}" if self.trial else ""
        return f"{self.dataset}/{self.model}/{self.quantizer}/s{self.seed}{start}{task}{trial}"


def _digest(value: object) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
