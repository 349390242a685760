"""Grid files: YAML -> Grid, every error with its line.

    load_grid("digits")                              a bundled grid
    load_grid("my.yaml", ["training.epochs=2"])      a file, with overrides
    python -m suite.gridfile                         rewrites grids/grid.schema.json, for editors

A file holds name, description, one block's keys and, optionally, `blocks`: a list of partial blocks, each laid over
those keys. Without `blocks` the file is the one block.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from suite.config import Block, Grid
from suite.errors import UserError

BUNDLED = Path(__file__).parent / "grids"
SCHEMA = BUNDLED / "grid.schema.json"
Location = tuple[str | int, ...]


class GridError(UserError):
    """A grid cannot be read; one line per fault."""


def bundled_names() -> list[str]:
    """Names of the grids that come with the package."""
    return sorted(path.stem for path in BUNDLED.glob("*.yaml"))


def load_grid(name_or_path: str, overrides: list[str] | None = None) -> Grid:
    """Reads a bundled grid by name, or a file by path, and applies `key.key=value` overrides to every block.

    Raises:
        GridError: anything wrong with the file or an override, all faults at once.
    """
    path = _find(name_or_path)
    raw, lines = _parse(path)
    settings = dict(_parse_override(text) for text in overrides or [])
    faults = _Faults(path, lines, set(settings))
    partial_blocks = raw.pop("blocks", [{}])
    head = {key: raw.pop(key) for key in ("name", "description") if key in raw}
    if not (isinstance(partial_blocks, list) and partial_blocks):
        raise GridError(f"{faults.place(('blocks',))}: blocks: needs a list of one or more blocks")
    blocks = []
    for index, partial in enumerate(partial_blocks):
        where: Location = ("blocks", index)
        if not isinstance(partial, dict):
            faults.add(f"{faults.place(where)}: blocks: each entry is a mapping of keys to override")
            continue
        merged = laid_over(raw, partial)
        for location, value in settings.items():
            _put(merged, location, value)
        try:
            blocks.append(Block.model_validate(merged))
        except ValidationError as error:
            faults.add_all(error, Block, where)
    try:
        grid = Grid.model_validate({**head, "blocks": blocks})
        if not faults:
            grid.cells()
    except ValidationError as error:
        faults.add_all(error, Grid, ())
    except ValueError as error:
        faults.add(f"{path}: {error}")
    if faults:
        raise GridError("\n".join(faults))
    return grid


class _Faults(dict[str, None]):
    """`file:line: key: what`, each once, in the order found: a fault of the shared keys is every block's."""

    def __init__(self, path: Path, lines: dict[Location, int], overridden: set[Location]) -> None:
        super().__init__()
        self.path, self.lines, self.overridden = path, lines, overridden

    def add(self, line: str) -> None:
        self[line] = None

    def add_all(self, error: ValidationError, model: type[BaseModel], block: Location) -> None:
        for fault in _root_causes(error.errors(), model):
            location: Location = tuple(part for part in fault["loc"] if part != "[key]")
            key = f"{_key(location)}: " if location else ""  # a fault of the whole block names its key itself
            self.add(f"{self.place(location, block)}: {key}{_what(fault, location, model)}")

    def place(self, location: Location, block: Location = ()) -> str:
        """File and line of the key, or of the nearest one around it that the file has; `--set` for an override."""
        if location and any(location[: len(key)] == key[: len(location)] for key in self.overridden):
            return "--set"
        for prefix in (block, ()):
            for length in range(len(location), 0, -1):
                if (line := self.lines.get((*prefix, *location[:length]))) is not None:
                    return f"{self.path}:{line}"
        return f"{self.path}:1"


def _root_causes(faults: Sequence[Any], model: type[BaseModel]) -> list[Any]:
    """Without what only follows from another fault: one typo, one line.

    A misspelt key is also a missing one, and a list whose one entry is wrong also too short.
    """
    misspelt = {
        (*fault["loc"][:-1], near)
        for fault in faults
        if fault["type"] == "extra_forbidden"
        for near in difflib.get_close_matches(str(fault["loc"][-1]), _fields(model, fault["loc"][:-1]), n=1)
    }
    lists = {fault["loc"][:-1] for fault in faults}
    return [
        fault
        for fault in faults
        if not (fault["type"] == "missing" and fault["loc"] in misspelt)
        and not (fault["type"] == "too_short" and fault["loc"] in lists)
        and fault["loc"] != ("blocks",)  # no block is left where each has faults of its own
    ]


def _unknown(kind: str, value: str, choices: list[str]) -> str:
    from quantizers.catalog import unknown  # late: it costs the import of torch

    return unknown(kind, value, choices)


def _key(location: Location) -> str:
    return ".".join(str(part) for part in location if isinstance(part, str))


def _what(fault: Any, location: Location, model: type[BaseModel]) -> str:  # noqa: ANN401  (pydantic's ErrorDetails)
    kind = fault["type"]
    if kind == "extra_forbidden":
        return _unknown("key", str(location[-1]), _fields(model, location[:-1]))
    if kind == "missing":
        return "is required"
    if kind == "literal_error":
        return _unknown(
            "value", str(fault["input"]), [choice.strip("'") for choice in _expected(fault["ctx"]["expected"])]
        )
    if kind == "value_error":
        return str(fault["ctx"]["error"])
    message = fault["msg"][0].lower() + fault["msg"][1:]
    return f"{message}, got {fault['input']!r}"


def _expected(text: str) -> list[str]:
    return text.replace(" or ", ", ").split(", ")


def _fields(model: type[BaseModel], location: Location) -> list[str]:
    for part in location:
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        types = (annotation, *get_args(annotation))  # Data, or Inputs | None with Inputs and None
        sections = [each for each in types if isinstance(each, type) and issubclass(each, BaseModel)]
        if len(sections) != 1:
            return sorted(model.model_fields)
        (model,) = sections
    extra = ["name", "description", "blocks"] if model is Block else []
    return [*model.model_fields, *extra]


def _find(name_or_path: str) -> Path:
    if name_or_path in bundled_names():
        return BUNDLED / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        raise GridError(f"{path}: no such grid file; the bundled grids are {', '.join(bundled_names())}")
    raise GridError(f"{_unknown('grid', name_or_path, bundled_names())}; or give the path of a YAML file")


def _parse(path: Path) -> tuple[dict[str, Any], dict[Location, int]]:
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise GridError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise GridError(f"{path}:{line}: not YAML: {error.problem}") from error
    if not isinstance(node, yaml.MappingNode):
        raise GridError(f"{path}:1: a grid is a mapping with the keys {', '.join(_fields(Block, ()))}")
    lines: dict[Location, int] = {}
    _collect_lines(node, (), lines, path)
    return yaml.safe_load(text), lines


def _collect_lines(node: yaml.Node, location: Location, lines: dict[Location, int], path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*location, key.value)
            line = key.start_mark.line + 1
            if here in lines:
                raise GridError(f"{path}:{line}: {_key(here)}: given twice, first in line {lines[here]}")
            lines[here] = line
            _collect_lines(value, here, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*location, index)] = value.start_mark.line + 1
            _collect_lines(value, (*location, index), lines, path)


def _parse_override(text: str) -> tuple[Location, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise GridError(f"--set {text}: write KEY=VALUE, for instance --set training.epochs=2")
    if key.split(".")[0] in {"name", "description", "blocks"}:
        raise GridError(f"--set {text}: only a block's keys can be overridden: {', '.join(Block.model_fields)}")
    try:
        return tuple(key.split(".")), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise GridError(f"--set {text}: the value is not YAML") from error


def laid_over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; where both have a mapping, that of `over` is laid over that of `base`."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = laid_over(merged[key], value) if both else value
    return merged


def _put(raw: dict[str, Any], location: Location, value: Any) -> None:  # noqa: ANN401  (any YAML value)
    for part in location[:-1]:
        inner = raw.get(str(part))
        raw[str(part)] = dict(inner) if isinstance(inner, dict) else {}
        raw = raw[str(part)]
    raw[str(location[-1])] = value


def schema() -> dict[str, Any]:
    """JSON schema of a grid file: Block's, with name and description, and `blocks` whose keys are all optional."""
    block = Block.model_json_schema()
    definitions = block.pop("$defs")
    partial = {**block, "required": [], "title": "blocks"}
    optional = {name: {**body, "required": []} for name, body in definitions.items() if name != "Sharpness"}
    head = {name: Grid.model_json_schema()["properties"][name] for name in ("name", "description")}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "proxbench grid",
        "description": "models x quantizers x seeds under one recipe; `blocks` are laid over it",
        "type": "object",
        "additionalProperties": False,
        "required": ["name"],
        "properties": {**head, **block["properties"], "blocks": {"type": "array", "items": partial}},
        "$defs": {**definitions, **optional},
    }


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(schema(), indent=2) + "\n", encoding="utf-8")
    print(SCHEMA)
