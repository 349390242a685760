"""What a parameter group says about quantization: {"params": [...], "quantizer": "bnn++", "mu": 2.0}."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from quantizers.catalog import Quantizer, get
from quantizers.sharpness import require_sharpness


class Entry(NamedTuple):
    """A quantized parameter, its latents, its row, and the mu its w was written with."""

    parameter: Tensor
    latent: Tensor
    quantizer: Quantizer
    mu: float


def is_quantized(group: Mapping[str, Any]) -> bool:
    """Whether the group names a quantizer; one that does not is the base optimizer's alone."""
    return group.get("quantizer") is not None


def require_trainable(group: Mapping[str, Any]) -> None:
    """Refuse a group that ProxConnect cannot train.

    ValueError: an unknown quantizer, an impossible mu. TypeError: a parameter that is not of a real floating dtype.
    """
    if not is_quantized(group):
        return
    get(group["quantizer"])
    require_sharpness(group.get("mu", 1.0))
    for p in group["params"]:
        if not p.is_floating_point():
            raise TypeError(f"a quantized parameter has a real floating dtype, not {p.dtype}")
