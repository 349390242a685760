"""Architectures, and which of their layers are binary.

    model = models.create("resnet20", num_classes=10, image_size=32)
    split = models.binarize(model)          # or models.full_precision(model), for the baseline

    model = models.create("bireal_resnet20", num_classes=10, image_size=32)
    split = models.binarize(model, inputs=models.InputQuantization("bnn"))      # binary activations too

timm takes three seconds to import, so the catalogue's functions import it when first called.
"""

from models.accumulators import accumulators, num_inexact, overflow_penalty, overflows, reset_overflows
from models.binarize import (
    POLICIES,
    Split,
    SumQuantization,
    binarize,
    binarize_inputs,
    fold_scales,
    full_precision,
    kept_layers,
    matrices,
)
from models.catalog import (
    create,
    full_precision_layers,
    input_size,
    is_known,
    names,
    skeleton,
    suggest,
    takes_any_size,
)
from models.inputs import InputQuantization, harden_inputs, set_input_mu, soften_inputs

__all__ = [
    "POLICIES",
    "InputQuantization",
    "Split",
    "SumQuantization",
    "accumulators",
    "binarize",
    "binarize_inputs",
    "create",
    "fold_scales",
    "full_precision",
    "full_precision_layers",
    "harden_inputs",
    "input_size",
    "is_known",
    "kept_layers",
    "matrices",
    "names",
    "num_inexact",
    "overflow_penalty",
    "overflows",
    "reset_overflows",
    "set_input_mu",
    "skeleton",
    "soften_inputs",
    "suggest",
    "takes_any_size",
]
