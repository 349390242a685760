"""One seed per cell, expanded by hashing into independent streams."""

import hashlib


def stream(seed: int, purpose: str, *index: int) -> int:
    """Seed of the random stream for `purpose`: the first 63 bits of SHA-256(seed/purpose/index...).

    Streams for different purposes, seeds or indices are unrelated. Neighbouring integers as seeds would not guarantee
    that: with seed + epoch, epoch 1 of seed 5 equals epoch 0 of seed 6. The quantizer is not an argument, so all
    methods with the same model and seed share initialisation, data order and augmentation: their comparison is paired.

    Args:
        seed: the cell's seed.
        purpose: "init", "order", "augmentation", "mixing" or "dropout"; "policy" and "erasing" derive from an
            epoch's augmentation seed.
        index: further numbers that select the stream, for instance the epoch.
    """
    text = "/".join([str(seed), purpose, *map(str, index)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
