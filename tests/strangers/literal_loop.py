"""The network that the test programs train, and the literal loop whose losses and weights they must reproduce.

A program is a training loop `train(model, optimizer, batches) -> losses`, written as for any torch optimizer.
`ends_as_the_literal_loop` runs it twice: with ProxConnect, and in float64 with a plain torch optimizer that moves the
latents by the two lines of the method. The first run is also in float64, or in float32 with fused=True, since the
one-pass step needs it.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from quantizers import ProxConnect, Quantizer, reference

criterion = nn.CrossEntropyLoss()
Batches = Sequence[tuple[Tensor, Tensor]]
Train = Callable[[Any, Any, Batches], list[float]]

DTYPES = {False: torch.float64, True: torch.float32}
eager_and_fused = pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])


class Network(nn.Module):
    """8 features, 16 hidden units, 4 classes. The two weights are quantized, the biases are not."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 4) of features (N, 8)."""
        logits: Tensor = self.head(torch.tanh(self.hidden(x)))
        return logits


def network(dtype: torch.dtype = torch.float64, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network().to(dtype)  # drawn in float32, so that every dtype starts from the same numbers


def batches(dtype: torch.dtype = torch.float64, num: int = 8) -> Batches:
    generator = torch.Generator().manual_seed(1)
    xs = torch.randn(num, 16, 8, generator=generator).to(dtype)
    ys = torch.randint(4, (num, 16), generator=generator)
    return list(zip(xs, ys, strict=True))


def groups(model: nn.Module, quantizer: str | Quantizer = "bnn++") -> list[dict[str, Any]]:
    """Groups that quantize the parameters with more than one dimension."""
    binary = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    rest = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
    return [{"params": binary, "quantizer": quantizer, "mu": 2.0}, {"params": rest}]


def sgd(model: nn.Module) -> Optimizer:
    return SGD(groups(model), lr=0.05, momentum=0.9, weight_decay=0.01)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(groups(model), lr=0.01, weight_decay=0.1, eps=0.01)


def literal(base: Optimizer) -> Optimizer:
    """`base` itself, changed to move latents: w = F(w*; mu),  w* <- base(w*, B(w*; mu) . grad l(w))."""
    latents: list[tuple[dict[str, Any], nn.Parameter, nn.Parameter]] = []
    for group in base.param_groups:
        for i, w in enumerate(group["params"] if "quantizer" in group else []):
            w_star = nn.Parameter(w.detach().clone())
            group["params"][i] = w_star
            latents.append((group, w, w_star))
            if w in base.state:
                base.state[w_star] = base.state.pop(w)
    written_mu: dict[Tensor, float] = {}

    @torch.no_grad()
    def multiply_by_b(*_: object) -> None:
        for group, w, w_star in latents:
            backward = reference.PAIRS[group["quantizer"]][1]
            w_star.grad = None if w.grad is None else backward(w_star, written_mu[w]) * w.grad

    @torch.no_grad()
    def write(*_: object) -> None:
        for group, w, w_star in latents:
            forward = reference.PAIRS[group["quantizer"]][0]
            w.copy_(forward(w_star, group["mu"]))
            written_mu[w] = group["mu"]

    def zero_grad(set_to_none: bool = True) -> None:
        type(base).zero_grad(base, set_to_none)
        for _, w, _ in latents:
            w.grad = None

    base.zero_grad = zero_grad  # type: ignore[method-assign]
    base.register_step_pre_hook(multiply_by_b)
    base.register_step_post_hook(write)
    write()
    return base


def clipped_at_the_step(optimizer: Optimizer, max_norm: float) -> None:
    """Make a literal optimizer clip B . grad, which its own hook has by then stored as the latents' gradient."""

    def clip(*_: object) -> None:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)

    optimizer.register_step_pre_hook(clip)


def tolerance(dtype: torch.dtype) -> float:
    """How far rounding may take a dozen steps of `Network` from the literal loop: 4096 eps, absolute.

    Latents, gradients and losses are of size 1. A step adds about lr . 64 eps from the gradient's sums and one eps of
    its own, less than 8 eps in all. It amplifies earlier errors by 1 + lr mu^2 |x|^2 |l''| < 1.5, so a dozen steps give
    8 eps . (1.5^12 - 1) / 0.5. Bases that divide by a root have an eps no smaller than their lr, which bounds their
    amplification likewise. A step that is lost, doubled or taken at another w is detectable at lr = 0.01.
    """
    return 4096 * torch.finfo(dtype).eps


def assert_equal_weights(model: nn.Module, twin: nn.Module, atol: float) -> None:
    theirs = twin.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value.to(theirs[name].dtype), theirs[name], rtol=0, atol=atol, msg=f"{name} differs")


def ends_as_the_literal_loop(
    train: Train,
    base: Callable[[Any], Optimizer] = sgd,
    *,
    fused: bool,
    literal_train: Train | None = None,
    make: Callable[[], nn.Module] = network,
    data: Callable[[torch.dtype], Batches] = batches,
    atol: float | None = None,
) -> None:
    """Run `train` with ProxConnect and `literal_train` (or `train`) literally; compare losses, weights and buffers."""
    dtype = DTYPES[fused]
    model = make().to(dtype)
    twin = copy.deepcopy(model).double()
    expected = (literal_train or train)(twin, literal(base(twin)), data(torch.float64))
    losses = train(model, ProxConnect(base(model), fused=fused), data(dtype))
    atol = tolerance(dtype) if atol is None else atol
    assert len(losses) > 1
    torch.testing.assert_close(losses, expected, rtol=0, atol=atol)
    assert_equal_weights(model, twin, atol)


def train(model: Callable[[Tensor], Tensor], optimizer: Optimizer, batches: Batches) -> list[float]:
    """The plain loop."""
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
