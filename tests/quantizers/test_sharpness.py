"""mu is a pure function of progress; the schedule only writes it where the optimizer reads it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tanh_network import TanhNetwork
from torch.optim import SGD

from quantizers import Constant, Cosine, Exponential, Linear, ProxConnect, SharpnessSchedule, get

Shape = Constant | Linear | Exponential | Cosine
SHAPES: list[Shape] = [Constant(5.0), Linear(2.0, 50.0), Exponential(2.0, 50.0), Cosine(2.0, 50.0)]


def optimizer_of(*quantizers: str | None) -> ProxConnect:
    return ProxConnect(SGD([{"params": [torch.rand(3)], "quantizer": name} for name in quantizers], lr=0.1))


def mus(optimizer: ProxConnect) -> list[float | None]:
    return [group.get("mu") for group in optimizer.param_groups]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (Constant(5.0), (5.0, 5.0, 5.0)),
        (Linear(2.0, 50.0), (2.0, 26.0, 50.0)),
        (Linear(1.0, 0.0), (1.0, 0.5, 0.0)),
        (Exponential(2.0, 50.0), (2.0, 10.0, 50.0)),
        (Cosine(1.0, 3.0), (1.0, 3.0 - 2**0.5, 3.0)),
    ],
)
def test_shape_at_start_middle_and_end(shape: Shape, expected: tuple[float, ...]) -> None:
    assert (shape(0), shape(1)) == (expected[0], expected[2])
    assert shape(0.5) == pytest.approx(expected[1], rel=1e-15)


@settings(max_examples=50)
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(0, 1), st.sampled_from([Linear, Exponential]))
def test_shape_stays_between_its_ends(
    start: float, end: float, progress: float, kind: Callable[[float, float], Shape]
) -> None:
    low, high = sorted((start, end))
    assert low * (1 - 1e-14) <= kind(start, end)(progress) <= high * (1 + 1e-14)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan")])
def test_progress_outside_0_to_1_is_refused(shape: Shape, progress: float) -> None:
    with pytest.raises(ValueError, match="progress="):
        shape(progress)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(-1.0), "mu=-1.0"),
        (lambda: Linear(0.0, float("inf")), "mu=inf"),
        (lambda: Exponential(0.0, 1.0), "never touches 0"),
        (lambda: SharpnessSchedule(optimizer_of("bc"), Constant(1.0), 0), "num_steps=0"),
        (lambda: SharpnessSchedule(optimizer_of("bc"), Constant(1.0), 5, quantizer="pc"), "quantizer='pc'"),
        (lambda: SharpnessSchedule(optimizer_of(None), Constant(1.0), 5), r"the groups have \[None\]"),
    ],
)
def test_bad_schedules_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_construction_makes_w_and_mu_agree() -> None:
    model = TanhNetwork()
    optimizer = ProxConnect(SGD(model.groups("bnn++", mu=1.0), lr=0.1))
    SharpnessSchedule(optimizer, Linear(3.0, 5.0), num_steps=10)
    assert mus(optimizer) == [3.0, None]
    assert torch.equal(model.u, get("bnn++").forward(optimizer.latent(model.u), 3.0))


def test_step_sets_mu_and_leaves_w_to_the_optimizer() -> None:
    model = TanhNetwork()
    optimizer = ProxConnect(SGD(model.groups("bnn++"), lr=0.1))
    schedule = SharpnessSchedule(optimizer, Linear(0.0, 10.0), num_steps=4)
    before, seen = model.bits(), []
    for _ in range(6):
        schedule.step()
        seen.append(optimizer.param_groups[0]["mu"])
    assert seen == [2.5, 5.0, 7.5, 10.0, 10.0, 10.0]
    assert torch.equal(model.u, before[0])


def test_optimizer_steps_do_not_move_mu() -> None:
    model = TanhNetwork()
    optimizer = ProxConnect(SGD(model.groups("bnn++"), lr=0.1))
    SharpnessSchedule(optimizer, Linear(1.0, 10.0), num_steps=4)
    model().backward()
    optimizer.step()
    assert mus(optimizer)[0] == 1.0


def test_schedule_can_be_restricted_to_one_quantizer() -> None:
    optimizer = optimizer_of("bnn++", "pc", None)
    for shape, quantizer in ((Constant(7.0), "bnn++"), (Constant(0.5), "pc")):
        SharpnessSchedule(optimizer, shape, 10, quantizer=quantizer)
    assert mus(optimizer) == [7.0, 0.5, None]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_users_shape_with_an_impossible_mu_changes_nothing(bad: float) -> None:
    model = TanhNetwork()
    optimizer = ProxConnect(SGD(model.groups("bnn++", mu=3.0), lr=0.1))
    before = model.bits()
    with pytest.raises(ValueError, match=f"^mu={bad}: a sharpness is finite and not negative$"):
        SharpnessSchedule(optimizer, lambda _: bad, num_steps=4)
    assert mus(optimizer) == [3.0, None]
    assert all(torch.equal(one, other) for one, other in zip(model.bits(), before, strict=True))
    schedule = SharpnessSchedule(optimizer, lambda progress: 2.0 if progress < 0.5 else bad, num_steps=4)
    schedule.step()
    for move in (schedule.step, lambda: schedule.load_state_dict({"num_steps_done": 3})):
        with pytest.raises(ValueError, match="mu="):
            move()
        assert mus(optimizer) == [2.0, None]
        assert schedule.state_dict() == {"num_steps_done": 1}


def test_a_schedule_finds_its_groups_by_name_also_where_they_hold_quantizers() -> None:
    mine = dataclasses.replace(get("bnn++"), name="mine")
    optimizer = ProxConnect(
        SGD([{"params": [torch.rand(3)], "quantizer": each} for each in (mine, get("pc"), "bnn++", None)], lr=0.1)
    )
    for quantizer, mu in (("mine", 7.0), (get("pc"), 0.5), (get("bnn++"), 3.0)):
        SharpnessSchedule(optimizer, Constant(mu), 10, quantizer=quantizer)
    assert mus(optimizer) == [7.0, 0.5, 3.0, None]
    with pytest.raises(ValueError, match=r"quantizer='bc', the groups have \['mine', 'pc', 'bnn\+\+', None\]"):
        SharpnessSchedule(optimizer, Constant(1.0), 10, quantizer="bc")


def test_schedule_goes_on_where_it_was_saved() -> None:
    first, second = optimizer_of("bnn++"), optimizer_of("bnn++")
    saved, loaded = (SharpnessSchedule(optimizer, Linear(0.0, 10.0), 10) for optimizer in (first, second))
    for _ in range(3):
        saved.step()
    second.load_state_dict(first.state_dict())  # replaces the group dictionaries
    loaded.load_state_dict(saved.state_dict())
    assert mus(second) == [3.0]
    loaded.step()
    assert mus(second) == [4.0]
