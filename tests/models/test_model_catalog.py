import socket
import subprocess
import sys
from typing import NoReturn

import pytest
import timm
import torch

import models

SMALL = [
    ("resnet20", 32, 3),
    ("resnet20", 28, 1),
    ("resnet20", 8, 1),
    ("resnet18", 64, 3),
    ("vit_mini_patch4_32", 32, 3),
    ("vit_mini_patch4_32", 28, 1),
    ("vit_mini_patch2_8", 8, 1),
    ("deit_tiny_patch16_224", 64, 3),
    ("deit_tiny_distilled_patch16_224", 64, 3),
]


@pytest.mark.parametrize(("name", "image_size", "in_chans"), SMALL)
@pytest.mark.parametrize("binary", [False, True], ids=["fp", "binary"])
def test_forward_maps_images_to_logits(name: str, image_size: int, in_chans: int, *, binary: bool) -> None:
    model = models.create(name, num_classes=7, image_size=image_size, in_chans=in_chans).eval()
    if binary:
        models.binarize(model)
    logits = model(torch.randn(2, in_chans, image_size, image_size))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "size"), [("resnet20", 32), ("vit_mini_patch2_8", 8), ("resnet50", 224), ("deit_tiny_patch16_224", 224)]
)
def test_input_size_is_the_design_size(name: str, size: int) -> None:
    assert models.input_size(name) == size


@pytest.mark.parametrize("name", ["resnet21", "hf-hub:timm/resnet18.a1_in1k", "resnet18.no_such_tag", ""])
def test_unknown_names_are_refused(name: str) -> None:
    assert not models.is_known(name)
    with pytest.raises(ValueError, match="unknown") as caught:
        models.create(name, num_classes=10, image_size=32)
    assert repr(name) in str(caught.value)


def test_a_misspelt_name_is_corrected() -> None:
    assert models.suggest("resnet_20")[0] == "resnet20"
    with pytest.raises(ValueError, match="did you mean 'resnet20'"):
        models.create("resnet_20", num_classes=10, image_size=32)


def test_names_lists_ours_among_timms() -> None:
    assert {"resnet20", "resnet56", "vit_mini_patch4_32", "vit_mini_patch2_8", "deit_tiny_patch16_224"} <= set(
        models.names()
    )
    assert models.is_known("resnet18.a1_in1k")


def test_creating_a_model_with_published_weights_touches_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with torch.device("meta"):
        model = models.create("resnet18.a1_in1k", num_classes=10, image_size=224)
    assert model.get_parameter("fc.weight").shape == (10, 512)


def test_timm_is_not_imported_for_a_model_of_ours() -> None:
    code = "import models, sys; assert all(map(models.is_known, models.catalog.OURS)); sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_full_precision_layers_are_the_first_and_every_head() -> None:
    with torch.device("meta"):
        distilled = models.create("deit_tiny_distilled_patch16_224", num_classes=10, image_size=224)
    assert models.full_precision_layers(distilled) == ("patch_embed.proj", "head", "head_dist")


def test_a_model_without_metadata_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear: timm's metadata has no 'first_conv'"):
        models.full_precision_layers(torch.nn.Linear(2, 2))


def test_metadata_that_names_a_missing_layer_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.pretrained_cfg = {"first_conv": "0", "classifier": "head"}  # type: ignore[assignment]  # as timm leaves it
    with pytest.raises(ValueError, match="'head'"):
        models.full_precision_layers(model)


def test_ours_are_the_models_that_this_package_registers() -> None:
    models.names()  # registers them
    modules = ("bireal", "cifar_resnet", "small_vit")
    assert {name for module in modules for name in timm.list_models(module=module)} == models.catalog.OURS


@pytest.mark.parametrize("name", ["convnext_tiny_in22ft1k", "resnet18."])
def test_names_that_timm_has_given_up_or_never_had_are_unknown(name: str) -> None:
    assert not models.is_known(name)


@pytest.mark.parametrize(
    ("name", "any_size"),
    [
        ("resnet20", True),
        ("resnet18.a1_in1k", True),
        ("bireal_resnet18", True),
        ("vit_mini_patch4_32", False),
        ("deit_tiny_patch16_224", False),
        ("vit_base_patch16_224.augreg_in21k", False),
    ],
)
def test_convolutions_take_images_of_any_size_and_transformers_of_one(name: str, *, any_size: bool) -> None:
    assert models.takes_any_size(name) == any_size
