"""The command `proxbench`: `proxbench launch grid digits --local` is `python -m launch grid digits --local`."""

import os
import runpy
import sys
from importlib import import_module
from types import ModuleType

import typer

MODULES = {
    "launch": ("launch", "Run grids of training jobs, here or on SLURM, and look after them."),
    "analysis": ("analysis", "Turn runs into tables, tests, figures and reports."),
    "quantizers": ("quantizers", "List and certify the quantizers."),
    "data": ("suite.data", "Prepare and verify FFCV data files."),
    "train": ("suite.train", "Train one cell, without a launcher."),
    "export": ("suite.export", "Write a trained network with one bit per binary weight."),
}
"""Module and summary of each command."""
SINGLE = frozenset(("train", "export"))
"""Commands without subcommands."""
_TO_COMPLETE, _TYPED = "_PROXBENCH_COMPLETE", ("COMP_WORDS", "_TYPER_COMPLETE_ARGS")
"""Environment variables by which shells ask for completions, and say what has been typed."""
HELP = """Binary neural networks as proximal quantizers: a benchmark.

[bold]proxbench launch grid digits --local[/]  a first grid, minutes on a laptop
[bold]proxbench analysis tables digits[/]      its table
[bold]proxbench --install-completion[/]        complete commands and options with Tab
"""


def program(name: str) -> ModuleType:
    """The module that has the command's Typer application as `app`, or its function as `main`."""
    module, _ = MODULES[name]
    return import_module(module if name == "train" else f"{module}.__main__")


def application(wanted: str) -> typer.Typer:
    """All commands, for help and shell completion. Only `wanted` is imported: importing all takes seconds."""
    app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False, help=HELP)
    for name, (_, summary) in MODULES.items():
        if name != wanted:
            app.command(name, help=summary)(lambda: None)
        elif name in SINGLE:
            app.command(name, help=summary)(program(name).main)
        else:
            app.add_typer(program(name).app, name=name, help=summary)
    return app


def main() -> None:
    """Run the module of the command that is named first; without one, print the commands."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in MODULES or _TO_COMPLETE in os.environ:
        words = next(filter(None, map(os.environ.get, _TYPED)), "").split()
        application(words[1] if len(words) > 1 else "")(prog_name="proxbench")
    module, _ = MODULES[name]
    sys.argv = [module, *sys.argv[2:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
