"""What the README and the docs tell a newcomer to type is real."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import analysis.__main__
import launch.__main__
import quantizers.__main__
import suite.data.__main__

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
APPS = {
    "launch": launch.__main__.app,
    "analysis": analysis.__main__.app,
    "quantizers": quantizers.__main__.app,
    "suite.data": suite.data.__main__.app,
}


def _commands() -> list[str]:
    pattern = rf"python -m (?:{'|'.join(map(re.escape, APPS))}) [^`\n#]*"
    found = [match for page in PAGES for match in re.findall(pattern, page.read_text(encoding="utf-8"))]
    return sorted({command.strip() for command in found})


@pytest.mark.parametrize("command", _commands())
def test_commands_in_the_docs_exist_with_their_options(command: str) -> None:
    _, _, package, *arguments = shlex.split(command)
    answer = CliRunner().invoke(APPS[package], [*arguments, "--help"])
    assert answer.exit_code == 0, answer.output


def test_the_docs_name_commands_at_all() -> None:
    assert len(_commands()) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


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
