"""The doctor reports each possible fault of a node, with its fix."""

from typing import Any

import pytest

from launch.doctor.diagnosis import Finding, Report, of_partition, of_report
from launch.slurm.client import Partition

HEALTHY: dict[str, Any] = {
    "node": "node7",
    "python": "/opt/python",
    "package": None,
    "num_gpus": 4,
    "folder": None,
    "nonce": "abc",
    "megabytes_per_second": 400.0,
    "lock_is_seen": True,
    "data_dir": True,
    "ffcv": None,
    "num_betons": 2,
    "tracking": None,
    "time": 1000.0,
}


def _findings(*, is_local: bool = False, data_is_here: bool = True, **changes: object) -> dict[str, Finding]:
    report = Report(HEALTHY | changes, 1000.1, "abc", data_is_here, 4, "http://host", is_local=is_local)
    return {finding.what: finding for finding in of_report(report)}


def test_all_is_well_on_a_healthy_node() -> None:
    found = _findings()
    assert len(found) == 9
    assert {finding.verdict for finding in found.values()} == {"ok"}


def test_of_this_machine_neither_clock_nor_server_is_asked() -> None:
    assert not {"clock of node7", "MLflow from node7", "clock of this machine"} & set(_findings(is_local=True))


@pytest.mark.parametrize(
    ("changes", "what", "verdict"),
    [
        ({"package": "ImportError: no torch"}, "proxbench on node7", "problem"),
        ({"num_gpus": 3}, "GPUs on node7", "problem"),
        ({"num_gpus": None}, "GPUs on node7", "can't tell"),
        ({"nonce": None}, "shared file system", "problem"),
        ({"nonce": "another file system's"}, "shared file system", "problem"),
        ({"folder": "Permission denied: /runs"}, "ROOT on node7", "problem"),
        ({"megabytes_per_second": 49.0}, "write speed on node7", "problem"),
        ({"megabytes_per_second": None}, "write speed on node7", "problem"),
        ({"lock_is_seen": False}, "file locks", "absent"),
        ({"time": 1002.2}, "clock of node7", "problem"),
        ({"time": 998.0}, "clock of node7", "problem"),
        ({"data_dir": False}, "data directory on node7", "problem"),
        ({"data_dir": False, "data_is_here": False}, "data directory on node7", "absent"),
        ({"ffcv": "ImportError: no ffcv"}, "FFCV on node7", "absent"),
        ({"num_betons": 0}, "FFCV on node7", "absent"),
        ({"tracking": "timed out"}, "MLflow from node7", "absent"),
    ],
)
def test_what_is_amiss_is_told_alone_with_its_fix(changes: dict[str, Any], what: str, verdict: str) -> None:
    found = _findings(**changes)
    assert found[what].verdict == verdict
    assert found[what].fix or verdict == "can't tell"
    assert [name for name, finding in found.items() if finding.verdict != "ok"] == [what]


@pytest.mark.parametrize(("num_down", "verdict"), [(0, "ok"), (3, "ok"), (4, "problem")])
def test_a_partition_all_of_whose_nodes_are_down_is_a_problem(num_down: int, verdict: str) -> None:
    finding = of_partition(Partition("gpu", True, None, 4, 4 - num_down, 0, num_down, ((16, 2),)))
    assert finding.verdict == verdict
    said = f"4 nodes: {4 - num_down} idle, 0 with jobs, {num_down} down or drained"
    assert finding.said == said
    cancelling = of_partition(
        Partition("gpu", True, None, 4, 4 - num_down, 0, num_down, ((16, 2),), preempt_mode="CANCEL")
    )
    assert cancelling.said == f"{said}; preempted jobs are cancelled, and workers submit successors"
