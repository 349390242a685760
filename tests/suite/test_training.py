"""A run gives the same bits each time, even after being killed; its result is measured with truly binary weights."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quantizers import QUANTIZERS
from suite.engines.process_group import Layout
from suite.recipe.cell import Cell
from suite.recipe.settings import Execution
from suite.run import journal
from suite.run.directory import RunDir
from suite.run.failures import DivergedError
from suite.train import Options, first_steps, main, open_run, train
from suite.training.evaluation import Evaluation, evaluate
from suite.training.trainer import Trainer

NOWHERE = Path("no-data-needed")


def _trainer(cell: Cell) -> Trainer:
    return Trainer(cell, Layout(), NOWHERE, None)


def _constant(quantizer: str, mu: float) -> dict[str, Any]:
    return {} if quantizer == "fp" else {quantizer: {"start": mu}}


def _losses(run: RunDir) -> dict[int, float]:
    return {epoch: metrics["train/loss"] for epoch, metrics in journal.read_metrics(run.journal).items()}


def _result(run: RunDir) -> dict[str, Any]:
    result = run.result()
    assert result is not None
    return result


def _run(run: RunDir, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    module = [*(torchrun if processes > 1 else []), "suite.train", str(run.cell_path), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # two processes, one GPU at most
    return subprocess.run([sys.executable, "-m", *module], env=environment, capture_output=True, text=True, check=False)


def test_two_runs_of_one_cell_give_the_same_bits(make_run: Callable[..., RunDir]) -> None:
    runs = [make_run(grid) for grid in ("once", "again")]
    for run in runs:
        train(run, NOWHERE)
    once, again = runs
    assert _result(once) == _result(again)
    assert _losses(once) == _losses(again)
    assert len(_losses(once)) == 2


def test_another_seed_gives_other_weights(make_cell: Callable[..., Cell]) -> None:
    digests = set()
    for seed in (0, 1):
        trainer = _trainer(make_cell(seed=seed, training__epochs=1))
        trainer.train_epoch(lambda _step, _loss: None)
        digests.add(trainer.weights_digest())
    assert len(digests) == 2


def test_all_methods_of_a_seed_start_from_the_same_network_and_see_the_same_data(
    make_cell: Callable[..., Cell],
) -> None:
    trainers = [
        _trainer(make_cell(quantizer=name, quantization__sharpness=_constant(name, 1.0))) for name in QUANTIZERS
    ]
    first_batches = [next(trainer.loaders.train.epoch(0))[0] for trainer in trainers]
    heads = [trainer.engine.model.get_parameter("fc.weight") for trainer in trainers]
    for batch, head in zip(first_batches, heads, strict=True):
        assert torch.equal(batch, first_batches[0])
        assert torch.equal(head, heads[0])
    signs = [trainer.engine.model.get_parameter("layer1.0.conv1.weight") >= 0 for trainer in trainers]
    assert all(torch.equal(sign, signs[0]) for sign in signs)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_hard_accuracy_is_measured_on_weights_that_are_plus_or_minus_one(
    make_cell: Callable[..., Cell], quantizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = make_cell(quantizer=quantizer, quantization__sharpness=_constant(quantizer, 0.5), training__epochs=1)
    trainer = _trainer(cell)
    binary = [trainer.engine.model.get_parameter(name) for name in trainer.split.binary]
    were_binary: list[bool] = []

    def spy(*arguments: Any) -> Evaluation:  # noqa: ANN401  (evaluate's)
        were_binary.append(all(bool((weight.abs() == 1).all()) for weight in binary))
        return evaluate(*arguments)

    monkeypatch.setattr("suite.training.trainer.evaluate", spy)
    trainer.train_epoch(lambda _step, _loss: None)
    soft, hard = trainer.test()
    assert bool(binary) == (quantizer != "fp")
    assert were_binary[0], "validation"
    assert were_binary[2], "hard test"
    if quantizer in {"bnn++", "pc"}:
        assert not were_binary[1], "F(w*) is soft at mu = 0.5: the soft accuracy is another number"
    if quantizer == "fp":
        assert torch.equal(hard.right, soft.right)


class _Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that wait for a device's results."""

    num = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
        self.num += operation.name().partition(".")[0] in waits
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__clip_grad_norm": 1.0, "training__ema_decay": 0.9, "training__label_smoothing": 0.1},
        {"training__mixup": 0.2},
        {"quantizer": "fp", "quantization": {}},
        {"model": "bireal_resnet8", "task": "bwa", "quantization__inputs": {"quantizer": "bnn"}},
    ],
)
def test_a_step_waits_for_no_device(make_cell: Callable[..., Cell], changes: dict[str, object]) -> None:
    cell = make_cell(**{"training__optimizer": "sgd", **changes})
    trainer = Trainer(cell, Layout(), NOWHERE, None, Execution(fused=False))
    batches = trainer.loaders.train.epoch(0)
    trainer._train_step(*next(batches))
    images, labels = next(batches)
    with _Waits() as waits:  # type: ignore[no-untyped-call]
        trainer._train_step(images, labels)
    assert waits.num == 0
    with _Waits() as waits:  # type: ignore[no-untyped-call]
        trainer._look_back(1, torch.zeros(()))
        trainer._look_back(2, torch.zeros(()))
    assert waits.num == 1, "for the previous step"


@pytest.mark.parametrize("quantizer", ["bc", "bnn++"])
def test_a_latent_that_is_nan_fails_the_run_within_the_epoch(make_cell: Callable[..., Cell], quantizer: str) -> None:
    cell = make_cell(quantizer=quantizer, quantization__sharpness=_constant(quantizer, 0.5))
    trainer = _trainer(cell)

    def poison(number: int, _loss: Tensor) -> None:
        if number == trainer.steps_per_epoch - 1:
            next(trainer.engine.latents()).w_star[0, 0, 0, 0] = float("nan")

    with pytest.raises(DivergedError, match=r"latents of .* are NaN or infinite"):
        trainer.train_epoch(poison)


def test_the_test_sets_images_are_told_one_by_one(make_run: Callable[..., RunDir]) -> None:
    run = make_run(training__epochs=1)
    train(run, NOWHERE)
    result = _result(run)
    with np.load(run.predictions_path, allow_pickle=False) as predictions:
        for kind in ("hard", "soft"):
            assert predictions[kind].shape == (359,)
            assert predictions[kind].mean() == pytest.approx(result[f"top1_{kind}"])
            assert result[f"loss_{kind}"] > 0
    assert {"val/loss", "val/top1"} <= set(journal.read_metrics(run.journal)[1])


def test_validation_changes_no_bit_of_training(make_cell: Callable[..., Cell]) -> None:
    losses = []
    for validate in (True, False):
        trainer = _trainer(make_cell())
        if not validate:
            trainer.loaders = trainer.loaders.__class__(
                trainer.loaders.train, None, trainer.loaders.final, trainer.loaders.num_train_images
            )
        losses.append([trainer.train_epoch(lambda _step, _loss: None)["train/loss"] for _ in range(2)])
    assert losses[0] == losses[1]


def test_mu_runs_from_its_start_to_its_end(make_cell: Callable[..., Cell]) -> None:
    trainer = _trainer(make_cell())
    (group,) = [group for group in trainer.optimizer.param_groups if "quantizer" in group]
    assert group["mu"] == 2.0
    metrics = [trainer.train_epoch(lambda _step, _loss: None) for _ in range(2)]
    assert metrics[0]["mu"] == pytest.approx((2.0 * 500.0) ** 0.5)
    assert metrics[1]["mu"] == 500.0
    assert {own["mu"] for own in trainer.optimizer.state_dict()["state"].values() if "mu" in own} == {500.0}


def test_an_average_is_evaluated_hard_and_leaves_training_alone(make_cell: Callable[..., Cell]) -> None:
    plain, averaged = (_trainer(make_cell(training__ema_decay=decay)) for decay in (None, 0.5))
    losses = [trainer.train_epoch(lambda _step, _loss: None)["train/loss"] for trainer in (plain, averaged)]
    assert losses[0] == losses[1]
    averaged.test()
    weights = [averaged.engine.model.get_parameter(name) for name in averaged.split.binary]
    assert all(bool((weight.abs() == 1).all()) for weight in weights)
    plain.test()
    assert plain.weights_digest() != averaged.weights_digest()


def test_bf16_computes_in_bf16_and_keeps_weights_in_float32(make_cell: Callable[..., Cell]) -> None:
    trainer = _trainer(make_cell(training__precision="bf16"))
    images, labels = next(trainer.loaders.train.epoch(0))
    _, logits = trainer.engine.train_step(images, labels)
    assert logits.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in trainer.engine.model.parameters()} == {torch.float32}


def test_norm_statistics_are_gathered_anew_where_the_recipe_says(make_cell: Callable[..., Cell]) -> None:
    means = []
    for again in (False, True):
        trainer = _trainer(make_cell(training__reestimate_norm=again, training__epochs=1))
        trainer.train_epoch(lambda _step, _loss: None)
        trainer.test()
        means.append(trainer.engine.model.get_buffer("layer2.0.bn1.running_mean"))
    assert not torch.allclose(means[0], means[1])


def test_a_loss_that_is_not_finite_stops_at_its_step(make_cell: Callable[..., Cell]) -> None:
    trainer = _trainer(make_cell(quantizer="fp", training__optimizer="sgd", training__learning_rate=1e30))
    with pytest.raises(DivergedError, match=r"the loss is (nan|inf) at step \d+ \(epoch 1\)"):
        trainer.train_epoch(lambda _step, _loss: None)


@pytest.mark.slow
def test_a_failed_run_says_its_cause_and_exits_1(make_run: Callable[..., RunDir]) -> None:
    run = make_run(quantizer="fp", training__optimizer="sgd", training__learning_rate=1e30)
    assert _run(run).returncode == 1
    state = run.state()
    assert (state.state, state.cause) == ("failed", "nan")
    assert state.reason.startswith("DivergedError: the loss is")


@pytest.mark.slow
def test_two_processes_train_as_one_does(make_run: Callable[..., RunDir]) -> None:
    # Use the transformer, because its layer norm is per sample; a batch norm uses only each process's half batch.
    runs = [make_run(grid, model="vit_mini_patch2_8", training__batch_size=128) for grid in ("one", "two")]
    assert _run(runs[0]).returncode == 0
    answer = _run(runs[1], processes=2)
    assert answer.returncode == 0, answer.stderr
    one, two = (journal.read_metrics(run.journal) for run in runs)
    for epoch in one:
        assert two[epoch]["train/loss"] == pytest.approx(one[epoch]["train/loss"], rel=1e-4)
    assert _result(runs[1])["top1_hard"] == pytest.approx(_result(runs[0])["top1_hard"], abs=0.02)
    assert runs[1].provenance()["num_processes"] == 2


@pytest.mark.slow
def test_an_image_folder_trains_from_its_files(make_run: Callable[..., RunDir], tmp_path: Path) -> None:
    for part, num in (("train", 12), ("test", 4)):
        for number, name in enumerate(("dark", "light")):
            folder = tmp_path / "lamps" / part / name
            folder.mkdir(parents=True)
            for index in range(num):
                Image.new("RGB", (40, 30), (150 * number + index,) * 3).save(folder / f"{index}.png")
    run = make_run(dataset="folder/lamps", data__image_size=16, data__crop="random_resized", training__batch_size=4)
    train(run, tmp_path)
    assert _result(run)["num_train_images"] == 22
    assert len(_losses(run)) == 2


def test_a_result_says_how_many_parameters_are_binary(make_run: Callable[..., RunDir]) -> None:
    run = make_run(training__epochs=1)
    train(run, NOWHERE)
    # ResNet-8: three stages of one block, two 3x3 convolutions each: 16-16-16, 16-32-32, 32-64-64.
    num_binary = 9 * (16 * 16 + 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64 + 64 * 64)
    # The first convolution (one input channel), seven batch norms, and the classifier with its bias.
    num_exact = 9 * 16 + 2 * (3 * 16 + 2 * 32 + 2 * 64) + 64 * 10 + 10
    assert _result(run)["num_binary_parameters"] == num_binary
    assert _result(run)["num_full_precision_parameters"] == num_exact
    assert _result(run)["num_train_images"] == 1294


def test_provenance_names_code_versions_hardware_and_data(make_run: Callable[..., RunDir]) -> None:
    run = make_run(training__epochs=1)
    train(run, NOWHERE)
    provenance = run.provenance()
    assert provenance["packages"]["torch"] == version("torch")
    assert {"commit", "diff", "untracked", "digest", "users_digest"} == set(provenance["code"])
    assert len(provenance["data_checksum"]) == 64
    assert provenance["num_threads"] == torch.get_num_threads()


def test_a_cell_chooses_how_its_optimizer_steps_and_provenance_says_so(make_run: Callable[..., RunDir]) -> None:
    one_pass, by_operations = make_run("fused"), make_run("eager")
    for run, fused in ((one_pass, True), (by_operations, False)):
        train(run, NOWHERE, options=Options(Execution(fused=fused)))
        assert run.provenance()["execution"]["fused"] == run.newest().facts["execution"]["fused"]  # type: ignore[union-attr]
    assert by_operations.provenance()["optimizer_step"] == "torch's operations"
    if shutil.which("g++") is not None:
        assert one_pass.provenance()["optimizer_step"] == "one pass"
    assert _losses(one_pass) == pytest.approx(_losses(by_operations), rel=1e-3)


def test_first_steps_record_nothing(make_run: Callable[..., RunDir], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run = make_run()
    first_steps(run, NOWHERE, 3)
    assert [record.getMessage()[:6] for record in caplog.records if record.name == "suite.train"] == [
        "step 0",
        "step 1",
        "step 2",
    ]
    assert {path.name for path in run.path.iterdir()} == {"cell.yaml"}


def test_first_steps_of_a_cell_file_leave_no_run_directory(
    make_run: Callable[..., RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "mine.yaml"
    elsewhere.write_bytes(make_run().cell_path.read_bytes())
    main(elsewhere, max_steps=1)
    assert not (tmp_path / "runs").exists()


def test_a_cell_file_outside_a_run_directory_runs_in_one_of_its_own(
    make_run: Callable[..., RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run()
    elsewhere = tmp_path / "mine.yaml"
    elsewhere.write_bytes(run.cell_path.read_bytes())
    assert open_run(run.cell_path).path == run.path
    assert open_run(elsewhere).path == Path("runs/adhoc") / run.path.name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"model: [", "not YAML"),
        (b"model: 2024-13-45", "not YAML"),
        (b"model: !include x", "not YAML"),
        (b"[" * 5000, "not YAML"),
        (b"model: Z\xfcrich", "not UTF-8 text (invalid start byte at byte 8)"),
        (b"", "not a cell: a mapping with the keys dataset, model, quantizer, seed, task, init, parent, teacher, "),
        (
            b"- resnet8",
            "not a cell: a mapping with the keys dataset, model, quantizer, seed, task, init, parent, teacher, ",
        ),
        (b"model: resnet8", "not a cell: dataset: Field required"),
    ],
)
def test_a_bad_cell_file_is_one_line_and_status_2(
    tmp_path: Path, content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cell.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(path)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{path}: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("execution", "message"),
    [
        ("{micro_batch_size: yes}", "--execution: micro_batch_size: yes is no number\n"),
        ("{zero_stage: 2}", "--execution: zero_stage: only with engine: deepspeed, here it is plain\n"),
        ("{compile: ", "--execution {compile: : not YAML: expected the node content, but found '<stream end>'\n"),
    ],
)
def test_a_bad_execution_is_one_line_and_status_2(
    make_run: Callable[..., RunDir], execution: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(make_run().cell_path, execution=execution)
    assert stop.value.code == 2
    assert capsys.readouterr().err == message
