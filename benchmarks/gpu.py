"""Checks and measures every GPU claim of this project on one NVIDIA GPU, offline, in under 25 minutes.

    make gpu                                            without a GPU: only checks that it could run
    python -m launch doctor --gpu --data-dir DATA       the same on a node without make
    python benchmarks/gpu.py --only speed               one part; the report keeps earlier results of the others
    python benchmarks/gpu.py --rehearse --out FOLDER    the whole program on a CPU, at toy sizes, in two minutes

Three parts. checks: tests/gpu, under pytest. speed: the optimizer, eager and compiled training steps, our loop, several
cells on one GPU. science: CIFAR-10 with ResNet-20 and six quantizers, with as many seeds and epochs as fit into the
remaining time; needs DATA with cifar10.tar.xz, cifar10/{train,test}/CLASS/*.jpg, or torchvision's cifar-10-batches-py.

Writes gpu.json after each part, and gpu.md from it. benchmarks/gpu_wheels.py lists the required packages. Exit status:
0 if all that could run did, 1 if a check or a measurement failed. A missed bar is a result, not a failure.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import asdict
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the project may not be installed, only checked out
from gpu_report import PICTURE, draw, markdown
from gpu_science import METHODS, USUAL_RATE, Design, design, train
from gpu_speed import NO_TIME, PER_HOUR, REHEARSAL, Measured, Sizes, measure, run_for
from machine import describe
from rich.console import Console

from suite.run.provenance import code_version

SOURCE = Path(__file__).resolve().parents[1]
CHECKS = "tests/gpu/test_on_a_gpu.py"
PYTEST = (
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "-p",
    "no:cacheprovider",
    "-p",
    "pytest_timeout",
    "-o",
    "filterwarnings=default",
)
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"
}
"""A GPU machine may have other pytest plugins, which stay off, and versions whose warnings must not fail a check."""
CHECKS_SHARE, SPEED_SHARE = 0.35, 0.65
"""Fractions of the total minutes by which the part should have ended."""


def _former(path: Path) -> dict[str, Any]:
    """Results of earlier calls."""
    if not path.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        markdown(found, has_picture=False)
    except (ValueError, TypeError, KeyError, AttributeError):
        sys.exit(f"{path} is not this program's, or another version's: delete it, or name another folder with --out")
    return found


class Part(str, Enum):
    """A part that --only can select."""

    CHECKS, SPEED, SCIENCE = "checks", "speed", "science"


def machine(device: str) -> dict[str, Any]:
    """The hardware and software that the numbers depend on."""
    code, found = code_version(), {"device": "rehearsal", "driver": None}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found = {"device": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB", "driver": _driver()}
        found["capability"] = f"{properties.major}.{properties.minor}"
    return (
        found
        | {
            "torch": torch.__version__,
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version() if device == "cuda" else None,  # type: ignore[no-untyped-call]
            "Python": platform.python_version(),
            "host": describe().partition(";")[0],
            "commit": f"{(code['commit'] or 'unknown')[:12]}{' and changes' if code['diff'] else ''}",
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        }
    )


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def checks(seconds: float) -> dict[str, Any]:
    """Runs CHECKS under pytest; returns each test's outcome, with the reason for a failure or a skip."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        path = Path(folder) / "outcomes.xml"
        status, said = run_for([*PYTEST, CHECKS, f"--junitxml={path}"], ENVIRONMENT, seconds)
        outcomes = dict(_outcomes(path)) if path.exists() else {CHECKS: f"failed: {said.strip()[-500:]}"}
        if status is None:
            outcomes["the rest"] = f"failed: no time was left after {seconds:.0f} s"
    return {"command": f"pytest {CHECKS}", "seconds": time.perf_counter() - start, "outcomes": outcomes}


def _outcomes(path: Path) -> "list[tuple[str, str]]":
    found = []
    for case in ET.parse(path).iter("testcase"):  # noqa: S314  (written by pytest just now)
        outcome = "passed"
        for kind, tag in (("failed", "failure"), ("failed", "error"), ("skipped", "skipped")):
            if (each := case.find(tag)) is not None:
                message = (each.get("message") or "").strip() or "no message"
                outcome = f"{kind}: {message.splitlines()[0][:300]}"
        found.append((case.get("name", "").removeprefix("test_").replace("|", "\\|"), outcome.replace("|", "\\|")))
    return found


def speed(sizes: Sizes, until: float, console: Console) -> dict[str, Any]:
    """Runs all measurements."""
    rows = []
    for each in measure(sizes, until, lambda what: console.print(f"[dim]{what}[/]")):
        rows.append(each)
        value = each.problem if each.value is None else f"{each.quantity} {each.value:.3g}"
        console.print(f"  {each.what}: {value}", markup=False, highlight=False, soft_wrap=True)
    return {"measured": [asdict(each) for each in rows]}


def science(found: dict[str, Any], data_dir: Path, seconds: float, *, rehearse: bool) -> dict[str, Any]:
    """Trains CIFAR-10, planned by the best number of cells at a time that the speed part found on this device."""
    at_once, rate = 4, USUAL_RATE
    device, model = ("cpu", "resnet8") if rehearse else ("cuda", "resnet20")
    speeds = found.get("speed", {"machine": {}, "measured": ()})
    is_same = speeds["machine"].get("device") == machine(device)["device"]
    rows = [Measured(**each) for each in speeds["measured"] if is_same]
    if cells := [each for each in rows if each.quantity == PER_HOUR]:
        best = max(cells, key=lambda each: each.value or 0.0)
        at_once = int(best.what.partition(" ")[0])
        sizes = REHEARSAL if rehearse else Sizes()
        rate = (best.value or 0.0) / 3600 * sizes.cell[1] * sizes.num_images
    chosen = Design(1, 1) if rehearse else design(seconds, rate)
    if chosen is None:
        raise RuntimeError(f"{seconds:.0f} s are too short for 3 seeds of 2 epochs: give it more --minutes")
    return train(data_dir, chosen, at_once, device, seconds, model)  # type: ignore[arg-type]


def could_run() -> str:
    """Checks that all a GPU would run can be imported and collected; returns one line that says so.

    Raises:
        RuntimeError: the checks cannot be collected.
    """
    status, said = run_for([*PYTEST, "--collect-only", CHECKS], ENVIRONMENT, None)
    if status:
        raise RuntimeError(f"{CHECKS} cannot be collected: {said.strip()[-500:]}")
    number = sum("::" in line for line in said.splitlines())
    return (
        f"no GPU that torch {torch.__version__} sees: nothing was measured. {number} checks can be collected; the "
        f"measurements of speed and the training of {len(METHODS)} methods can be imported"
    )


def main(
    only: Annotated[list[Part] | None, typer.Option(help="Run only this part. Repeatable.")] = None,
    minutes: Annotated[float, typer.Option(min=1, help="Time for all parts together.")] = 25,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder that holds CIFAR-10; without it, the science part is skipped."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for gpu.json and gpu.md.")] = SOURCE / "docs" / "results",
    rehearse: Annotated[bool, typer.Option(help="Run on a CPU, at toy sizes.")] = False,
) -> None:
    """Checks and measures what needs a GPU."""
    console, begin = Console(), time.monotonic()
    if not rehearse and not torch.cuda.is_available():
        try:
            print(could_run())
        except RuntimeError as error:
            sys.exit(str(error))
        return
    device, sizes = ("cpu", REHEARSAL) if rehearse else ("cuda", Sizes())
    wanted, total, problems = [each.value for each in only or Part], 60 * minutes, []
    path = out / "gpu.json"
    found = _former(path)
    out.mkdir(parents=True, exist_ok=True)

    def left(share: float) -> float:
        return (share if not only else 1.0) * total - (time.monotonic() - begin)

    for name in wanted:
        console.rule(name)
        try:
            if name == Part.CHECKS.value:
                made = checks(max(left(CHECKS_SHARE), 60))
                problems += [test for test, outcome in made["outcomes"].items() if outcome.startswith("failed")]
            elif name == Part.SPEED.value:
                made = speed(sizes, time.monotonic() + left(SPEED_SHARE), console)
                problems += [each["what"] for each in made["measured"] if each["problem"] not in {"", NO_TIME}]
            elif data_dir is None:
                console.print("left out: --data-dir names the folder with CIFAR-10")
                continue
            else:
                made = science(found, data_dir, left(1.0), rehearse=rehearse)
        except RuntimeError as error:
            problems.append(f"{name}: {error}")
            console.print(f"{name}: {error}", style="red", markup=False, soft_wrap=True)
            continue
        found[name] = {"machine": machine(device), **made}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        has_picture = "science" in found and draw(found["science"], out / PICTURE)
        (out / "gpu.md").write_text(markdown(found, has_picture=has_picture), encoding="utf-8")
    console.print(f"written: {path}, {out / 'gpu.md'}; {(time.monotonic() - begin) / 60:.1f} minutes", soft_wrap=True)
    for problem in problems:
        console.print(f"failed: {problem}", style="red", markup=False, soft_wrap=True)
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    typer.run(main)
