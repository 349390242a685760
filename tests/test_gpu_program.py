"""What `make gpu` will do on a GPU: rehearsed on a CPU with nothing but what is carried there, and its report."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from gpu_report import draw, markdown
from gpu_science import METHODS, Design, design
from gpu_speed import CELLS, LOOP, NO_TIME, PER_HOUR, Measured, noise_folder, run_for
from gpu_wheels import FILES_ONLY, needed, required
from typer.testing import CliRunner

SOURCE = Path(__file__).parents[1]
CARRIED = ("quantizers", "models", "suite", "launch", "analysis", "benchmarks", "tests", "pyproject.toml")
"""What the program needs of a checkout. Elsewhere the project is not installed, so no metadata is copied."""


@pytest.fixture
def carried(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python that has torch and what is listed for a GPU machine, and no other package."""
    site = tmp_path / "site"
    for name in required(["torch"]) | set(needed()):
        for file in distribution(name).files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                link = site / file
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(Path(str(file.locate())))
    kept = {name: value for name, value in os.environ.items() if name not in {"VIRTUAL_ENV", "PYTHONHOME"}}
    return kept | {"PYTHONPATH": str(site), "PYTHONNOUSERSITE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program in a copy of the checkout."""
    place = tmp_path_factory.mktemp("carried")
    for name in CARRIED:
        if (SOURCE / name).is_dir():
            shutil.copytree(SOURCE / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(SOURCE / name, place / name)
    return place / "benchmarks" / "gpu.py"


def _run(program: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    command = [str(python), str(program), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_the_whole_program_runs_with_what_is_carried_to_a_gpu_machine(
    program: Path, carried: dict[str, str], tmp_path: Path
) -> None:
    noise_folder(tmp_path / "data" / "cifar10", 200)
    out = tmp_path / "results"
    answer = _run(program, carried, "--rehearse", "--data-dir", str(tmp_path / "data"), "--out", str(out))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    found = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
    assert set(found) == {"checks", "speed", "science"}
    assert [each["problem"] for each in found["speed"]["measured"]] == [""] * len(found["speed"]["measured"])
    assert {cell["quantizer"] for cell in found["science"]["cells"]} == set(METHODS)
    page = (out / "gpu.md").read_text(encoding="utf-8")
    assert "**A rehearsal on a CPU" in page
    assert "| 2 at a time: resnet8" in page


@pytest.mark.slow
def test_without_a_gpu_it_says_in_one_line_that_it_could_run(program: Path, carried: dict[str, str]) -> None:
    answer = _run(program, {**carried, "CUDA_VISIBLE_DEVICES": ""})
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (line,) = answer.stdout.splitlines()
    assert "nothing was measured" in line
    assert "checks can be collected" in line


def test_the_doctor_starts_it_and_does_not_where_it_would_run_on_another_machine(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch", "doctor", "--gpu", "--root", str(tmp_path)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    here, there = (
        subprocess.run([*command, *more], env=environment, capture_output=True, text=True, check=False, cwd=SOURCE)
        for more in ((), ("--partition", "gpu"))
    )
    assert here.returncode == 0, here.stderr
    assert "nothing was measured" in here.stdout
    assert there.returncode != 0
    assert "--gpu checks this node; on SLURM, run it there: srun" in there.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def test_a_command_that_takes_too_long_is_interrupted_and_keeps_its_output(handler: signal.Handlers) -> None:
    program = "trap 'echo saved; exit' INT; echo begun; while :; do sleep 0.1; done"
    before = signal.signal(signal.SIGINT, handler)
    try:
        assert run_for(["sh", "-c", program], dict(os.environ), 3.0) == (None, "begun\nsaved\n")
    finally:
        signal.signal(signal.SIGINT, before)
    assert run_for([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ), None) == (3, "")


def test_scikit_learn_is_carried_for_its_file_and_scipy_is_not() -> None:
    names = needed()
    assert set(FILES_ONLY) <= set(names)
    assert not {"scipy", "pandas", "mlflow", "torch"} & set(names)


@pytest.mark.parametrize(
    ("seconds", "rate", "expected"),
    [
        (600, 50_000.0, Design(3, 25)),  # 0.7 * 600 * 50,000 / 45,000 = 466 epochs, 77 for a seed of six methods
        (600, 500_000.0, Design(8, 97)),
        (6000, 5_000_000.0, Design(8, 300)),
        (60, 5_000.0, None),
    ],
)
def test_seeds_and_epochs_fit_into_the_time_that_is_left(seconds: float, rate: float, expected: Design | None) -> None:
    assert design(seconds, rate) == expected


def _report() -> dict[str, Any]:
    machine = {"device": "a GPU", "torch": "2.14.1"}
    measured = [
        Measured(LOOP, "batch 128", "time of ours / plain", 1.2, bar=1.1),
        Measured(CELLS, "4 at a time: resnet20", PER_HOUR, 1234.0),
        Measured(CELLS, "8 at a time: resnet20", "", None, problem=NO_TIME),
    ]
    cells = [
        {
            "cell": "0" * 12,
            "quantizer": "bc",
            "seed": seed,
            "result": {"top1_hard": 0.9 + seed / 100, "top1_soft": 0.92},
            "train/loss": [1.0, 0.5],
            "val/top1": [0.5, 0.9],
        }
        for seed in (0, 1)
    ]
    outcomes = {"a_b[1]": "passed", "a_b[2]": "failed: 1 \\| 2", "c": "skipped: none"}
    return {
        "checks": {"machine": machine, "command": "pytest", "seconds": 3.0, "outcomes": outcomes},
        "speed": {"machine": machine, "measured": [asdict(each) for each in measured]},
        "science": {
            "machine": machine,
            "model": "resnet20",
            "num_seeds": 3,
            "epochs": 2,
            "at_once": 4,
            "seconds": 90.0,
            "cells": cells,
        },
    }


def test_the_page_has_each_outcome_a_bar_that_is_missed_and_what_was_not_measured() -> None:
    page = markdown(_report(), has_picture=True)
    assert "`pytest`: 1 passed, 1 failed, 1 skipped, 3 s." in page
    assert "| a b | 1 passed; 1 failed: 1 \\| 2 |" in page
    assert "| batch 128 | 1.2 (at most 1.1: **missed**) |" in page
    assert "| 4 at a time: resnet20 | 1,234 |" in page
    assert "| 8 at a time: resnet20 |  | not measured: no time was left" in page
    assert "2 of 18 cells done in 1.5 minutes" in page
    assert "| bc | 2 | 90.50 (90.00 to 91.00) | 92.00 |" in page
    assert "gpu-curves.png" in page


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    assert draw(_report()["science"], tmp_path / "images" / "curves.png")
    assert (tmp_path / "images" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_is_not_the_programs_is_told_and_kept(tmp_path: Path) -> None:
    import gpu
    import typer

    app = typer.Typer()
    app.command()(gpu.main)
    (tmp_path / "gpu.json").write_text('{"checks": 3}', encoding="utf-8")
    answer = CliRunner().invoke(app, ["--rehearse", "--out", str(tmp_path)])
    assert answer.exit_code == 1
    assert "another version's: delete it" in str(answer.exception)
    assert (tmp_path / "gpu.json").read_text(encoding="utf-8") == '{"checks": 3}'
