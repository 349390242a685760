"""Base optimizers by timm's names, and the settings that each supports."""

import difflib
from functools import cache
from typing import NamedTuple


class Traits(NamedTuple):
    """Settings of an optimizer besides learning rate and weight decay; `num_betas` is 0 if it has none."""

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
"""Copied from timm, so that only grids with other optimizers need to import it, which takes seconds."""


def traits(name: str) -> Traits:
    """The settings of the named optimizer.

    Raises:
        ValueError: it is unknown or unsupported (not in `names`); the message suggests the nearest and common ones.
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
    """Supported timm optimizers: excludes second-order ones and ones from other packages (apex, bitsandbytes).

    Also excludes kron's, which draw random numbers of their own, so a resumed run would differ.
    """
    from timm.optim import get_optimizer_info, list_optimizers

    infos = {name: get_optimizer_info(name) for name in list_optimizers()}
    return tuple(
        name
        for name, info in infos.items()
        if not isinstance(info.opt_class, str) and not info.second_order and info.opt_class.__name__ != "Kron"
    )
