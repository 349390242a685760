"""One seed per cell, expanded by hashing into independent streams."""

import hashlib


def stream(seed: int, purpose: str, *index: int) -> int:
    """Seed of the random stream that serves `purpose`: the first 63 bits of SHA-256(seed/purpose/index...).

    Streams of different purposes, seeds or indices are unrelated, which neighbouring integers as seeds would not
    guarantee (seed + epoch makes epoch 1 of seed 5 the epoch 0 of seed 6). The quantizer is not an argument, so all
    methods of one (model, seed) share initialisation, data order and augmentation: their comparison is paired.

    Args:
        seed: the cell's seed.
        purpose: "init", "order", "augmentation", "mixing" or "dropout"; "policy" and "erasing" derive from an
            epoch's augmentation seed.
        index: what the stream restarts at, for instance the epoch.
    """
    text = "/".join([str(seed), purpose, *map(str, index)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
