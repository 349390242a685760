"""One model per timm family is binarized, trained for a step and hardened; refusals say which layers to keep."""

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import models
from quantizers import ProxConnect

# The smallest of the family, or nearly.
AS_THEY_ARE = (
    *("test_byobnet", "cait_xxs24_224", "convit_tiny", "convmixer_768_32", "test_convnext", "cpubone_nano"),
    *("crossvit_tiny_240", "cs3darknet_focus_s", "cspnext_tiny", "davit_tiny", "deit_tiny_patch16_224", "densenet121"),
    *("dla46_c", "dpn48b", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0", "tinynet_e"),
    *("efficientvit_b0", "efficientvit_m0", "fasternet_t0", "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny"),
    *("ghostnet_050", "hardcorenas_b", "hgnetv2_b0", "hiera_tiny_224", "hrnet_w18_small", "iformer_t"),
    *("inception_next_atto", "lcnetv2_small", "levit_128", "test_mambaout", "test_coatnet", "poolformerv2_s12"),
    *("gmlp_ti16_224", "mobilenetv3_small_050", "mobilevit_xxs", "mvitv2_tiny", "nest_tiny", "pit_ti_224"),
    *("pvt_v2_b0", "rdnet_tiny", "regnetx_002", "repghostnet_050", "repvit_m1", "res2next50", "resnest14d"),
    *("test_resnet", "resnetv2_18", "rexnet_100", "selecsls42", "legacy_seresnet18", "sequencer2d_s", "shvit_s1"),
    *("skresnet18", "starnet_s050", "swiftformer_xs", "swin_tiny_patch4_window7_224", "tiny_vit_5m_224", "tresnet_m"),
    *("twins_svt_small", "visformer_tiny", "test_vit", "vit_tiny_r_s16_p8_224", "test_vit_relpos", "vitamin_small_224"),
    *("volo_d1_224", "ese_vovnet19b_slim_dw", "legacy_xception", "xception41p", "xcit_nano_12_p8_224"),
)
IN_PART = ("coat_tiny", "efficientvim_m1", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256", "lowformer_b0")
"""Models with some layers that have no binary form: the message names what to keep."""
SIDE = 64
"""Side of the images of networks that take any, in pixels."""


@dataclass(frozen=True)
class Trained:
    """A network after a step, hardened, and how many of its weights are binary."""

    logits: torch.Tensor
    share: float


def _trained(name: str, keep: tuple[str, ...]) -> Trained:
    torch.manual_seed(0)
    size = models.input_size(name)
    size = min(size, SIDE) if models.takes_any_size(name) else size
    model = models.create(name, 10, size)
    split = models.binarize(model, keep)
    parameters = dict(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [parameters[key] for key in split.binary], "quantizer": "bc"},
        {"params": [parameters[key] for key in (*split.decay, *split.no_decay)]},
    ]
    optimizer = ProxConnect(torch.optim.SGD(groups, lr=0.001))
    images = torch.randn(2, 3, size, size)
    torch.autograd.backward(nn.functional.cross_entropy(model.train()(images), torch.tensor([0, 1])))
    optimizer.step()
    optimizer.harden()
    assert all(bool((parameters[key].abs() == 1).all()) for key in split.binary)
    with torch.no_grad():
        logits = model.eval()(images)
    num_binary = sum(parameters[key].numel() for key in split.binary)
    return Trained(logits, num_binary / sum(p.numel() for p in parameters.values()))


def test_there_are_60_families() -> None:
    assert len(AS_THEY_ARE) + len(IN_PART) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_a_familys_network_is_binarized_trained_and_hardened(name: str) -> None:
    trained = _trained(name, ("ends",))
    assert trained.logits.shape == (2, 10)
    assert bool(trained.logits.isfinite().all())
    assert trained.share > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_PART)
def test_what_has_no_binary_form_is_kept_by_the_patterns_that_the_message_names(name: str) -> None:
    keep: tuple[str, ...] = ("ends",)
    with pytest.raises(ValueError, match="can't be binarized"):
        _trained(name, keep)
    for _ in range(2):  # a second kind of unsupported layer appears once the first is kept
        try:
            trained = _trained(name, keep)
        except ValueError as refusal:
            keep = (*keep, *_named_in(str(refusal)))
        else:
            break
    else:
        trained = _trained(name, keep)
    assert bool(trained.logits.isfinite().all())
    assert trained.share > 0.05


def _named_in(message: str) -> list[str]:
    named = re.search(r"can't be binarized: .*; full_precision: \[ends, (.+)\] keeps such layers exact", message)
    assert named, message
    return named[1].split(", ")
