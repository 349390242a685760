"""Two processes have equal weights, the same as the literal loop over whole batches, or raise one clear error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from two_ranks import PROGRAMS

WORKER = Path(__file__).parent / "two_ranks.py"


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Each rank's verdict on each program; one pair of processes runs them all."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(WORKER), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.parametrize("program", PROGRAMS)
def test_two_ranks(program: str, verdicts: list[dict[str, str]]) -> None:
    assert [found[program] for found in verdicts] == ["holds", "holds"]
