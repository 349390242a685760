"""The model after a step, and the interplay with groups, schedulers, hooks and errors."""

from typing import Any

import pytest
import torch
from tanh_network import TanhNetwork, equal, grad, train
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from quantizers import QUANTIZERS, ProxConnect, get

UPDATES = ("pc++", "pq", "rpc")
BASES = [(SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}), (AdamW, {"lr": 0.02, "weight_decay": 0.1})]


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(("base", "options"), BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_through_proxconnect_is_the_base_alone(
    dtype: torch.dtype, base: type[Optimizer], options: dict[str, Any], update: str
) -> None:
    alone, wrapped = TanhNetwork(dtype), TanhNetwork(dtype)
    train(alone, base(alone.groups("fp"), **options))
    train(wrapped, ProxConnect(base(wrapped.groups("fp"), **options), update=update))
    assert equal(alone.bits(), wrapped.bits())


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_model_holds_w_at_fixed_addresses(quantizer: str) -> None:
    model = TanhNetwork()
    start, addresses = model.bits(), [p.data_ptr() for p in model.parameters()]
    optimizer = ProxConnect(SGD(model.groups(quantizer, mu=0.7), lr=0.1))
    assert torch.equal(optimizer.latent(model.u), start[0])
    train(model, optimizer)
    assert torch.equal(model.u, get(quantizer).forward(optimizer.latent(model.u), 0.7))
    assert [p.data_ptr() for p in model.parameters()] == addresses


def test_rpc_leaves_the_latents_in_the_model() -> None:
    model = TanhNetwork()
    optimizer = ProxConnect(SGD(model.groups("bnn++"), lr=0.1), update="rpc")
    train(model, optimizer)
    assert torch.equal(model.u, optimizer.latent(model.u))


def test_a_new_mu_takes_effect_when_w_is_next_written() -> None:
    model = TanhNetwork()
    optimizer = ProxConnect(SGD(model.groups("bnn++", mu=1.0), lr=0.1))
    model().backward()
    w_star, w, mu = optimizer.latent(model.u).clone(), model.u.detach().clone(), 3.0
    optimizer.param_groups[0]["mu"] = mu
    assert torch.equal(model.u, w)
    expected = w_star - 0.1 * get("bnn++").backward(w_star, 1.0) * grad(model.u)
    optimizer.step()
    torch.testing.assert_close(optimizer.latent(model.u), expected, rtol=0, atol=1e-15)
    assert torch.equal(model.u, get("bnn++").forward(optimizer.latent(model.u), mu))


def test_mu_is_1_unless_the_group_says_otherwise() -> None:
    model = TanhNetwork()
    optimizer = ProxConnect(SGD(model.groups("bnn++"), lr=0.1))
    assert [group.get("mu") for group in optimizer.param_groups] == [1.0, None]


@pytest.mark.parametrize("update", UPDATES)
def test_step_leaves_raw_gradients_as_they_were(update: str) -> None:
    model = TanhNetwork()
    optimizer = ProxConnect(SGD(model.groups("bnn++"), lr=0.1), update=update)
    model().backward()
    before = [(grad(p), grad(p).clone()) for p in model.parameters()]
    optimizer.step()
    for p, (tensor, value) in zip(model.parameters(), before, strict=True):
        assert p.grad is tensor
        assert torch.equal(tensor, value)
    assert optimizer.latent(model.u).grad is None


@pytest.mark.parametrize("update", UPDATES)
def test_parameter_without_gradient_keeps_its_latents(update: str) -> None:
    model = TanhNetwork()
    optimizer = ProxConnect(SGD(model.groups("bnn++"), lr=0.1, weight_decay=0.5), update=update)
    w_star, w = optimizer.latent(model.v).clone(), model.v.detach().clone()
    model().backward()
    model.v.grad = None
    optimizer.step()
    assert torch.equal(optimizer.latent(model.v), w_star)
    assert torch.equal(model.v, w)


# Other optimizers, schedulers, hooks


def test_base_that_makes_its_state_at_birth_hands_it_to_the_latents() -> None:
    alone, wrapped = TanhNetwork(), TanhNetwork()
    train(alone, Adagrad(alone.groups("fp"), lr=0.1))
    train(wrapped, ProxConnect(Adagrad(wrapped.groups("fp"), lr=0.1)))
    assert equal(alone.bits(), wrapped.bits())


def test_learning_rate_schedulers_move_the_base() -> None:
    alone, wrapped = TanhNetwork(), TanhNetwork()
    base = SGD(alone.groups("fp"), lr=0.1, momentum=0.9)
    optimizer = ProxConnect(SGD(wrapped.groups("fp"), lr=0.1, momentum=0.9))
    schedulers = [
        scheduler
        for each in (base, optimizer)
        for scheduler in (CosineAnnealingLR(each, T_max=10), OneCycleLR(each, max_lr=0.1, total_steps=20))
    ]
    for _ in range(10):
        train(alone, base, num_steps=1)
        train(wrapped, optimizer, num_steps=1)
        for scheduler in schedulers:
            scheduler.step()
    assert base.param_groups[0]["lr"] == optimizer.base.param_groups[0]["lr"] != 0.1
    assert equal(alone.bits(), wrapped.bits())


def test_step_hooks_run_once_a_step() -> None:
    model = TanhNetwork()
    optimizer = ProxConnect(SGD(model.groups("bc"), lr=0.1))
    seen: list[Optimizer] = []
    optimizer.register_step_post_hook(lambda hooked, *_: seen.append(hooked))
    train(model, optimizer, num_steps=3)
    assert seen == [optimizer] * 3


def test_hooks_on_gradient_accumulation_survive_a_step_of_a_bfloat16_model() -> None:
    """DDP reduces gradients in such hooks."""
    model = TanhNetwork(torch.bfloat16)
    grad_fn = model.u.expand_as(model.u).grad_fn
    assert grad_fn is not None
    accumulator = grad_fn.next_functions[0][0]
    assert accumulator is not None
    calls: list[object] = []
    accumulator.register_hook(lambda *_: calls.append(None))
    train(model, ProxConnect(SGD(model.groups("bnn++"), lr=0.1)), num_steps=3)
    assert len(calls) == 3


def test_groups_are_the_bases_own() -> None:
    model = TanhNetwork()
    base = SGD(model.groups("bc"), lr=0.1)
    optimizer = ProxConnect(base)
    assert isinstance(optimizer, Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.param_groups[0]["params"] == [model.u, model.v]


def test_added_group_is_quantized() -> None:
    model = TanhNetwork()
    base = SGD([{"params": [model.u], "quantizer": "bc"}], lr=0.1)
    optimizer = ProxConnect(base)
    w_star = model.v.detach().clone()
    optimizer.add_param_group({"params": model.v, "quantizer": "bnn++", "mu": 2.0})
    assert len(base.param_groups) == 2
    assert torch.equal(optimizer.latent(model.v), w_star)
    assert torch.equal(model.v, get("bnn++").forward(w_star, 2.0))
    train(model, optimizer)
    assert not torch.equal(optimizer.latent(model.v), w_star)


def test_bad_group_is_not_added() -> None:
    model = TanhNetwork()
    optimizer = ProxConnect(SGD([model.u], lr=0.1))
    with pytest.raises(ValueError, match="unknown quantizer 'xnor'"):
        optimizer.add_param_group({"params": (p for p in [model.v]), "quantizer": "xnor"})
    assert [group["params"] for group in optimizer.param_groups] == [[model.u]]


@pytest.mark.parametrize("update", UPDATES)
def test_exception_in_a_step_leaves_the_model_holding_w(update: str) -> None:
    model = TanhNetwork()
    base = SGD(model.groups("bnn++"), lr=0.1)
    optimizer = ProxConnect(base, update=update)

    def fail(*_: object) -> None:
        raise ArithmeticError

    base.register_step_pre_hook(fail)
    before, w_star = model.bits(), optimizer.latent(model.u).clone()
    model().backward()
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert equal(model.bits(), before)
    assert torch.equal(optimizer.latent(model.u), w_star)
    assert optimizer.param_groups[0]["params"] == [model.u, model.v]


# Bad input


@pytest.mark.parametrize(
    ("group", "options", "error", "message"),
    [
        ({"quantizer": "bnnpp"}, {}, ValueError, r"unknown quantizer 'bnnpp'; did you mean 'bnn\+\+'\? \(fp, bc, pc"),
        ({"quantizer": "bc"}, {"update": "pc+"}, ValueError, r"unknown update 'pc\+'; .*\(pc\+\+, pq, rpc\)"),
        ({"quantizer": "bc", "mu": -1.0}, {}, ValueError, "mu=-1.0"),
        ({"quantizer": "bc", "mu": float("nan")}, {}, ValueError, "mu=nan"),
    ],
)
def test_bad_input_is_refused_and_the_model_untouched(
    group: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = TanhNetwork()
    before = model.bits()
    with pytest.raises(error, match=message):
        ProxConnect(SGD([{"params": list(model.parameters()), **group}], lr=0.1), **options)
    assert equal(model.bits(), before)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_only_real_floats_can_be_quantized(dtype: torch.dtype) -> None:
    weights = nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)
    with pytest.raises(TypeError, match=str(dtype)):
        ProxConnect(SGD([{"params": [weights], "quantizer": "bc"}], lr=0.1))


def test_parameter_that_is_not_quantized_has_no_latents() -> None:
    model = TanhNetwork()
    optimizer = ProxConnect(SGD(model.groups("bc"), lr=0.1))
    with pytest.raises(ValueError, match=r"shape \(6,\) has no latents"):
        optimizer.latent(model.c)
