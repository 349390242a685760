"""What `gpu.py` needs besides torch, for a GPU machine that reaches no registry: a list, and the wheels.

    make gpu-wheels                                                 lists them; nothing is downloaded
    python benchmarks/gpu_wheels.py --into wheels                   fetches them, and says how large they are
    python benchmarks/gpu_wheels.py --into wheels --python 3.12 --platform manylinux_2_28_x86_64
    python3 -m pip install --no-index --no-deps --target site wheels/*.whl         over there, then:
    PYTHONPATH=site python3 benchmarks/gpu.py --data-dir DATA

Listed are the packages in ROOTS and their requirements, in the versions of this environment, except torch and its
requirements. scikit-learn is carried for the file of the digits, and is never imported, so that SciPy stays at home.
torchao (for PARQ's optimizer), matplotlib (curves), deepspeed and ffcv are used where they are.
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
"""Of the platform tags that a machine of today takes."""


def required(roots: Iterable[str], without: frozenset[str] = frozenset()) -> frozenset[str]:
    """Names of the distributions, and of all that they require here, as they are installed; not those `without`."""
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
    """Versions by name, of all that has to be carried to a machine that has torch."""
    names = required(ROOTS, required(["torch"])) | set(FILES_ONLY)
    return {name: distribution(name).version for name in sorted(names)}


def main(
    into: Annotated[Path | None, typer.Option(help="Fetch the wheels into this folder.")] = None,
    python: Annotated[
        str, typer.Option(help="The other machine's.")
    ] = f"{sys.version_info.major}.{sys.version_info.minor}",
    platform: Annotated[
        list[str] | None, typer.Option(help="Its wheels' tag; default: Linux on x86_64. Repeatable.")
    ] = None,
) -> None:
    """List what the GPU program needs besides torch, and fetch it."""
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
