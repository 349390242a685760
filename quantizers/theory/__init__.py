"""Decide which pairs (F, B) are principled, construct such pairs, and draw both. Start with `synthesis.py`.

`synthesis` constructs pairs from P and T or only from B (`quadrature` computes the integral). `certificates` decides
whether a given pair decomposes (`mesh` samples its maps, `inference` finds P and T). `convergence` runs PC++ against
its bounds; `drawing` makes the pictures of the docs.
"""
