"""YAML files that people write: every key has its line, and every fault is told at once, with its line.

raw, lines = read(path, "a profile", Profile.model_fields, ProfileError)
faults = Faults(path, lines)
faults.add_all(validation_error, Profile, ())
"""

import difflib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from suite.errors import UserError

Location = tuple[str | int, ...]


class Faults(dict[str, None]):
    """`file:line: key: what`, each once, in the order found: a fault of the shared keys is every block's."""

    def __init__(
        self,
        path: Path,
        lines: dict[Location, int],
        overridden: Collection[Location] = (),
        extra_keys: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.path, self.lines, self.overridden = path, lines, overridden
        self.extra_keys = extra_keys  # of the file, beside those of the model it is checked against

    def add(self, line: str) -> None:
        """One line, as it stands."""
        self[line] = None

    def add_all(self, error: ValidationError, model: type[BaseModel], block: Location) -> None:
        """The faults that pydantic found in the part of the file at `block`, as the user has to mend them."""
        for fault in self._root_causes(error.errors(), model):
            location: Location = tuple(part for part in fault["loc"] if part != "[key]")
            key = f"{_key(location)}: " if location else ""  # a fault of the whole block names its key itself
            self.add(f"{self.place(location, block)}: {key}{self._what(fault, location, model)}")

    def place(self, location: Location, block: Location = ()) -> str:
        """File and line of the key, or of the nearest one around it that the file has; `--set` for an override."""
        if location and any(location[: len(key)] == key[: len(location)] for key in self.overridden):
            return "--set"
        for prefix in (block, ()):
            for length in range(len(location), 0, -1):
                if (line := self.lines.get((*prefix, *location[:length]))) is not None:
                    return f"{self.path}:{line}"
        return f"{self.path}:1"

    def _root_causes(self, faults: Sequence[Any], model: type[BaseModel]) -> list[Any]:
        """Without what only follows from another fault: one typo, one line.

        A misspelt key is also a missing one, and a list whose one entry is wrong also too short.
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
            and fault["loc"] != ("blocks",)  # no block is left where each has faults of its own
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
            return str(fault["ctx"]["error"])
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


def unknown(kind: str, value: str, choices: Iterable[str]) -> str:
    """The message for a value that is not among the choices."""
    from quantizers.catalog import unknown  # late: it costs the import of torch

    return unknown(kind, value, choices)


def _key(location: Location) -> str:
    return ".".join(str(part) for part in location if isinstance(part, str))


def _expected(text: str) -> list[str]:
    return text.replace(" or ", ", ").split(", ")


def read(
    path: Path, what: str, keys: Iterable[str], fault: type[UserError], *, as_text: bool = False
) -> tuple[dict[str, Any], dict[Location, int]]:
    """The file's mapping, and the line of every key in it.

    Args:
        path: the file.
        what: it is: "a grid".
        keys: it may have, for the message.
        fault: the error to raise.
        as_text: whether every value is the text that stands there. YAML's 12:00:00 is the number 43200, its no False.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.CSafeLoader)
    except UnicodeDecodeError as error:
        raise fault(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise fault(f"{path}:{line}: not YAML: {error.problem}") from error
    if not isinstance(node, yaml.MappingNode):
        raise fault(f"{path}:1: {what} is a mapping with the keys {', '.join(keys)}")
    lines: dict[Location, int] = {}
    _collect_lines(node, (), lines, path, fault)
    loader = yaml.CBaseLoader if as_text else yaml.CSafeLoader
    return yaml.load(text, Loader=loader), lines  # noqa: S506  (a base loader makes text, lists and mappings only)


def _collect_lines(
    node: yaml.Node, location: Location, lines: dict[Location, int], path: Path, fault: type[UserError]
) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*location, key.value)
            line = key.start_mark.line + 1
            if here in lines:
                raise fault(f"{path}:{line}: {_key(here)}: given twice, first in line {lines[here]}")
            lines[here] = line
            _collect_lines(value, here, lines, path, fault)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*location, index)] = value.start_mark.line + 1
            _collect_lines(value, (*location, index), lines, path, fault)
