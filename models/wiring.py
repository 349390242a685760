"""How a model uses the weights of its layers, found by running it once and watching every torch function.

A run shows what the source and a symbolic trace may hide: control flow, a weight used outside its layer, a weight that
is standardised before use.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

Function = Callable[..., Any]


def layers_before_batch_norm(model: nn.Module, layers: Mapping[str, nn.Module], x: Tensor) -> frozenset[str]:
    """Names of the layers whose outputs all go to F.batch_norm and to no other function, when the model sees x.

    The scale of such a layer's weight is immaterial. x: (B, C, H, W). The model is run in evaluation mode (no random
    numbers, no statistics updated); afterwards each of its modules is in its previous mode.

    Raises ValueError unless every layer is used as `layer(x)` and computes F.linear(x, weight) or F.conv2d(x, weight):
    if a weight is transformed first, used without the layer, or not used at all.
    """
    watch = _Watch({id(layer.weight): name for name, layer in layers.items()})
    returned: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _layer, _args, y: returned.append(y)) for layer in layers.values()]
    with _observed(model, hooks), watch:
        model(x)

    returned_ids = {id(y) for y in returned}
    misused = [
        name for name in layers if name in watch.misused or not all(id(y) in returned_ids for y in watch.products[name])
    ]
    if misused:
        raise ValueError(not_binary(misused, "its weight is transformed, or used outside the layer"))
    if unused := [name for name in layers if not watch.products[name]]:
        raise ValueError(not_binary(unused, "the model's forward pass does not use it"))
    return frozenset(
        name for name in layers if all(watch.consumers[id(y)] == [F.batch_norm] for y in watch.products[name])
    )


def not_binary(names: Sequence[str], reason: str) -> str:
    """The message: why these layers can't be binarized, and the recipe setting that keeps them in full precision."""
    patterns = dict.fromkeys(_pattern(name) for name in names)
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    kept = f"full_precision: [ends, {', '.join(patterns)}] keeps such layers exact"
    return f"{names[0]}{others} can't be binarized: {reason}; {kept}"


def _pattern(name: str) -> str:
    """The name with * for its numbers: blocks.0.attn.qkv becomes blocks.*.attn.qkv."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def layers_that_see_no_sign(model: nn.Module, layers: Mapping[str, nn.Module], x: Tensor) -> tuple[str, ...]:
    """Names of the layers whose inputs have no negative element when the model sees x, in the order of `layers`.

    The sign of such an input is +1 everywhere, for example after a ReLU. x: (B, C, H, W), preferably noise. The model
    is run as in `layers_before_batch_norm`, and must have values (not be on the meta device).
    """
    signed: set[str] = set()

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if bool((inputs[0] < 0).any()):
                signed.add(name)

        return look

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    with _observed(model, hooks):
        model(x)
    return tuple(name for name in layers if name not in signed)


@contextmanager
def _observed(model: nn.Module, hooks: list[RemovableHandle]) -> Iterator[None]:
    """Within, the model is in evaluation mode without gradients; afterwards modes are restored and hooks removed."""
    were_training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        # Not model.train(): that would unfreeze frozen parts, such as a batch norm in evaluation mode.
        for module, was_training in were_training.items():
            module.training = was_training
        for hook in hooks:
            hook.remove()


class _Watch(TorchFunctionMode):
    """Records the products of each watched weight, and the functions that use each product (`consumers`, by its id)."""

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self.products: dict[str, list[Tensor]] = defaultdict(list)  # kept alive, so that no id is reused
        self.consumers: dict[int, list[Function]] = {}
        self.misused: set[str] = set()

    def __torch_function__(
        self,
        func: Function,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if next(_tensors(result), None) is None:  # reading a shape or dtype is not a use
            return result
        for tensor in _tensors((args, kwargs)):
            if id(tensor) in self.consumers:
                self.consumers[id(tensor)].append(func)
            name = self.weights.get(id(tensor))
            if name is None:
                continue
            if func in (F.linear, F.conv2d):
                self.products[name].append(result)
                self.consumers[id(result)] = []
            else:
                self.misused.add(name)
        return result


def _tensors(tree: object) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dictionaries."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, tuple | list):
        for branch in tree:
            yield from _tensors(branch)
