"""The bundled grids by name; imports nothing heavy, so that a command's --help can list them at once."""

from pathlib import Path

BUNDLED = Path(__file__).parent / "grids"


CHOICES = BUNDLED / "choices"
"""Choices of an earlier tuning of bundled grids: NAME.yaml."""


def bundled_names() -> list[str]:
    """Names that a grid argument may have instead of a file path."""
    return sorted(path.stem for path in BUNDLED.glob("*.yaml"))
