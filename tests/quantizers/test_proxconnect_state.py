"""Saving, loading, copying and hardening change no bit of a training."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tanh_network import TanhNetwork, equal
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from quantizers import QUANTIZERS, Linear, ProxConnect, SharpnessSchedule, get

UPDATES = ("pc++", "pq", "rpc")
BASES: dict[str, Callable[[list[dict[str, Any]]], Optimizer]] = {
    "momentum": lambda groups: SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda groups: AdamW(groups, lr=0.02, weight_decay=0.1),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


class Training:
    """A network, its optimizer and a moving sharpness."""

    def __init__(
        self, quantizer: str, dtype: torch.dtype = torch.float64, base: str = "momentum", update: str = "pc++"
    ) -> None:
        self.model = TanhNetwork(dtype)
        self.optimizer = ProxConnect(BASES[base](self.model.groups(quantizer)), update=update)
        self.sharpness = SharpnessSchedule(self.optimizer, Linear(0.2, 0.9), num_steps=20)

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.optimizer.zero_grad()
            self.model().backward()
            self.optimizer.step()
            self.sharpness.step()

    def bits(self) -> list[Tensor]:
        """All that training goes on from, but for the base optimizer's state."""
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


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_resumed_training_is_the_same_to_the_bit(quantizer: str, dtype: torch.dtype, base: str, update: str) -> None:
    straight, resumed = (Training(quantizer, dtype, base, update) for _ in range(2))
    straight.run(5)
    resumed.load(through_a_file(straight.state()))
    assert equal(resumed.bits(), straight.bits())
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
        (lambda: Training("bc", update="pq").optimizer, "update: pq in the state, pc\\+\\+ here"),
        (lambda: Training("bnn").optimizer, "quantizers of the groups: .*bnn.* in the state, .*bc.* here"),
        (
            lambda: ProxConnect(SGD([group_of(3, quantizer="bc"), group_of(1)])),
            r"latent shapes: \[\(3,\)\] in the state, \[\(6, 4\), \(1, 6\)\] here",
        ),
        (lambda: SGD([torch.ones(1)]), "not a state of ProxConnect: it has no base, latents, update"),
    ],
)
def test_state_of_another_optimizer_is_refused_and_changes_nothing(
    other: Callable[[], Optimizer], message: str
) -> None:
    training = Training("bc")
    before = training.bits()
    with pytest.raises(ValueError, match=message):
        training.optimizer.load_state_dict(other().state_dict())
    assert equal(training.bits(), before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda training: pickle.loads(pickle.dumps(training))])  # noqa: S301  (our own bytes)
def test_a_copy_trains_as_the_original(duplicate: Callable[[Training], Training]) -> None:
    training = Training("bnn++", torch.bfloat16)
    training.run(5)
    duplicated = duplicate(training)
    training.run(5)
    duplicated.run(5)
    assert equal(duplicated.bits(), training.bits())


# Hardening


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantizer", [name for name, row in QUANTIZERS.items() if row.binary])
def test_hardened_weights_are_the_signs_of_the_latents(quantizer: str, dtype: torch.dtype) -> None:
    training = Training(quantizer, dtype)
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


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_evaluating_hard_in_the_middle_changes_no_bit(quantizer: str, update: str) -> None:
    straight, interrupted = Training(quantizer, update=update), Training(quantizer, update=update)
    for _ in range(5):
        straight.run(1)
        interrupted.run(1)
        interrupted.optimizer.harden()
        interrupted.model()
        interrupted.optimizer.soften()
    assert equal(interrupted.bits(), straight.bits())


def test_stepping_a_hardened_model_raises() -> None:
    training = Training("bnn++")
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
