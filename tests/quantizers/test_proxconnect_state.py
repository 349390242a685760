"""Saving, loading, copying and hardening change no bit of a training run."""

import copy
import io
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tanh_network import UPDATES, TanhNetwork, dtype_of, eager_and_fused, equal, every_update
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from quantizers import QUANTIZERS, Linear, ProxConnect, SharpnessSchedule, get

BASES: dict[str, Callable[[list[dict[str, Any]]], Optimizer]] = {
    "momentum": lambda groups: SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda groups: AdamW(groups, lr=0.02, weight_decay=0.1),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
STEPS = [(dtype, False) for dtype in DTYPES] + [(dtype, True) for dtype in DTYPES[1:]]
every_step = pytest.mark.parametrize(("dtype", "fused"), STEPS, ids=lambda value: str(value).removeprefix("torch."))


class Training:
    """A network, its optimizer and a moving sharpness."""

    def __init__(
        self,
        quantizer: str,
        dtype: torch.dtype = torch.float64,
        base: str = "momentum",
        update: str = "pc++",
        *,
        fused: bool = False,
    ) -> None:
        self.model = TanhNetwork(dtype)
        self.optimizer = ProxConnect(BASES[base](self.model.groups(quantizer)), update=update, fused=fused)
        self.sharpness = SharpnessSchedule(self.optimizer, Linear(0.2, 0.9), num_steps=20)

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.optimizer.zero_grad()
            self.model().backward()
            self.optimizer.step()
            self.sharpness.step()

    def bits(self) -> list[Tensor]:
        """Copies of the parameters and latents: the training state except for the base optimizer's."""
        latents = [self.optimizer.latent(p).clone() for p in (self.model.u, self.model.v)]
        return [*self.model.bits(), *latents]

    def state(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "sharpness": self.sharpness}
        return {name: part.state_dict() for name, part in parts.items()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sharpness.load_state_dict(state["sharpness"])


def group_of(size: int, **options: str) -> dict[str, Any]:
    return {"params": [torch.ones(size)], **options}


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("base", BASES)
@every_step
@pytest.mark.parametrize("quantizer", ["bc", "bnn", "bnn++"])
def test_resumed_training_is_the_same_to_the_bit(quantizer: str, dtype: torch.dtype, fused: bool, base: str) -> None:
    _require_same_bits_when_resumed(Training(quantizer, dtype, base, fused=fused), Training(quantizer, dtype, base))


@pytest.mark.parametrize("update", ["pq", "rpc"])
@pytest.mark.parametrize("base", BASES)
def test_resumed_training_of_other_updates_is_the_same_to_the_bit(base: str, update: str) -> None:
    _require_same_bits_when_resumed(*(Training("bnn++", torch.bfloat16, base, update) for _ in range(2)))


def _require_same_bits_when_resumed(straight: Training, resumed: Training) -> None:
    resumed.optimizer.fused = straight.optimizer.fused
    straight.run(5)
    resumed.load(through_a_file(straight.state()))
    assert equal(resumed.bits(), straight.bits())
    straight.run(5)
    resumed.run(5)
    assert equal(resumed.bits(), straight.bits())


def test_model_and_optimizer_can_be_loaded_in_either_order() -> None:
    straight, resumed = Training("bnn++"), Training("bnn++")
    straight.run(5)
    state = through_a_file(straight.state())
    resumed.optimizer.load_state_dict(state["optimizer"])
    resumed.model.load_state_dict(state["model"])
    resumed.sharpness.load_state_dict(state["sharpness"])
    straight.run(5)
    resumed.run(5)
    assert equal(resumed.bits(), straight.bits())


def test_latents_and_base_state_of_a_bfloat16_model_are_float32() -> None:
    training = Training("bnn++", torch.bfloat16)
    training.run(2)
    w_star = training.optimizer.latent(training.model.u)
    assert w_star.dtype == torch.float32
    assert training.optimizer.state[w_star]["momentum_buffer"].dtype == torch.float32
    assert training.model.u.dtype == torch.bfloat16
    assert torch.equal(training.model.u, get("bnn++").forward(w_star, Linear(0.2, 0.9)(1 / 20)).bfloat16())


def test_state_saved_while_hardened_is_that_of_training() -> None:
    straight, resumed = Training("bnn++"), Training("bnn++")
    straight.run(5)
    straight.optimizer.harden()
    state = through_a_file(straight.state())
    straight.optimizer.soften()
    resumed.optimizer.harden()
    resumed.load(state)
    assert equal(resumed.bits(), straight.bits())
    resumed.run(1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: Training("bc", update="pq").optimizer, r"updates: \['pq'\] in the state, \['pc\+\+'\] here"),
        (lambda: Training("bnn").optimizer, "quantizers of the groups: .*bnn.* in the state, .*bc.* here"),
        (
            lambda: ProxConnect(SGD([group_of(3, quantizer="bc"), group_of(1)])),
            r"parameters in the groups: \[1, 1\] in the state, \[2, 1\] here",
        ),
        (
            lambda: ProxConnect(SGD([{"params": [torch.ones(3), torch.ones(4)], "quantizer": "bc"}, group_of(1)])),
            r"latent shapes: \[\[\(3,\), \(4,\)\], \[\]\] in the state, \[\[\(6, 4\), \(1, 6\)\], \[\]\] here",
        ),
        (lambda: SGD([group_of(1), group_of(1)]), r"quantizers of the groups: \[None, None\] in the state"),
    ],
)
def test_state_of_another_optimizer_is_refused_and_changes_nothing(
    other: Callable[[], Optimizer], message: str
) -> None:
    training = Training("bc")
    before = training.bits()
    with pytest.raises(ValueError, match=message):
        training.optimizer.load_state_dict(other().state_dict())
    with pytest.raises(ValueError, match="not a state of an optimizer: it has no param_groups"):
        training.optimizer.load_state_dict({"state": {}})
    assert equal(training.bits(), before)


@every_step
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda training: pickle.loads(pickle.dumps(training))])  # noqa: S301  (our own bytes)
def test_a_copy_trains_as_the_original_and_apart_from_it(
    duplicate: Callable[[Training], Training], base: str, dtype: torch.dtype, fused: bool
) -> None:
    training = Training("bnn++", dtype, base, fused=fused)
    training.run(5)
    duplicated = duplicate(training)
    before = duplicated.bits()
    training.run(5)
    assert equal(duplicated.bits(), before)
    duplicated.run(5)
    assert equal(duplicated.bits(), training.bits())
    assert duplicated.optimizer.is_fused == fused


def test_a_pickled_optimizer_is_not_larger_than_its_tensors() -> None:
    """Latents are views of one tensor, which pickle would write once per view."""
    parameters = [nn.Parameter(torch.randn(1000)) for _ in range(50)]
    optimizer = ProxConnect(SGD([{"params": parameters, "quantizer": "bc"}], lr=0.1))
    assert len(pickle.dumps(optimizer)) < 3 * 4 * 50_000  # w and w*, in float32, and as much again for the rest


@eager_and_fused
def test_state_of_a_parameter_is_the_bases_for_it(fused: bool) -> None:
    training = Training("bnn++", dtype_of(fused=fused), fused=fused)
    optimizer, u = training.optimizer, training.model.u
    assert optimizer.state[u] == {}
    training.run(1)
    buffer = optimizer.state[u]["momentum_buffer"]
    assert buffer.shape == u.shape
    assert set(optimizer.state) == set(training.model.parameters())
    assert torch.equal(optimizer.state_dict()["state"][0]["momentum_buffer"], buffer)
    buffer.zero_()
    fresh = copy.deepcopy(training)
    fresh.optimizer.state.clear()
    training.model.c.grad = fresh.model.c.grad = None
    for each in (training, fresh):
        each.optimizer.state[each.model.c].clear()
        each.optimizer.state[each.model.v].clear()
        each.run(1)
    torch.testing.assert_close(fresh.bits(), training.bits())
    training.optimizer.state = defaultdict(dict)
    assert not training.optimizer.state


def test_state_dict_hooks_are_called_as_torchs_are() -> None:
    calls: list[Optimizer] = []
    optimizer = Training("bnn++").optimizer

    def without_note(hooked: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        calls.append(hooked)
        return {key: state[key] for key in ("state", "param_groups")}

    optimizer.register_state_dict_pre_hook(calls.append)
    optimizer.register_state_dict_post_hook(lambda hooked, state: {**state, "note": type(hooked).__name__})
    optimizer.register_load_state_dict_pre_hook(without_note)
    optimizer.register_load_state_dict_post_hook(calls.append)
    state = optimizer.state_dict()
    assert state["note"] == "ProxConnect"
    optimizer.load_state_dict(state)
    assert calls == [optimizer] * 3


# Writes by others

WRITES: dict[str, Callable[[TanhNetwork], object]] = {
    "load_state_dict": lambda model: model.load_state_dict({k: v / 2 for k, v in model.state_dict().items()}),
    "init": lambda model: nn.init.normal_(model.u),
    "broadcast": lambda model: model.u.detach().copy_(torch.full_like(model.u, 0.3)),
    "another memory": lambda model: setattr(model.u, "data", model.u / 3),
}


@eager_and_fused
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_by_others_is_refused_by_name_and_adopted_or_discarded_when_asked(
    write: Callable[[TanhNetwork], object], update: str, fused: bool
) -> None:
    if fused and update != "pc++":
        return
    training = Training("bnn++", dtype_of(fused=fused), update=update, fused=fused)
    model, optimizer = training.model, training.optimizer
    training.run(2)
    before = training.bits()
    write(model)
    values = model.u.detach().clone()
    for use in (optimizer.step, optimizer.harden, optimizer.quantize, optimizer.state_dict):
        with pytest.raises(RuntimeError, match=r"^parameter 0 of group 0.*: no longer F\(w\*\).*adopt\(\)"):
            use()
    assert torch.equal(model.u, values)
    discarded = copy.deepcopy(training)
    with pytest.raises(RuntimeError, match="no longer F"):
        discarded.optimizer.step()
    discarded.optimizer.soften()
    assert equal([discarded.model.u, discarded.optimizer.latent(discarded.model.u)], [before[0], before[3]])
    optimizer.adopt()
    assert torch.equal(optimizer.latent(model.u), values)
    mu = optimizer.param_groups[0]["mu"]
    expected = values if update == "rpc" else get("bnn++").forward(values, mu)
    torch.testing.assert_close(model.u.detach(), expected)
    training.run(1)


def test_the_same_values_may_be_written_again() -> None:
    training = Training("bnn++")
    training.run(2)
    before = training.bits()
    training.model.load_state_dict({name: value.clone() for name, value in training.model.state_dict().items()})
    training.model.u.data = training.model.u.detach().clone()
    training.optimizer.harden()
    training.model.load_state_dict({name: value.clone() for name, value in training.model.state_dict().items()})
    training.optimizer.soften()
    assert equal(training.bits(), before)
    training.run(1)


def test_a_parameter_is_named_as_its_group_names_it() -> None:
    model = TanhNetwork()
    named = [(name, p) for name, p in model.named_parameters() if name != "c"]
    optimizer = ProxConnect(SGD([{"params": named, "quantizer": "bc"}], lr=0.1))
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    with pytest.raises(RuntimeError, match=r"^u and 1 more: no longer F"):
        optimizer.harden()


def test_a_parameter_of_another_shape_is_refused() -> None:
    training = Training("bnn++")
    training.model.u.data = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"is \(2, 2\) on cpu, its latents are \(6, 4\) on cpu: make the optimizer"):
        training.optimizer.harden()


@eager_and_fused
def test_autograd_sees_that_a_step_writes_parameters(fused: bool) -> None:
    p = nn.Parameter(torch.randn(4, 4))
    optimizer = ProxConnect(SGD([{"params": [p], "quantizer": "bnn++"}], lr=0.1, momentum=0.9), fused=fused)
    x = torch.randn(2, 4, requires_grad=True)
    product = x @ p
    first, second = product.sum(), product.square().sum()
    torch.autograd.backward(first, retain_graph=True)
    written = [p, optimizer.latent(p)]
    before = [tensor._version for tensor in written]
    optimizer.step()
    assert all(tensor._version > version for tensor, version in zip(written, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(second)


# Hardening


@every_step
@pytest.mark.parametrize("quantizer", [name for name, row in QUANTIZERS.items() if row.binary])
def test_hardened_weights_are_the_signs_of_the_latents(quantizer: str, dtype: torch.dtype, fused: bool) -> None:
    training = Training(quantizer, dtype, fused=fused)
    training.run(3)
    training.optimizer.harden()
    for p in (training.model.u, training.model.v):
        w_star = training.optimizer.latent(p)
        assert torch.equal(p, torch.where(w_star >= 0, 1.0, -1.0).to(dtype))


def test_hardened_full_precision_is_full_precision() -> None:
    training = Training("fp")
    training.run(3)
    before = training.bits()
    training.optimizer.harden()
    assert equal(training.bits(), before)


@every_step
@every_update
@pytest.mark.parametrize("quantizer", ["fp", "bc", "bnn++"])
def test_evaluating_hard_in_the_middle_changes_no_bit(
    quantizer: str, update: str, dtype: torch.dtype, fused: bool
) -> None:
    if fused and update != "pc++":
        return
    straight, interrupted = (Training(quantizer, dtype, update=update, fused=fused) for _ in range(2))
    for _ in range(5):
        straight.run(1)
        interrupted.run(1)
        interrupted.optimizer.harden()
        interrupted.model()
        interrupted.optimizer.soften()
    assert equal(interrupted.bits(), straight.bits())


@eager_and_fused
def test_stepping_a_hardened_model_raises(fused: bool) -> None:
    training = Training("bnn++", dtype_of(fused=fused), fused=fused)
    training.optimizer.harden()
    with pytest.raises(RuntimeError, match=r"call soften\(\) first"):
        training.run(1)
    training.optimizer.soften()
    training.run(1)


def test_group_added_to_a_hardened_model_is_hard() -> None:
    model = TanhNetwork()
    optimizer = ProxConnect(SGD([{"params": [model.u], "quantizer": "bnn++"}], lr=0.1))
    optimizer.harden()
    optimizer.add_param_group({"params": [model.v], "quantizer": "bnn++"})
    assert model.v.abs().eq(1).all()
    assert optimizer.hardened


@pytest.mark.parametrize("update", UPDATES)
def test_hardening_does_not_hide_not_a_number(update: str) -> None:
    training = Training("bc", update=update)
    training.optimizer.latent(training.model.u)[0, 0] = torch.nan
    training.optimizer.soften()
    training.optimizer.harden()
    assert training.model.u[0, 0].isnan()
    assert training.model().isnan()
