"""Forward-backward proximal quantizers and the optimizer that trains with them.

from quantizers import ProxConnect, SharpnessSchedule, Linear

base = torch.optim.SGD([{"params": binary, "quantizer": "bnn++"}, {"params": rest}], lr=0.1, momentum=0.9)
optimizer = ProxConnect(base)
sharpness = SharpnessSchedule(optimizer, Linear(2.0, 50.0), num_steps)

Names are imported when they are first asked for: `python -m quantizers --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantizers.catalog import QUANTIZERS, Quantizer, get
    from quantizers.certificates import Certificate, certify
    from quantizers.proxconnect import ProxConnect
    from quantizers.shapes import Constant, Cosine, Exponential, Linear
    from quantizers.sharpness import SharpnessSchedule
    from quantizers.synthesis import complete, synthesize

__all__ = [
    "QUANTIZERS",
    "Certificate",
    "Constant",
    "Cosine",
    "Exponential",
    "Linear",
    "ProxConnect",
    "Quantizer",
    "SharpnessSchedule",
    "certify",
    "complete",
    "get",
    "synthesize",
]

_NAMES = {
    "catalog": ("QUANTIZERS", "Quantizer", "get"),
    "certificates": ("Certificate", "certify"),
    "proxconnect": ("ProxConnect",),
    "shapes": ("Constant", "Cosine", "Exponential", "Linear"),
    "sharpness": ("SharpnessSchedule",),
    "synthesis": ("complete", "synthesize"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # asked for once
    return value
