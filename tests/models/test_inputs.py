"""Binary inputs: F forward, B backward, for every row of the catalogue."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import models
from models.inputs import BinaryInput, InputQuantization, quantize
from quantizers import QUANTIZERS

every_row = pytest.mark.parametrize("row", QUANTIZERS)
every_binary_row = pytest.mark.parametrize("row", [name for name, row in QUANTIZERS.items() if row.binary])
MUS = (0.5, 1.0, 7.0)


def some_inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise, and the points where maps have kinks or jumps."""
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0))
    return torch.cat([noise, torch.tensor([0.0, -0.0, 1.0, -1.0, 3.0, -30.0, 0.1, -1.5])]).to(dtype)


@every_row
@pytest.mark.parametrize("mu", MUS)
def test_forward_is_f_and_backward_multiplies_by_b(row: str, mu: float) -> None:
    x = some_inputs().requires_grad_()
    grad = torch.linspace(-2, 2, len(x))
    y = quantize(x, row, mu)
    (x_grad,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(y, QUANTIZERS[row].forward(x.detach(), mu))
    assert torch.equal(x_grad, grad * QUANTIZERS[row].backward(x.detach(), mu))


@pytest.mark.parametrize("row", [name for name, row in QUANTIZERS.items() if row.completes])
def test_the_gradient_of_a_completion_is_the_slope_of_its_f(row: str) -> None:
    x = torch.linspace(-0.93, 0.97, 20, dtype=torch.float64).requires_grad_()
    (x_grad,) = torch.autograd.grad(quantize(x, row, 2.0).sum(), x)
    h = 1e-6
    forward = QUANTIZERS[row].forward
    slope = (forward(x.detach() + h, 2.0) - forward(x.detach() - h, 2.0)) / (2 * h)
    torch.testing.assert_close(x_grad, slope, rtol=1e-6, atol=1e-7)


@every_binary_row
def test_hard_inputs_are_signs_whatever_the_row_and_its_mu(row: str) -> None:
    module = BinaryInput(InputQuantization(row, 0.5))
    x = some_inputs()
    module.hard = True
    assert torch.equal(module(x), torch.where(x >= 0, 1.0, -1.0))
    module.hard = False
    assert torch.equal(module(x), QUANTIZERS[row].forward(x, 0.5))


@every_binary_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_memory_format_are_kept_both_ways(row: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4, 5).to(dtype, memory_format=torch.channels_last).requires_grad_()
    y = quantize(x, row, 1.0)
    (x_grad,) = torch.autograd.grad(y.sum(), x)
    assert y.dtype is x_grad.dtype is dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x_grad.is_contiguous(memory_format=torch.channels_last)


def test_only_the_inputs_are_kept_for_backward() -> None:
    kept: list[Tensor] = []
    x = some_inputs().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        quantize(x, "ede++", 2.0)
    assert len(kept) == 1
    assert kept[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("row", ["bnn", "bnn++"])
def test_compiled_it_is_the_same_also_when_mu_moves(row: str) -> None:
    module = BinaryInput(InputQuantization(row, 1.0))
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for mu in MUS:
        module.mu = mu
        x, x_compiled = some_inputs().requires_grad_(), some_inputs().requires_grad_()
        y, y_compiled = module(x), compiled(x_compiled)
        assert torch.equal(y, y_compiled)
        gradients = torch.autograd.grad(y.sum() + y_compiled.sum(), (x, x_compiled))
        assert torch.equal(*gradients)


def test_autocast_computes_a_binary_layer_in_its_own_dtype() -> None:
    model = models.create("reactnet_resnet8", 10, 8, 1)
    models.binarize(model, inputs=InputQuantization())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.randn(2, 1, 8, 8))
    assert logits.dtype is torch.bfloat16
    logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def inputs_of(model: nn.Module) -> Iterator[BinaryInput]:
    return (module for module in model.modules() if isinstance(module, BinaryInput))


def test_a_models_inputs_move_and_harden_together() -> None:
    model = models.create("bireal_resnet8", 10, 8, 1)
    models.binarize(model, inputs=InputQuantization("bnn++", 2.0))
    assert {inputs.mu for inputs in inputs_of(model)} == {2.0}
    models.set_input_mu(model, 3.0)
    models.harden_inputs(model)
    assert {(inputs.mu, inputs.hard) for inputs in inputs_of(model)} == {(3.0, True)}
    models.soften_inputs(model)
    assert {(inputs.mu, inputs.hard) for inputs in inputs_of(model)} == {(3.0, False)}
    assert not [name for name in model.state_dict() if "inputs" in name]


def test_what_leaves_inputs_real_or_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="'fp' leaves inputs real"):
        InputQuantization("fp")
    with pytest.raises(ValueError, match="unknown quantizer 'bnnn'; did you mean 'bnn'"):
        InputQuantization("bnnn")
    with pytest.raises(ValueError, match="mu=-1"):
        InputQuantization("bnn++", -1.0)
    with pytest.raises(ValueError, match="mu=nan"):
        models.set_input_mu(nn.Identity(), float("nan"))


def test_a_printed_model_shows_how_inputs_are_quantized() -> None:
    module = BinaryInput(InputQuantization("ede++", 2.5))
    module.hard = True
    assert repr(module) == "BinaryInput(ede++, mu=2.5, hard)"
