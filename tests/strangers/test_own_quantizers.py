"""Pairs that are not in the catalogue: a Quantizer object in a group, or "module:attribute"."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from literal_loop import (
    DTYPES,
    assert_equal_weights,
    batches,
    eager_and_fused,
    ends_as_the_literal_loop,
    groups,
    literal,
    network,
    tolerance,
    train,
)
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from quantizers import ProxConnect, Quantizer, get, reference, synthesize

MODULE = """
import torch
from quantizers import synthesize

ARCTAN = synthesize(lambda w, mu: w, lambda u, mu: torch.atan(mu * u), name="arctan")
"""


def arctan() -> Quantizer:
    """F(w*) = atan(mu w*), B(w*) = mu / (1 + (mu w*)^2), by autograd."""
    return synthesize(lambda w, _mu: w, lambda u, mu: torch.atan(mu * u), name="arctan")


QUANTIZER = arctan()


@pytest.fixture(autouse=True)
def _literal_arctan(monkeypatch: pytest.MonkeyPatch) -> None:
    """F and B for the literal loop, which looks them up by the group's "quantizer"."""

    def forward(w: Tensor, mu: float) -> Tensor:
        return torch.atan(mu * w)

    def backward(w: Tensor, mu: float) -> Tensor:
        return mu / (1 + (mu * w) ** 2)

    pairs: dict[Any, Any] = reference.PAIRS
    for key in (QUANTIZER, "own_pairs:ARCTAN"):
        monkeypatch.setitem(pairs, key, (forward, backward))


@pytest.fixture
def own_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_pairs.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_pairs", raising=False)
    return "own_pairs:ARCTAN"


def base(model: nn.Module, quantizer: str | Quantizer = QUANTIZER) -> Optimizer:
    return SGD(groups(model, quantizer), lr=0.05, momentum=0.9)


def test_object_in_a_group_trains_as_the_literal_loop() -> None:
    ends_as_the_literal_loop(train, base, fused=False)


def test_attribute_of_a_module_in_a_group_trains_as_the_literal_loop(own_pairs: str) -> None:
    ends_as_the_literal_loop(train, lambda model: base(model, own_pairs), fused=False)


def test_attribute_that_is_not_there_is_refused(own_pairs: str) -> None:
    with pytest.raises(ValueError, match="own_pairs:ARCTANGENT"):
        ProxConnect(base(network(), own_pairs + "GENT"))


def test_object_cannot_be_fused() -> None:
    with pytest.raises(ValueError, match=r"fused=True: the maps of arctan are not in maps\.h"):
        ProxConnect(base(network(torch.float32)), fused=True)


@eager_and_fused
def test_row_as_an_object_is_the_row_by_its_name(fused: bool) -> None:
    dtype = DTYPES[fused]
    model, twin = network(dtype), network(dtype)
    losses = train(model, ProxConnect(base(model, get("bnn++")), fused=fused), batches(dtype))
    assert losses == train(twin, ProxConnect(base(twin, "bnn++"), fused=fused), batches(dtype))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_state_with_an_object_is_resumed_through_a_file(tmp_path: Path) -> None:
    model, resumed, twin = network(), network(seed=3), network()
    optimizer, again = ProxConnect(base(model)), ProxConnect(base(resumed))
    train(model, optimizer, batches()[:4])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    again.load_state_dict(state["optimizer"])
    train(resumed, again, batches()[4:])
    train(twin, literal(base(twin)), batches())
    assert_equal_weights(resumed, twin, tolerance(torch.float64))


def test_hardened_object_is_a_sign_at_any_mu() -> None:
    model = network()
    optimizer = ProxConnect(base(model))
    optimizer.param_groups[0]["mu"] = math.pi
    optimizer.harden()
    assert model.head.weight.abs().eq(1).all()
