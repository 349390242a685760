"""One real SLURM cluster for all tests in this folder."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.lab import Lab, obstacle
from launch.slurm import client


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Skips this folder's tests without SLURM; fails them if SLURM is required, as in CI."""
    if why := obstacle():
        if os.environ.get("PROXBENCH_REQUIRE_SLURM") == "1":
            pytest.fail(why, pytrace=False)
        pytest.skip(why)  # here rather than in a fixture: pytest then reports it once, not once per test


@pytest.fixture(scope="package")  # with scope "session" it and its SLURM_CONF would outlive this folder's tests
def cluster() -> Iterator[Lab]:
    """Four idle nodes with two GPUs each, which SLURM's commands find through the environment."""
    with pytest.MonkeyPatch.context() as patch, Lab() as lab:
        for variable in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))]:
            patch.delenv(variable)  # set if the tests run in a job
        for variable in ("SLURM_CONF", "PATH"):
            patch.setenv(variable, lab.environment[variable])
        patch.setenv("COLUMNS", "150")
        yield lab


@pytest.fixture
def root(cluster: Lab, tmp_path: Path) -> Iterator[Path]:
    """A ROOT; remaining jobs are cancelled afterwards."""
    yield tmp_path / "runs"
    client.cancel(list(client.queue()))
    cluster.run("scancel", "--user=root")


@pytest.fixture
def waiting(cluster: Lab, root: Path) -> Iterator[Path]:
    """A ROOT, and a cluster on which jobs only wait."""
    nodes = ",".join(cluster.nodes)
    cluster.run("scontrol", "update", f"nodename={nodes}", "state=drain", "reason=test")
    yield root
    cluster.run("scontrol", "update", f"nodename={nodes}", "state=resume")
