"""Reads hand-written YAML 1.2 and records the line of every key.

    raw, lines = read(path, "a profile", Profile.model_fields, ProfileError)

Values follow YAML 1.2's core schema, so `no` is text, 010 is ten and 1:30 is not a number; keys are always text.
Anchors, aliases and merge keys work. Top-level keys that start with `x-` are ignored, as a place for anchors.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.errors import UserError
from suite.recipe.faults import Location, dotted

if TYPE_CHECKING:  # ruamel.yaml takes 0.1 s to import, too long for --help
    from ruamel.yaml import MappingNode, Node

_MAX_DEPTH = 50
"""Maximum nesting depth. A grid needs five levels; Python's stack allows a few hundred."""
_TOO_DEEP = f"nested more than {_MAX_DEPTH} levels deep"
_CORE = "tag:yaml.org,2002:"
_TAGS = {
    f"{_CORE}{name}" for name in ("str", "null", "bool", "int", "float", "map", "seq", "merge", "value", "timestamp")
}


def read(
    path: Path, what: str, keys: Iterable[str], fault: type[UserError], *, as_text: bool = False
) -> tuple[dict[str, Any], dict[Location, int]]:
    """The file's mapping without its `x-` keys, and the line of every key in it.

    Args:
        path: the file.
        what: the kind of file, for messages: "a grid".
        keys: the allowed keys, for messages.
        fault: the exception class to raise.
        as_text: keep every value as its literal text: 0123 is "0123", null is "null".
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise fault(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise fault(f"{path}:{line}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    try:
        values = _Values(text, as_text=as_text)
        raw = values.mapping(_compose_mapping(text, what, keys), ())
    except _YAMLError as error:
        key = f"{dotted(error.location)}: " if error.location else ""
        raise fault(f"{path}:{error.line}: {key}{error}") from error
    return {key: value for key, value in raw.items() if not key.startswith("x-")}, values.lines


def read_value(text: str) -> Any:  # noqa: ANN401  (any YAML value)
    """The value in `KEY=VALUE`, parsed as in a file; None for empty text.

    Raises:
        ValueError: the text is not YAML; the message is one line.
    """
    node = _compose(text)
    return None if node is None else _Values(text, as_text=False).of(node, ())


class _YAMLError(ValueError):
    """A YAML error, with its line and key."""

    def __init__(self, line: int, location: Location, reason: str) -> None:
        super().__init__(" ".join(reason.split()))
        self.line, self.location = line, location


def _compose_mapping(text: str, what: str, keys: Iterable[str]) -> "MappingNode":
    from ruamel.yaml import MappingNode

    node = _compose(text)
    if not isinstance(node, MappingNode):
        raise _YAMLError(1, (), f"{what} is a mapping with the keys {', '.join(keys)}")
    return node


def _compose(text: str) -> "Node | None":
    """The text's only document as nodes; None if it has none."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError
    from ruamel.yaml.reader import ReaderError

    reader = YAML(typ="safe", pure=True)
    reader.max_depth = _MAX_DEPTH
    reader.composer.warn_double_anchors = False  # YAML allows them; an alias means the last one
    try:
        node: Node | None = reader.compose(text)
    except ReaderError as error:
        character = chr(error.character)
        line = text[: text.index(character)].count("\n") + 1
        raise _YAMLError(line, (), f"not YAML: the character {character!r} is not allowed") from error
    except MarkedYAMLError as error:
        raise _YAMLError(*_described(error)) from error
    except (ValueError, OverflowError) as error:  # raised by chr(), without a position
        line = text[: text.find("\\U")].count("\n") + 1
        raise _YAMLError(line, (), "not YAML: an escape \\U... is not a character") from error
    return node


def _described(error: Any) -> tuple[int, Location, str]:  # noqa: ANN401  (ruamel's MarkedYAMLError, untyped)
    mark, start = error.problem_mark, error.context_mark
    line = mark.line + 1 if mark else 1
    if "maximum depth" in str(error.problem):
        return line, (), _TOO_DEEP
    begun = f" ({error.context} that starts in line {start.line + 1})" if start and start.line + 1 != line else ""
    return line, (), f"not YAML: {str(error.problem).removeprefix('but ')}{begun}"


class _Values:
    """Converts nodes to Python values; `lines` has the line of each key and list entry seen."""

    def __init__(self, text: str, *, as_text: bool) -> None:
        self.lines: dict[Location, int] = {}
        self._text, self._as_text = text, as_text
        self._open: list[Node] = []  # ancestors of the current node; an alias to one is a loop

    def of(self, node: "Node", here: Location) -> Any:  # noqa: ANN401  (any YAML value)
        """The value at `here`."""
        from ruamel.yaml import MappingNode, ScalarNode

        self._require_plain(node, here)
        if isinstance(node, ScalarNode):
            return node.value if self._as_text else self._scalar(node, here)
        if isinstance(node, MappingNode):
            return self.mapping(node, here)
        self._enter(node, here)
        entries = []
        for index, entry in enumerate(node.value):
            self.lines[(*here, index)] = entry.start_mark.line + 1
            entries.append(self.of(entry, (*here, index)))
        self._open.pop()
        return entries

    def mapping(self, node: "Node", here: Location) -> dict[str, Any]:
        """The mapping at `here`, overriding the mappings of its merge key `<<`."""
        self._require_plain(node, here)
        self._enter(node, here)
        own: dict[str, Any] = {}
        merged: list[Node] = []
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = self._name(key, here)
            if name in lines:
                raise _YAMLError(line, (*here, name), f"given twice, first in line {lines[name]}")
            lines[name] = line
            if key.tag == f"{_CORE}merge":
                merged += self._merged(value, (*here, name), line)
        inherited: dict[str, Any] = {}
        for source in reversed(merged):  # the first of several wins; the mapping's own keys override all
            inherited |= self.mapping(source, here)
        for key, value in node.value:
            if key.tag != f"{_CORE}merge":
                self.lines[(*here, key.value)] = lines[key.value]
                own[key.value] = self.of(value, (*here, key.value))
        self._open.pop()
        return inherited | own

    def _name(self, key: "Node", here: Location) -> str:
        from ruamel.yaml import ScalarNode

        self._require_plain(key, here)
        if isinstance(key, ScalarNode):
            return str(key.value)
        written = self._text[key.start_mark.index : key.end_mark.index]
        raise _YAMLError(
            key.start_mark.line + 1, here, f"{written}: a key has to be text; text with braces or brackets needs quotes"
        )

    def _merged(self, value: "Node", here: Location, line: int) -> "list[Node]":
        from ruamel.yaml import MappingNode, SequenceNode

        nodes = value.value if isinstance(value, SequenceNode) else [value]
        if not all(isinstance(each, MappingNode) for each in nodes):
            raise _YAMLError(line, here, "can only merge a mapping or a list of mappings")
        return list(nodes)

    def _scalar(self, node: "Node", here: Location) -> str | int | float | bool | None:
        kind, text = str(node.tag).removeprefix(_CORE), str(node.value)
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in {"true", "false"}:
            return text.lower() == "true"
        if kind == "timestamp":
            raise self._fault(node, here, f"{text} is a date, which no key takes; quote it if it is text")
        if kind not in {"int", "float"}:
            return text
        digits = text.replace("_", "").lower()
        try:
            if kind == "float":
                return float(digits.replace(".inf", "inf").replace(".nan", "nan"))
            return int(digits, 0 if digits.lstrip("+-")[:2] in {"0x", "0o", "0b"} else 10)
        except ValueError as error:
            raise self._fault(node, here, f"{text} is not a number") from error

    def _require_plain(self, node: "Node", here: Location) -> None:
        if node.tag not in _TAGS:
            tag = str(node.tag).replace(_CORE, "!!")
            raise self._fault(node, here, f"the tag {tag} means nothing here; leave it out")

    def _enter(self, node: "Node", here: Location) -> None:
        if any(node is each for each in self._open):
            raise self._fault(node, here, f"the alias *{node.anchor} is inside its own anchor")
        if len(self._open) == _MAX_DEPTH:  # through aliases; ruamel itself checks nesting without aliases
            raise self._fault(node, here, _TOO_DEEP)
        self._open.append(node)

    def _fault(self, node: "Node", here: Location, reason: str) -> _YAMLError:
        """An error at the nearest key's line, because a node behind an alias has its anchor's line."""
        keys = (here[:length] for length in range(len(here), 0, -1) if isinstance(here[length - 1], str))
        line = next((self.lines[key] for key in keys if key in self.lines), node.start_mark.line + 1)
        return _YAMLError(line, here, reason)
