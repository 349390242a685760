import pytest
import timm
import torch

import models
from models.cifar_resnet import CifarResNet, ShortcutA, resnet20


def test_timm_creates_it_by_name() -> None:
    assert models.is_known("resnet20")  # the catalogue registers it
    model = timm.create_model("resnet20", num_classes=7, in_chans=1)
    assert isinstance(model, CifarResNet)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(("name", "num_layers"), [("resnet20", 20), ("resnet32", 32), ("resnet56", 56)])
def test_its_name_is_its_number_of_layers_with_weights(name: str, num_layers: int) -> None:
    layers = models.create(name, num_classes=10, image_size=32).modules()
    assert sum(isinstance(layer, torch.nn.Conv2d | torch.nn.Linear) for layer in layers) == num_layers


@pytest.mark.parametrize(("side", "final_side"), [(8, 2), (28, 7), (32, 8)])
def test_stages_two_and_three_halve_the_resolution(side: int, final_side: int) -> None:
    model = resnet20()
    x = model.bn1(model.conv1(torch.zeros(1, 3, side, side)))
    assert model.layer3(model.layer2(model.layer1(x))).shape == (1, 64, final_side, final_side)


def test_shortcut_has_no_parameters_subsamples_and_pads_with_zeros() -> None:
    shortcut = ShortcutA(2, 5, stride=2)
    x = torch.arange(2.0 * 4 * 4).reshape(1, 2, 4, 4)
    y = shortcut(x)
    assert list(shortcut.parameters()) == []
    assert torch.equal(y[:, :2], torch.tensor([[[[0.0, 2], [8, 10]], [[16, 18], [24, 26]]]]))
    assert torch.equal(y[:, 2:], torch.zeros(1, 3, 2, 2))


def test_shortcut_is_the_identity_where_nothing_changes() -> None:
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(ShortcutA(3, 3, stride=1)(x), x)


def test_weights_start_with_variance_two_over_fan_in() -> None:
    torch.manual_seed(0)
    weight = resnet20().get_parameter("layer3.1.conv1.weight")
    assert weight.var().item() == pytest.approx(2 / (9 * 64), rel=0.05)


def test_other_pooling_is_refused() -> None:
    with pytest.raises(ValueError, match="'max'"):
        CifarResNet(3, global_pool="max")
