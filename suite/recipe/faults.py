r"""Reports all faults that pydantic found in a hand-written file at once, each with its line and key.

faults = Faults(path, lines)
faults.add_all(validation_error, Profile, ())
raise ProfileError("\n".join(faults))
"""

import difflib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from suite.errors import SettingError

Location = tuple[str | int, ...]
"""Keys of mappings and indices of lists, outermost first."""


class Faults(dict[str, None]):
    """Lines `file:line: key: reason`, in the order found, without repeats: each block repeats faults of shared keys."""

    def __init__(
        self,
        path: Path,
        lines: dict[Location, int],
        overridden: Collection[Location] = (),
        extra_keys: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.path, self.lines, self.overridden = path, lines, overridden
        self.extra_keys = extra_keys  # keys that the file may have in addition to the model's

    def add(self, line: str) -> None:
        """Adds one line verbatim."""
        self[line] = None

    def add_all(self, error: ValidationError, model: type[BaseModel], block: Location) -> None:
        """Adds the faults that pydantic found in the part of the file at `block`, reduced to their root causes."""
        for fault in self._root_causes(error.errors(), model):
            location: Location = tuple(part for part in fault["loc"] if part != "[key]")
            if isinstance(cause := _cause(fault), SettingError):
                location += cause.location
            key = f"{dotted(location)}: " if location else ""  # a fault of the whole block names its key itself
            self.add(f"{self.place(location, block)}: {key}{self._what(fault, location, model)}")

    def place(self, location: Location, block: Location = ()) -> str:
        """File and line of the key, or of its nearest enclosing key in the file; `--set` for an override."""
        if location and any(location[: len(key)] == key[: len(location)] for key in self.overridden):
            return "--set"
        for length in range(len(location), 0, -1):
            for prefix in (block, ()):
                if (line := self.lines.get((*prefix, *location[:length]))) is not None:
                    return f"{self.path}:{line}"
        return f"{self.path}:1"

    def _root_causes(self, faults: Sequence[Any], model: type[BaseModel]) -> list[Any]:
        """Drops faults that only follow from others, so that one typo gives one line.

        A misspelt key is also a missing key, and a list whose only entry is wrong is also too short.
        """
        misspelt = {
            (*fault["loc"][:-1], near)
            for fault in faults
            if fault["type"] == "extra_forbidden"
            for near in difflib.get_close_matches(str(fault["loc"][-1]), self._fields(model, fault["loc"][:-1]), n=1)
        }
        lists = {fault["loc"][:-1] for fault in faults}
        return [
            fault
            for fault in faults
            if not (fault["type"] == "missing" and fault["loc"] in misspelt)
            and not (fault["type"] == "too_short" and fault["loc"] in lists)
            and fault["loc"] != ("blocks",)  # if every block has faults, the list is also empty
        ]

    def _what(self, fault: Any, location: Location, model: type[BaseModel]) -> str:  # noqa: ANN401  (pydantic's ErrorDetails)
        kind = fault["type"]
        if kind == "extra_forbidden":
            return unknown("key", str(location[-1]), self._fields(model, location[:-1]))
        if kind == "missing":
            return "is required"
        if kind == "literal_error":
            return unknown(
                "value", str(fault["input"]), [choice.strip("'") for choice in _expected(fault["ctx"]["expected"])]
            )
        if kind == "value_error":
            cause = _cause(fault)
            return cause.reason if isinstance(cause, SettingError) else str(cause)
        message = fault["msg"][0].lower() + fault["msg"][1:]
        return f"{message}, got {fault['input']!r}"

    def _fields(self, model: type[BaseModel], location: Location) -> list[str]:
        for part in location:
            annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
            types = (annotation, *get_args(annotation))  # Data, or Inputs | None with Inputs and None
            sections = [each for each in types if isinstance(each, type) and issubclass(each, BaseModel)]
            if len(sections) != 1:
                return sorted(model.model_fields)
            (model,) = sections
        return [*model.model_fields, *([] if location else self.extra_keys)]


def first_fault(error: ValidationError) -> str:
    """`key: reason` of the first fault, for sources without line numbers: a flag, or a file that a program wrote."""
    fault: Any = error.errors()[0]
    location, reason = tuple(fault["loc"]), str(_cause(fault) or fault["msg"])
    if isinstance(cause := _cause(fault), SettingError):
        location, reason = (*location, *cause.location), cause.reason
    return f"{'.'.join(map(str, location))}: {reason}" if location else reason


def unknown(kind: str, value: str, choices: Iterable[str]) -> str:
    """The message for a value that is not among the choices."""
    from quantizers.names import unknown  # late: imports torch

    return unknown(kind, value, choices)


def _cause(fault: Any) -> object:  # noqa: ANN401  (pydantic's ErrorDetails)
    """The exception that one of our validators raised; None for a fault that pydantic found."""
    return fault.get("ctx", {}).get("error")


def dotted(location: Location) -> str:
    """The keys without indices: `blocks.training.epochs`."""
    return ".".join(str(part) for part in location if isinstance(part, str))


def _expected(text: str) -> list[str]:
    return text.replace(" or ", ", ").split(", ")
