"""What the doctor finds, and what to do about it: pure functions of what SLURM and a probe report."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from launch.slurm.client import Partition

MIN_MEGABYTES_PER_SECOND = 50.0
"""Slower, and a checkpoint of a large model holds up its training."""
MAX_SKEW_SECONDS = 2.0
Verdict = Literal["ok", "absent", "can't tell", "problem"]


@dataclass(frozen=True)
class Finding:
    """`said` of `what`; a problem stops a grid, what is absent is one that it can do without. `fix` is one line."""

    verdict: Verdict
    what: str
    said: str
    fix: str = ""


@dataclass(frozen=True)
class Report:
    """What launch.doctor.probe found, `arrived` in unix seconds by this machine; `nonce` is what ROOT held for it."""

    found: dict[str, Any]
    arrived: float
    nonce: str
    data_is_here: bool
    num_gpus_asked: int
    tracking_uri: str | None
    is_local: bool


def of_partition(partition: Partition) -> Finding:
    """Whether jobs can start there at all."""
    what = f"partition {partition.name}"
    said = (
        f"{partition.num_nodes} nodes: {partition.num_idle} idle, {partition.num_allocated} with jobs, "
        f"{partition.num_down} down or drained"
    )
    if partition.preempt_mode == "CANCEL":
        said += "; preempted jobs are cancelled, and workers hand in successors"
    if partition.num_down < partition.num_nodes:
        return Finding("ok", what, said)
    return Finding("problem", what, said, "name another --partition, or ask its administrators: sinfo -R says why")


def of_report(report: Report) -> Iterator[Finding]:
    """What a run would meet on the machine that reported."""
    found = report.found
    here = "this machine" if report.is_local else found["node"]
    if found["package"]:
        fix = "name an interpreter that has it with --python, or say --setup 'module load ...'"
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
        yield Finding("problem", "shared file system", f"{here} does not see what is written to ROOT here", fix)
        return
    if found["folder"]:
        yield Finding("problem", f"ROOT on {here}", found["folder"], "put --root where jobs may write")
        return
    yield Finding("ok", f"ROOT on {here}", "seen and writable")
    speed = found["megabytes_per_second"]
    if speed is None:
        yield Finding("problem", f"write speed on {here}", "the file system is full", "make room, or move --root")
    else:
        fix = "" if speed >= MIN_MEGABYTES_PER_SECOND else "put --root on a faster one, or say --checkpoint-minutes 30"
        verdict: Verdict = "problem" if fix else "ok"
        yield Finding(verdict, f"write speed on {here}", f"{speed:.0f} MB/s into ROOT, flushed", fix)
    if found["lock_is_seen"]:
        yield Finding("ok", "file locks", f"held here, seen on {here}")
    else:
        fix = "none is needed: cells are claimed without locks"
        yield Finding("absent", "file locks", f"held here, not seen on {here}", fix)


def _clock(report: Report, here: str) -> Finding:
    ahead = report.found["time"] - report.arrived
    said = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
    if abs(ahead) < MAX_SKEW_SECONDS:
        return Finding("ok", f"clock of {here}", said)
    return Finding("problem", f"clock of {here}", said, "have NTP (chrony) run there: `status` compares heartbeats")


def _data(report: Report, here: str) -> Finding:
    what = f"data directory on {here}"
    if report.found["data_dir"]:
        return Finding("ok", what, "seen")
    if report.data_is_here:
        return Finding("problem", what, "not seen", "name one that the nodes see with --data-dir")
    return Finding("absent", what, "not there yet", "a launch downloads into it what may be downloaded")


def _ffcv(found: dict[str, Any], here: str) -> Finding:
    what = f"FFCV on {here}"
    if found["ffcv"]:
        return Finding("absent", what, found["ffcv"], "pip install 'proxbench[ffcv]'; only its loader needs it")
    if not found["num_betons"]:
        fix = "data sets that fit into memory need none"
        return Finding("absent", what, "can be imported; no .beton file in the data directory or its folders", fix)
    return Finding("ok", what, f"can be imported; {found['num_betons']} .beton files")


def _tracking(found: dict[str, Any], here: str, uri: str) -> Finding:
    if found["tracking"] is None:
        return Finding("ok", f"MLflow from {here}", f"{uri} answers")
    fix = "name it by an address that nodes reach; or let `launch sync --watch` fill it from here"
    return Finding("absent", f"MLflow from {here}", f"{uri}: {found['tracking']}", fix)
