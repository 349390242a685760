"""Bi-Real Net and ReActNet: real values bypass every sign, and no ReLU precedes one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from models.bireal import BiRealBlock, PooledShortcut, ReActBlock, RPReLU
from models.cifar_resnet import ShortcutA
from models.layers import BinaryConv2d, ClippedConv2d

FAMILY = [f"{kind}_resnet{depth}" for kind in ("bireal", "reactnet") for depth in (8, 18, 20)]


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    return models.create(name, num_classes=10, image_size=32)


@pytest.mark.parametrize(("small", "side", "in_chans"), [("8", 8, 1), ("20", 28, 1), ("18", 33, 3)])
@pytest.mark.parametrize("kind", ["bireal", "reactnet"])
@pytest.mark.parametrize("inputs", [None, models.InputQuantization()], ids=["bw", "bwa"])
def test_images_become_logits_and_every_parameter_learns(
    kind: str, small: str, side: int, in_chans: int, inputs: models.InputQuantization | None
) -> None:
    model = models.create(f"{kind}_resnet{small}", 7, side, in_chans)
    models.binarize(model, inputs=inputs)
    logits = model(torch.randn(4, in_chans, side, side))
    logits.square().mean().backward()
    assert logits.shape == (4, 7)
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("depth", ["8", "20"])
def test_the_cifar_family_has_resnets_parameters_and_reactnet_adds_vectors(depth: str) -> None:
    resnet, bireal, reactnet = (create(f"{kind}resnet{depth}") for kind in ("", "bireal_", "reactnet_"))
    assert num_parameters(bireal) == num_parameters(resnet)
    # One shift per input channel before each sign; two shifts and a slope per output channel after it.
    convolutions = [layer for layer in reactnet.modules() if isinstance(layer, nn.Conv2d)][1:]
    vectors = sum(layer.in_channels + 3 * layer.out_channels for layer in convolutions)
    assert num_parameters(reactnet) - num_parameters(bireal) == vectors


@pytest.mark.parametrize("name", ["bireal_resnet18", "reactnet_resnet18"])
def test_the_imagenet_form_has_resnet18s_convolutions_and_norms(name: str) -> None:
    ours, theirs = create(name), create("resnet18")
    shapes = [
        sorted(tuple(layer.weight.shape) for layer in model.modules() if isinstance(layer, nn.Conv2d))
        for model in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in ours.modules()) == 20


@pytest.mark.parametrize("name", FAMILY)
def test_each_3x3_convolution_between_the_ends_has_its_own_shortcut_and_is_binary(name: str) -> None:
    model = create(name)
    blocks = [module for module in model.modules() if isinstance(module, BiRealBlock | ReActBlock)]
    split = models.binarize(model, ("ends", "shortcuts"), models.InputQuantization())
    assert len(split.binary) == len(blocks) == {"8": 6, "20": 18, "18": 16}[name.partition("resnet")[2]]
    assert all(type(block.conv) is BinaryConv2d and block.conv.kernel_size == (3, 3) for block in blocks)
    assert all(block.conv.gain is None for block in blocks)  # a batch norm follows


@pytest.mark.parametrize("name", FAMILY)
def test_shifts_and_slopes_do_not_decay(name: str) -> None:
    model = create(name)
    split = models.binarize(model, ("ends",), models.InputQuantization())
    assert set(split.decay) == {"conv1.weight", "fc.weight"}
    learnt = [name for name, _ in model.named_parameters() if name.endswith((".shift", ".prelu.weight"))]
    assert set(learnt) <= set(split.no_decay)
    assert bool(learnt) == name.startswith("reactnet")


def test_a_bireal_block_adds_its_shortcut_to_the_norm_of_the_convolution_of_the_sign() -> None:
    block = BiRealBlock(2, 3, stride=2)
    block.conv = BinaryConv2d.from_layer(  # type: ignore[assignment]
        block.conv, with_gain=False, inputs=models.inputs.BinaryInput(models.InputQuantization())
    )
    x = torch.randn(4, 2, 6, 6)
    sign = torch.where(x >= 0, 1.0, -1.0)
    convolved = F.conv2d(sign, block.conv.weight, stride=2, padding=1)
    expected = F.batch_norm(convolved, None, None, training=True) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 1))
    torch.testing.assert_close(block(x), expected)


def test_with_real_inputs_a_bireal_convolution_clips_what_it_reads() -> None:
    convolution = ClippedConv2d(2, 3, 3, padding=1)
    x = 3 * torch.randn(4, 2, 6, 6)
    assert torch.equal(convolution(x), nn.Conv2d.forward(convolution, x.clamp(-1, 1)))


def test_a_react_block_shifts_before_and_bends_behind_the_addition() -> None:
    block = ReActBlock(2, 2, stride=1).eval()
    for parameter in (*block.threshold.parameters(), *block.activation.parameters()):
        nn.init.normal_(parameter)
    x, activation = torch.randn(4, 2, 6, 6), block.activation
    shifted = x + block.threshold.shift[:, None, None]
    total = block.bn(block.conv(shifted)) + x + activation.before.shift[:, None, None]
    bent = torch.where(total >= 0, total, activation.prelu.weight[:, None, None] * total)
    torch.testing.assert_close(block(x), bent + activation.after.shift[:, None, None])


def test_rprelu_starts_as_a_prelu_of_slope_a_quarter() -> None:
    x = torch.tensor([-2.0, 3.0]).reshape(1, 2, 1, 1)
    assert RPReLU(2)(x).flatten().tolist() == [-0.5, 3.0]


def test_a_pooled_shortcut_averages_before_its_1x1_convolution_and_is_the_identity_where_nothing_changes() -> None:
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(PooledShortcut(3, 3, 1)(x), x)
    pool, convolution, norm = PooledShortcut(3, 4, 2)
    assert isinstance(pool, nn.AvgPool2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert convolution(pool(x)).shape == (2, 4, 3, 3)
    torch.testing.assert_close(pool(x)[:, :, 0, 0], x[:, :, :2, :2].mean(dim=(2, 3)))
    torch.testing.assert_close(pool(x)[:, :, 2, 2], x[:, :, 4, 4])  # the last row of an odd side is pooled by itself


def test_shortcuts_of_the_cifar_family_have_no_parameters() -> None:
    shortcuts = [module for module in create("reactnet_resnet20").modules() if isinstance(module, ShortcutA)]
    assert len(shortcuts) == 18
    assert not [parameter for shortcut in shortcuts for parameter in shortcut.parameters()]


def test_other_pooling_is_refused() -> None:
    with pytest.raises(ValueError, match="'max'"):
        models.bireal.ImageNetBiRealNet(BiRealBlock, global_pool="max")
