"""What the README and the docs tell a newcomer to type is real."""

import inspect
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import analysis.__main__
import launch.__main__
import quantizers.__main__
import suite.data.__main__
import suite.export.__main__
import suite.train
from suite.recipe.grid_file import load_grid

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
MADE = {"docs/reference/commands.md", "docs/reference/grid-keys.md"}  # by docs/hooks.py, when the site is built
APPS = {
    "launch": launch.__main__.app,
    "analysis": analysis.__main__.app,
    "quantizers": quantizers.__main__.app,
    "suite.data": suite.data.__main__.app,
}


def _commands() -> list[str]:
    pattern = rf"python -m (?:{'|'.join(map(re.escape, APPS))}) [^`\n#]*"
    found = [match for page in PAGES for match in re.findall(pattern, page.read_text(encoding="utf-8"))]
    return sorted({command.removesuffix(" -->").strip() for command in found})


@pytest.mark.parametrize("command", _commands())
def test_commands_in_the_docs_exist_with_their_options(command: str) -> None:
    _, _, package, *arguments = shlex.split(command)
    answer = CliRunner().invoke(APPS[package], [*arguments, "--help"])
    assert answer.exit_code == 0, answer.output


def test_the_docs_name_commands_at_all() -> None:
    assert len(_commands()) > 10


TYPED = re.compile(
    r"^ {4}(?:[A-Z_]+=\S+ )*((?:python3?|make|torchrun|srun|pip|git|mkdocs|proxbench|tar|source) .*)$", re.MULTILINE
)
CHECKED = re.compile(rf"(?:.* )?python3? -m (?:{'|'.join(map(re.escape, APPS))}) ")  # by the test above
NOT_RUN = {
    r"git clone ": "needs the address of the repository",
    r"source \.venv/bin/activate": "changes the shell that it is typed in",
    r"python3 -m pip install --no-index ": "installs into a GPU machine",
    r"pip install ": "installs packages",
    r"mkdocs serve": "serves until it is stopped; tests/test_site.py builds the site",
    r"python -m pytest tests/": "is a test",
    r"tar xf ": "unpacks a file of the reader's",
}
"""Commands that no test runs, and why."""


def _typed() -> list[str]:
    found = [line for page in PAGES for line in TYPED.findall(page.read_text(encoding="utf-8"))]
    return sorted({re.split(r"\s+#|\s{2,}", line)[0].strip() for line in found})


@pytest.mark.parametrize("line", [line for line in _typed() if not CHECKED.match(line)])
def test_a_line_of_a_code_block_is_a_command_that_exists(line: str) -> None:
    if any(re.match(pattern, line) for pattern in NOT_RUN):
        return
    for command in line.split(" && "):
        words = shlex.split(command)
        if words[0] == "make":
            rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            assert {word for word in words[1:] if "=" not in word} <= set(rules)
        elif len(words) > 1 and words[1].startswith("benchmarks/"):
            source = (ROOT / words[1]).read_text(encoding="utf-8")
            options = [word.removeprefix("--") for word in words if word.startswith("--")]
            assert all(f"--{name}" in source or f"{name.replace('-', '_')}:" in source for name in options)
        elif "suite.train" in words or "suite.export" in words:
            program = suite.train.main if "suite.train" in words else suite.export.__main__.main
            names = inspect.signature(program).parameters
            given = words[words.index("suite.train" if "suite.train" in words else "suite.export") :]
            options = [word.removeprefix("--").replace("-", "_") for word in given if word.startswith("--")]
            assert all(name in names or f"{name}_" in names for name in options), names
        else:
            assert any(re.match(pattern, command) for pattern in NOT_RUN), f"nothing checks {command!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        path = page.parent / target
        is_made = path.resolve().relative_to(ROOT).as_posix() in MADE if "://" not in target else False
        assert target.startswith("https://") or path.exists() or is_made, target


def test_make_targets_in_the_readme_exist() -> None:
    targets = set(re.findall(r"make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    rules = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= targets <= rules


def test_the_readmes_optimizer_trains() -> None:
    (code,) = re.findall(r"(    import torch\n.*?)\n\n\S", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    hidden, head = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)
    names: dict[str, object] = {
        "model": torch.nn.Sequential(hidden, head),
        "binary_weights": [hidden.weight],
        "the_rest": [hidden.bias, *head.parameters()],
        "loader": [(torch.randn(16, 4), torch.randint(0, 2, (16,)))] * 5,
        "criterion": torch.nn.CrossEntropyLoss(),
        "num_steps": 5,
    }
    exec("\n".join(line[4:] for line in code.splitlines()), names)  # noqa: S102  (our own README)
    assert bool((hidden.weight.abs() == 1).all())


GRID_PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]
INDENTED = re.compile(r"(?:^(?: {4}.*)?\n)+", re.MULTILINE)


def _blocks(page: Path, first: str) -> list[str]:
    """Code blocks of a page that begin so."""
    found = [textwrap.dedent(block).strip("\n") + "\n" for block in INDENTED.findall(page.read_text(encoding="utf-8"))]
    return [block for block in found if block.startswith(first)]


@pytest.mark.parametrize("page", [page for page in GRID_PAGES if _blocks(page, "name: ")], ids=lambda page: page.stem)
def test_a_grid_on_a_page_is_one(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for module in _blocks(page, "from torch import nn"):
        (tmp_path / "my_models.py").write_text(module, encoding="utf-8")
    for text in _blocks(page, "name: "):
        path = tmp_path / "grid.yaml"
        path.write_text(text, encoding="utf-8")
        assert load_grid(str(path)).cells() or load_grid(str(path)).resolve().cells


def test_the_tutorials_model_is_launched_and_binarized_as_its_page_says(tmp_path: Path) -> None:
    page = ROOT / "docs" / "tutorials" / "your-model.md"
    (module,), (program,) = _blocks(page, "from torch import nn"), _blocks(page, "import models")
    (grid,) = [text for text in _blocks(page, "name: ") if "my_models" in text]
    (tmp_path / "my_models.py").write_text(module, encoding="utf-8")
    (tmp_path / "three.yaml").write_text(grid, encoding="utf-8")

    def typed(*arguments: str) -> str:
        answer = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert answer.returncode == 0, answer.stderr
        return answer.stdout.strip()

    assert f"# {typed('-c', program)}" in program
    (promised,) = re.findall(
        r"launch grid three.yaml --local --dry-run +# (.*); \.\.\.", page.read_text(encoding="utf-8")
    )
    assert promised in typed("-m", "launch", "grid", "three.yaml", "--local", "--dry-run")
