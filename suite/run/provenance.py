"""The provenance of a run's numbers: code, versions, hardware, data."""

import hashlib
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imports torch, which would delay a launcher that only copies the code
    from suite.recipe.cell import Cell
    from suite.training.trainer import Trainer

SNAPSHOT = "snapshot.json"
"""File beside a copy of the packages that contains the original's code_version."""
RUN_BY = ("quantizers", "models", "suite")
"""Packages whose code a run's numbers depend on."""
CODE = {".py", ".h", ".cpp", ".cu"}
"""Suffixes of code files. Bundled grids do not count: a cell contains everything it takes from its grid."""
_PACKAGES = ("proxbench", "torch", "torchvision", "timm", "numpy", "ffcv", "deepspeed", "mlflow", "submitit")


def collect(trainer: "Trainer") -> dict[str, Any]:
    """Provenance of this process's attempt, as JSON; `execution` has resolved defaults."""
    import torch

    layout = trainer.layout
    return {
        "command": sys.argv,
        "code": {**code_version(), "digest": code_digest(), "users_digest": users_digest(_names(trainer.cell))},
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "host": platform.node(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(layout.device) if layout.device.type == "cuda" else _processor(),
        "num_processes": layout.world_size,
        # Sums are split over threads, so another number of threads may round differently.
        "num_threads": torch.get_num_threads(),
        # The two steps round differently.
        "optimizer_step": "one pass" if trainer.optimizer.is_fused else "torch's operations",
        "execution": trainer.resolved_execution(),
        "num_cores": len(os.sched_getaffinity(0)),
        "data_checksum": trainer.data_checksum,
        "weights_checksum": trainer.weights_checksum,
        "teacher_checksum": trainer.teacher_checksum,
    }


def _names(cell: "Cell") -> list[str]:
    inputs = cell.quantization.inputs
    return [cell.model, cell.quantizer, *([] if inputs is None else [inputs.quantizer])]


@cache
def code_digest() -> str:
    """16 hex digits: SHA-256 over the sources that a run's numbers depend on, as this process imports them.

    Runs with equal digests used the same quantizers, models and suite, whatever their commits. A copy made by the
    launcher has its original's digest.
    """
    digest, folder = hashlib.sha256(), Path(__file__).parents[2]
    for package in RUN_BY:
        for path in sorted((folder / package).rglob("*")):
            if path.suffix in CODE and "__pycache__" not in path.parts:
                content = path.read_bytes()
                digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def users_digest(names: Iterable[str]) -> str:
    """The same digest over modules of a user's own models and quantizers, `module:attribute`; empty without any."""
    modules = sorted({name.partition(":")[0] for name in names if ":" in name})
    digest = hashlib.sha256()
    for module in modules:
        source = importlib.import_module(module).__file__
        digest.update(module.encode() + (b"" if source is None else Path(source).read_bytes()))
    return digest.hexdigest()[:16] if modules else ""


def code_version() -> dict[str, str | None]:
    """The commit that this package was imported or (by the launcher) copied from, and local changes; None without git.

    Untracked files are listed by name.
    """
    snapshot = Path(__file__).parents[2] / SNAPSHOT
    if snapshot.exists():
        copied: dict[str, str | None] = json.loads(snapshot.read_text(encoding="utf-8"))
        return copied
    if shutil.which("git") is None:
        return {"commit": None, "diff": None, "untracked": None}
    return {
        "commit": _git("rev-parse", "HEAD"),
        "diff": _git("diff", "HEAD"),
        "untracked": _git("ls-files", "--others", "--exclude-standard", "--full-name", ":/"),
    }


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


def own_version() -> str:
    """This project's installed version; `not installed` where only its code lies, as in a launcher's copy."""
    return _version("proxbench") or "not installed"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()
