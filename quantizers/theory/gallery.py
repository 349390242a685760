"""The catalogue in words: what `python -m quantizers list` tells of each row, and the text of docs/quantizers.md."""

import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path

from quantizers.catalog import Map, Quantizer
from quantizers.sharpness import Shape

PICTURES = Path("images") / "quantizers"
"""Where the pictures of the rows lie, seen from the page."""


def formula(f: Map) -> str:
    """The first sentence of the docstring of `f`, which by our custom is its formula, without the literature."""
    text = " ".join((f.__doc__ or "not written down").split())
    sentence = re.split(r"\.(?:\s|$)", text, maxsplit=1)[0]
    return re.sub(r" \([^()]*\b(?:19|20)\d\d\)", "", sentence)


def sharpness(shape: Shape | None) -> str:
    """How mu moves, in words: 'exponential, 2 to 500', 'constant, 5', or 'none'."""
    if shape is None:
        return "none"
    if not is_dataclass(shape):
        return f"{shape(0):g} to {shape(1):g}"
    ends = " to ".join(f"{getattr(shape, field.name):g}" for field in fields(shape))
    return f"{type(shape).__name__.lower()}, {ends}"


def middle_mu(quantizer: Quantizer) -> float:
    """The row's usual mu at the middle of training, to three digits; 1 where mu is ignored."""
    return 1.0 if quantizer.usual_mu is None else float(f"{quantizer.usual_mu(0.5):.3g}")


def standing(quantizer: Quantizer) -> str:
    """Whether the row claims to be principled, and whose completion it is."""
    if quantizer.prox is None:
        return "not principled"
    return "principled" if quantizer.completes is None else f"principled, completes {quantizer.completes}"


def page(rows: Iterable[Quantizer]) -> str:
    """The text of docs/quantizers.md, one section for each row."""
    return HEADER + "".join(_section(row) for row in rows)


HEADER = """\
# The quantizers

Written by `python -m quantizers gallery` from the catalogue; change `quantizers/catalog.py`, not this page. Each
picture shows F and B over the latents w*, and P and T with F = T o P and B = T' o P where they exist; where they do
not, an interval on which the pair breaks a rule of [the theory](theory.md) is shaded. It is drawn at the mu of
mid-training. The mu below is the usual one: its paper's, or ours where the catalogue says so; a grid may ask for
another.
"""


def _section(row: Quantizer) -> str:
    picture = (PICTURES / f"{row.name}.png").as_posix()
    return f"""
## {row.name}

![F, B, P and T of {row.name}]({picture})

- {standing(row)}; mu: {sharpness(row.usual_mu)}
- forward: `{formula(row.forward)}`
- backward: `{formula(row.backward)}`
- {row.citation}
"""
