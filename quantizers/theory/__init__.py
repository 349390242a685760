"""Which pairs (F, B) are principled, principled pairs made to order, and pictures of both. Start with `synthesis.py`.

`synthesis` makes pairs from P and T or from B alone (`quadrature` is its integral). `certificates` decides whether a
given pair decomposes (`mesh` samples it, `inference` looks for P and T). `convergence` runs PC++ against its bounds;
`drawing` and `gallery` draw all of it for the docs.
"""
