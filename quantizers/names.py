"""Names that users write: the message for an unknown one, and their own objects, `module:attribute`."""

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any


def unknown(kind: str, value: object, choices: Iterable[str]) -> str:
    """The error message for an unknown value: the value, the nearest choice, and all choices."""
    names = list(choices)
    spelled = {name.replace("+", "p"): name for name in names}  # as users write them where + is not allowed: bnnpp
    near = difflib.get_close_matches(str(value).replace("+", "p"), spelled, n=1)
    hint = f"; did you mean {spelled[near[0]]!r}?" if near else ""
    return f"unknown {kind} {value!r}{hint} ({', '.join(names)})"


def is_own(name: str) -> bool:
    """Whether the name is of a user's own object, `module:attribute`."""
    _, colon, attribute = name.partition(":")
    return bool(colon) and "/" not in attribute  # hf-hub:timm/resnet18 is one of timm's notations


def own(name: str, fits: Callable[[Any], bool], kind: str) -> Any:  # noqa: ANN401  (of the type that `fits` accepts)
    """The user's object `module:attribute`. `kind` describes what `fits` accepts, for messages ("Quantizer").

    Modules are imported as by `python -m`: the working directory is searched first.

    Raises:
        ValueError: with a one-line message: the module cannot be imported, or the attribute is missing or does not
            fit (the message lists the module's attributes that do).
    """
    module, attribute = module_of(name), name.partition(":")[2]
    found = getattr(module, attribute, None)
    if found is not None and fits(found):
        return found
    theirs = [key for key, value in vars(module).items() if fits(value) and _is_defined_in(module, value)]
    if hasattr(module, attribute):
        choices = ", ".join(theirs) or "none"
        raise ValueError(f"{name}: of type {type(found).__name__}, not a {kind}; {module.__name__} has {choices}")
    raise ValueError(f"{name}: {unknown('attribute', attribute, theirs or [f'no {kind} there'])}")


def _is_defined_in(module: ModuleType, value: object) -> bool:
    """False for functions and classes that the module imported. Other objects don't say where they were made."""
    return getattr(value, "__module__", "") in {module.__name__, type(value).__module__}


def module_of(name: str) -> ModuleType:
    """The module of `module:attribute`, imported unless it is already. Raises ValueError if that fails."""
    module_name = name.partition(":")[0]
    if module_name in sys.modules:
        return sys.modules[module_name]
    # `python -m` puts the working directory first on sys.path; a console script does not.
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{name}: cannot import {module_name!r}: {reason}") from error
    finally:
        sys.path.pop(0)
