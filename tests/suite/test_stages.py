"""Parents and teachers: which cells of a grid others start or learn from, and what they use of them."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from tiny_cells import tiny_cell, tiny_grid
from torch import Tensor, nn

import models
from suite.data.augmentation import Normalization
from suite.data.source import Description
from suite.engines.process_group import Layout
from suite.recipe.cell import Cell
from suite.recipe.grid import Grid
from suite.recipe.grid_file import GridError, load_grid
from suite.recipe.settings import Distillation
from suite.run import checkpoint
from suite.run.checkpoint import CheckpointError
from suite.run.directory import RunDir
from suite.train import train
from suite.training.losses import Distilled, build_criterion
from suite.training.pretrained import PretrainedError
from suite.training.teacher import Teacher, published
from suite.training.trainer import Trainer

NOWHERE = Path("no-data-needed")
DIGITS = Description(tuple("0123456789"), 8, 1)
# ReActNet's two stages: inputs binary first, then weights; both learn from a full-precision network.
STAGES: list[dict[str, Any]] = [
    {"quantizers": ["fp"]},
    {
        "models": ["bireal_resnet8"],
        "task": "ba",
        "quantizers": ["fp"],
        "distillation": {"teacher": {"model": "resnet8"}},
    },
    {
        "models": ["bireal_resnet8"],
        "task": "bwa",
        "init": "finetune",
        "quantizers": ["bc", "bnn++"],
        "parent": {"task": "ba"},
        "distillation": {"teacher": {"model": "resnet8"}, "share": 1.0},
    },
]


def _grid(folder: Path, **changes: object) -> Grid:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(tiny_grid(**changes), sort_keys=False), encoding="utf-8")
    return load_grid(str(path))


def _by_name(grid: Grid) -> dict[str, Cell]:
    return {cell.name: cell for cell in grid.cells()}


def test_stages_and_teachers_are_linked_and_come_before_what_needs_them(tmp_path: Path) -> None:
    grid = _grid(tmp_path, blocks=STAGES, seeds=[0, 1])
    cells = _by_name(grid)
    teacher, first = cells["digits/resnet8/fp/s1"], cells["digits/bireal_resnet8/fp/s1/ba"]
    second = cells["digits/bireal_resnet8/bnn++/s1/finetune/bwa"]
    assert teacher.needs == ()
    assert first.needs == (teacher.id,)
    assert second.needs == (first.id, teacher.id)
    assert (second.parent, second.teacher) == (first.id, teacher.id)
    assert second.distillation == Distillation(share=1.0, temperature=1.0)
    order = [cell.id for cell in grid.cells()]
    assert all(order.index(each) < order.index(cell.id) for cell in grid.cells() for each in cell.needs)
    assert len(order) == 8


def test_a_recipe_is_the_same_for_all_seeds_whoever_the_teacher_is(tmp_path: Path) -> None:
    cells = _by_name(_grid(tmp_path, blocks=STAGES, seeds=[0, 1]))
    own = [cells[f"digits/bireal_resnet8/bc/s{seed}/finetune/bwa"] for seed in (0, 1)]
    assert own[0].recipe_id == own[1].recipe_id
    assert own[0].teacher != own[1].teacher


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distillation": {}}, "digits/resnet8/fp/s0 would wait for itself"),
        (
            {"quantizers": ["bnn++"], "distillation": {"teacher": {"model": "resnet20"}}},
            "bnn++/s0 learns from the one full-precision cell of resnet20 of its seed; the grid has none",
        ),
        ({"parent": {"task": "ba"}}, "parent: changes nothing: only with init: finetune, here it is scratch"),
        ({"task": "ba"}, "task: ba leaves weights real, for quantizers: [fp]; bnn++ makes them binary"),
        (
            {"blocks": [{}, {"quantizers": ["bnn++"], "init": "finetune", "parent": {"model": "resnet20"}}]},
            "parent.model: a parent always has the same architecture",
        ),
        (
            {"distillation": {"teacher": {}, "weights": "resnet18"}},
            "distillation.weights: only one teacher is allowed, and a cell is given",
        ),
        (
            {
                "blocks": [
                    {"quantizers": ["fp"], "data": {"mean": [0.5], "std": [0.5]}},
                    {"quantizers": ["bnn++"], "distillation": {}},
                ]
            },
            "gets different images: data.mean is None for the first and (0.5,) for the second",
        ),
        (
            {
                "blocks": [
                    {"quantizers": ["fp"], "training": {"reestimate_norm": True}},
                    {"quantizers": ["bnn++"], "distillation": {}},
                ]
            },
            "re-estimates its norms, so it cannot be a teacher",
        ),
        (
            {
                "blocks": [
                    {"quantizers": ["bnn++"], "quantization": {"scale": "tensor"}},
                    {"quantizers": ["bc"], "init": "finetune", "parent": {"quantizer": "bnn++"}},
                ]
            },
            "whose layers differ: quantization.scale must be the same in both",
        ),
    ],
)
def test_links_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GridError, match=re.escape(message)):
        _grid(tmp_path, **changes)


def test_a_block_without_full_precision_may_learn_from_that_of_another(tmp_path: Path) -> None:
    cells = _by_name(_grid(tmp_path, blocks=[{"quantizers": ["fp"]}, {"quantizers": ["bnn++"], "distillation": {}}]))
    assert cells["digits/resnet8/bnn++/s0"].teacher == cells["digits/resnet8/fp/s0"].id


def test_trials_learn_from_teachers_of_their_own_seeds(tmp_path: Path) -> None:
    tune = {"training.learning_rate": [0.001, 0.01], "trials": 2, "seeds": [1000]}
    blocks = [{"quantizers": ["fp"]}, {"quantizers": ["bnn++"], "distillation": {}, "tune": tune}]
    resolved = _grid(tmp_path, blocks=blocks).resolve()
    by_id = {cell.id: cell for cell in resolved.cells}
    trials = [cell for cell in resolved.cells if cell.trial and cell.quantizer == "bnn++"]
    assert len(trials) == 2
    teachers = [by_id[cell.teacher or ""] for cell in trials]
    assert {(each.quantizer, each.seed, each.trial) for each in teachers} == {("fp", 1000, True)}
    assert len({each.id for each in teachers}) == 1


def test_the_distillation_loss_is_what_a_hand_computes() -> None:
    """Two images, two classes, T = 2, share 0.3, computed from logarithms of hand-made probabilities."""
    logits, soft = torch.tensor([[2.0, 0.0], [0.0, -2.0]]), torch.tensor([[0.0, 2.0], [4.0, 0.0]])
    criterion = Distilled(nn.CrossEntropyLoss(), Distillation(share=0.3, temperature=2.0))

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    divergences = []
    for ours, theirs in ((1.0, -1.0), (1.0, 2.0)):  # differences of logits over T
        p, q = sigmoid(theirs), sigmoid(ours)
        divergences.append(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    of_labels = (-math.log(sigmoid(2.0)) - math.log(1 - sigmoid(2.0))) / 2
    expected = 0.7 * of_labels + 0.3 * 4 * sum(divergences) / 2
    assert criterion(logits, torch.tensor([0, 1]), soft).item() == pytest.approx(expected, rel=1e-6)


def test_with_share_1_and_temperature_1_the_gradient_is_reactnets() -> None:
    generator = torch.Generator().manual_seed(0)
    soft, labels = torch.randn(5, 7, generator=generator), torch.zeros(5, dtype=torch.int64)
    gradients = []
    for of in ("ours", "distributional"):
        logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
        if of == "ours":
            loss = Distilled(nn.CrossEntropyLoss(), Distillation(share=1.0))(logits, labels, soft)
        else:
            loss = -(soft.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        torch.autograd.backward(loss)
        gradients.append(logits.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_cell_without_a_teacher_has_the_loss_that_it_had() -> None:
    assert type(build_criterion(tiny_cell())) is nn.CrossEntropyLoss


def test_two_stages_and_their_teacher_train_one_after_another(tmp_path: Path) -> None:
    grid = _grid(tmp_path, blocks=STAGES, training={"epochs": 1, "batch_size": 256, "learning_rate": 0.01})
    runs = {}
    for cell in grid.cells():
        runs[cell.name] = run = RunDir.create(tmp_path / "grid" / cell.id, cell)
        train(run, NOWHERE)
        assert run.result() is not None
    first = runs["digits/bireal_resnet8/fp/s0/ba"]
    # Real weights and binary inputs: no weight is quantized, and the tested network has hard inputs.
    assert (first.result() or {})["num_binary_parameters"] == 0


def test_the_second_stage_starts_from_the_weights_of_the_first(tmp_path: Path) -> None:
    cells = _by_name(_grid(tmp_path, blocks=STAGES, training={"epochs": 1, "batch_size": 256, "learning_rate": 0.01}))
    first = cells["digits/bireal_resnet8/fp/s0/ba"].model_copy(update={"teacher": None, "distillation": None})
    run = RunDir.create(tmp_path / first.id, first)
    train(run, NOWHERE)
    second = cells["digits/bireal_resnet8/bc/s0/finetune/bwa"].model_copy(
        update={"parent": first.id, "teacher": None, "distillation": None}
    )
    from suite.train import _parent_weights

    weights = _parent_weights(RunDir(tmp_path / second.id), second)
    trainer = Trainer(second, Layout(), NOWHERE, weights)
    assert weights is not None
    for name in trainer.split.binary:
        raw = weights.values[name]
        expected = (raw / (2 * raw.abs().mean())).clamp(-1, 1)
        torch.testing.assert_close(trainer.optimizer.latent(trainer.engine.model.get_parameter(name)), expected)
    assert torch.equal(trainer.engine.model.get_parameter("conv1.weight"), weights.values["conv1.weight"])


@pytest.mark.parametrize("model", ["resnet8", "vit_mini_patch2_8"])
def test_a_binary_parent_hands_its_latents_and_gains_on(tmp_path: Path, model: str) -> None:
    from suite.train import _parent_weights

    parent = tiny_cell(model=model, training__epochs=1)
    train(RunDir.create(tmp_path / parent.id, parent), NOWHERE)
    child = tiny_cell(model=model, quantizer="bc", init="finetune", quantization__sharpness={}, parent=parent.id)
    weights = _parent_weights(RunDir(tmp_path / child.id), child)
    assert weights is not None
    assert weights.are_latents
    trainer = Trainer(child, Layout(), NOWHERE, weights)
    for name, parameter in trainer.engine.model.named_parameters():
        held = trainer.optimizer.latent(parameter) if name in trainer.split.binary else parameter
        assert torch.equal(held, weights.values[name]), name
    latents = torch.cat([weights.values[name].flatten() for name in trainer.split.binary])
    assert not bool((latents.abs() == 1).all()), "w* and not its sign"


def test_a_cell_whose_teacher_is_not_done_says_so(tmp_path: Path) -> None:
    cells = _by_name(_grid(tmp_path, blocks=[{"quantizers": ["fp"]}, {"quantizers": ["bnn++"], "distillation": {}}]))
    teacher, cell = cells["digits/resnet8/fp/s0"], cells["digits/resnet8/bnn++/s0"]
    RunDir.create(tmp_path / teacher.id, teacher)
    with pytest.raises(CheckpointError, match="the cell that this one needs is not done"):
        train(RunDir.create(tmp_path / cell.id, cell), NOWHERE)


class _Counting(nn.Module):
    """Returns the image's first ten pixels as logits; records its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls: list[tuple[bool, int, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append((self.training, len(images), torch.is_grad_enabled()))
        return images.flatten(1)[:, :10] * self.weight


def test_a_teacher_runs_once_a_batch_in_evaluation_mode_whatever_the_micro_batches() -> None:
    from suite.recipe.settings import Execution

    model = _Counting()
    cell = tiny_cell(distillation={"share": 0.5}, training__batch_size=64)
    trainer = Trainer(cell, Layout(), NOWHERE, None, Execution(micro_batch_size=16), teacher=Teacher(model, "float32"))
    with pytest.raises(StopIteration):
        trainer.train_epoch(_stop_after_two)
    assert model.calls == [(False, 64, False)] * 2
    assert model.weight.grad is None


def test_a_distilled_run_resumes_to_the_bit(tmp_path: Path) -> None:
    cell = tiny_cell(distillation={"share": 0.7, "temperature": 2.0}, training__batch_size=256)

    def trainer(*, is_resumed: bool = False) -> Trainer:
        return Trainer(cell, Layout(), NOWHERE, None, is_resumed=is_resumed, teacher=Teacher(_Counting(), "float32"))

    straight, stopped = trainer(), trainer()
    for _ in range(2):
        straight.train_epoch(lambda _step, _loss: None)
    stopped.train_epoch(lambda _step, _loss: None)
    path = checkpoint.save(tmp_path, stopped.state_dict())
    resumed = trainer(is_resumed=True)
    resumed.load_state_dict(checkpoint.load(path, cell.id, torch.device("cpu")))
    resumed.train_epoch(lambda _step, _loss: None)
    assert resumed.weights_digest() == straight.weights_digest()


def _stop_after_two(number: int, _loss: Tensor) -> None:
    if number == 1:
        raise StopIteration


def test_what_a_teacher_says_moves_the_student() -> None:
    losses = []
    for share in (0.1, 1.0):
        cell = tiny_cell(distillation={"share": share, "temperature": 4.0}, training__batch_size=256)
        trainer = Trainer(cell, Layout(), NOWHERE, None, teacher=Teacher(_Counting(), "float32"))
        losses.append(trainer.train_epoch(lambda _step, _loss: None)["train/loss"])
    assert losses[0] != losses[1]


def _teacher_file(folder: Path, name: str, num_classes: int = 10) -> nn.Module:
    torch.manual_seed(5)
    model = models.create(name, num_classes, 32, 3)
    (folder / "weights").mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "weights" / f"{name}.safetensors")
    return model


def test_a_published_teacher_sees_images_normalised_as_its_own(tmp_path: Path) -> None:
    model = _teacher_file(tmp_path, "resnet18").eval()
    cell = tiny_cell(dataset="cifar10", distillation={"weights": "resnet18", "share": 1.0})
    ours = Normalization(torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3]))
    theirs = timm.get_pretrained_cfg("resnet18")
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    description = Description(tuple("0123456789"), 32, 3)
    teacher, checksum = published(cell, description, Layout(), tmp_path, ours)
    with torch.no_grad():
        expected = model(Normalization(torch.tensor(theirs.mean), torch.tensor(theirs.std))(pixels))
    torch.testing.assert_close(teacher.logits(ours(pixels)), expected, rtol=1e-4, atol=1e-4)
    assert len(checksum) == 64


def test_a_published_teacher_of_other_classes_is_refused(tmp_path: Path) -> None:
    _teacher_file(tmp_path, "resnet18", 7)
    cell = tiny_cell(dataset="cifar10", distillation={"weights": "resnet18"})
    ours = Normalization(torch.zeros(3), torch.ones(3))
    with pytest.raises(PretrainedError, match="for 7 classes, but the data set has 10"):
        published(cell, Description(tuple("0123456789"), 32, 3), Layout(), tmp_path, ours)
