"""What holds for every command of the project."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "numpy", "pandas", "scipy", "mlflow", "timm", "torchvision", "matplotlib", "submitit", "ffcv")
COMMANDS = (
    *("launch", "launch grid", "launch debug", "launch retry", "launch cancel", "launch status", "launch logs"),
    *("launch sync", "launch clean", "launch doctor", "analysis", "analysis tables", "analysis figures"),
    *("analysis power", "analysis report"),
    *("suite.data", "suite.data prepare", "suite.data verify", "suite.export", "suite.train"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command: str) -> None:
    module, *rest = command.split()
    # sys.modules is looked at when all is said: a command may import what it likes until then.
    program = (
        "import atexit, runpy, sys\n"
        f"sys.argv = ['command', *{rest!r}, '--help']\n"
        f"atexit.register(lambda: print('HEAVY', sorted({set(HEAVY)!r} & set(sys.modules))))\n"
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    answer = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert "Usage" in answer.stdout
    assert "HEAVY []" in answer.stdout
