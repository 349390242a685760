"""Accuracy counts every sample once; the health metrics of latents are correct."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from quantizers import get
from suite.data.augmentation import IMAGENET
from suite.data.loader import Loader
from suite.engines.ddp import PlainEngine
from suite.engines.process_group import Layout
from suite.engines.protocol import Latent
from suite.errors import DataError
from suite.recipe.settings import Data
from suite.run.failures import DivergedError
from suite.training.evaluation import Evaluation, Health, evaluate


class _Echo(PlainEngine):
    """Returns the images as the logits."""

    def __init__(self) -> None:
        self.model = nn.Identity()

    def logits(self, images: Tensor) -> Tensor:
        return images


class _Logits:
    """A reader whose images are logits."""

    name = "memory"

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        self.logits, self.labels = logits, labels


class _Parrot(Loader):
    """A loader of unchanged logits, in batches of three."""

    def __init__(self, logits: Tensor, labels: Tensor, layout: Layout) -> None:
        super().__init__(_Logits(logits, labels), Data(), 1, IMAGENET, 3 * layout.world_size, 0, layout)  # type: ignore[arg-type]

    def _finished(self, batches: Sequence[Tensor], *_others: object) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            yield self.reader.logits[batch], self.reader.labels[batch]  # type: ignore[attr-defined]


def _alone(logits: Tensor, labels: Tensor, size: int | None = None) -> Evaluation:
    return evaluate(_Echo(), _Parrot(logits, labels, Layout()), Layout(), size)


@pytest.mark.parametrize("size", [None, 1, 2])
def test_an_evaluation_is_of_all_samples_whatever_the_batches(size: int | None) -> None:
    logits, labels = torch.eye(10), torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 0, 0])
    found = _alone(logits, labels, size)
    assert (found.top1, found.top5) == (0.7, None)
    assert found.right.tolist() == [True] * 7 + [False] * 3
    assert found.loss == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert list(found.metrics("test", "_hard")) == ["test/top1_hard", "test/loss_hard"]


def test_of_more_than_ten_classes_the_first_five_count_too() -> None:
    logits = torch.arange(11.0).repeat(4, 1)
    found = _alone(logits, torch.tensor([10, 6, 5, 0]))
    assert (found.top1, found.top5) == (0.25, 0.5)
    assert "val/top5" in found.metrics("val")


@pytest.mark.parametrize("num", [1, 2, 5, 6, 7])
def test_processes_make_equally_many_passes_and_count_no_sample_twice(num: int) -> None:
    logits, labels = torch.eye(10)[:num], torch.zeros(num, dtype=torch.int64)
    passes = []
    for rank in range(3):
        layout = Layout(rank, 3)
        passes.append([len(y) for _, y in _Parrot(logits, labels, layout).evaluation(1)])
    assert passes[0] == passes[1] == passes[2] == [1] * -(-num // 3)


def test_accuracy_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="the part has no images"):
        _alone(torch.empty(0, 10), torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_latents_that_a_sign_would_hide_are_told(bad: float) -> None:
    health = Health(_latents(torch.tensor([0.5, -0.5]), "bc"))
    health.latents = _latents(torch.tensor([0.5, bad]), "bc")
    with pytest.raises(DivergedError, match="1 of the 2 latents of weight are NaN or infinite"):
        health.measure()


def _latents(values: Tensor, quantizer: str, mu: float = 1.0) -> Callable[[], Iterator[Latent]]:
    return lambda: iter([Latent("weight", values, get(quantizer), mu)])


def test_health_is_measured_on_the_latents() -> None:
    w_star = torch.tensor([0.5, -0.5, 2.0, -0.25])
    health = Health(_latents(w_star, "bnn"))
    first = health.measure()
    assert first == {
        "health/flip_rate": 0.0,
        "health/latent_gap": pytest.approx((0.5 + 0.5 + 1.0 + 0.75) / 4),
        "health/masked_share": 0.25,  # BinaryNet's B is 0 beyond 1
    }
    w_star.copy_(torch.tensor([-0.5, -0.5, 2.0, 0.25]))
    assert health.measure()["health/flip_rate"] == 0.5
    assert health.measure()["health/flip_rate"] == 0.0


def test_a_sharp_sign_swish_masks_all_but_what_lies_near_zero() -> None:
    w_star = torch.tensor([0.5, -0.5, 0.001, 0.0])
    assert Health(_latents(w_star, "bnn++", mu=100.0)).measure()["health/masked_share"] == 0.5
    assert Health(_latents(w_star, "bc")).measure()["health/masked_share"] == 0.0


def test_health_goes_on_from_the_signs_that_were_saved() -> None:
    w_star = torch.tensor([[0.5, -0.5, 2.0], [-0.25, 0.0, -1.0]])
    saved = Health(_latents(w_star, "bnn")).state_dict()
    assert saved["weight"].dtype == torch.uint8
    w_star.neg_()
    health = Health(_latents(w_star, "bnn"))
    health.load_state_dict(saved)
    assert health.measure()["health/flip_rate"] == pytest.approx(5 / 6)  # -0.0 counts as positive, like 0


def test_full_precision_has_no_health_to_measure() -> None:
    assert Health(lambda: iter([])).measure() == {}
