"""Every snippet of docs/your-training-loop.md runs and trains its model.

The DDP and FSDP2 snippets run among the programs of `two_ranks`. The Lightning and Accelerate snippets run if these
packages are installed: python -m pip install lightning accelerate
"""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from page import SNIPPETS, given, run
from torch import Tensor


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)  # some snippets write files
    return given()


def are_signs(weights: list[Tensor]) -> bool:
    return all(bool((w.abs() == 1).all()) for w in weights)


def test_page_has_a_snippet_for_each_framework() -> None:
    frameworks = {"In your own training loop", "timm's train script", "Lightning", "Accelerate", "DDP", "FSDP2"}
    assert frameworks <= SNIPPETS.keys()


def test_plain_torch_then_resume_then_average_then_export(names: dict[str, Any]) -> None:
    run("In your own training loop", names)
    assert [are_signs(weights) for weights in names["evaluations"]] == [True, True]
    trained = [p.detach().clone() for p in names["binary"]]

    run("Save and resume", names)
    assert all(torch.equal(p, before) for p, before in zip(names["binary"], trained, strict=True))

    run("Averages of the weights", names)
    assert are_signs(names["evaluations"][-1])

    run("Export", names)
    hidden = names["binary"][0]
    assert are_signs(names["binary"])
    assert names["packed"]["0.weight"].numel() * 8 == hidden.numel()


def test_timm(names: dict[str, Any]) -> None:
    names["loader"] = [(torch.randn(4, 3, 32, 32), torch.randint(4, (4,))) for _ in range(2)]
    names["args"] = argparse.Namespace(
        model="test_resnet", num_classes=4, seed=0, rank=0, opt="adamw", lr=1e-3, weight_decay=0.05, momentum=0.9,
        sched="cosine", epochs=2, min_lr=0.0, warmup_lr=1e-5, warmup_epochs=1, cooldown_epochs=0, clip_grad=1.0,
    )  # fmt: skip
    run("timm's train script", names)
    assert len(names["evaluations"]) == 2
    assert all(are_signs(weights) for weights in names["evaluations"])


def needs(framework: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(framework) is None
    return pytest.mark.skipif(missing, reason="lightning and accelerate are optional: pip install them to run this")


@needs("lightning")
@pytest.mark.filterwarnings("ignore")
def test_lightning(names: dict[str, Any]) -> None:
    images, labels = (torch.cat(each) for each in zip(*names["loader"], strict=True))
    dataset = torch.utils.data.TensorDataset(images, labels)
    names["loader"] = torch.utils.data.DataLoader(dataset, batch_size=16)
    run("Lightning", names)
    prox = names["trainer"].optimizers[0]
    assert names["trainer"].global_step == 8
    assert prox.param_groups[0]["mu"] == 500
    assert not are_signs(names["binary"])
    (checkpoint,) = Path("lightning_logs").rglob("*.ckpt")
    resumed = names["lightning"].Trainer(max_epochs=3, accelerator="cpu", gradient_clip_val=1.0)
    resumed.fit(names["Classifier"](names["model"]), names["loader"], names["loader"], ckpt_path=checkpoint)
    assert resumed.global_step == 12


@needs("accelerate")
@pytest.mark.filterwarnings("ignore")
def test_accelerate(names: dict[str, Any]) -> None:
    before = [p.detach().clone() for p in names["binary"]]
    run("Accelerate", names)
    assert are_signs(names["evaluations"][-1])
    latents = [names["prox"].latent(p) for p in names["binary"]]
    assert not any(torch.equal(w_star, start) for w_star, start in zip(latents, before, strict=True))
