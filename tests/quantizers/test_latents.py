"""Latents of several parameters in one tensor train as they would separately, in few operations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_step import OPERATIONS_BARS, num_operations
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from quantizers import ProxConnect
from quantizers.latents import CPU_BLOCK, ELEMENTWISE

SHAPES = [(4, 3, 3, 3), (5,), (), (7, 2)]
OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9, "weight_decay": 0.01}, "Adadelta": {"lr": 1.0}}
every_base = pytest.mark.parametrize("base", ELEMENTWISE, ids=lambda base: str(base.__name__))


def _numbers(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def _require_close(one: Tensor | list[Tensor], other: Tensor | list[Tensor]) -> None:
    """Equal up to a few thousand roundings of float64; a few steps on values of about 1 cause a hundred."""
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class _Pair:
    """The same parameters in one group, with latents in one tensor, and in one group each, with separate latents."""

    def __init__(self, base: Callable[..., Optimizer], quantizer: str = "bnn++", **options: Any) -> None:  # noqa: ANN401
        self.together, self.apart = ([nn.Parameter(tensor) for tensor in _numbers(0)] for _ in range(2))
        settings = {"lr": 0.05, **OPTIONS.get(base.__name__, {}), **options}
        group = {"quantizer": quantizer, "mu": 1.5}
        self.optimizers = [
            ProxConnect(base([{"params": self.together, **group}], **settings)),
            ProxConnect(base([{"params": [p], **group} for p in self.apart], **settings)),
        ]

    def run(self, t: int, without: tuple[int, ...] = ()) -> None:
        for parameters in (self.together, self.apart):
            for index, (p, gradient) in enumerate(zip(parameters, _numbers(1 + t), strict=True)):
                p.grad = None if index in without else gradient.clone()
        for optimizer in self.optimizers:
            optimizer.step()

    def require_equal(self) -> None:
        """Up to rounding: torch's kernels treat an array's last elements differently, so position affects last bits."""
        one, other = self.optimizers
        _require_close([p.detach() for p in self.together], [p.detach() for p in self.apart])
        _require_close([one.latent(p) for p in self.together], [other.latent(p) for p in self.apart])
        for p, its in zip(self.together, self.apart, strict=True):
            mine, theirs = one.state[p], other.state[its]
            assert mine.keys() == theirs.keys()
            for key, value in theirs.items():
                if isinstance(value, Tensor):
                    assert mine[key].shape == value.shape
                    _require_close(mine[key], value)
                else:
                    assert mine[key] == value


@every_base
def test_parameters_that_share_a_tensor_train_as_each_by_itself(base: Callable[..., Optimizer]) -> None:
    pair = _Pair(base)
    for t in range(4):
        pair.run(t)
        pair.require_equal()


@pytest.mark.parametrize("base", [SGD, AdamW])
def test_parameters_without_a_gradient_now_and_then_change_nothing_for_the_others(
    base: Callable[..., Optimizer],
) -> None:
    """AdamW's step counts then differ, and the parameters are stepped one by one from then on."""
    pair = _Pair(base)
    for t, without in enumerate([(), (1,), (), (0, 3), ()]):
        pair.run(t, without)
        pair.require_equal()


def test_a_state_goes_from_shared_tensors_to_single_ones_and_back() -> None:
    pair = _Pair(AdamW)
    pair.run(0)
    one, other = pair.optimizers
    state = one.state_dict()
    apart = {"state": state["state"], "param_groups": other.state_dict()["param_groups"]}
    other.load_state_dict(apart)
    pair.run(1)
    pair.require_equal()
    one.load_state_dict({"state": other.state_dict()["state"], "param_groups": state["param_groups"]})
    pair.run(2)
    pair.require_equal()


def test_a_step_that_fails_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = _Pair(AdamW)
    pair.run(0)
    optimizer = pair.optimizers[0]

    def fail(_closure: object = None) -> None:
        raise ArithmeticError

    with monkeypatch.context() as patch:
        patch.setattr(optimizer.base, "step", fail)
        with pytest.raises(ArithmeticError):
            optimizer.step()
    assert set(optimizer.state) == set(pair.together)
    pair.run(1)
    pair.require_equal()


@pytest.mark.parametrize("update", ["pq", "rpc"])
def test_other_updates_share_tensors_too(update: str) -> None:
    together, apart = ([nn.Parameter(tensor) for tensor in _numbers(0)] for _ in range(2))
    one = ProxConnect(SGD([{"params": together, "quantizer": "pc", "mu": 0.3}], lr=0.1, momentum=0.9), update)
    other = ProxConnect(
        SGD([{"params": [p], "quantizer": "pc", "mu": 0.3} for p in apart], lr=0.1, momentum=0.9), update
    )
    for t in range(3):
        for optimizer, parameters in ((one, together), (other, apart)):
            for p, gradient in zip(parameters, _numbers(1 + t), strict=True):
                p.grad = gradient
            optimizer.step()
    _require_close([p.detach() for p in together], [p.detach() for p in apart])


def test_the_order_of_elements_in_memory_and_their_dtype_are_the_parameters_own() -> None:
    last = nn.Parameter(_numbers(0)[0].to(memory_format=torch.channels_last))
    half = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    gaps = nn.Parameter(torch.ones(4, 4)[:, ::2])
    optimizer = ProxConnect(SGD([{"params": [last, half, gaps], "quantizer": "fp"}], lr=0.5))
    before = last.detach().clone()
    for p in (last, half, gaps):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.latent(last).stride() == last.stride()
    assert torch.equal(last, before - 0.5)
    assert half.dtype == torch.bfloat16
    assert half.eq(0.5).all()
    assert gaps.eq(0.5).all()


def test_large_tensors_are_not_joined_on_a_cpu() -> None:
    parameters = [nn.Parameter(torch.zeros(n)) for n in (CPU_BLOCK + 1, CPU_BLOCK - 2, 1, 1, 1)]
    optimizer = ProxConnect(SGD([{"params": parameters, "quantizer": "bc"}], lr=0.1), fused=False)
    blocks = [optimizer._entries[p].block for p in parameters]
    assert [len(block.entries) for block in dict.fromkeys(blocks)] == [1, 3, 1]


@pytest.mark.parametrize("quantizer", OPERATIONS_BARS)
def test_an_eager_step_takes_few_operations_whatever_the_number_of_parameters(quantizer: str) -> None:
    """On a GPU each is at least one kernel, and a small network's step mostly waits for kernel launches."""
    numbers = {model: num_operations(model, quantizer) for model in ("resnet20", "resnet56")}
    assert numbers["resnet20"] == numbers["resnet56"] <= OPERATIONS_BARS[quantizer]


def test_a_kept_product_is_not_used_after_its_latents_or_its_sharpness_have_changed() -> None:
    found = []
    for is_kept in (True, False):
        p, q = (nn.Parameter(tensor) for tensor in _numbers(0)[:2])
        optimizer = ProxConnect(SGD([{"params": [p, q], "quantizer": "bnn++", "mu": 1.5}], lr=0.1))
        for each, gradient in zip((p, q), _numbers(1), strict=False):
            each.grad = gradient
        optimizer.clip_grad_norm_(0.5)
        block = optimizer._entries[p].block
        assert block.has_product()
        if not is_kept:
            block.drop_product()
        with torch.no_grad():
            optimizer.latent(p).mul_(0.5)
        assert not block.has_product()
        optimizer.param_groups[0]["mu"] = 3.0
        optimizer.soften()
        optimizer.quantize()
        optimizer.step()
        found.append([optimizer.latent(p), optimizer.latent(q)])
    _require_close(*found)
