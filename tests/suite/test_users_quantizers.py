"""A user's own Quantizer, `module:attribute`, is trained and shown like the catalogue's rows."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from analysis.compare.table import tabulate
from analysis.render.methods import quantizers as cited
from analysis.render.tables import to_latex, to_markdown
from analysis.runs import folders
from launch import snapshot
from suite.recipe.cell import Cell
from suite.recipe.grid_file import GridError, load_grid
from suite.run.directory import Planned, RunDir, write_plan
from suite.run.provenance import code_digest
from suite.train import train

MODULE = """
from quantizers import Exponential, Quantizer, complete, maps
from users_helpers import slope

PAIR = Quantizer("pair", maps.hard_sign, slope, None, None, "mine", usual_mu=Exponential(1.0, 9.0))
CURVED = Quantizer("curved", maps.tanh, slope, maps.identity, maps.tanh, "mine", usual_mu=lambda p: 1 + p**2)
SOFT = Quantizer("soft", maps.identity, maps.ones, maps.identity, maps.identity, "mine", binary=False)
COMPLETED = complete(maps.clip_derivative)
"""
GRID = """\
name: mine
dataset: digits
models: [resnet8]
quantizers:
  - bc
  - {quantizer}
seeds: [0]
training: {{epochs: 2, batch_size: 256, optimizer: adamw, learning_rate: 0.003}}
quantization:
  sharpness:
    users_mine:PAIR: {{start: 2.0}}
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory with the user's module, not yet imported."""
    (tmp_path / "users_mine.py").write_text(MODULE)
    (tmp_path / "users_helpers.py").write_text("from quantizers.maps import tanh_derivative as slope\n")
    monkeypatch.chdir(tmp_path)
    _forget()
    yield
    _forget()


def _forget() -> None:
    for name in ("users_mine", "users_helpers"):
        sys.modules.pop(name, None)


def _grid(quantizer: str) -> Path:
    path = Path("grid.yaml")
    path.write_text(GRID.format(quantizer=quantizer))
    return path


def test_a_grid_names_them_and_their_cells_are_identified_by_that_name() -> None:
    cells = load_grid(str(_grid("users_mine:PAIR"))).cells()
    assert [cell.name for cell in cells] == ["digits/resnet8/bc/s0", "digits/resnet8/users_mine:PAIR/s0"]
    assert cells[1].quantization.sharpness["users_mine:PAIR"].start == 2.0
    assert cells[1].id != cells[1].model_copy(update={"quantizer": "users_mine:COMPLETED"}).id


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        ("no_such:PAIR", "grid.yaml:6: quantizers: no_such:PAIR: cannot import 'no_such': ModuleNotFoundError: "),
        (
            "users_mine:PAIER",
            "grid.yaml:6: quantizers: users_mine:PAIER: unknown attribute 'PAIER'; did you mean 'PAIR'",
        ),
        (
            "users_mine:maps",
            "grid.yaml:6: quantizers: users_mine:maps: of type module, not a Quantizer; users_mine has ",
        ),
        ("users_mine:SOFT", "grid.yaml:6: quantizers: users_mine:SOFT is deployed as F(w*), not as sign(w*)"),
        (
            "users_mine:CURVED",
            "grid.yaml:10: quantization.sharpness: users_mine:CURVED needs its mu, for instance users_mine:CURVED: {sh",
        ),
    ],
)
def test_a_grid_with_one_that_cannot_be_trained_is_refused_with_its_line(quantizer: str, message: str) -> None:
    with pytest.raises(GridError) as refused:
        load_grid(str(_grid(quantizer)))
    (line,) = str(refused.value).splitlines()
    assert line.startswith(message)


def test_a_missing_mu_of_inputs_is_asked_for_by_the_name_that_was_written(make_cell: Callable[..., Cell]) -> None:
    with pytest.raises(ValueError, match="users_mine:PAIR needs its mu, for instance sharpness: "):
        make_cell(task="bwa", quantization__inputs={"quantizer": "users_mine:PAIR"})


def test_they_train_and_are_in_the_table_and_its_notes_which_do_not_import_the_module(
    tmp_path: Path, make_cell: Callable[..., Cell]
) -> None:
    cells = [
        make_cell(
            quantizer="users_mine:PAIR",
            quantization__sharpness={"users_mine:PAIR": {"shape": "exponential", "start": 1.0, "end": 9.0}},
        ),
        make_cell(
            model="bireal_resnet8",
            quantizer="users_mine:COMPLETED",
            quantization__sharpness={},
            task="bwa",
            quantization__inputs={"quantizer": "users_mine:PAIR", "sharpness": {"start": 2.0}},
            training__epochs=1,
        ),
    ]
    for cell in cells:
        train(RunDir.create(tmp_path / "runs" / "mine" / cell.id, cell), tmp_path)
    write_plan(tmp_path / "runs" / "mine", map(Planned, cells))
    _forget()
    results = folders.load(tmp_path / "runs", "mine")
    frame, table = results.frame, tabulate(results)
    assert set(frame["quantizer"]) == {"users_mine:PAIR", "users_mine:COMPLETED"}
    assert frame["top1_hard"].notna().all()
    assert (frame["device_hours"] > 0).all()
    assert (frame["code_digest"] == code_digest()).all()
    assert frame["users_digest"].str.fullmatch("[0-9a-f]{16}").all()
    assert "| users_mine:PAIR |" in to_markdown(table)
    assert r"users\_mine:PAIR" in to_latex(table)
    assert cited(frame) == []
    assert "users_mine" not in sys.modules


def test_a_launch_keeps_their_modules_and_what_these_import_beside_its_code(
    tmp_path: Path, make_cell: Callable[..., Cell]
) -> None:
    bare, own = make_cell(), make_cell(quantizer="users_mine:COMPLETED", quantization__sharpness={})
    code = snapshot.folder_of(tmp_path, snapshot.take(tmp_path, [bare, own]))
    assert (code / "users_mine.py").read_text() == MODULE
    assert (code / "users_helpers.py").exists()
    assert snapshot.name([own]) == code.name != snapshot.name([bare])
