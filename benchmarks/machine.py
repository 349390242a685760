"""The first line of every benchmark's output, and the format of its verdicts."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

from suite.run.provenance import code_version

BAR = "bar: "
"""Prefix of the lines that hold a program's verdicts; `run_all.py` collects them."""


def describe() -> str:
    """Processor, cores, memory, GPU if torch sees one, torch's version and threads, commit and load, in one line."""
    import torch

    parts = [f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {_memory_bytes() / 2**30:.0f} GiB"]
    parts.append(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
    parts.append(f"torch {version('torch')}, {torch.get_num_threads()} threads")
    code = code_version()
    if code["commit"] is not None:
        parts.append(f"commit {code['commit'][:12]}{' and changes' if code['diff'] else ''}")
    parts.append(f"load {os.getloadavg()[0]:.1f}")  # load by other processes
    return "; ".join(parts)


def verdict(what: str, value: float, limit: float, *, at_least: bool = False, unit: str = "") -> str:
    """`bar: WHAT <= LIMIT: VALUE, met` (or missed); with `at_least`, >=."""
    is_met = value >= limit if at_least else value <= limit
    sign = ">=" if at_least else "<="
    return f"{BAR}{what} {sign} {limit:g}{unit}: {value:.3g}{unit}, {'met' if is_met else 'missed'}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (models or [platform.processor()])[0]


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
