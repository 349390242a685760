from functools import cache

import pytest
import torch
from torch import Tensor, nn

import models
from models.binarize import latents
from models.catalog import metadata
from models.inputs import BinaryInput
from models.layers import BinaryConv2d, BinaryLinear
from quantizers import ProxConnect
from quantizers.scales import Scale

SMALL = {"resnet20": (32, 3), "vit_mini_patch4_32": (32, 3), "vit_mini_patch2_8": (8, 1), "efficientnet_b0": (32, 3)}
small_model = pytest.mark.parametrize("name", SMALL)
# One per kind of network: plain, residual, dense, inverted bottleneck, squeeze, hybrid, transformers, MLP.
FAMILIES = ["vgg11_bn", "resnet50", "densenet121", "tf_efficientnet_b0", "mobilenetv3_small_100", "levit_128"]
FAMILIES += ["convnext_atto", "swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224", "mixer_b16_224"]


def create(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    image_size, in_chans = SMALL[name]
    return models.create(name, num_classes=10, image_size=image_size, in_chans=in_chans)


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return models.create(name, num_classes=10, image_size=models.input_size(name))


@cache
def binarized(name: str) -> tuple[nn.Module, models.Split]:
    """A binarized model without memory for its weights, and its split; cached, so do not change it."""
    model = on_meta(name)
    return model, models.binarize(model)


def weights(model: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: model.get_parameter(name).detach().clone() for name in names}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_in_exactly_one_group(name: str) -> None:
    model, split = binarized(name)
    grouped = split.binary + split.decay + split.no_decay
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {parameter for parameter, _ in model.named_parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_matrix_is_binary_except_in_the_first_layer_and_the_heads(name: str) -> None:
    model, split = binarized(name)
    exact = models.full_precision_layers(model)
    assert set(split.decay) == {f"{layer}.weight" for layer in exact}
    matrices = {n for n, p in model.named_parameters() if n.endswith(".weight") and p.ndim > 1}
    assert matrices == {*split.binary, *split.decay}


@pytest.mark.parametrize("name", FAMILIES)
def test_groups_are_in_the_models_order(name: str) -> None:
    model, split = binarized(name)
    position = {parameter: i for i, (parameter, _) in enumerate(model.named_parameters())}
    for group in (split.binary, split.decay, split.no_decay):
        assert list(group) == sorted(group, key=position.__getitem__)


def test_convolutions_before_batch_norms_stay_and_transformer_layers_get_gains() -> None:
    resnet, vit = create("resnet20"), create("vit_mini_patch2_8")
    models.binarize(resnet)
    models.binarize(vit)
    assert not any(isinstance(layer, BinaryConv2d | BinaryLinear) for layer in resnet.modules())
    with_gain = {name for name, layer in vit.named_modules() if isinstance(layer, BinaryLinear)}
    assert with_gain == {
        f"blocks.{i}.{layer}" for i in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }


def test_only_the_convolutions_without_a_batch_norm_behind_get_gains() -> None:
    model = create("efficientnet_b0")
    models.binarize(model)
    with_gain = {name for name, layer in model.named_modules() if isinstance(layer, BinaryConv2d)}
    assert with_gain
    assert all(name.endswith(("se.conv_reduce", "se.conv_expand")) for name in with_gain)


@small_model
def test_latents_lie_in_the_unit_interval_with_mean_abs_a_half_before_the_clip(name: str) -> None:
    model = create(name)
    before = {parameter: value.detach().clone() for parameter, value in model.named_parameters()}
    split = models.binarize(model)
    for parameter, w_star in weights(model, split.binary).items():
        scaled = before[parameter] * (0.5 / before[parameter].abs().mean())
        assert w_star.abs().max() <= 1
        torch.testing.assert_close(w_star, scaled.clamp(-1, 1))


@small_model
def test_gains_are_the_mean_abs_of_the_full_precision_weights(name: str) -> None:
    model = create(name)
    before = {parameter: value.detach().clone() for parameter, value in model.named_parameters()}
    split = models.binarize(model)
    for parameter in split.no_decay:
        if parameter.endswith(".gain"):
            weight = before[parameter.removesuffix("gain") + "weight"]
            torch.testing.assert_close(model.get_parameter(parameter).detach(), weight.abs().flatten(1).mean(dim=1))


@small_model
def test_the_other_parameters_keep_their_values(name: str) -> None:
    model = create(name)
    before = {parameter: value.detach().clone() for parameter, value in model.named_parameters()}
    split = models.binarize(model)
    kept = [n for n in split.decay + split.no_decay if not n.endswith(".gain")]
    assert all(torch.equal(model.get_parameter(n), before[n]) for n in kept)


@small_model
def test_binary_weights_train(name: str) -> None:
    model = create(name)
    split = models.binarize(model)
    image_size, in_chans = SMALL[name]
    with torch.no_grad():
        for parameter in split.binary:
            weight = model.get_parameter(parameter)
            weight.copy_(torch.where(weight >= 0, 1.0, -1.0))
    logits = model(torch.randn(4, in_chans, image_size, image_size))
    logits.square().mean().backward()
    assert logits.isfinite().all()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@small_model
def test_binarizing_the_same_full_precision_weights_gives_the_same_model(name: str) -> None:
    first, second = create(name, seed=0), create(name, seed=1)
    second.load_state_dict(first.state_dict())
    before = torch.get_rng_state()
    assert models.binarize(first) == models.binarize(second)
    assert torch.equal(torch.get_rng_state(), before)
    state = second.state_dict()
    assert first.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in first.state_dict().items())


@small_model
def test_the_baseline_is_unchanged(name: str) -> None:
    model = create(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    models.full_precision(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_tokens_and_positions_do_not_decay() -> None:
    model = on_meta("deit_tiny_distilled_patch16_224")
    assert {"cls_token", "dist_token", "pos_embed"} <= set(models.full_precision(model).no_decay)


def test_what_the_model_exempts_from_decay_does_not_decay() -> None:
    model = create("resnet20")
    model.no_weight_decay = lambda: {"fc.weight"}  # type: ignore[assignment]  # as timm's transformers define it
    assert "fc.weight" in models.full_precision(model).no_decay


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "nf_resnet50", "ecaresnet26t"])
def test_weights_that_are_transformed_or_borrowed_are_refused_and_the_model_is_unchanged(name: str) -> None:
    model = on_meta(name)
    before = [parameter for parameter, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="can't be binarized"):
        models.binarize(model)
    assert [parameter for parameter, _ in model.named_parameters()] == before


def test_a_transformer_is_binarized_once_only() -> None:
    model = create("vit_mini_patch2_8")
    models.binarize(model)
    with pytest.raises(ValueError, match="can't be binarized"):
        models.binarize(model)


def test_a_special_convolution_without_batch_norm_behind_is_refused() -> None:
    class Special(nn.Conv2d):
        pass

    model = nn.Sequential(nn.Conv2d(1, 2, 1), Special(2, 2, 1), nn.Flatten(), nn.Linear(8, 2))
    model.pretrained_cfg = {"first_conv": "0", "classifier": "3", "input_size": (1, 2, 2)}  # type: ignore[assignment]
    with pytest.raises(
        ValueError,
        match=r"1 can't be binarized: a Special has no binary twin with a gain.*\[ends, \*\] keeps such",
    ):
        models.binarize(model)


def test_a_model_with_nothing_to_binarize_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, 2))
    model.pretrained_cfg = {"first_conv": "0", "classifier": "2", "input_size": (1, 2, 2)}  # type: ignore[assignment]
    with pytest.raises(ValueError, match="nothing to binarize"):
        models.binarize(model)


def test_latents_of_zero_weights_are_zero() -> None:
    assert torch.equal(latents(torch.zeros(3, 2)), torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("binary", "decay", "problem"),
    [
        (("weight",), (), "in no group: bias"),
        (("weight", "gain"), ("bias",), "not in the model: gain"),
        (("weight",), ("weight", "bias"), "in several groups: weight"),
    ],
)
def test_a_split_that_is_no_partition_is_refused(binary: tuple[str, ...], decay: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        models.Split(binary, decay, (), model=nn.Linear(2, 2))


@pytest.mark.parametrize("policy", models.POLICIES)
def test_every_policy_partitions_and_adds_to_the_ends(policy: str) -> None:
    for name in ("resnet18", "vit_mini_patch2_8"):
        model = on_meta(name)
        split = models.binarize(model, ("ends", policy))
        assert {f"{layer}.weight" for layer in models.full_precision_layers(model)} <= set(split.decay)


def test_shortcuts_of_a_resnet_can_stay_exact() -> None:
    split = models.binarize(on_meta("resnet18"), ("ends", "shortcuts"))
    downsampling = [f"layer{stage}.0.downsample.0.weight" for stage in (2, 3, 4)]
    assert list(split.decay) == ["conv1.weight", *downsampling, "fc.weight"]
    assert len(split.binary) == 16


def test_attention_of_a_transformer_can_stay_exact() -> None:
    model = on_meta("vit_mini_patch2_8")
    split = models.binarize(model, ("ends", "attention"))
    assert split.binary == tuple(f"blocks.{i}.mlp.{layer}.weight" for i in range(2) for layer in ("fc1", "fc2"))
    assert type(model.get_submodule("blocks.0.attn.qkv")) is nn.Linear


def test_what_stays_exact_may_be_named_by_patterns_or_be_nothing() -> None:
    split = models.binarize(on_meta("vit_mini_patch2_8"), ("ends", "blocks.*.attn.qkv", "blocks.1"))
    assert split.binary == tuple(f"blocks.0.{layer}.weight" for layer in ("attn.proj", "mlp.fc1", "mlp.fc2"))
    everything = models.binarize(on_meta("resnet20"), ())
    assert not everything.decay
    assert {"conv1.weight", "fc.weight"} <= set(everything.binary)


def test_a_pattern_that_matches_no_layer_is_corrected() -> None:
    with pytest.raises(
        ValueError, match=r"unknown layers .* 'end'; did you mean 'ends'\? \(ends, shortcuts, attention\)"
    ):
        models.binarize(on_meta("resnet20"), ("end",))
    with pytest.raises(ValueError, match=r"no layer of CifarResNet matches it; its layers are conv1, .*, fc$"):
        models.binarize(on_meta("resnet20"), ("ends", "blocks.*"))


@pytest.mark.parametrize("scale", ["tensor", "channel"])
@pytest.mark.parametrize("name", ["resnet20", "vit_mini_patch2_8"])
def test_a_folded_scale_gives_the_same_logits_to_the_bit(name: str, scale: Scale) -> None:
    model = create(name)
    raw = {key: value.clone() for key, value in model.state_dict().items()}
    split = models.binarize(model, ("ends",), None, scale)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[key], raw[key]) for key in split.binary), "latents are the weights as they are"
    assert not any(key.endswith("gain") for key in parameters)
    group = {"params": [parameters[key] for key in split.binary], "quantizer": "bc", "scale": scale}
    ProxConnect(torch.optim.SGD([group], lr=0.1)).harden()
    images = torch.randn(3, *metadata(model)["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.eval()(images)
        models.fold_scales(model, split)
        assert torch.equal(model(images), before)
    assert all(bool((parameters[key].abs() == 1).all()) for key in split.binary)


def test_weights_without_a_scale_are_not_folded() -> None:
    model = create("vit_mini_patch2_8")
    split = models.binarize(model, ("ends",), None, "channel")
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv.weight: its weights are not -s and \+s"):
        models.fold_scales(model, split)


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_binary_inputs_behind_a_relu_are_refused_and_nothing_is_changed(name: str) -> None:
    model = models.create(name, num_classes=10, image_size=32)
    before, random_state = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(ValueError, match=r"^layer1\.0\.conv1: .* never negative .* bireal_\* or reactnet_\* model"):
        models.binarize(model, inputs=models.InputQuantization())
    assert torch.equal(torch.get_rng_state(), random_state)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_binary_inputs_of_a_transformer_are_those_of_its_linear_layers() -> None:
    model = create("vit_mini_patch2_8")
    models.binarize(model, inputs=models.InputQuantization("bnn"))
    quantized = {name for name, layer in model.named_modules() if isinstance(layer, BinaryInput)}
    assert quantized == {
        f"blocks.{i}.{layer}.inputs" for i in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }


def test_a_special_convolution_takes_no_binary_inputs() -> None:
    class Special(nn.Conv2d):
        pass

    model = nn.Sequential(nn.Conv2d(1, 2, 1), Special(2, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    model.pretrained_cfg = {"first_conv": "0", "classifier": "4", "input_size": (1, 2, 2)}  # type: ignore[assignment]
    with pytest.raises(ValueError, match="1 can't be binarized: a Special has no binary twin with binary inputs"):
        models.binarize(model, inputs=models.InputQuantization())


def test_frozen_norms_stay_frozen() -> None:
    model = models.create("resnet8", num_classes=10, image_size=8).train()
    norm = model.get_submodule("bn1").eval()
    models.binarize(model)
    assert not norm.training
    assert model.training
    assert model.get_submodule("layer1").training
