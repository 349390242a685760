"""The catalogue: an algorithm is a row. To add one, add it here; optimizer and conformance suite find it.

A row is principled, that is PC++ with it is ProxConnect with proximal map P on the loss l(T(.)), if F = T o P and
B = T' o P (Lu et al., "Understanding Neural Network Binarization with Forward and Backward Proximal Quantizers",
NeurIPS 2023). A row without P and T has no such pair: BNN+'s F is flat where its B varies.
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from quantizers import maps

Map = Callable[[Tensor, float], Tensor]
"""(w*, mu) -> a tensor of the shape, dtype and device of w*, elementwise."""


@dataclass(frozen=True)
class Quantizer:
    """A forward-backward pair: w = F(w*; mu) is what the network computes with, B(w*; mu) multiplies its gradient.

    `prox` and `transform` are P and T with F = T o P and B = T' o P, or None where no such pair exists. `binary` says
    what is deployed: sign(w*), or for full precision F(w*).
    """

    name: str
    forward: Map
    backward: Map
    prox: Map | None
    transform: Map | None
    citation: str
    binary: bool = True
    uses_mu: bool = False


_ROWS = (
    Quantizer(
        name="fp",
        forward=maps.identity,
        backward=maps.ones,
        prox=maps.identity,
        transform=maps.identity,
        citation="full precision: the baseline, gradient descent itself",
        binary=False,
    ),
    Quantizer(
        name="bc",
        forward=maps.hard_sign,
        backward=maps.ones,
        prox=maps.hard_sign,
        transform=maps.identity,
        citation="Courbariaux, Bengio, David: BinaryConnect, NeurIPS 2015",
    ),
    Quantizer(
        name="pc",
        forward=maps.piecewise_linear,
        backward=maps.ones,
        prox=maps.piecewise_linear,
        transform=maps.identity,
        citation="Dockhorn et al.: Demystifying and Generalizing BinaryConnect, NeurIPS 2021 (arXiv 2110.13220)",
        uses_mu=True,
    ),
    Quantizer(
        name="bnn",
        forward=maps.hard_sign,
        backward=maps.clip_derivative,
        prox=maps.outward,
        transform=maps.clip,
        citation="Courbariaux et al.: BinaryNet, 2016",
    ),
    Quantizer(
        name="bnn+",
        forward=maps.hard_sign,
        backward=maps.sign_swish_derivative,
        prox=None,
        transform=None,
        citation="Darabi et al.: BNN+, 2018 (arXiv 1812.11800)",
        uses_mu=True,
    ),
    Quantizer(
        name="bnn++",
        forward=maps.sign_swish,
        backward=maps.sign_swish_derivative,
        prox=maps.identity,
        transform=maps.sign_swish,
        citation="Lu, Yu, Li, Partovi Nia: Understanding Neural Network Binarization with Forward and Backward "
        "Proximal Quantizers, NeurIPS 2023 (arXiv 2402.17710)",
        uses_mu=True,
    ),
)

QUANTIZERS: dict[str, Quantizer] = {row.name: row for row in _ROWS}


def get(name: str) -> Quantizer:
    """The row called `name`. ValueError, with the nearest name and all the choices, if there is none."""
    if name in QUANTIZERS:
        return QUANTIZERS[name]
    raise ValueError(unknown("quantizer", name, QUANTIZERS))


def unknown(kind: str, value: object, choices: Iterable[str]) -> str:
    """The message for a value that is not among the choices: the value, the nearest choice, all choices."""
    names = list(choices)
    spelled = {name.replace("+", "p"): name for name in names}  # as they are where + is no letter: bnnpp
    near = difflib.get_close_matches(str(value).replace("+", "p"), spelled, n=1)
    hint = f"; did you mean {spelled[near[0]]!r}?" if near else ""
    return f"unknown {kind} {value!r}{hint} ({', '.join(names)})"
