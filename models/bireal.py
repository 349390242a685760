"""Residual networks made for binary activations: Bi-Real Net and ReActNet.

Bi-Real Net (Liu et al., ECCV 2018, arXiv 1808.00278): each 3x3 convolution has its own shortcut, so real values bypass
every sign, and no ReLU precedes a sign, since that would make it constant.
    y = bn(conv(sign(x))) + shortcut(x)
ReActNet (Liu et al., ECCV 2020, arXiv 2003.03488): thresholds and the activation after the addition are learnt.
    y = rprelu(bn(conv(sign(x + shift))) + shortcut(x))

`models.binarize` with `inputs` adds the sign. Without it, the convolution reads the clipped x (Bi-Real) or x + shift
(ReActNet), so the same network trains in full precision. Stems have no ReLU either. Registered with timm.
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from models.cifar_resnet import CIFAR_CFG, Block, CifarResNet, ShortcutA, he_init, stage
from models.layers import ClippedConv2d


class ChannelShift(nn.Module):
    """y_c = x_c + shift_c, with trainable shifts that start at 0: (B, C, H, W) -> the same."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Add one number per channel."""
        return x + self.shift[:, None, None]


class RPReLU(nn.Module):
    """y_c = prelu_c(x_c + a_c) + b_c; a, b and PReLU's slope trainable, one of each per channel.

    (B, C, H, W) -> the same.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.before, self.after = ChannelShift(num_channels), ChannelShift(num_channels)
        self.prelu = nn.PReLU(num_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Shift, bend, shift."""
        y: Tensor = self.after(self.prelu(self.before(x)))
        return y


class PooledShortcut(nn.Sequential):
    """bn(W avgpool(x)), W a 1x1 convolution, where width or resolution changes; x itself elsewhere.

    (B, C_in, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        if (in_channels, stride) == (out_channels, 1):
            super().__init__()
            return
        super().__init__(
            nn.AvgPool2d(stride, ceil_mode=True),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )


Shortcut = type[ShortcutA] | type[PooledShortcut]


class BiRealBlock(nn.Module):
    """y = bn(conv(x)) + shortcut(x), 3x3 convolution. It clips its inputs, or takes their sign once binarized."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut = ShortcutA) -> None:
        super().__init__()
        self.conv = ClippedConv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride))."""
        y: Tensor = self.bn(self.conv(x)) + self.shortcut(x)
        return y


class ReActBlock(nn.Module):
    """y = rprelu(bn(conv(x + shift)) + shortcut(x)), 3x3 convolution. RPReLU is nonlinear, so nothing is clipped."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut = ShortcutA) -> None:
        super().__init__()
        self.threshold = ChannelShift(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut(in_channels, out_channels, stride)
        self.activation = RPReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride))."""
        y: Tensor = self.activation(self.bn(self.conv(self.threshold(x))) + self.shortcut(x))
        return y


class CifarBiRealNet(CifarResNet):
    """The CIFAR family with these blocks. num_blocks counts them; each has one convolution, not two.

    Its shortcuts stay option A, without parameters: the paper's 1x1 convolutions would add real weights that ResNet-20
    does not have, and if binary they would block the real values that the shortcuts are meant to carry.
    """

    def stem(self, x: Tensor) -> Tensor:
        """bn(conv(x)): a ReLU would make the first block's sign constant. (B, C, H, W) -> (B, 16, H, W)."""
        y: Tensor = self.bn1(self.conv1(x))
        return y


class ImageNetBiRealNet(nn.Module):
    """ResNet-18's layout: a 7x7 stem, four stages of four such blocks, (B, in_chans, H, W) -> (B, num_classes)."""

    def __init__(self, block: Block, num_classes: int = 1000, in_chans: int = 3, global_pool: str = "avg") -> None:
        if global_pool != "avg":  # timm passes the default_cfg's value
            raise ValueError(f"global_pool: {global_pool!r}; these networks have 'avg' only")
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = stage(block, 64, 64, 4, stride=1)
        self.layer2 = stage(block, 64, 128, 4, stride=2)
        self.layer3 = stage(block, 128, 256, 4, stride=2)
        self.layer4 = stage(block, 256, 512, 4, stride=2)
        self.fc = nn.Linear(512, num_classes)
        self.apply(he_init)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> logits (B, num_classes)."""
        x = F.max_pool2d(self.bn1(self.conv1(x)), 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.mean(x, dim=(2, 3)))
        return logits


_IMAGENET_CFG = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "first_conv": "conv1",
    "classifier": "fc",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
_CIFAR_NAMES = ("bireal_resnet8", "bireal_resnet20", "reactnet_resnet8", "reactnet_resnet20")
default_cfgs = generate_default_cfgs(
    {
        **dict.fromkeys(_CIFAR_NAMES, CIFAR_CFG),
        **dict.fromkeys(("bireal_resnet18", "reactnet_resnet18"), _IMAGENET_CFG),
    }
)


def _cifar(name: str, block: Block, num_blocks: int, *, pretrained: bool, **kwargs: object) -> CifarBiRealNet:
    settings = {"block": block, "num_blocks": num_blocks, **kwargs}
    model: CifarBiRealNet = build_model_with_cfg(CifarBiRealNet, name, pretrained, **settings)
    return model


def _imagenet(name: str, block: type[BiRealBlock | ReActBlock], *, pretrained: bool, **kwargs: object) -> nn.Module:
    settings = {"block": partial(block, shortcut=PooledShortcut), **kwargs}
    model: nn.Module = build_model_with_cfg(ImageNetBiRealNet, name, pretrained, **settings)
    return model


def bireal_resnet8(pretrained: bool = False, **kwargs: object) -> CifarBiRealNet:
    """Bi-Real blocks on ResNet-8: six 3x3 convolutions between stem and classifier. For small images."""
    return _cifar("bireal_resnet8", BiRealBlock, 2, pretrained=pretrained, **kwargs)


def bireal_resnet20(pretrained: bool = False, **kwargs: object) -> CifarBiRealNet:
    """Bi-Real blocks on ResNet-20: 18 3x3 convolutions between stem and classifier, as many weights as ResNet-20."""
    return _cifar("bireal_resnet20", BiRealBlock, 6, pretrained=pretrained, **kwargs)


def bireal_resnet18(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """Bi-Real Net 18, for ImageNet: 16 3x3 convolutions, three 1x1 ones on shortcuts. Keep ends and shortcuts exact."""
    return _imagenet("bireal_resnet18", BiRealBlock, pretrained=pretrained, **kwargs)


def reactnet_resnet8(pretrained: bool = False, **kwargs: object) -> CifarBiRealNet:
    """ReActNet's blocks on ResNet-8."""
    return _cifar("reactnet_resnet8", ReActBlock, 2, pretrained=pretrained, **kwargs)


def reactnet_resnet20(pretrained: bool = False, **kwargs: object) -> CifarBiRealNet:
    """ReActNet's blocks on ResNet-20."""
    return _cifar("reactnet_resnet20", ReActBlock, 6, pretrained=pretrained, **kwargs)


def reactnet_resnet18(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """ReActNet's blocks on ResNet-18, for ImageNet. Keep ends and shortcuts exact."""
    return _imagenet("reactnet_resnet18", ReActBlock, pretrained=pretrained, **kwargs)


for entry_point in (
    bireal_resnet8,
    bireal_resnet20,
    bireal_resnet18,
    reactnet_resnet8,
    reactnet_resnet20,
    reactnet_resnet18,
):  # not as a decorator: timm's is untyped and would hide our types
    register_model(entry_point)
