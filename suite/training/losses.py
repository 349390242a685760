"""The loss of a recipe: for labels, mixed labels, and a teacher's outputs."""

from torch import Tensor, nn

from suite.recipe.cell import Cell
from suite.recipe.settings import Distillation, Training
from suite.training.mixup import mixes


def build_criterion(cell: Cell) -> nn.Module:
    """The recipe's mean loss over the batch: (logits, labels) -> [], or with a teacher (logits, labels, soft) -> []."""
    of_labels = _of_labels(cell.training)
    return of_labels if cell.distillation is None else Distilled(of_labels, cell.distillation)


class Distilled(nn.Module):
    """(1 - share) of_labels(z, y) + share T^2 KL(softmax(t / T) | softmax(z / T)), KL the mean over the batch."""

    def __init__(self, of_labels: nn.Module, distillation: Distillation) -> None:
        super().__init__()
        self.of_labels, self.share, self.temperature = of_labels, distillation.share, distillation.temperature

    def forward(self, logits: Tensor, labels: Tensor, soft: Tensor) -> Tensor:
        """Logits and soft: [B, classes]; labels: as for `of_labels`. Computed in float32 for logits of any dtype."""
        ours, theirs = ((each.float() / self.temperature).log_softmax(1) for each in (logits, soft))
        divergence = nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        loss = self.share * self.temperature**2 * divergence
        return loss if self.share == 1 else (1 - self.share) * self.of_labels(logits, labels) + loss


def _of_labels(training: Training) -> nn.Module:
    """The mean loss over a batch. It smooths labels, unless mixing has already smoothed them."""
    from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy

    smoothing = 0.0 if mixes(training) else training.label_smoothing
    criterion: nn.Module
    if training.loss == "bce":
        criterion = BinaryCrossEntropy(smoothing)
    elif smoothing:
        criterion = LabelSmoothingCrossEntropy(smoothing)
    else:
        criterion = nn.CrossEntropyLoss()
    return criterion
