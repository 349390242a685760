"""What only a GPU shows. Collected everywhere, run where there is one; two of them for what needs two."""

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
from tiny_cells import tiny_cell
from torch import Tensor, nn
from torch.nn import functional

import models
from launch.worker.nursery import Nursery
from quantizers import ProxConnect
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


@pytest.mark.parametrize("model", ["resnet20", "vit_mini_patch2_8"])
@pytest.mark.parametrize("quantizer", ["bc", "bnn++"])
def test_a_resumed_run_has_the_undisturbed_ones_bits_and_strictness_warns_of_nothing(
    make_run: MakeRun, model: str, quantizer: str
) -> None:
    recipe = {"model": model, "quantizer": quantizer, "training__epochs": 3}
    if quantizer == "bc":
        recipe["quantization"] = {}
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


def test_our_loop_is_as_fast_as_thirty_lines_of_torch() -> None:
    cell = tiny_cell(model="resnet20", training__batch_size=128, training__optimizer="sgd", training__epochs=2)
    trainer = Trainer(cell, Layout(device=torch.device("cuda", 0)), NOWHERE, None, Execution(determinism="fast"))
    trainer.train_epoch(lambda _number, _loss: None)
    torch.cuda.synchronize()
    start = time.perf_counter()
    batches = list(trainer.loaders.train.epoch(1))
    for images, labels in batches:
        trainer._train_step(images, labels)
    torch.cuda.synchronize()
    ours = time.perf_counter() - start

    network = models.create("resnet20", 10, 8, 1)
    split = models.binarize(network)
    network = network.cuda().to(memory_format=torch.channels_last)
    parameters = dict(network.named_parameters())
    rest = [parameters[name] for name in (*split.decay, *split.no_decay)]
    quantized: dict[str, Any] = {"params": [parameters[name] for name in split.binary], "quantizer": "bnn++", "mu": 2.0}
    optimizer = ProxConnect(torch.optim.SGD([{"params": rest}, quantized], 0.003, 0.9))

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(images.contiguous(memory_format=torch.channels_last)), labels)
        torch.autograd.backward(loss)
        optimizer.step()

    for images, labels in batches:
        step(images, labels)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for images, labels in batches:
        step(images, labels)
    torch.cuda.synchronize()
    assert ours <= 1.1 * (time.perf_counter() - start)


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
    pytest.importorskip("deepspeed", reason="no DeepSpeed: pip install 'proxbench[deepspeed]'")
    run = make_run(model="vit_mini_patch2_8", training__epochs=1, training__batch_size=256)
    execution = {"engine": "deepspeed", "zero_stage": zero_stage}
    answer = _launched(run, "--execution", json.dumps(execution), processes=2)  # 359 test images
    assert answer.returncode == 0, answer.stderr
    assert run.state().state == "done"


def test_the_model_is_where_the_layout_says() -> None:
    trainer = Trainer(tiny_cell(), Layout(device=torch.device("cuda", 0)), NOWHERE, None)
    assert isinstance(trainer.engine.model, nn.Module)
    assert {parameter.device.type for parameter in trainer.engine.model.parameters()} == {"cuda"}
