"""Lists, or fetches, the wheels that `gpu.py` needs besides torch on a GPU machine without a package registry.

    make gpu-wheels                                                 lists them, downloads nothing
    python benchmarks/gpu_wheels.py --into wheels                   fetches them and prints their sizes
    python benchmarks/gpu_wheels.py --into wheels --python 3.12 --platform manylinux_2_28_x86_64
    python3 -m pip install --no-index --no-deps --target site wheels/*.whl         on the GPU machine, then:
    PYTHONPATH=site python3 benchmarks/gpu.py --data-dir DATA

The list has the packages in ROOTS and their requirements, in this environment's versions, without torch and its
requirements. scikit-learn is included only for the file of the digits and is never imported, so SciPy is not needed.
torchao (for PARQ's optimizer), matplotlib (curves), deepspeed and ffcv are used if they are installed.
"""

import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Annotated

import typer

ROOTS = (
    "torchvision",
    "timm",
    "safetensors",
    "pydantic",
    "ruamel.yaml",
    "pyyaml",
    "typer",
    "rich",
    "pytest",
    "pytest-timeout",
)
FILES_ONLY = ("scikit-learn",)
LIMIT_MEGABYTES = 60
GLIBC = ("2_28", "2_27", "2_17")
"""Versions in the platform tags that a current machine accepts."""


def required(roots: Iterable[str], without: frozenset[str] = frozenset()) -> frozenset[str]:
    """Names of the distributions and of all their installed requirements, minus those in `without`."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: set[str] = set()
    waiting = [Requirement(name) for name in roots]
    seen: set[str] = set()
    while waiting:
        asked = waiting.pop()
        name = canonicalize_name(asked.name)
        if name in without or (key := f"{name}{sorted(asked.extras)}") in seen:
            continue
        seen.add(key)
        try:
            requirements = distribution(name).requires or ()
        except PackageNotFoundError:  # not needed in this environment
            continue
        found.add(name)
        extras = [{"extra": extra} for extra in ("", *asked.extras)]
        parsed = map(Requirement, requirements)
        waiting += [each for each in parsed if each.marker is None or any(map(each.marker.evaluate, extras))]
    return frozenset(found)


def needed() -> dict[str, str]:
    """Name -> version of each distribution that a machine with torch lacks."""
    names = required(ROOTS, required(["torch"])) | set(FILES_ONLY)
    return {name: distribution(name).version for name in sorted(names)}


def main(
    into: Annotated[Path | None, typer.Option(help="Fetch the wheels into this folder.")] = None,
    python: Annotated[
        str, typer.Option(help="Python version of the GPU machine.")
    ] = f"{sys.version_info.major}.{sys.version_info.minor}",
    platform: Annotated[
        list[str] | None, typer.Option(help="Platform tag of the GPU machine; default: Linux on x86_64. Repeatable.")
    ] = None,
) -> None:
    """Lists the packages that the GPU program needs besides torch, or fetches them."""
    packages = needed()
    if into is None:
        print("\n".join(f"{name}=={version}" for name, version in packages.items()))
        print("# besides torch; --into FOLDER fetches these wheels", file=sys.stderr)
        return
    tags = platform or [f"manylinux_{version}_x86_64" for version in GLIBC] + ["manylinux2014_x86_64"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(into),
    ]
    command += [f"--python-version={python}", "--implementation=cp", *(f"--platform={tag}" for tag in tags)]
    done = subprocess.run([*command, *(f"{n}=={v}" for n, v in packages.items())], check=False)
    if done.returncode:
        sys.exit(f"pip download: exit status {done.returncode}; its message is above")
    wheels = sorted(into.glob("*.whl"), key=lambda wheel: -wheel.stat().st_size)
    total = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 1e6:7.2f} MB  {wheel.name}")
    print(f"{total:7.2f} MB in {len(wheels)} wheels; at most {LIMIT_MEGABYTES} wanted")
    raise SystemExit(int(total > LIMIT_MEGABYTES))


if __name__ == "__main__":
    typer.run(main)
