"""Kills the launcher of a tuned grid repeatedly at random; choices and results must equal an undisturbed grid's.

    python benchmarks/tuned_kills.py --kills 20

The grid has trials, the choice, and the cells that follow from it, including fine-tuned ones; all cells are tiny and
run on this machine. Half of the kills hit every process of the launch. The others hit only the launcher, whose cells
train on as orphans while the next launch begins. Kill times are drawn uniformly over a launch's first seconds, counted
for half of the kills from its start and for half from its first new attempt. Then the grid is launched again, until it
is done. Exit status: 0 if all are equal, else 1.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from machine import verdict
from rich.console import Console
from rich.progress import track

from suite.run.atomic import read_json
from suite.run.directory import RunDir, run_dirs

GRID: dict[str, Any] = {
    "name": "tuned",
    "dataset": "digits",
    "models": ["resnet8"],
    "quantizers": ["fp", "bnn++"],
    "seeds": [0, 1],
    "training": {"epochs": 3, "batch_size": 128, "optimizer": "adamw", "learning_rate": 0.003},
    "quantization": {"sharpness": {"bnn++": {"shape": "exponential", "start": 2.0, "end": 500.0}}},
    "tune": {
        "training.learning_rate": {"log": [0.0003, 0.03]},
        "quantization.sharpness.bnn++.end": {"log": [10, 1000]},
        "trials": 3,
        "seeds": [1000, 1001],
        "epochs": 2,
    },
    "blocks": [{}, {"init": "finetune", "quantizers": ["bnn++"]}],
}
SPAN_SECONDS = 12.0
"""Latest kill, in seconds after the launch or after its first new attempt."""
PATIENCE_SECONDS = 900.0


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Starts a launch as the leader of its own process group."""
    command = [sys.executable, "-m", "launch", "grid", str(folder / "tuned.yaml"), "--local", "--root", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def finish(folder: Path) -> None:
    """Launches the grid once more and waits until it is done."""
    process = start(folder)
    if status := process.wait(PATIENCE_SECONDS):
        raise SystemExit(f"the last launch ended with status {status}: see {folder / 'log'}")


def num_attempts(folder: Path) -> int:
    """Number of attempts begun so far, over all cells."""
    return sum(len(run.all_attempts()) for run in run_dirs(folder / "tuned"))


def kill(folder: Path, chance: random.Random) -> str:
    """Launches, and kills at a random time; returns what was killed, or "" if the launch ended first."""
    before, process = num_attempts(folder), start(folder)
    if chance.random() < 0.5:  # noqa: PLR2004  (half of the kills)
        while num_attempts(folder) == before and process.poll() is None:
            time.sleep(0.05)
    try:
        process.wait(chance.uniform(0, SPAN_SECONDS))
    except subprocess.TimeoutExpired:
        is_all = chance.random() < 0.5  # noqa: PLR2004
        if is_all:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
        return "everything" if is_all else "the launcher"
    return ""


def facts(folder: Path) -> dict[str, object]:
    """The facts that must be equal: the choices, and each cell's result."""
    found: dict[str, object] = {"choices.yaml": (folder / "tuned" / "choices.yaml").read_text(encoding="utf-8")}
    for run in run_dirs(folder / "tuned"):
        found[run.path.name] = run.result()
    return found


def main(
    kills: Annotated[int, typer.Option(min=0, help="Number of kills.")] = 20,
    seed: Annotated[int, typer.Option(help="Random seed of the kill times.")] = 0,
) -> None:
    """Compares a grid that was killed repeatedly with one that was not."""
    chance, console = random.Random(seed), Console(stderr=True)  # noqa: S311  (no secret)
    with tempfile.TemporaryDirectory() as place:
        disturbed, quiet = Path(place) / "disturbed", Path(place) / "quiet"
        for folder in (disturbed, quiet):
            folder.mkdir()
            (folder / "tuned.yaml").write_text(yaml.safe_dump(GRID), encoding="utf-8")
        rounds = track(range(kills), "kills", console=console, transient=True)
        hits = [kill(disturbed, chance) for _ in rounds]
        finish(disturbed)
        finish(quiet)
        ours, theirs = facts(disturbed), facts(quiet)
        different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        attempts = num_attempts(disturbed)
        num_late = hits.count("")
        num_trials = sum(RunDir(disturbed / "tuned" / name).cell().trial for name in ours if name != "choices.yaml")
        again = read_json(disturbed / "tuned" / "plan.json").keys() ^ read_json(quiet / "tuned" / "plan.json").keys()
        print(
            f"{len(hits) - num_late} kills ({hits.count('everything')} of everything, {hits.count('the launcher')} of "
            f"the launcher alone; {num_late} came after the end), {len(ours) - 1} cells, {num_trials} of them trials, "
            f"in {attempts} attempts"
        )
        for name in different:
            print(f"differs: {name}: {ours.get(name)} and {theirs.get(name)}")
        wrong = len(different) + len(again)
    print(verdict("choices, cells and results that differ", wrong, 0, at_least=False))
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
