"""The studies under docs/results: every number is rebuilt from the committed runs, and the page shows it as it is."""

import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from test_analysis_bundle import call

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PAGE = RESULTS / "small-studies.md"
BUNDLES = sorted((RESULTS / "small-studies").glob("*.tar.xz"))
MAX_BYTES = 3_000_000
SHOWN = re.compile(r"^<!-- python -m analysis (?P<command>.*) -->\n(?P<block>(?:.+\n)+)", re.MULTILINE)
"""On the page: a command, and lines of its output."""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all bundles are unpacked."""
    folder = tmp_path_factory.mktemp("studies")
    for bundle in BUNDLES:
        with tarfile.open(bundle) as archive:
            archive.extractall(folder, filter="data")
    return folder


def test_the_bundles_are_small_and_have_no_weights(unpacked: Path) -> None:
    assert 0 < sum(bundle.stat().st_size for bundle in BUNDLES) < MAX_BYTES
    names = {path.name for path in unpacked.rglob("*") if path.is_file()}
    assert "result.json" in names
    assert not [name for name in names if name.endswith((".pt", ".safetensors"))]


@pytest.mark.slow
@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name.partition(".")[0])
def test_a_study_is_rebuilt_from_its_bundle_byte_for_byte(bundle: Path, unpacked: Path) -> None:
    with tarfile.open(bundle) as archive:
        folder = unpacked / archive.getnames()[0].partition("/")[0]
    lines = (folder / "README.txt").read_text(encoding="utf-8").splitlines()
    commands = [line.split() for line in lines if line.startswith("    ")]
    assert [command[0] for command in commands].count("cmp") == 3  # tables.md, tables.json and tuning.md
    for command in commands:
        program = sys.executable if command[0] == "python" else command[0]
        words, _, output = " ".join(command[1:]).partition(" > ")
        done = subprocess.run([program, *words.split()], check=True, cwd=folder, timeout=300, stdout=subprocess.PIPE)
        if output:
            (folder / output).write_bytes(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shown", list(SHOWN.finditer(PAGE.read_text(encoding="utf-8"))), ids=lambda each: each["command"]
)
def test_the_page_shows_what_its_commands_print(shown: re.Match[str], unpacked: Path) -> None:
    assert shown["block"] in call(unpacked, *shown["command"].split())


@pytest.mark.slow
def test_the_notebook_runs_and_finds_the_tables_estimates(monkeypatch: pytest.MonkeyPatch, unpacked: Path) -> None:
    """Cell by cell, in one namespace and from its own folder, as Jupyter runs it."""
    import matplotlib as mpl

    notebook = RESULTS.parent / "tutorials" / "first-comparison.ipynb"
    monkeypatch.chdir(notebook.parent)
    names: dict[str, Any] = {}
    codes = [
        "".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    with mpl.rc_context({"backend": "agg"}):
        for code in codes:
            exec(compile(code, str(notebook), "exec"), names)  # noqa: S102  (our own notebook)
    tables = json.loads((unpacked / "study-digits" / "tables.json").read_text(encoding="utf-8"))
    rows = {entry["quantizer"]: entry for entry in tables["entries"]}
    assert len(names["tests"]) == 4
    for name, test in names["tests"].items():
        assert test.estimate == pytest.approx(100 * rows[name]["primary_estimate"])
        assert test.p() == pytest.approx(rows[name]["primary_p"])
