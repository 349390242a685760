"""Tuning of a grid: knobs with their ranges, and the trials drawn from them. Pure functions of the grid file.

    tune:
      training.learning_rate: {log: [0.0003, 0.03]}
      quantization.sharpness.bnn++.end: {log: [10, 1000]}     a method's own knob
      trials: 12
      seeds: [1000, 1001]

Every method of a block gets the same number of trials. Shared knobs take the same values in the same trials for all
methods, whatever knobs of its own a method has. This follows AlgoPerf's external tuning (Dahl et al. 2023).
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from suite.errors import SettingError
from suite.recipe.settings import Frozen

Scalar = bool | int | float | str
Values = Mapping[str, Scalar]
"""A trial's value for each knob, by key in a grid file."""
Sampler = Literal["sobol", "random", "grid"]
SHARPNESS = "quantization.sharpness."
_SECTIONS = ("training", "quantization", "data")
_FIXED = {
    "training.epochs": "it is the budget of a run, not a knob: set tune.epochs for shorter trials",
    "data.validation_fraction": "trials are scored on that part",
}
_SETTINGS = ("trials", "sampler", "seeds", "epochs")
_SCALES = {"log", "linear"}
_NESTED = {*_SECTIONS, "quantization.sharpness", "quantization.inputs", "data.progressive_resizing"}
_EDGE = 0.1
"""The fraction of a range, at either end, that counts as its edge."""
_MAX_DRAWN = 1024
"""Maximum number of points drawn per trial to find distinct values."""
_ENDS = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
_KNOB = {
    "description": "values to try: a range or a list; null: not tuned here",
    "anyOf": [
        {"type": "array", "minItems": 1, "items": {"type": ["number", "string", "boolean"]}},
        *(
            {"type": "object", "properties": {scale: _ENDS}, "required": [scale], "additionalProperties": False}
            for scale in ("log", "linear")
        ),
        {"type": "null"},
    ],
}


class Knob(Frozen):
    """The values that a key may take: a linear or logarithmic range from the first to the second value, or a list."""

    scale: Literal["log", "linear", "list"]
    values: tuple[Scalar, ...]

    @classmethod
    def of(cls, key: str, written: Any) -> "Knob":  # noqa: ANN401  (any YAML value)
        """A knob from `{log: [low, high]}`, `{linear: [low, high]}` or a list. Raises SettingError at the key."""
        if isinstance(written, Mapping) and {"scale", "values"} == written.keys():
            return cls.model_validate(dict(written))
        if isinstance(written, list | tuple):
            if not written or any(not isinstance(each, Scalar) for each in written):
                raise SettingError((key,), "needs a list of one or more values")
            if len(set(written)) < len(written):
                raise SettingError((key,), "contains a value twice")
            return cls(scale="list", values=tuple(written))
        if not isinstance(written, Mapping) or len(written) != 1 or not written.keys() <= _SCALES:
            raise SettingError((key,), "needs {log: [low, high]}, {linear: [low, high]} or a list of values")
        [(scale, ends)] = written.items()
        if not (isinstance(ends, list | tuple) and len(ends) == 2 and all(map(_is_number, ends))):  # noqa: PLR2004
            raise SettingError((key,), f"{scale} needs two numbers, [low, high]")
        low, high = map(float, ends)
        if low >= high or (scale == "log" and low <= 0):
            raise SettingError((key,), f"{list(ends)} is not an increasing range{' above 0' * (scale == 'log')}")
        return cls(scale=scale, values=(low, high))

    def at(self, position: float) -> Scalar:
        """The value at a position in [0, 1); for a range, rounded to four significant digits.

        Rounded, because the last bits of exp() differ between machines, and a cell's id depends on its values.
        """
        if self.scale == "list":
            return self.values[min(int(position * len(self.values)), len(self.values) - 1)]
        low, high = self._ends()
        if self.scale == "log":
            return _rounded(math.exp(math.log(low) + position * (math.log(high) - math.log(low))))
        return _rounded(low + position * (high - low))

    def position(self, value: Scalar) -> float:
        """A value's position in the range, from 0 to 1 (outside [0, 1] beyond it); list entries are evenly spaced.

        Raises:
            ValueError: the list does not have the value.
        """
        if self.scale == "list":
            index = self.values.index(value)
            return index / (len(self.values) - 1) if len(self.values) > 1 else 0.5
        low, high = self._ends()
        if self.scale == "log":
            return math.log(float(value) / low) / math.log(high / low) if float(value) > 0 else -math.inf
        return (float(value) - low) / (high - low)

    def is_edge(self, value: Scalar) -> bool:
        """Whether a better value may be outside: in the outer tenth of a range, or at an end of 3 or more numbers."""
        if self.scale == "list":
            numbers = [float(each) for each in self.values if _is_number(each)]
            return len(numbers) == len(self.values) > 2 and value in {min(self.values), max(self.values)}  # noqa: PLR2004
        return _is_number(value) and not _EDGE <= self.position(value) <= 1 - _EDGE

    def written(self) -> str:
        """The knob as written in a grid file."""
        values = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in self.values)
        return f"[{values}]" if self.scale == "list" else f"{{{self.scale}: [{values}]}}"

    def _ends(self) -> tuple[float, float]:
        low, high = self.values
        return float(low), float(high)


class Tune(Frozen):
    """Trials before the grid's own cells: the same number for each method on each model. See docs/tuning.md."""

    knobs: dict[str, Knob] = Field(min_length=1)
    trials: PositiveInt = Field(description="settings tried for each (data set, model, quantizer)")
    sampler: Sampler = Field(
        "sobol",
        description="sobol: scrambled Sobol' points; random: independent ones; grid: every combination of lists",
    )
    seeds: tuple[NonNegativeInt, ...] = Field(
        min_length=1, description="seeds of the trials, different from the grid's own"
    )
    epochs: PositiveInt | None = Field(
        None, description="maximum epochs of a trial; warm-up and decays shrink in proportion"
    )

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{list(seeds)} contains a seed twice")
        return seeds

    def space(self, quantizer: str) -> dict[str, Knob]:
        """The method's search space, in order: knobs of all methods, of binary methods, and its own."""
        own = f"{SHARPNESS}{quantizer}."
        shared = {key: knob for key, knob in self.knobs.items() if not key.startswith("quantization.")}
        if quantizer == "fp":
            return shared
        binary = {
            key: knob
            for key, knob in self.knobs.items()
            if key.startswith("quantization.") and not key.startswith(SHARPNESS)
        }
        return shared | binary | {key: knob for key, knob in self.knobs.items() if key.startswith(own)}

    def draw(self, quantizer: str, quantizers: Sequence[str]) -> list[dict[str, Scalar]]:
        """The values of the method's trials, all different; `quantizers` are the methods tuned together.

        Raises:
            SettingError: its knobs have fewer combinations than there are trials, or, with sampler grid, more.
        """
        space = self.space(quantizer)
        if self.sampler == "grid":
            return self._grid(quantizer, space)
        num_dimensions = max(len(self.space(name)) for name in quantizers)
        num_lists = math.prod(len(knob.values) if knob.scale == "list" else 10**6 for knob in space.values())
        if num_lists < self.trials:
            raise SettingError(
                "trials", f"{self.trials} are more than the {num_lists} combinations of {quantizer}'s knobs"
            )
        found: dict[str, dict[str, Scalar]] = {}
        num_points = self.trials
        while len(found) < self.trials:  # redraw points that map to values already tried
            num_points *= 2
            if num_points > _MAX_DRAWN * self.trials:
                told = (
                    f"{self.trials} are more than the {len(found)} combinations of {quantizer}'s knobs to four digits"
                )
                raise SettingError("trials", told)
            for point in self._points(num_points, max(num_dimensions, 1)):
                values = {key: knob.at(u) for (key, knob), u in zip(space.items(), point, strict=False)}
                found.setdefault(json.dumps(values), values)
        return list(found.values())[: self.trials]

    def _grid(self, quantizer: str, space: Mapping[str, Knob]) -> list[dict[str, Scalar]]:
        for key, knob in space.items():
            if knob.scale != "list":
                raise SettingError((key,), "sampler: grid needs a list of values, or take sampler: sobol")
        found = [dict(zip(space, values, strict=True)) for values in product(*(knob.values for knob in space.values()))]
        if len(found) != self.trials:
            raise SettingError(
                "trials",
                f"sampler: grid tries all {len(found)} combinations of {quantizer}'s knobs, and each method gets "
                f"{self.trials} trials: make them equal, or take sampler: sobol",
            )
        return found

    def _points(self, count: int, num_dimensions: int) -> npt.NDArray[np.float64]:
        """Points [count, num_dimensions] in [0, 1); a smaller count gives the first points of a larger one."""
        from scipy.stats import qmc  # late: it costs a second

        seed = int.from_bytes(hashlib.sha256(json.dumps(["tune", self.seeds]).encode()).digest()[:8], "big")
        if self.sampler == "random":
            return np.random.default_rng(seed).random((count, num_dimensions))
        exponent = max(count - 1, 1).bit_length()  # Sobol' points are balanced in powers of two
        points = qmc.Sobol(num_dimensions, scramble=True, rng=np.random.default_rng(seed)).random_base2(exponent)
        return cast("npt.NDArray[np.float64]", points[:count])


def _schema() -> dict[str, Any]:
    """JSON schema of a grid file's `tune`: Tune's settings, and a pattern for the knobs."""
    found = Tune.model_json_schema()
    properties = {name: body for name, body in found["properties"].items() if name in _SETTINGS}
    return {
        "description": "trials before the grid's own cells; see docs/tuning.md",
        "anyOf": [
            {
                "type": "object",
                "additionalProperties": False,
                "properties": properties,
                "patternProperties": {rf"^({'|'.join(_SECTIONS)})\.": _KNOB},
            },
            {"type": "null"},
        ],
    }


SCHEMA = _schema()


def normalised(written: Any) -> Any:  # noqa: ANN401  (any YAML value)
    """Convert the `tune` mapping of a grid file to the fields of Tune; knobs set to null are dropped.

    Raises:
        SettingError: a knob is invalid; the error's location is the knob's key.
    """
    if not isinstance(written, Mapping) or "knobs" in written:
        return written
    settings = {key: value for key, value in written.items() if key in _SETTINGS}
    knobs: dict[str, Knob] = {}
    for key, value in _flat({key: value for key, value in written.items() if key not in _SETTINGS}):
        section, dot, _ = key.partition(".")
        if section not in _SECTIONS or not dot:
            raise SettingError(
                (key,), f"is none of {', '.join(_SETTINGS)}, nor a recipe's key such as training.learning_rate"
            )
        if key in _FIXED:
            raise SettingError((key,), f"cannot be tuned: {_FIXED[key]}")
        if value is not None:
            knobs[key] = Knob.of(key, value)
    if not knobs:
        raise SettingError((), "needs a knob, for instance training.learning_rate: {log: [0.0003, 0.03]}")
    return {"knobs": knobs, **settings}


def _flat(written: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Knobs by dotted key, from nested or dotted keys."""
    for key, value in written.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and (name in _NESTED or (prefix == SHARPNESS and not value.keys() & _SCALES)):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def location(key: str) -> tuple[str, ...]:
    """The path of the knob's value in a recipe. A user's own quantizer may have dots in its name."""
    if key.startswith(SHARPNESS):
        quantizer, _, name = key.removeprefix(SHARPNESS).rpartition(".")
        return ("quantization", "sharpness", quantizer, name)
    return tuple(key.split("."))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
