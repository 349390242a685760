"""`python -m quantizers`: its output, its pictures, and its error messages."""

import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from quantizers import QUANTIZERS, Constant, Cosine, Exponential, Linear, Quantizer, maps
from quantizers.__main__ import PICTURES, app, main, middle_mu, page, schedule
from quantizers.theory.convergence import curves

DOCS = Path(__file__).parents[2] / "docs"
MINE = """
from quantizers import Quantizer, maps
from quantizers.theory.synthesis import complete

CUBE = Quantizer("my cube/s", maps.hard_sign, lambda w, mu: 1 + w * w, prox=None, transform=None, citation="mine")
SWISH = complete(maps.sign_swish_derivative, name="swish")
"""


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of the user's own pairs."""
    (tmp_path / "my_pairs.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_pairs", raising=False)
    return tmp_path


def is_png(picture: Path) -> bool:
    with Image.open(picture) as image:
        return image.format == "PNG" and image.width > 500


# Certify


def test_certify_says_that_bnn_plus_fails_and_draws_it(mine: Path) -> None:
    answer = call("certify", "bnn+")
    assert answer.exit_code == 1
    assert "does not decompose" in answer.stdout
    assert is_png(mine / "certificate-bnn+-5.png")


def test_certify_says_that_bnn_plus_plus_is_principled_at_the_mu_asked_for(mine: Path) -> None:
    answer = call("certify", "bnn++", "--mu", "3", "--out", "pictures/one.png")
    assert answer.exit_code == 0
    assert answer.stdout.startswith("bnn++ at mu = 3\n(F, B) decomposes")
    assert is_png(mine / "pictures" / "one.png")


@pytest.mark.parametrize(
    ("name", "status", "picture"),
    [("CUBE", 1, "my-cube-s"), ("SWISH", 0, "swish")],
)
def test_certify_answers_for_pairs_of_the_users_own(mine: Path, name: str, status: int, picture: str) -> None:
    answer = call("certify", f"my_pairs:{name}")
    assert answer.exit_code == status, answer.output
    assert is_png(mine / f"certificate-{picture}-1.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bnnpp"], "unknown quantizer 'bnnpp'; did you mean 'bnn++'? (fp, bc,"),
        (["no_such_module:PAIR"], "no_such_module:PAIR: cannot import 'no_such_module'"),
        (["bnn++", "--mu", "-1"], "mu=-1.0: a sharpness is finite and not negative"),
    ],
)
def test_bad_input_gets_one_line_and_status_two(mine: Path, arguments: list[str], message: str) -> None:
    answer = call("certify", *arguments)
    assert answer.exit_code == 2
    assert answer.stderr.startswith(message)
    assert answer.stderr.count("\n") == 1
    assert not list(mine.glob("*.png"))


def test_a_picture_that_cannot_be_written_is_told_without_a_traceback(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (mine / "file").touch()
    monkeypatch.setattr(sys, "argv", ["quantizers", "certify", "fp", "--out", "file/picture.png"])
    with pytest.raises(SystemExit, match="2"):
        main()
    told = capsys.readouterr().err
    assert "'file'" in told
    assert told.count("\n") == 1


# List


def test_list_shows_every_row_on_a_line_of_its_own() -> None:
    answer = call("list")
    assert answer.exit_code == 0
    lines = [line.split()[0] for line in answer.stdout.splitlines() if line.strip()]
    assert [word for word in lines if word in QUANTIZERS] == list(QUANTIZERS)
    assert len(lines) == len(QUANTIZERS) + 3  # the title, its rule, and the next step


@pytest.mark.parametrize("row", QUANTIZERS.values(), ids=list(QUANTIZERS))
def test_show_gives_formulas_source_and_a_sharpness_that_a_grid_takes(row: Quantizer) -> None:
    answer = call("show", row.name)
    assert answer.exit_code == 0
    assert all(part in answer.stdout for part in [*row.formula.split("; "), row.citation])
    (line,) = [line for line in answer.stdout.splitlines() if line.startswith("in a grid: ")]
    _, _, sharpness = line.partition(" with quantization: ")
    if row.usual_mu is None:
        assert sharpness == ""
        return
    (given,) = yaml.safe_load(sharpness)["sharpness"].values()
    shape = {"constant": Constant, "linear": Linear, "exponential": Exponential, "cosine": Cosine}[given.pop("shape")]
    assert shape(*given.values()) == row.usual_mu


def test_show_answers_a_typo_with_the_nearest_name() -> None:
    answer = call("show", "bnnpp")
    assert answer.exit_code == 2
    assert "did you mean" in answer.stderr


@pytest.mark.parametrize("row", QUANTIZERS.values(), ids=list(QUANTIZERS))
def test_every_row_of_the_catalogue_gives_its_formula(row: Quantizer) -> None:
    forward, backward = row.formula.split("; ")
    assert forward.startswith("F = ")
    assert backward.startswith("B = ")
    assert "`" not in row.formula


def test_a_row_without_a_formula_has_its_section_all_the_same() -> None:
    row = Quantizer("mine", maps.hard_sign, maps.ones, prox=None, transform=None, citation="my own")
    assert page([row]).endswith("- not principled; mu: none\n- my own\n")


def test_the_usual_mu_is_told_in_words() -> None:
    told = [schedule(QUANTIZERS[name].usual_mu) for name in ("bc", "pc", "bnn+", "bnn++")]
    assert told == ["none", "linear, 0 to 1", "constant, 5", "exponential, 2 to 500"]
    assert middle_mu(QUANTIZERS["bnn++"]) == 31.6


# Gallery


def test_the_committed_page_is_what_the_command_writes() -> None:
    assert (DOCS / "quantizers.md").read_text(encoding="utf-8") == page(QUANTIZERS.values())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_each_row_has_its_picture_and_a_small_one(name: str) -> None:
    picture = DOCS / PICTURES / f"{name}.png"
    assert is_png(picture)
    assert picture.stat().st_size < 60_000


def test_gallery_writes_the_page_and_a_picture_for_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: QUANTIZERS[name] for name in ("bc", "bnn+")}
    monkeypatch.setattr("quantizers.__main__.QUANTIZERS", few)
    answer = call("gallery", "--out", str(tmp_path))
    assert answer.exit_code == 0, answer.output
    assert (tmp_path / "quantizers.md").read_text(encoding="utf-8") == page(few.values())
    assert all(is_png(tmp_path / PICTURES / f"{name}.png") for name in few)


@pytest.mark.parametrize("name", ["convergence.png", "paths.png"])
def test_the_pictures_of_convergence_are_there_and_small(name: str) -> None:
    assert is_png(DOCS / "images" / name)
    assert (DOCS / "images" / name).stat().st_size < 60_000


def test_convergence_draws_both_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantizers.theory.convergence.curves", lambda num_steps: curves(num_steps // 40))
    monkeypatch.setattr("quantizers.theory.drawing.NUM_PATH_STEPS", 20)
    answer = call("convergence", "--out", str(tmp_path))
    assert answer.exit_code == 0, answer.output
    assert is_png(tmp_path / "convergence.png")
    assert is_png(tmp_path / "paths.png")
