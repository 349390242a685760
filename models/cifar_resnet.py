"""ResNet-20, 32 and 56 for CIFAR: He et al., Deep Residual Learning for Image Recognition (CVPR 2016), section 4.2.

A 3x3 convolution, three stages of n blocks with 16, 32, 64 channels, average pooling, a linear layer: 6n + 2 layers
with weights. Registered with timm: `timm.create_model("resnet20", num_classes=10)`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


class ShortcutA(nn.Module):
    """Option A of the paper: y = x at every `stride`-th pixel, then zeros for the channels x lacks. No parameters.

    Shapes: (B, C_in, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.num_zero_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Subsample, then pad the channels."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.num_zero_channels))


class BasicBlock(nn.Module):
    """y = relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), both convolutions 3x3, the first one strided."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = ShortcutA(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride))."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


Block = Callable[[int, int, int], nn.Module]
"""(in_channels, out_channels, stride) -> block."""


class CifarResNet(nn.Module):
    """The network of 6 * num_blocks + 2 layers, for images of any size: (B, in_chans, H, W) -> (B, num_classes).

    `block` makes one block from its input channels, output channels and stride. Weights are initialised as in He et
    al., Delving Deep into Rectifiers (2015): normal, variance 2 / fan-in.
    """

    def __init__(
        self,
        num_blocks: int,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        block: Block = BasicBlock,
    ) -> None:
        if global_pool != "avg":  # timm passes the default_cfg's value
            raise ValueError(f"global_pool: {global_pool!r}; a CIFAR ResNet has 'avg' only")
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(block, 16, 16, num_blocks, stride=1)
        self.layer2 = stage(block, 16, 32, num_blocks, stride=2)
        self.layer3 = stage(block, 32, 64, num_blocks, stride=2)
        self.fc = nn.Linear(64, num_classes)
        self.apply(he_init)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> logits (B, num_classes)."""
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        logits: Tensor = self.fc(torch.mean(x, dim=(2, 3)))
        return logits

    def stem(self, x: Tensor) -> Tensor:
        """relu(bn(conv(x))): (B, in_chans, H, W) -> (B, 16, H, W)."""
        return F.relu(self.bn1(self.conv1(x)))


def stage(block: Block, in_channels: int, out_channels: int, num_blocks: int, *, stride: int) -> nn.Sequential:
    """A stage of `num_blocks` blocks; the first changes the number of channels and the resolution."""
    first = block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1) for _ in range(num_blocks - 1)))


def he_init(module: nn.Module) -> None:
    """Initialise a convolution or linear layer: normal weights of variance 2 / fan-in, biases of 0."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


CIFAR_CFG = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "first_conv": "conv1",
    "classifier": "fc",
    "mean": (0.4914, 0.4822, 0.4465),  # of CIFAR-10's training images
    "std": (0.2470, 0.2435, 0.2616),
}
default_cfgs = generate_default_cfgs(dict.fromkeys(("resnet8", "resnet20", "resnet32", "resnet56"), CIFAR_CFG))


def _build(name: str, num_blocks: int, *, pretrained: bool, **kwargs: object) -> CifarResNet:
    model: CifarResNet = build_model_with_cfg(CifarResNet, name, pretrained, num_blocks=num_blocks, **kwargs)
    return model


def resnet8(pretrained: bool = False, **kwargs: object) -> CifarResNet:
    """ResNet-8, the family's smallest (n = 1): 0.08 million parameters. Not in the paper; for small images."""
    return _build("resnet8", 1, pretrained=pretrained, **kwargs)


def resnet20(pretrained: bool = False, **kwargs: object) -> CifarResNet:
    """ResNet-20: 0.27 million parameters (table 6 of the paper)."""
    return _build("resnet20", 3, pretrained=pretrained, **kwargs)


def resnet32(pretrained: bool = False, **kwargs: object) -> CifarResNet:
    """ResNet-32: 0.46 million parameters (table 6 of the paper)."""
    return _build("resnet32", 5, pretrained=pretrained, **kwargs)


def resnet56(pretrained: bool = False, **kwargs: object) -> CifarResNet:
    """ResNet-56: 0.85 million parameters (table 6 of the paper)."""
    return _build("resnet56", 9, pretrained=pretrained, **kwargs)


for entry_point in (
    resnet8,
    resnet20,
    resnet32,
    resnet56,
):  # not as a decorator: timm's is untyped and would hide our types
    register_model(entry_point)
