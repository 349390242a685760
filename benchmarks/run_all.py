"""Runs every benchmark once, with settings that take a quarter of an hour on two cores; writes benchmarks/RESULTS.md.

    make bench
    python benchmarks/run_all.py --only peer_layers --only shares --out results.md

The programs run one after the other, on one thread each by default: repeatable ratios are worth more than short times.
The results name programs that cannot run here (FFCV, photographs, SLURM), with the reason. Exit status: 0 if all that
could run did, 1 if one failed or timed out. A missed bar is a result, not a failure.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from machine import BAR, describe
from photographs import photographs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

HERE = Path(__file__).parent
LIMIT_SECONDS = 300.0
"""Time limit of a program; the settings here are planned to take a third of it."""


@dataclass(frozen=True)
class Program:
    """A question, and the command that answers it. `lacks` returns a missing requirement, or an empty string."""

    name: str
    question: str
    peer: str
    arguments: tuple[str, ...] = ()
    lacks: Callable[[], str] = str
    needs_photographs: bool = False


@dataclass(frozen=True)
class Outcome:
    """Result of a program. `problem` says why output is missing or incomplete, else it is empty."""

    program: Program
    output: str = ""
    seconds: float = 0.0
    problem: str = ""
    is_failure: bool = False

    @property
    def bars(self) -> list[str]:
        """The verdict lines in machine.verdict's format, without their prefix."""
        return [line.removeprefix(BAR) for line in self.output.splitlines() if line.startswith(BAR)]


def _no_torchao() -> str:
    return "" if find_spec("torchao") else "torchao is not installed: pip install torchao, in an environment of its own"


def _no_ffcv() -> str:
    return "" if find_spec("ffcv") else "FFCV is not installed: pip install proxbench[ffcv]"


def _not_here(reason: str) -> Callable[[], str]:
    return lambda: reason


PROGRAMS = (
    Program(
        "optimizer_step",
        "What does the optimizer's step cost?",
        "torch's fused SGD; PARQ; copying memory",
        ("--repeats", "9"),
    ),
    Program(
        "step_overhead",
        "What does binarization cost a whole training step?",
        "the same network in full precision",
        ("--turns", "10", "--batch-size", "64"),
    ),
    Program(
        "peer_layers",
        "Is a sign in the optimizer faster than a sign in every layer's forward pass?",
        "layers as BiBench, bitorch and IR-Net have them",
        ("--turns", "20"),
    ),
    Program(
        "stacked_seeds",
        "Do several seeds in one process train faster?",
        "the same seeds one after the other",
        ("--steps", "10"),
    ),
    Program("start_up", "How long from the command to the first step?", "5 s; 0.5 s for --help"),
    Program("throughput", "How many cells an hour?", "a submitit array, hydra's launcher", ("--repeats", "1")),
    Program("shares", "What of a cell's time is not training?", "1 % of it", ("--epochs", "2", "--steps", "20")),
    Program("memory", "Does a step hold copies that nobody needs?", "w, w*, gradient, momentum and activations"),
    Program(
        "checkpoint_overhead",
        "What do checkpoints every 100 steps cost?",
        "the steps between them",
        ("--steps", "4", "--batch-size", "64"),
    ),
    Program("tables", "How long do tables of many cells take?", "MLflow's own search", ("--cells", "2000")),
    Program(
        "loading",
        "How fast are batches loaded?",
        "torchvision, ffcv-imagenet's settings",
        ("--samples", "256", "--repeats", "2"),
        _no_ffcv,
        needs_photographs=True,
    ),
    Program(
        "peer_parq",
        "Does bc with a scale step as torchao's PARQ?",
        "torchao's QuantOptimizer",
        lacks=_no_torchao,
    ),
    Program(
        "calibration",
        "Do tests and intervals err as often as they say?",
        "their nominal rates",
        lacks=_not_here(
            "rates that can be told from nominal ones take 20,000 simulations: minutes; docs/statistics.md"
        ),
    ),
    Program(
        "layout_parity",
        "Do ZeRO and DDP train as one process does?",
        "one process",
        lacks=_not_here("minutes under torchrun; a part of it is tests/suite/test_layouts.py"),
    ),
    Program(
        "kills",
        "Does a killed run end with the undisturbed one's bits?",
        "an undisturbed run",
        lacks=_not_here("an hour for 100 kills; a part of it is tests/suite/test_faults.py"),
    ),
    Program(
        "tuned_kills",
        "Do a killed launcher's choices and results equal an undisturbed one's?",
        "an undisturbed grid",
        lacks=_not_here("minutes; a part of it is tests/launch/test_tuning.py"),
    ),
    Program(
        "chaos",
        "Does a disturbed grid on SLURM end with the undisturbed one's bits?",
        "an undisturbed grid",
        lacks=_not_here("needs SLURM, root and a quarter of an hour"),
    ),
    Program(
        "cost",
        "What will a grid take on a GPU?",
        "none",
        lacks=_not_here("an estimate, not a measurement: docs/reproducing.md"),
    ),
)


def run(program: Program, threads: int, source: Path | None) -> Outcome:
    """Runs a program until it ends or its time limit passes."""
    path = HERE / f"{program.name}.py"
    if not path.exists():
        return Outcome(program, problem=f"benchmarks/{path.name} is not there")
    if why := program.lacks():
        return Outcome(program, problem=why)
    command = [sys.executable, str(path), *program.arguments]
    if program.needs_photographs:
        command += ["--source", str(source)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "COLUMNS": "120", "PYTHONWARNINGS": "ignore"}
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else ""
        return Outcome(program, output, LIMIT_SECONDS, f"stopped after {LIMIT_SECONDS:g} s", is_failure=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        problem = f"exit status {done.returncode}: {last}"
        return Outcome(program, done.stdout, seconds, problem, is_failure=True)
    return Outcome(program, done.stdout, seconds)


def markdown(outcomes: list[Outcome], machine: str, threads: int, photographs_are: str) -> str:
    """RESULTS.md: the verdicts of all programs, then one section per question."""
    minutes = sum(outcome.seconds for outcome in outcomes) / 60
    lines = [
        "# Benchmarks, as measured",
        "",
        f"Written by `make bench` in {minutes:.0f} minutes; threads of each program: {threads}. Do not edit.",
        "",
        machine,
        "",
        "| program | bar | measured |",
        "| --- | --- | --- |",
    ]
    for outcome in outcomes:
        for bar in outcome.bars:
            what, _, measured = bar.rpartition(": ")
            lines.append(f"| {outcome.program.name} | {what} | {measured} |")
    for outcome in outcomes:
        program = outcome.program
        if outcome.output:
            command = " ".join([f"python benchmarks/{program.name}.py", *program.arguments])
            on = f" on {photographs_are}" if program.needs_photographs else ""
            lines += ["", f"## {program.question}", "", f"Against: {program.peer}. `{command}`{on}, "]
            lines[-1] += f"{outcome.seconds:.0f} s" + (f"; **{outcome.problem}**" if outcome.problem else "")
            lines += ["", "```text", outcome.output.strip("\n"), "```"]
    left_out = [outcome for outcome in outcomes if outcome.problem and not outcome.output]
    if left_out:
        lines += ["", "## Left out", ""]
        lines += [f"- {each.program.name} ({each.program.question}) {each.problem}" for each in left_out]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def main(
    only: Annotated[list[str] | None, typer.Option(help="Run only this program. Repeatable.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each program.")] = 1,
    source: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Class folders of JPEG files; default: synthetic.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Markdown file to write.")] = HERE / "RESULTS.md",
) -> None:
    """Runs the benchmarks and writes their results to a file."""
    programs = [program for program in PROGRAMS if not only or program.name in only]
    if unknown := set(only or []) - {program.name for program in PROGRAMS}:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: not among {', '.join(p.name for p in PROGRAMS)}")
    console, outcomes = Console(), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(programs))
        for program in programs:
            progress.update(task, description=program.name)
            place = source
            if program.needs_photographs and source is None and not program.lacks():
                place = photographs(Path(folder))
            outcomes.append(outcome := run(program, threads, place))
            progress.advance(task)
            what = outcome.problem or f"{outcome.seconds:.0f} s"
            console.print(f"{program.name}: {what}", *outcome.bars, sep="\n  ", markup=False, highlight=False)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported: describe() reports it
    photographs_are = "synthetic photographs" if source is None else "the photographs given"
    out.write_text(markdown(outcomes, describe(), threads, photographs_are), encoding="utf-8")
    console.print(f"written to {out}", highlight=False)
    raise SystemExit(int(any(outcome.is_failure for outcome in outcomes)))


if __name__ == "__main__":
    typer.run(main)
