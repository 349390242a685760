"""Forward-backward proximal quantizers and the optimizer that trains with them. Start with `proxconnect.py`.

    from quantizers import Linear, ProxConnect, SharpnessSchedule

    base = torch.optim.SGD([{"params": binary, "quantizer": "bnn++"}, {"params": rest}], lr=0.1, momentum=0.9)
    optimizer = ProxConnect(base)
    sharpness = SharpnessSchedule(optimizer, Linear(2.0, 50.0), num_steps)

`maps` defines the scalar maps, and `catalog` the algorithms, each a row of maps. `reference` implements the iterations
literally, for the tests to compare with. `fused/` is the one-pass C++ step. `theory/` decides which pairs are
principled and constructs such pairs.
"""

from quantizers.catalog import QUANTIZERS, Quantizer, get
from quantizers.proxconnect import ProxConnect
from quantizers.sharpness import Constant, Cosine, Exponential, Linear, SharpnessSchedule
from quantizers.theory.certificates import Certificate, certify
from quantizers.theory.synthesis import complete, synthesize

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
