"""Grid files: YAML -> Grid, with the line of every error.

    load_grid("digits")                              a bundled grid
    load_grid("my.yaml", ["training.epochs=2"])      a file, with overrides
    python -m suite.recipe.grid_file                 rewrites grids/grid.schema.json, for editors

A file has a name, a description, `analysis`, the keys of one block and, optionally, `blocks`: a list of partial blocks
that override those keys. Without `blocks`, the file is a single block. In `blocks`, `null` unsets an optional key.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from suite.errors import UserError
from suite.recipe.block import Block
from suite.recipe.bundled import BUNDLED, bundled_names
from suite.recipe.faults import Faults, Location, first_fault, unknown
from suite.recipe.grid import Grid
from suite.recipe.settings import Execution
from suite.recipe.yaml_lines import read, read_value

SCHEMA = BUNDLED / "grid.schema.json"
_KEYS_OF_A_FILE = ("name", "description", "analysis", "blocks")
"""Beside a block's."""


class GridError(UserError):
    """A grid cannot be read; the message has one line per fault."""


def load_grid(name_or_path: str, overrides: list[str] | None = None) -> Grid:
    """Reads a bundled grid by name, or a file by path, and applies `key.key=value` overrides to every block.

    Raises:
        GridError: the file or an override is invalid; the message lists all faults.
    """
    path = path_of(name_or_path)
    raw, lines = read(path, "a grid", [*Block.model_fields, *_KEYS_OF_A_FILE], GridError)
    settings = dict(_parse_override(text) for text in overrides or [])
    faults = Faults(path, lines, set(settings), _KEYS_OF_A_FILE)
    partial_blocks = raw.pop("blocks", [{}])
    head = {key: raw.pop(key) for key in _KEYS_OF_A_FILE[:-1] if key in raw}
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
            grid.resolve(grid.imagined())
    except ValidationError as error:
        faults.add_all(error, Grid, ())
    except ValueError as error:
        faults.add(f"{path}: {error}")
    if faults:
        raise GridError("\n".join(faults))
    return grid


def path_of(name_or_path: str) -> Path:
    """The file of a bundled grid's name or of a path.

    Raises:
        GridError: there is no such file.
    """
    if name_or_path in bundled_names():
        return BUNDLED / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    try:
        if path.is_file():
            return path
    except OSError as error:  # a parent folder is not accessible
        raise GridError(f"{path}: {error.strerror}") from error
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        raise GridError(f"{path}: no such grid file; the bundled grids are {', '.join(bundled_names())}")
    raise GridError(f"{unknown('grid', name_or_path, bundled_names())}; or give the path of a YAML file")


def _parse_override(text: str) -> tuple[Location, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise GridError(f"--set {text}: write KEY=VALUE, for instance --set training.epochs=2")
    if key.split(".")[0] in _KEYS_OF_A_FILE:
        raise GridError(f"--set {text}: only a block's keys can be overridden: {', '.join(Block.model_fields)}")
    try:
        return tuple(key.split(".")), read_value(value)
    except ValueError as error:
        raise GridError(f"--set {text}: {error}") from error


def laid_over_execution(execution: Execution, settings: list[str]) -> Execution:
    """The execution with `execution.KEY=VALUE` settings applied.

    Raises:
        GridError: a setting is for another section, or invalid.
    """
    raw: dict[str, Any] = {"execution": execution.model_dump()}
    for text in settings:
        location, value = _parse_override(text)
        if location[0] != "execution" or location[1:] == ():
            raise GridError(f"--set {text}: only execution.KEY of an existing cell can be changed")
        _put(raw, location, value)
    try:
        return Execution.model_validate(raw["execution"])
    except ValidationError as error:
        raise GridError(f"--set execution.{first_fault(error)}") from error


def laid_over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` updated with the values of `over`; mappings in both are merged recursively."""
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
    grid = Grid.model_json_schema()
    head = {name: grid["properties"][name] for name in _KEYS_OF_A_FILE[:-1]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "proxbench grid",
        "description": "models x quantizers x seeds under one recipe; `blocks` override its keys",
        "type": "object",
        "additionalProperties": False,
        "required": ["name"],
        "properties": {**head, **block["properties"], "blocks": {"type": "array", "items": partial}},
        "patternProperties": {"^x-": {"description": "ignored: a place for anchors"}},
        "$defs": {**definitions, **optional, "Analysis": grid["$defs"]["Analysis"]},
    }


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(schema(), indent=2) + "\n", encoding="utf-8")
    print(SCHEMA)
