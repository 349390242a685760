"""Forward-backward proximal quantizers and the optimizer that trains with them.

from quantizers import ProxConnect, SharpnessSchedule, Linear

base = torch.optim.SGD([{"params": binary, "quantizer": "bnn++"}, {"params": rest}], lr=0.1, momentum=0.9)
optimizer = ProxConnect(base)
sharpness = SharpnessSchedule(optimizer, Linear(2.0, 50.0), num_steps)
"""

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
