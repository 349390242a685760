"""`make bench` asks every question there is, and writes down what came of each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from machine import verdict
from peer_layers import StraightThrough
from run_all import PROGRAMS, Outcome, Program, markdown, run
from torch import Tensor, autograd, tensor

HELPERS = {"machine", "noise", "photographs", "run_all"}
GPU = {"gpu", "gpu_report", "gpu_science", "gpu_speed", "gpu_wheels"}  # `make gpu`, and no part of `make bench`


def test_no_program_is_forgotten() -> None:
    folder = Path(__file__).parents[1] / "benchmarks"
    assert {path.stem for path in folder.glob("*.py")} <= HELPERS | GPU | {program.name for program in PROGRAMS}


def test_a_program_that_borrows_from_the_tests_has_the_projects_packages(tmp_path: Path) -> None:
    program = Path(__file__).parents[1] / "benchmarks" / "start_up.py"
    code = f"import runpy; runpy.run_path({str(program)!r}); import models; models.is_known('resnet20')"
    path = str(program.parent)  # as python has it for a program
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, check=True)


@pytest.mark.parametrize(
    ("value", "at_least", "word"),
    [(1.0, False, "met"), (1.2, False, "missed"), (1.2, True, "met"), (1.0, True, "missed")],
)
def test_a_verdict_says_on_which_side_of_its_bar_a_value_is(value: float, at_least: bool, word: str) -> None:
    sign = ">=" if at_least else "<="
    assert verdict("a ratio", value, 1.1, at_least=at_least) == f"bar: a ratio {sign} 1.1: {value:g}, {word}"


def test_what_cannot_run_is_named_with_the_reason() -> None:
    program = Program("kills", "Is it the same?", "none", lacks=lambda: "takes an hour")
    outcome = run(program, 1, None)
    assert not outcome.is_failure
    assert "- kills (Is it the same?) takes an hour" in markdown([outcome], "a machine", 1, "")


def test_the_results_have_each_programs_output_and_its_bars_on_top() -> None:
    program = Program("shares", "What else?", "1 %", ("--epochs", "2"))
    text = markdown([Outcome(program, "a table\nbar: all <= 1 %: 0.5 %, met\n", 60.0)], "a machine", 1, "")
    assert "| shares | all <= 1 % | 0.5 %, met |" in text
    assert text.index("| shares |") < text.index("a table")
    assert "`python benchmarks/shares.py --epochs 2`, 60 s" in text


def test_the_peers_sign_passes_gradients_straight_through_where_the_weight_is_small() -> None:
    v = tensor([-2.0, -0.5, 0.0, 0.5, 2.0], requires_grad=True)
    w: Tensor = StraightThrough.apply(v)
    autograd.backward(w, tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert w.tolist() == [-1, -1, 1, 1, 1]
    assert v.grad is not None
    assert v.grad.tolist() == [0, 2, 3, 4, 0]
