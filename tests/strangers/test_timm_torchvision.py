"""timm's and torchvision's models, parameter groups, schedules and optimizers, joined as in their training scripts."""

import pytest
import timm
import timm.optim
import timm.scheduler
import timm.utils
import torch
import torchvision
from literal_loop import (
    Batches,
    Network,
    criterion,
    eager_and_fused,
    ends_as_the_literal_loop,
    groups,
    network,
    train,
)
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torchvision.transforms import v2

from quantizers import ProxConnect

DEEP = 1e-8
"""Tolerance for deep networks with batch norm in float64: ill-conditioning may cost eight of sixteen digits."""


def images(dtype: torch.dtype, num: int = 2, size: int = 32) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, size, size, generator=generator).to(dtype), torch.arange(4) % 3) for _ in range(num)]


def resnet() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.resnet18(weights=None, num_classes=3)
    return model


def test_torchvision_resnet_from_scratch() -> None:
    def base(model: nn.Module) -> Optimizer:
        return SGD(groups(model, "bc"), lr=0.01, momentum=0.9, weight_decay=1e-4)

    ends_as_the_literal_loop(train, base, fused=False, make=resnet, data=images, atol=DEEP)


@eager_and_fused
def test_transfer_learning_of_the_last_layers(fused: bool) -> None:
    """Frozen layers get no gradient and no latents. In eval mode their features are fixed functions of the input."""

    def make() -> nn.Module:
        model: nn.Module = torchvision.models.resnet18(weights=None)
        for p in model.parameters():
            p.requires_grad = False
        torch.manual_seed(0)
        model.fc = nn.Linear(512, 3)
        return model.eval()

    def base(model: nn.Module) -> Optimizer:
        return SGD(groups(model), lr=0.001, momentum=0.9)

    torch.manual_seed(0)
    ends_as_the_literal_loop(train, base, fused=fused, make=make, data=images)


@eager_and_fused
def test_mixup_and_label_smoothing(fused: bool) -> None:
    def mixed(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        torch.manual_seed(0)
        mixup, smooth = v2.MixUp(num_classes=4), nn.CrossEntropyLoss(label_smoothing=0.1)
        losses = []
        for x, y in batches:
            mixed_x, mixed_y = mixup(x[:, None, None], y)
            optimizer.zero_grad()
            loss = smooth(model(mixed_x.flatten(1)), mixed_y.to(x.dtype))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    ends_as_the_literal_loop(mixed, fused=fused)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_timm_models_with_timm_groups(name: str) -> None:
    """Quantize the groups of timm whose parameters decay: those with more than one dimension."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(name, num_classes=3)
        return model

    def base(model: nn.Module) -> Optimizer:
        no_decay, decay = timm.optim.param_groups_weight_decay(model, weight_decay=0.05)
        return torch.optim.AdamW([no_decay, {**decay, "quantizer": "bnn++", "mu": 2.0}], lr=0.01, eps=0.01)

    def data(dtype: torch.dtype) -> Batches:
        return images(dtype, size=160 if "vit" in name else 32)

    ends_as_the_literal_loop(train, base, fused=False, make=make, data=data, atol=DEEP)


@eager_and_fused
def test_timm_cosine_schedule_by_updates(fused: bool) -> None:
    def scheduled(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        schedule = timm.scheduler.CosineLRScheduler(
            optimizer, t_initial=len(batches), warmup_t=2, warmup_lr_init=1e-3, t_in_epochs=False
        )
        losses = []
        for i, batch in enumerate(batches):
            losses += train(model, optimizer, [batch])
            schedule.step_update(i + 1)
        return losses

    ends_as_the_literal_loop(scheduled, fused=fused)


@eager_and_fused
def test_timm_native_scaler_with_its_clipping(fused: bool) -> None:
    def scaled(model: Network, optimizer: ProxConnect, batches: Batches) -> list[float]:
        scaler = timm.utils.NativeScaler(device="cpu")
        losses = []
        for x, y in batches:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            scaler(loss, optimizer, clip_grad=0.1, parameters=model.parameters())
            losses.append(loss.item())
        return losses

    def literally(model: Network, optimizer: Optimizer, batches: Batches) -> list[float]:
        losses = []
        for x, y in batches:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            losses.append(loss.item())
        return losses

    ends_as_the_literal_loop(scaled, fused=fused, literal_train=literally)


@pytest.mark.parametrize("optimizer", ["lamb", "lookahead_sgd", "nadamw"])
def test_timm_optimizers_as_a_base(optimizer: str) -> None:
    """Lamb uses norms of whole tensors, and Lookahead steps another optimizer: both see each parameter's latents."""

    def base(model: nn.Module) -> Optimizer:
        made: Optimizer = timm.optim.create_optimizer_v2(groups(model), opt=optimizer, lr=0.01, weight_decay=0.01)
        for group in made.param_groups:
            group["eps"] = 0.01
        return made

    ends_as_the_literal_loop(train, base, fused=False, make=network)


@eager_and_fused
def test_gradient_checkpointing(fused: bool) -> None:
    class Checkpointed(Network):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)
            return logits

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Checkpointed()

    ends_as_the_literal_loop(train, fused=fused, make=make)
