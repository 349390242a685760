"""What only a GPU shows. Without one these tests are skipped; some need two."""

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from noise import data_set
from tiny_cells import tiny_cell
from torch import nn

from launch.worker.nursery import Nursery
from quantizers import QUANTIZERS, ProxConnect
from suite.engines.process_group import Layout, joined
from suite.export.__main__ import export
from suite.recipe.cell import Cell
from suite.recipe.settings import Execution
from suite.run import failures, journal
from suite.run.directory import RunDir
from suite.train import Options, train
from suite.training.trainer import Trainer

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
NOWHERE = Path("no-data-needed")
NO_DEEPSPEED = "no DeepSpeed: pip install 'proxbench[deepspeed]'"
needs_two = pytest.mark.skipif(NUM_GPUS < 2, reason=f"{NUM_GPUS} GPUs: two are needed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NUM_GPUS == 0, reason="no GPU that torch sees: what only a GPU shows is not tested"),
]
MakeRun = Callable[..., RunDir]


def _losses(run: RunDir) -> list[float]:
    return [metrics["train/loss"] for metrics in journal.read_metrics(run.journal).values()]


def _launched(run: RunDir, *arguments: str, processes: int = 1, program: str = "") -> subprocess.CompletedProcess[str]:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    module = [program] if program else ["-m", "suite.train"]
    start = ["-m", *torchrun, *module] if processes > 1 else module
    command = [sys.executable, *start, str(run.cell_path), *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


BINARY_INPUTS: dict[str, Any] = {"model": "bireal_resnet20", "quantization__inputs": {"quantizer": "bnn"}}
LARGE: dict[str, Any] = {"training__batch_size": 64, "training__epochs": 3}
RECIPES: dict[str, dict[str, Any]] = {
    "resnet20": {"model": "resnet20"},
    "vit_mini": {"model": "vit_mini_patch2_8"},
    "resnet18": {"model": "resnet18", "dataset": data_set(64), **LARGE},
    "deit_tiny": {"model": "deit_tiny_patch16_224", "dataset": data_set(64), **LARGE},
    "straight through": {"quantizer": "bc", "quantization": {}, "model": "resnet20"},
    "bf16": {"model": "resnet20", "training__precision": "bf16"},
    "fp16": {"model": "resnet20", "training__precision": "fp16"},
    "with a scale": {"model": "resnet20", "quantization__scale": "channel"},
    "binary inputs": {"task": "bwa", **BINARY_INPUTS},
    "sums of few bits": {"task": "bwaa", **BINARY_INPUTS, "quantization__accumulator": {"bits": 8}},
    "averaged, mixed, clipped": {
        "training__ema_decay": 0.99,
        "training__mixup": 0.8,
        "training__cutmix": 1.0,
        "training__label_smoothing": 0.1,
        "training__clip_grad_norm": 1.0,
    },
    "erased, by lamb": {"data__random_erasing": 0.5, "training__optimizer": "lamb"},
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_a_resumed_run_has_the_undisturbed_ones_bits_and_strictness_warns_of_nothing(
    make_run: MakeRun, recipe: dict[str, Any]
) -> None:
    recipe = {"training__epochs": 3, **recipe}
    undisturbed, stopped = make_run("undisturbed", **recipe), make_run("stopped", **recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(undisturbed, NOWHERE)
    with joined() as layout:
        trainer = Trainer(stopped.cell(), layout, NOWHERE, None)
        for _ in range(2):
            trainer.train_epoch(lambda _number, _loss: None)
        state = trainer.state_dict()
        resumed = Trainer(stopped.cell(), layout, NOWHERE, None)
        resumed.load_state_dict(state)
        metrics = resumed.train_epoch(lambda _number, _loss: None)
        resumed.test()
        assert metrics["train/loss"] == _losses(undisturbed)[2]
        result = undisturbed.result()
        assert result is not None
        assert resumed.weights_digest() == result["weights_sha256"]


def test_forked_processes_train_on_the_gpu_as_plain_ones_do(make_run: MakeRun) -> None:
    plain, *warm = [make_run(name) for name in ("plain", "warm", "other")]
    answer = _launched(plain)
    assert answer.returncode == 0, answer.stderr
    nursery = Nursery(os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, None)
    try:
        devices = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]}
        children = [nursery.spawn([str(run.cell_path)], devices, run.path / "log.txt") for run in warm]
        assert [child.wait() for child in children] == [0, 0]
    finally:
        nursery.close()
    for run in warm:
        assert run.result() == plain.result()
        assert _losses(run) == _losses(plain)
        assert run.provenance()["device"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_every_precision_trains_and_provenance_says_how(make_run: MakeRun, precision: str) -> None:
    run = make_run(training__precision=precision, training__epochs=4)
    train(run, NOWHERE, options=Options(Execution(determinism="fast")))
    losses = _losses(run)
    assert losses[-1] < losses[0]
    execution = run.provenance()["execution"]
    assert (execution["device"], execution["determinism"], execution["tf32"]) == ("cuda", "fast", True)
    assert run.provenance()["device"] == torch.cuda.get_device_name()


def test_batches_on_a_gpu_are_the_cpus(make_cell: Callable[..., Cell]) -> None:
    cell = make_cell(data__horizontal_flip=True)
    loaders = [
        Trainer(cell, Layout(device=torch.device(device)), NOWHERE, None).loaders.train for device in ("cpu", "cuda")
    ]
    for (images, labels), (theirs, their_labels) in zip(*(loader.epoch(1) for loader in loaders), strict=True):
        assert torch.equal(labels, their_labels.cpu())
        assert torch.allclose(images, theirs.cpu(), atol=1e-6)


def test_image_files_decoded_by_workers_and_pinned_are_the_cpus_to_the_bit(
    make_cell: Callable[..., Cell], lamps: Path
) -> None:
    settings = {"crop": "random_resized", "horizontal_flip": True, "image_size": 32}
    cell = make_cell(dataset="folder/lamps", data=settings, training__batch_size=4)
    execution = Execution(num_workers=2)
    batches = []
    for device in ("cpu", "cuda"):
        trainer = Trainer(cell, Layout(device=torch.device(device)), lamps.parent, None, execution)
        batches.append([images.cpu() for epoch in range(2) for images, _ in trainer.loaders.train.epoch(epoch)])
    for here, there in zip(*batches, strict=True):
        assert torch.equal(here, there)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_optimizers_steps_are_the_cpus_for_the_whole_catalogue(name: str, base: str) -> None:
    """In float64, where a difference beyond rounding would be a mistake: both take the same operations."""
    results = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        parameters = [
            nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(device))
            for shape in ((64, 33), (8, 3, 3, 3))
        ]
        group: dict[str, Any] = {"params": parameters, "quantizer": name, "mu": 2.0}
        made: torch.optim.Optimizer = (
            torch.optim.SGD([group], 0.1, momentum=0.9) if base == "sgd" else torch.optim.AdamW([group], 0.01)
        )
        optimizer = ProxConnect(made)
        for _ in range(5):
            for p in parameters:
                p.grad = torch.sin(3 * optimizer.latent(p))
            optimizer.step()
        optimizer.harden()
        results.append([torch.cat([optimizer.latent(p).cpu().flatten() for p in parameters])])
        results[-1].append(torch.cat([p.detach().cpu().flatten() for p in parameters]))
    (latents, weights), (their_latents, their_weights) = results
    # SGD: a rounding of 2e-16 grows by a step's slope, below 10, in each of five steps. AdamW divides by the gradient's
    # size: a rounding becomes lr * 3e-16 / |gradient|, which is below the limit for gradients above 3e-8.
    apart = (latents - their_latents).abs()
    assert float(apart.max()) < 1e-10
    # A sign may differ only where the latent is no further from 0 than that.
    assert torch.equal(weights[latents.abs() > apart], their_weights[latents.abs() > apart])


@pytest.mark.parametrize("recipe", [{"model": "resnet20"}, {"task": "bwa", **BINARY_INPUTS}], ids=["bw", "bwa"])
def test_a_compiled_network_trains_as_an_eager_one_and_is_compiled_once(
    make_cell: Callable[..., Cell], recipe: dict[str, Any]
) -> None:
    from torch._dynamo.utils import counters

    losses = []
    for compiled in (False, True):
        layout, execution = Layout(device=torch.device("cuda", 0)), Execution(compile=compiled)
        trainer = Trainer(make_cell(**recipe, training__batch_size=64), layout, NOWHERE, None, execution)
        batches = trainer.loaders.train.epoch(0)
        counters.clear()
        losses.append([float(trainer._train_step(*next(batches))) for _ in range(2)])
        graphs = counters["stats"]["unique_graphs"]
        for _ in range(8):
            trainer._train_step(*next(batches))
        assert counters["stats"]["unique_graphs"] == graphs  # mu has moved
    eager, compiled_losses = losses
    assert compiled_losses[0] == pytest.approx(eager[0], rel=1e-3)  # the same weights by other kernels
    assert compiled_losses[1] == pytest.approx(eager[1], rel=0.1)  # a rounding flips signs, and with them sums


def test_ddp_over_nccl_with_one_process_is_the_plain_network(make_run: MakeRun, tmp_path: Path) -> None:
    cell = make_run(model="resnet20").cell()
    losses = []
    for is_distributed in (False, True):
        with joined() as layout:
            trainer = Trainer(cell, layout, NOWHERE, None)
            if is_distributed:
                place = f"file://{tmp_path}/store"
                torch.distributed.init_process_group("nccl", init_method=place, rank=0, world_size=1)
                trainer.engine._replica = trainer.engine._replicated("strict")  # type: ignore[attr-defined]
            batches = trainer.loaders.train.epoch(0)
            losses.append([float(trainer._train_step(*next(batches))) for _ in range(4)])
            if is_distributed:
                torch.distributed.destroy_process_group()
    assert losses[0] == losses[1]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_zero_with_one_process_trains_and_ends_as_the_plain_engine_does(make_run: MakeRun, zero_stage: int) -> None:
    pytest.importorskip("deepspeed", reason=NO_DEEPSPEED)
    plain, sharded = (make_run(name, model="vit_mini_patch2_8") for name in ("plain", "sharded"))
    train(plain, NOWHERE)
    execution = {"engine": "deepspeed", "zero_stage": zero_stage}
    answer = _launched(sharded, "--execution", json.dumps(execution))
    assert answer.returncode == 0, answer.stderr
    assert _losses(sharded) == pytest.approx(_losses(plain), rel=0.01)


def test_a_step_never_waits_for_the_gpu(make_cell: Callable[..., Cell]) -> None:
    trainer = Trainer(make_cell(), Layout(device=torch.device("cuda", 0)), NOWHERE, None)
    batches = trainer.loaders.train.epoch(0)
    for _ in range(2):
        trainer._train_step(*next(batches))
    images, labels = next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._train_step(images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_run_out_of_memory_says_what_to_do_and_that_helps(make_run: MakeRun) -> None:
    run = make_run(model="resnet20", training__batch_size=1024, training__epochs=1)
    whole, part = (_peak(run.cell(), size) for size in (None, 64))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((whole + part) / 2 / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            train(run, NOWHERE)
        while run.state().state != "done":
            assert run.state().cause == "oom"
            size = int(run.state().reason.rpartition("execution.micro_batch_size=")[2])
            with suppress(torch.OutOfMemoryError):
                train(run, NOWHERE, options=Options(Execution(micro_batch_size=size)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _peak(cell: Cell, size: int | None) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    execution = Execution(micro_batch_size=size)
    trainer = Trainer(cell, Layout(device=torch.device("cuda", 0)), NOWHERE, None, execution)
    trainer._train_step(*next(trainer.loaders.train.epoch(0)))
    return torch.cuda.max_memory_reserved()


def test_a_run_of_a_gpu_is_exported_on_a_cpu(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(training__epochs=1)
    train(run, NOWHERE)
    monkey: dict[str, Any] = {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "suite.export", str(run.path), "--out", str(tmp_path / "packed.safetensors")]
    answer = subprocess.run(command, env=os.environ | monkey, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert export(run, tmp_path / "on the gpu.safetensors", NOWHERE).weights_digest()


@needs_two
def test_each_process_is_on_its_own_gpu(make_run: MakeRun) -> None:
    run = make_run(training__epochs=200, training__batch_size=64)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "suite.train"]
    with subprocess.Popen([sys.executable, *torchrun, str(run.cell_path)]) as process:
        while run.state().epoch < 1:
            assert process.poll() is None
            time.sleep(0.1)
        attempt = run.newest()
        assert attempt is not None
        ours = {beat.process.pid for beat in failures.beats(attempt.path).values()}
        query = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
        rows = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
        process.terminate()
    places = [tuple(row.split(", ")) for row in rows if int(row.split(",")[0]) in ours]
    assert len(places) == len({gpu for _, gpu in places}) == 2


@needs_two
def test_a_process_that_fails_ends_the_one_that_waits_in_nccl(make_run: MakeRun) -> None:
    run = make_run(training__batch_size=64)
    faulty = str(Path(__file__).parents[1] / "suite" / "faulty.py")
    start = time.monotonic()
    assert _launched(run, "raise", processes=2, program=faulty).returncode == 1
    assert time.monotonic() - start < 90  # of which the start takes half
    assert run.state().reason == "ValueError: a label of 4711 (process 1)"


@needs_two
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_zero_evaluates_a_test_set_that_does_not_divide(make_run: MakeRun, zero_stage: int) -> None:
    pytest.importorskip("deepspeed", reason=NO_DEEPSPEED)
    run = make_run(model="vit_mini_patch2_8", training__epochs=1, training__batch_size=256)
    execution = {"engine": "deepspeed", "zero_stage": zero_stage}
    answer = _launched(run, "--execution", json.dumps(execution), processes=2)  # 359 test images
    assert answer.returncode == 0, answer.stderr
    assert run.state().state == "done"


def test_the_model_is_where_the_layout_says() -> None:
    trainer = Trainer(tiny_cell(), Layout(device=torch.device("cuda", 0)), NOWHERE, None)
    assert isinstance(trainer.engine.model, nn.Module)
    assert {parameter.device.type for parameter in trainer.engine.model.parameters()} == {"cuda"}
