"""Architectures, and what is binary in them.

    model = models.create("resnet20", num_classes=10, image_size=32)
    split = models.binarize(model)          # or models.full_precision(model), for the baseline

timm costs three seconds to import: the catalogue's functions import it when they are first called.
"""

from models.binarize import Split, binarize, full_precision
from models.catalog import create, full_precision_layers, input_size, is_known, names, suggest

__all__ = [
    "Split",
    "binarize",
    "create",
    "full_precision",
    "full_precision_layers",
    "input_size",
    "is_known",
    "names",
    "suggest",
]
