"""What holds for every command of the project."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import proxbench

HEAVY = ("torch", "numpy", "pandas", "scipy", "mlflow", "timm", "torchvision", "matplotlib", "submitit", "ffcv")


def _commands() -> list[tuple[str, str]]:
    """Every command of every program, and its docstring."""
    found = []
    for name, (module, _) in proxbench.MODULES.items():
        program = proxbench.program(name)
        if name in proxbench.SINGLE:
            found.append((module, program.main.__doc__))
        else:
            group = get_command(program.app)
            own = group.commands  # type: ignore[attr-defined]
            found += [(module, group.help or ""), *((f"{module} {key}", own[key].help) for key in own)]
    return found


COMMANDS = dict(_commands())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_examples_and_fits_a_terminal(command: str) -> None:
    """Examples come right after the summary; lines below them are shown as written, so they must not wrap."""
    summary, *paragraphs = inspect.cleandoc(COMMANDS[command]).split("\n\n")
    assert "\n" not in summary
    assert f"-m {command}" in paragraphs[0]
    for paragraph in paragraphs[1:]:
        assert all(len(line) <= 80 or "[bold]" in line for line in paragraph.split("\n"))


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("quantizers")])
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


def _proxbench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "proxbench", *arguments]
    root = str(Path(__file__).parents[1])
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": root, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "words",
    [["launch", "grid"], ["analysis", "tables"], ["quantizers", "list"], ["data", "verify"], ["train"], ["export"]],
)
def test_each_command_of_proxbench_is_its_modules(words: list[str]) -> None:
    module = {"data": "suite.data", "train": "suite.train", "export": "suite.export"}.get(words[0], words[0])
    theirs = subprocess.run(
        [sys.executable, "-m", module, *words[1:], "--help"], capture_output=True, text=True, check=True
    )
    ours = _proxbench(*words, "--help")
    assert (ours.returncode, ours.stdout) == (0, theirs.stdout)


def test_proxbench_alone_lists_its_commands_and_a_typo_is_answered_with_the_nearest() -> None:
    listed = _proxbench()
    assert all(f" {name} " in listed.stdout for name in ("launch", "analysis", "quantizers", "data", "train", "export"))
    typo = _proxbench("lanch")
    assert typo.returncode == 2
    assert "Did you mean 'launch'?" in typo.stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("la", "launch"), ("launch gr", "grid"), ("analysis tables --for", "--format"), ("quantizers cert", "certify")],
)
def test_the_shell_completes_commands_and_options(typed: str, offered: str) -> None:
    asked = {"_PROXBENCH_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": f"proxbench {typed}"}
    assert f'"{offered}"' in _proxbench(**asked).stdout
