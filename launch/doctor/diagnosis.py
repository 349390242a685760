"""Turns the reports of SLURM and of a probe into findings with fixes: pure functions."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from launch.slurm.client import Partition

MIN_MEGABYTES_PER_SECOND = 50.0
"""Below this, saving a checkpoint of a large model delays its training."""
MAX_SKEW_SECONDS = 2.0
Verdict = Literal["ok", "absent", "can't tell", "problem"]


@dataclass(frozen=True)
class Finding:
    """`said` is true of `what`. A problem stops a grid; it can run without absent things. `fix` is one line."""

    verdict: Verdict
    what: str
    said: str
    fix: str = ""


@dataclass(frozen=True)
class Report:
    """A report of launch.doctor.probe. `arrived`: unix seconds by this machine's clock; `nonce`: as written to ROOT."""

    found: dict[str, Any]
    arrived: float
    nonce: str
    data_is_here: bool
    num_gpus_asked: int
    tracking_uri: str | None
    is_local: bool


def of_partition(partition: Partition) -> Finding:
    """Whether jobs can start in the partition at all."""
    what = f"partition {partition.name}"
    said = (
        f"{partition.num_nodes} nodes: {partition.num_idle} idle, {partition.num_allocated} with jobs, "
        f"{partition.num_down} down or drained"
    )
    if partition.preempt_mode == "CANCEL":
        said += "; preempted jobs are cancelled, and workers submit successors"
    if partition.num_down < partition.num_nodes:
        return Finding("ok", what, said)
    return Finding("problem", what, said, "name another --partition, or ask its administrators: sinfo -R shows why")


def of_report(report: Report) -> Iterator[Finding]:
    """Findings about the machine that reported."""
    found = report.found
    here = "this machine" if report.is_local else found["node"]
    if found["package"]:
        fix = "name an interpreter that has it with --python, or add --setup 'module load ...'"
        yield Finding("problem", f"proxbench on {here}", f"{found['python']}: {found['package']}", fix)
    else:
        yield Finding("ok", f"proxbench on {here}", found["python"])
    yield _gpus(report, here)
    yield from _folder(report, here)
    if not report.is_local:
        yield _clock(report, here)
    yield _data(report, here)
    yield _ffcv(found, here)
    if report.tracking_uri is not None and not report.is_local:
        yield _tracking(found, here, report.tracking_uri)


def _gpus(report: Report, here: str) -> Finding:
    what, seen, asked = f"GPUs on {here}", report.found["num_gpus"], report.num_gpus_asked
    if seen is None:
        return Finding("can't tell", what, "torch cannot be imported there")
    said = f"torch sees {seen}" + ("" if report.is_local else f", the job asked for {asked}")
    if seen >= asked:
        return Finding("ok", what, said)
    return Finding(
        "problem", what, said, "install a torch that fits the driver: compare nvidia-smi and torch.version.cuda"
    )


def _folder(report: Report, here: str) -> Iterator[Finding]:
    found = report.found
    if found["nonce"] != report.nonce:
        fix = "put --root on a file system that the nodes share"
        yield Finding("problem", "shared file system", f"files written to ROOT here do not appear on {here}", fix)
        return
    if found["folder"]:
        yield Finding("problem", f"ROOT on {here}", found["folder"], "use a --root that jobs may write to")
        return
    yield Finding("ok", f"ROOT on {here}", "seen and writable")
    speed = found["megabytes_per_second"]
    if speed is None:
        yield Finding("problem", f"write speed on {here}", "the file system is full", "free space, or move --root")
    else:
        fix = "" if speed >= MIN_MEGABYTES_PER_SECOND else "use a faster --root, or add --checkpoint-minutes 30"
        verdict: Verdict = "problem" if fix else "ok"
        yield Finding(verdict, f"write speed on {here}", f"{speed:.0f} MB/s into ROOT, flushed", fix)
    if found["lock_is_seen"]:
        yield Finding("ok", "file locks", f"held here, seen on {here}")
    else:
        fix = "no fix needed: cells are claimed without locks"
        yield Finding("absent", "file locks", f"held here, not seen on {here}", fix)


def _clock(report: Report, here: str) -> Finding:
    ahead = report.found["time"] - report.arrived
    said = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
    if abs(ahead) < MAX_SKEW_SECONDS:
        return Finding("ok", f"clock of {here}", said)
    return Finding("problem", f"clock of {here}", said, "run NTP (chrony) there: `status` compares heartbeats")


def _data(report: Report, here: str) -> Finding:
    what = f"data directory on {here}"
    if report.found["data_dir"]:
        return Finding("ok", what, "seen")
    if report.data_is_here:
        return Finding("problem", what, "not seen", "use a --data-dir that the nodes can see")
    return Finding("absent", what, "not there yet", "a launch downloads into it the data sets that it can")


def _ffcv(found: dict[str, Any], here: str) -> Finding:
    what = f"FFCV on {here}"
    if found["ffcv"]:
        return Finding("absent", what, found["ffcv"], "only the ffcv loader needs it: pip install 'proxbench[ffcv]'")
    if not found["num_betons"]:
        fix = "data sets that fit into memory need no .beton file"
        return Finding("absent", what, "can be imported; no .beton file in the data directory or its folders", fix)
    return Finding("ok", what, f"can be imported; {found['num_betons']} .beton files")


def _tracking(found: dict[str, Any], here: str, uri: str) -> Finding:
    if found["tracking"] is None:
        return Finding("ok", f"MLflow from {here}", f"{uri} answers")
    fix = "use an address that nodes can reach, or let `launch sync --watch` fill it from here"
    return Finding("absent", f"MLflow from {here}", f"{uri}: {found['tracking']}", fix)
