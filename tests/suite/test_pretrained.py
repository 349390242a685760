"""Published weights are loaded unchanged, or the error says which file to put where."""

import hashlib
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import models
from suite.training.pretrained import SUFFIXES, PretrainedError, pretrained

TAGGED = "resnet18.a1_in1k"


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., Path]:
    """Writes a state dict to a weights file in the data directory; returns its path."""

    def write(name: str, state: object, suffix: str = ".safetensors") -> Path:
        path = tmp_path / "weights" / f"{name}{suffix}"
        path.parent.mkdir(exist_ok=True)
        if suffix == ".safetensors":
            assert isinstance(state, dict)
            save_file({key: value.contiguous() for key, value in state.items()}, path)
        else:
            torch.save(state, path)
        return path

    return write


@pytest.fixture(autouse=True)
def _no_internet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Refuses every connection, and empties the cache."""

    def refuse(*_: object) -> None:
        raise ConnectionRefusedError("no internet in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def _drawn(name: str, num_classes: int, image_size: int, in_chans: int = 3, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return models.create(name, num_classes, image_size, in_chans)


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_local_file_is_loaded_exactly_and_its_checksum_returned(
    publish: Callable[..., Path], tmp_path: Path, suffix: str
) -> None:
    published = _drawn("resnet8", 10, 8, 1).state_dict()
    path = publish("resnet8", published, suffix)
    model, checksum = pretrained("resnet8", 10, 8, 1, tmp_path)
    assert _equal(model.state_dict(), published)
    assert checksum == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_loads_is_a_model_that_can_be_binarized(publish: Callable[..., Path], tmp_path: Path) -> None:
    publish(TAGGED, _drawn(TAGGED, 1000, 64).state_dict())
    model, _ = pretrained(TAGGED, 10, 64, 3, tmp_path)
    split = models.binarize(model)
    assert "conv1.weight" not in split.binary
    assert len(split.binary) > 10
    assert model.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize(("name", "size", "head"), [(TAGGED, 64, "fc"), ("vit_mini_patch4_32", 32, "head")])
def test_a_head_of_another_number_of_classes_is_drawn_from_the_callers_seed(
    publish: Callable[..., Path], tmp_path: Path, name: str, size: int, head: str
) -> None:
    published = _drawn(name, 20, size).state_dict()
    publish(name, published)
    fresh = _drawn(name, 7, size, seed=5)
    state_of_a_fresh_one = torch.get_rng_state()
    torch.manual_seed(5)
    model, _ = pretrained(name, 7, size, 3, tmp_path)
    assert torch.equal(torch.get_rng_state(), state_of_a_fresh_one)
    for key, value in model.state_dict().items():
        expected = fresh.state_dict() if key.startswith(f"{head}.") else published
        assert torch.equal(value, expected[key]), key


def test_every_head_of_a_distilled_model_is_drawn(publish: Callable[..., Path], tmp_path: Path) -> None:
    name = "deit_tiny_distilled_patch16_224"
    publish(name, _drawn(name, 20, 32).state_dict())
    model, _ = pretrained(name, 7, 32, 3, tmp_path)
    assert model.get_parameter("head.weight").shape == model.get_parameter("head_dist.weight").shape == (7, 192)


def test_published_weights_without_a_head_get_a_drawn_one(publish: Callable[..., Path], tmp_path: Path) -> None:
    name = "vit_small_patch16_224.dino"
    published = _drawn(name, 0, 32).state_dict()
    assert not any(key.startswith("head.") for key in published)
    publish(name, published)
    model, _ = pretrained(name, 7, 32, 3, tmp_path)
    assert torch.equal(model.get_parameter("norm.weight"), published["norm.weight"])
    assert model.get_parameter("head.weight").shape == (7, 384)


def test_a_first_layer_for_colour_is_summed_for_grey(publish: Callable[..., Path], tmp_path: Path) -> None:
    published = _drawn("resnet18", 20, 64).state_dict()
    publish("resnet18", published)
    model, _ = pretrained("resnet18", 20, 64, 1, tmp_path)
    assert torch.allclose(model.get_parameter("conv1.weight"), published["conv1.weight"].sum(1, keepdim=True))
    assert torch.equal(model.get_parameter("fc.weight"), published["fc.weight"])


def test_position_embeddings_are_resampled_for_another_image_size(publish: Callable[..., Path], tmp_path: Path) -> None:
    published = _drawn("deit_tiny_patch16_224", 20, 64).state_dict()
    publish("deit_tiny_patch16_224", published)
    model, _ = pretrained("deit_tiny_patch16_224", 20, 96, 3, tmp_path)
    assert published["pos_embed"].shape == (1, 1 + 4 * 4, 192)
    assert model.get_parameter("pos_embed").shape == (1, 1 + 6 * 6, 192)
    assert torch.equal(model.get_parameter("cls_token"), published["cls_token"])
    assert model.eval()(torch.randn(1, 3, 96, 96)).shape == (1, 20)


def test_a_training_checkpoints_weights_are_found_in_it(publish: Callable[..., Path], tmp_path: Path) -> None:
    published = _drawn("resnet8", 10, 8, 1).state_dict()
    wrapped = {f"module.{key}": value for key, value in published.items()}
    publish("resnet8", {"epoch": 3, "state_dict": wrapped}, ".pth")
    model, _ = pretrained("resnet8", 10, 8, 1, tmp_path)
    assert _equal(model.state_dict(), published)


def _refusal(name: str, data_dir: Path, size: int = 8, in_chans: int = 1) -> str:
    with pytest.raises(PretrainedError) as caught:
        pretrained(name, 10, size, in_chans, data_dir)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


@pytest.mark.parametrize("num_classes", [10, 20], ids=["same head", "another head"])
def test_weights_that_do_not_fit_are_refused_with_the_first_keys(
    publish: Callable[..., Path], tmp_path: Path, num_classes: int
) -> None:
    state = _drawn("resnet8", num_classes, 8, 1).state_dict()
    lacking = {key: value for key, value in state.items() if not key.startswith("layer2")}
    path = publish("resnet8", lacking)
    message = _refusal("resnet8", tmp_path)
    assert message.startswith(f"{path}: not the weights of resnet8: ")
    assert "layer2.0.conv1.weight" in message

    publish("resnet8", {**state, "extra.weight": torch.zeros(1)})
    assert "extra.weight" in _refusal("resnet8", tmp_path)

    publish("resnet8", {**state, "layer2.0.conv1.weight": torch.zeros(1, 2, 3, 3)})
    assert "layer2.0.conv1.weight" in _refusal("resnet8", tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"PK\x03\x04torn"])
def test_a_file_that_is_none_is_refused_by_name(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / "weights" / f"resnet8{suffix}"
    path.parent.mkdir()
    path.write_bytes(content)
    assert _refusal("resnet8", tmp_path).startswith(f"{path}: cannot be read as weights: ")


def test_code_in_a_pickle_is_not_run(publish: Callable[..., Path], tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(ran),)

    publish("resnet8", {"conv1.weight": Bomb()}, ".pth")
    assert "cannot be read as weights" in _refusal("resnet8", tmp_path)
    assert not ran.exists()


def test_something_else_than_tensors_is_refused(publish: Callable[..., Path], tmp_path: Path) -> None:
    publish("resnet8", {"epoch": 3}, ".pth")
    assert "'epoch' is no tensor" in _refusal("resnet8", tmp_path)


def test_a_name_without_a_tag_is_answered_with_its_tags(tmp_path: Path) -> None:
    message = _refusal("resnet18", tmp_path, 64, 3)
    assert "resnet18 has published weights as resnet18.a1_in1k, " in message
    assert str(tmp_path / "weights" / "resnet18.safetensors") in message


def test_a_model_nobody_published_says_where_to_put_ones_own(tmp_path: Path) -> None:
    place = tmp_path / "weights" / "resnet8.safetensors"
    assert _refusal("resnet8", tmp_path).endswith(f"resnet8 has no published weights: put your own at {place}")


def test_weights_that_are_not_on_the_hub_name_their_address(tmp_path: Path) -> None:
    message = _refusal("legacy_seresnet18.in1k", tmp_path, 64, 3)
    assert re.search(r"put https://\S+seresnet18\S+\.pth at \S+legacy_seresnet18\.in1k\.pth", message)


def test_without_internet_the_message_names_the_file_and_the_address(tmp_path: Path) -> None:
    message = _refusal(TAGGED, tmp_path, 64, 3)
    assert str(tmp_path / "weights" / f"{TAGGED}.safetensors") in message
    assert "https://huggingface.co/timm/resnet18.a1_in1k/resolve/main/model.safetensors" in message
    assert "ConnectError" in message


def test_a_hub_that_never_answers_is_given_up_in_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()  # this test connects to its own socket, which accepts and stays silent
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/weights"
        monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda *_: address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("suite.training.pretrained._HUB_TIMEOUT_SECONDS", 0.5)
        start = time.perf_counter()
        message = _refusal(TAGGED, tmp_path, 64, 3)
        assert 0.5 < time.perf_counter() - start < 10
    assert f"{address} cannot be downloaded (ReadTimeout)" in message


def test_the_hubs_file_is_taken_and_its_checksum_returned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    published = _drawn(TAGGED, 1000, 64).state_dict()
    cached = tmp_path / "model.safetensors"
    save_file(published, cached)
    asked = []

    def download(hub_id: str, file: str) -> str:
        asked.append((hub_id, file))
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model, checksum = pretrained(TAGGED, 1000, 64, 3, tmp_path)
    assert asked == [("timm/resnet18.a1_in1k", "model.safetensors")]
    assert _equal(model.state_dict(), published)
    assert checksum == hashlib.sha256(cached.read_bytes()).hexdigest()


def test_a_local_file_goes_before_the_hub(
    monkeypatch: pytest.MonkeyPatch, publish: Callable[..., Path], tmp_path: Path
) -> None:
    published = _drawn(TAGGED, 1000, 64).state_dict()
    publish(TAGGED, published)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: pytest.fail("the hub was asked"))
    assert _equal(pretrained(TAGGED, 1000, 64, 3, tmp_path)[0].state_dict(), published)
