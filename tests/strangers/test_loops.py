"""Training loops as torch's tutorials write them end with the loss and weights of the literal loop."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from literal_loop import (
    DTYPES,
    Batches,
    Network,
    adamw,
    assert_equal_weights,
    batches,
    clipped_at_the_step,
    criterion,
    eager_and_fused,
    ends_as_the_literal_loop,
    groups,
    literal,
    network,
    sgd,
    tolerance,
    train,
)
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, NAdam, Optimizer, RMSprop
from torch.optim.lr_scheduler import OneCycleLR

from quantizers import ProxConnect, reference


@eager_and_fused
def test_plain_loop(fused: bool) -> None:
    ends_as_the_literal_loop(train, fused=fused)


@eager_and_fused
def test_adamw_under_a_one_cycle_schedule(fused: bool) -> None:
    def train(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        schedule = OneCycleLR(optimizer, max_lr=0.01, total_steps=len(batches) + 1)  # moves lr and beta1
        losses = []
        for x, y in batches:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        return losses

    ends_as_the_literal_loop(train, adamw, fused=fused)


@pytest.mark.parametrize("base", [Adagrad, RMSprop, Adam, NAdam], ids=lambda base: base.__name__)
def test_other_bases_of_torch(base: Callable[..., Optimizer]) -> None:
    ends_as_the_literal_loop(train, lambda model: base(groups(model), lr=0.01, eps=0.01), fused=False)


@eager_and_fused
def test_gradients_accumulated_over_several_batches(fused: bool) -> None:
    def train(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        losses = []
        for i, (x, y) in enumerate(batches):
            loss = criterion(model(x), y) / 4
            loss.backward()
            losses.append(loss.item())
            if i % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
        return losses

    ends_as_the_literal_loop(train, fused=fused)


@eager_and_fused
def test_gradient_scaler_skips_the_overflow_and_nothing_else(fused: bool) -> None:
    def with_scaler(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        losses = []
        for i, (x, y) in enumerate(batches):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            scaler.scale(loss * math.inf if i == 2 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        return losses

    def without(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        losses = []
        for i, (x, y) in enumerate(batches):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            if i != 2:
                optimizer.step()
            losses.append(loss.item())
        return losses

    ends_as_the_literal_loop(with_scaler, fused=fused, literal_train=without)


@eager_and_fused
def test_torchs_clipping_clips_the_gradient_of_w(fused: bool) -> None:
    def train(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        losses = []
        for x, y in batches:
            model.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.1)
            optimizer.step()
            losses.append(loss.item())
        return losses

    ends_as_the_literal_loop(train, fused=fused)


@eager_and_fused
def test_own_clipping_clips_the_gradient_of_the_latents(fused: bool) -> None:
    def ours(model: Network, optimizer: ProxConnect, batches: Batches) -> list[float]:
        losses = []
        for x, y in batches:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.clip_grad_norm_(0.1)
            optimizer.step()
            losses.append(loss.item())
        return losses

    def literally(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        clipped_at_the_step(optimizer, 0.1)
        return train(model, optimizer, batches)

    ends_as_the_literal_loop(ours, fused=fused, literal_train=literally)


@eager_and_fused
def test_closure_is_evaluated_once_and_its_loss_returned(fused: bool) -> None:
    def with_closure(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        losses = []
        for x, y in batches:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss: Tensor = criterion(model(x), y)
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            losses.append(optimizer.step(closure).item())  # type: ignore[arg-type, attr-defined]
        return losses

    ends_as_the_literal_loop(with_closure, fused=fused, literal_train=train)


def test_lbfgs_moves_the_latents_and_evaluates_at_f_of_them() -> None:
    f, b = reference.PAIRS["bnn++"]
    model, twin = network(), network()
    (x, y), *_ = batches()
    weights = [model.hidden.weight, model.head.weight]
    base = LBFGS([{"params": weights, "quantizer": "bnn++", "mu": 2.0}], lr=0.5, max_iter=6)
    optimizer = ProxConnect(base)
    written = [twin.hidden.weight, twin.head.weight]
    latents = [nn.Parameter(w.detach().clone()) for w in written]
    literal = LBFGS(latents, lr=0.5, max_iter=6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = criterion(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def closure_at_f() -> Tensor:
        twin.zero_grad()
        with torch.no_grad():
            for w, w_star in zip(written, latents, strict=True):
                w.copy_(f(w_star, 2.0))
        loss: Tensor = criterion(twin(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        for w, w_star in zip(written, latents, strict=True):
            assert w.grad is not None
            w_star.grad = b(w_star, 2.0).detach() * w.grad
        return loss

    for _ in range(2):
        losses: list[Any] = [optimizer.step(closure), literal.step(closure_at_f)]  # type: ignore[arg-type, no-untyped-call]
        assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-9)
    for p, w_star in zip(weights, latents, strict=True):
        # Curvature is a quotient of small differences: LBFGS keeps about half of float64's digits.
        torch.testing.assert_close(optimizer.latent(p), w_star.detach(), rtol=0, atol=1e-7)
        torch.testing.assert_close(p.detach(), f(w_star, 2.0).detach(), rtol=0, atol=1e-6)


@eager_and_fused
def test_second_backward_through_a_graph_of_old_weights_raises_torchs_error(fused: bool) -> None:
    model = network(DTYPES[fused])
    optimizer = ProxConnect(sgd(model), fused=fused)
    x, y = batches(DTYPES[fused])[0]
    logits = model(x)
    criterion(logits, y).backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.square().mean().backward()


@eager_and_fused
def test_two_losses_before_one_step(fused: bool) -> None:
    def train(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        losses = []
        for x, y in batches:
            optimizer.zero_grad()
            logits = model(x)
            first, second = criterion(logits, y), 0.1 * logits.square().mean()
            first.backward(retain_graph=True)
            second.backward()
            optimizer.step()
            losses.append((first + second).item())
        return losses

    ends_as_the_literal_loop(train, fused=fused)


class Adversaries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8))
        self.critic = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


@eager_and_fused
def test_generator_and_critic_with_an_optimizer_each(fused: bool) -> None:
    def play(model: Adversaries, optimizers: list[Any], batches: Batches) -> list[float]:
        of_generator, of_critic = optimizers
        losses = []
        for x, _ in batches:
            fake = model.generator(x[:, :4])
            of_critic.zero_grad()
            critic_loss = model.critic(fake.detach()).mean() - model.critic(x).tanh().mean()
            critic_loss.backward()
            of_critic.step()
            of_generator.zero_grad()
            generator_loss = -model.critic(fake).tanh().mean()  # also leaves gradients in the critic
            generator_loss.backward()
            of_generator.step()
            of_critic.zero_grad()
            losses += [critic_loss.item(), generator_loss.item()]
        return losses

    dtype = DTYPES[fused]
    torch.manual_seed(0)
    model = Adversaries().to(dtype)
    twin = Adversaries().double()
    twin.load_state_dict(model.state_dict())
    ours = [ProxConnect(adamw(half), fused=fused) for half in (model.generator, model.critic)]
    theirs = [literal(adamw(half)) for half in (twin.generator, twin.critic)]
    torch.testing.assert_close(
        play(model, ours, batches(dtype)), play(twin, theirs, batches()), rtol=0, atol=tolerance(dtype)
    )


@eager_and_fused
def test_optimizer_of_its_own_for_each_parameter_stepped_in_backward(fused: bool) -> None:
    def in_backward(model: Network, batches: Batches) -> list[float]:
        optimizers: dict[Tensor, Any] = {
            p: ProxConnect(SGD([{"params": [p], "quantizer": "bnn++", "mu": 2.0}], lr=0.05), fused=fused)
            if p.ndim > 1
            else SGD([p], lr=0.05)
            for p in model.parameters()
        }

        def step(p: Tensor) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]
        losses = []
        for x, y in batches:
            loss = criterion(model(x), y)
            loss.backward()
            losses.append(loss.item())
        return losses

    dtype = DTYPES[fused]
    model, twin = network(dtype), network()
    losses = in_backward(model, batches(dtype))
    expected = train(twin, literal(SGD(groups(twin), lr=0.05)), batches())
    torch.testing.assert_close(losses, expected, rtol=0, atol=tolerance(dtype))
    assert_equal_weights(model, twin, tolerance(dtype))


@eager_and_fused
def test_compiled_model(fused: bool) -> None:
    def compiled(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        return train(torch.compile(model, backend="aot_eager"), optimizer, batches)

    ends_as_the_literal_loop(compiled, fused=fused, literal_train=train)


@eager_and_fused
def test_gradients_from_functional_call(fused: bool) -> None:
    def functional(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        parameters = dict(model.named_parameters())

        def loss_of(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            loss: Tensor = criterion(torch.func.functional_call(model, values, (x,)), y)
            return loss

        losses = []
        for x, y in batches:
            values = {name: p.detach() for name, p in parameters.items()}
            gradients, loss = torch.func.grad_and_value(loss_of)(values, x, y)
            for name, p in parameters.items():
                p.grad = gradients[name]
            optimizer.step()
            losses.append(loss.item())
        return losses

    ends_as_the_literal_loop(functional, fused=fused, literal_train=train)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@eager_and_fused
def test_anomaly_detection(fused: bool) -> None:
    def watched(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        with torch.autograd.set_detect_anomaly(True):
            return train(model, optimizer, batches)

    ends_as_the_literal_loop(watched, fused=fused, literal_train=train)


@eager_and_fused
def test_learning_rate_of_its_own_for_each_layer(fused: bool) -> None:
    def base(model: Network) -> Optimizer:
        layers: list[dict[str, Any]] = [
            {"params": [model.hidden.weight], "quantizer": "bnn++", "mu": 2.0, "lr": 0.01},
            {"params": [model.head.weight], "quantizer": "bc", "mu": 1.0, "lr": 0.02, "momentum": 0.5},
            {"params": [model.hidden.bias, model.head.bias]},
        ]
        return SGD(layers, lr=0.05, momentum=0.9)

    ends_as_the_literal_loop(train, base, fused=fused)


@eager_and_fused
def test_mu_raised_by_hand(fused: bool) -> None:
    def sharpened(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        losses = []
        for batch in batches:
            optimizer.param_groups[0]["mu"] *= 1.1
            losses += train(model, optimizer, [batch])
        return losses

    ends_as_the_literal_loop(sharpened, fused=fused)
