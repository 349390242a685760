"""Base optimizers by timm's names, and which settings each of them has."""

import difflib
from functools import cache
from typing import NamedTuple


class Traits(NamedTuple):
    """Settings of an optimizer besides its learning rate and weight decay; `num_betas` is 0 where it has none."""

    has_momentum: bool
    num_betas: int
    has_eps: bool


COMMON = {
    "sgd": Traits(has_momentum=True, num_betas=0, has_eps=False),
    "adam": Traits(has_momentum=False, num_betas=2, has_eps=True),
    "adamw": Traits(has_momentum=False, num_betas=2, has_eps=True),
    "lamb": Traits(has_momentum=False, num_betas=2, has_eps=True),
    "lion": Traits(has_momentum=False, num_betas=2, has_eps=False),
}
"""What timm says of these, so that its import, which takes seconds, is left to grids that name others."""


def traits(name: str) -> Traits:
    """Of the optimizer of that name.

    Raises:
        ValueError: there is none, or none of those that can be used (`names`); with the nearest and the commonest.
    """
    if name in COMMON:
        return COMMON[name]
    from timm.optim import get_optimizer_info

    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown optimizer {name!r}; {hint}({', '.join(COMMON)}, ...: timm has {len(names())})")
    info = get_optimizer_info(name)
    return Traits(info.has_momentum, info.num_betas if info.has_betas else 0, info.has_eps)


@cache
def names() -> tuple[str, ...]:
    """Optimizers of timm, without those of other packages (apex, bitsandbytes) and those of second order.

    Nor are kron's among them: they draw random numbers of their own, so a resumed run would be another.
    """
    from timm.optim import get_optimizer_info, list_optimizers

    infos = {name: get_optimizer_info(name) for name in list_optimizers()}
    return tuple(
        name
        for name, info in infos.items()
        if not isinstance(info.opt_class, str) and not info.second_order and info.opt_class.__name__ != "Kron"
    )
