"""All layouts give the same result: DDP and ZeRO 0-3 on two processes, and one process; any resumes from any other.

One launch of tests/suite/layout_worker.py does it all; benchmarks/layout_parity.py does the same for every quantizer.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layout_parity import LAYOUTS
from layout_worker import VARIANTS, ZERO

from suite.run import journal
from suite.run.directory import RunDir
from suite.train import train

ROUNDING = 1e-5
BF16_ROUNDING = 1e-3
PLACES = tuple(name for name in LAYOUTS if name != "DDP, accumulation 2")
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of the two processes, by rank."""
    folder = tmp_path_factory.mktemp("layouts")
    worker = Path(__file__).with_name("layout_worker.py")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker), str(folder)]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run(
        [sys.executable, *command], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_fifty_steps_are_those_of_one_process(found: list[dict[str, Any]], layout: str) -> None:
    (row,) = [row for row in found[0]["parity"] if row["layout"] == layout]
    assert row["loss_difference"] <= ROUNDING
    assert row["num_quantized"] == 98304  # two blocks: 64 x 192, 64 x 64, 64 x 256, 256 x 64
    assert row["num_other_signs"] <= 98
    assert row["num_flipped"] > 98, "otherwise equal signs would prove nothing"


@pytest.mark.parametrize("target", PLACES)
@pytest.mark.parametrize("source", PLACES)
def test_a_state_goes_on_on_any_layout(found: list[dict[str, Any]], source: str, target: str) -> None:
    assert all(process["exchange"]["differences"][f"{source} -> {target}"] <= ROUNDING for process in found)


@pytest.mark.parametrize("layout", PLACES)
def test_a_state_goes_on_to_the_bit_on_its_own_layout(found: list[dict[str, Any]], layout: str) -> None:
    assert all(process["exchange"]["same_bits"][layout] for process in found)


@pytest.mark.parametrize("layout", PLACES)
def test_the_processes_agree_on_the_state(found: list[dict[str, Any]], layout: str) -> None:
    digests = {process["exchange"]["state_digests"][layout] for process in found}
    assert len(digests) == 1


@pytest.mark.parametrize("stage", ZERO)
def test_quantized_weights_are_plus_or_minus_one_on_every_process(found: list[dict[str, Any]], stage: str) -> None:
    for process in found:
        here = process["binary"][stage]
        assert here["num"] == 98304
        assert here["bc"], "the weights that a forward pass uses"
        assert here["bc as in the state"]
        assert here["soft before"], "bnn++ at mu = 3 is not binary yet"
        assert here["hardened"]
        assert here["state of a hardened model is that of training"]
        assert here["soft again to the bit"]
        assert here["finite logits"]
        assert here["latents are float32"]
    for digest in ("bc digest", "hardened digest"):
        assert len({process["binary"][stage][digest] for process in found}) == 1


@pytest.mark.parametrize("name", VARIANTS)
def test_clipping_offload_accumulation_and_updates_are_as_under_ddp(found: list[dict[str, Any]], name: str) -> None:
    assert found[0]["variants"][name] <= (BF16_ROUNDING if "bf16" in name else ROUNDING)


def test_one_process_trains_with_deepspeed_as_without(make_run: Callable[..., RunDir]) -> None:
    plain, zero = (make_run(grid, model="vit_mini_patch2_8") for grid in ("plain", "zero"))
    train(plain, Path("no-data-needed"))
    command = [sys.executable, "-m", "suite.train", str(zero.cell_path)]
    command += ["--execution", "{engine: deepspeed, zero_stage: 2}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert "deepspeed configuration: {" in answer.stdout
    losses = [[epoch["train/loss"] for epoch in journal.read_metrics(run.journal).values()] for run in (plain, zero)]
    assert losses[1] == pytest.approx(losses[0], rel=ROUNDING)
    results = [run.result() for run in (plain, zero)]
    assert results[0] is not None
    assert results[1] is not None
    assert results[1]["top1_hard"] == results[0]["top1_hard"]


def test_the_clipping_compared_is_one_that_acts(found: list[dict[str, Any]]) -> None:
    assert found[0]["variants"]["clipping, which changes something"] > 10 * ROUNDING


def test_processes_that_would_step_differently_are_refused(found: list[dict[str, Any]]) -> None:
    """Replicas whose last bits differ would drift apart, and signs would flip."""
    for process, word in zip(found, ("can", "cannot"), strict=True):
        assert process["disagreement"].startswith(
            f"this process {word} use the fused optimizer step and another differs"
        )
