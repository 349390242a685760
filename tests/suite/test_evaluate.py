"""Accuracy counts every sample once; the health of latents is what it says."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from suite.engines.ddp import PlainEngine
from suite.engines.process_group import Layout
from suite.engines.protocol import Latent
from suite.training.evaluation import Health, top1


class _Echo(PlainEngine):
    """Answers with the images themselves: they are the logits."""

    def __init__(self) -> None:
        self.model = nn.Identity()

    def logits(self, images: Tensor) -> Tensor:
        return images


def test_top1_is_the_share_of_right_answers_whatever_the_batches() -> None:
    logits, labels = torch.eye(10), torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 0, 0])
    batches = list(zip(torch.split(logits, 3), torch.split(labels, 3), strict=True))
    assert top1(_Echo(), batches, Layout()) == 0.7


def test_accuracy_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        top1(_Echo(), [], Layout())


def _latents(values: Tensor, quantizer: str, mu: float = 1.0) -> Callable[[], Iterator[Latent]]:
    return lambda: iter([Latent("weight", values, quantizer, mu)])


def test_health_is_measured_on_the_latents() -> None:
    w_star = torch.tensor([0.5, -0.5, 2.0, -0.25])
    health = Health(_latents(w_star, "bnn"))
    first = health.measure()
    assert first == {
        "health/flip_rate": 0.0,
        "health/latent_gap": pytest.approx((0.5 + 0.5 + 1.0 + 0.75) / 4),
        "health/masked_share": 0.25,  # BinaryNet's B is 0 past 1
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
    assert health.measure()["health/flip_rate"] == pytest.approx(5 / 6)  # -0.0 counts as positive, as 0 does


def test_full_precision_has_no_health_to_measure() -> None:
    assert Health(lambda: iter([])).measure() == {}
