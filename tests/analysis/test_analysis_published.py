"""Published numbers: faults are reported with their lines; only cells that follow the protocol are tested."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.compare.published import (
    NO_RECIPE,
    UNKNOWN_PROTOCOL,
    Number,
    Publication,
    Reproduction,
    bundled,
    by_key,
    differences,
    load,
    reproduction,
)
from analysis.stats.equivalence import Verdict
from suite.errors import UserError
from suite.recipe.cell import Cell
from suite.recipe.grid_file import load_grid
from suite.recipe.settings import Data, Frozen, Quantization, Training
from suite.run.mlflow_replica import recipe

FILE = """\
name: Paper
title: A Paper
authors: Somebody
year: 2020
doi: 10.1000/1
table: Table 2
verified_in: the paper
epoch: last
scale: tensor
requires: {training.epochs: 200, training.weight_decay: 2.0e-4}
numbers:
  - {dataset: digits, model: resnet20, quantizer: fp, row: fp, accuracy: 99.0, verified: true}
  - {dataset: digits, model: resnet20, quantizer: bc, row: B, accuracy: 90, sd: 0.3, n: 5, verified: false}
"""
FOLLOWS = {"training.epochs": "200", "training.weight_decay": "0.0002", "quantization.scale": "tensor"}
CLOSE = {0: 0.9901, 1: 0.9899, 2: 0.9903, 3: 0.9898}

# PARQ: arXiv 2503.15748, the table of 1-bit weights, columns FP, STE, BinaryRelax, PARQ. W1A32 and W1A1: the READMEs of
# htqin/IR-Net, DravenALG/ReSTE, apple/ml-quant, huawei-noah/Efficient-Computing (AdaBin), liuzechun/Bi-Real-net and
# liuzechun/ReActNet; the FDA-BNN paper's table; larq/docs, docs/zoo. He et al.: arXiv 1512.03385, Table 6.
READ = [
    ("parq", "cifar10/resnet20/fp/bw", 91.82, None),
    ("parq", "cifar10/resnet20/bc/bw", 89.56, 0.18),
    ("parq", "cifar10/resnet20/BinaryRelax/bw", 89.98, 0.13),
    ("parq", "cifar10/resnet20/PARQ/bw", 90.48, 0.26),
    ("parq", "cifar10/resnet56/fp/bw", 93.08, None),
    ("parq", "cifar10/resnet56/bc/bw", 91.55, 0.33),
    ("parq", "cifar10/resnet56/PARQ/bw", 91.34, 0.37),
    ("parq", "imagenet/resnet50/fp/bw", 75.60, None),
    ("parq", "imagenet/resnet50/bc/bw", 66.17, 0.04),
    ("parq", "imagenet/resnet50/BinaryRelax/bw", 66.14, 0.28),
    ("parq", "imagenet/deit_tiny_patch16_224/bc/bw", 51.62, 0.18),
    ("parq", "imagenet/deit_tiny_patch16_224/PARQ/bw", 52.51, 0.19),
    ("parq", "imagenet/deit_small_patch16_224/fp/bw", 79.80, None),
    ("parq", "imagenet/deit_small_patch16_224/bc/bw", 70.07, 0.03),
    ("parq", "imagenet/deit_base_patch16_224/PARQ/bw", 79.35, 0.04),
    ("ir-net", "cifar10/resnet20/IR-Net/bw", 90.8, None),
    ("ir-net", "imagenet/resnet34/IR-Net/bw", 70.4, None),
    ("ir-net", "imagenet/resnet18/IR-Net/bwa", 58.1, None),
    ("reste", "cifar10/resnet20/reste/bw", 91.32, None),
    ("reste", "cifar10/bireal_resnet20/reste/bwa", 87.92, None),
    ("reste", "imagenet/resnet18/reste/bwa", 60.88, None),
    ("ls-1", "imagenet/resnet18/LS-1 with distillation/bw", 66.1, None),
    ("ls-1", "imagenet/resnet18/fp/bw", 69.8, None),
    ("adabin", "cifar10/resnet20/AdaBin/bwa", 88.1, None),
    ("adabin", "imagenet/resnet18/AdaBin in two steps/bwa", 66.4, None),
    ("bi-real", "imagenet/bireal_resnet18/Bi-Real/bwa", 56.4, None),
    ("reactnet", "imagenet/reactnet_resnet18/ReActNet/bwa", 65.9, None),
    ("fda-bnn", "cifar10/resnet20/DoReFa/bwa", 84.44, None),
    ("fda-bnn", "cifar10/resnet20/bnn+/bwa", 84.59, None),
    ("larq-zoo", "imagenet/bireal_resnet18/Bi-Real/bwa", 57.5, None),
    ("larq-zoo", "imagenet/QuickNet/QuickNet/bwa", 63.3, None),
    ("resnet-cifar10", "cifar10/resnet20/fp/bw", 91.25, None),
    ("resnet-cifar10", "cifar10/resnet56/fp/bw", 93.03, None),
]


def published(tmp_path: Path, old: str = "", new: str = "") -> Path:
    assert old in FILE
    path = tmp_path / "paper.yaml"
    path.write_text(FILE.replace(old, new) if old else FILE, encoding="utf-8")
    return path


def number_of(publication: Publication, quantizer: str) -> Number:
    (found,) = (number for number in publication.numbers if number.quantizer == quantizer)
    return found


def reproduced(
    tmp_path: Path, accuracies: dict[int, float], *, margin: float | None = 0.005, num_tests: int = 1
) -> Reproduction:
    """The file's full-precision number, 99 %, against runs that follow its protocol."""
    publication = load(str(published(tmp_path)))
    return reproduction(number_of(publication, "fp"), publication, accuracies, margin, FOLLOWS, num_tests)


@pytest.mark.parametrize("name", bundled())
def test_every_bundled_file_names_a_source_that_can_be_followed(name: str) -> None:
    publication = load(name)
    source = publication.arxiv or publication.doi or f"github.com/{publication.repository}"
    assert source != "github.com/"
    assert source in publication.citation
    assert (publication.table or publication.read_in) in publication.citation
    assert all(number.row for number in publication.numbers)


@pytest.mark.parametrize(("name", "cell", "accuracy", "sd"), READ, ids=[f"{row[0]}: {row[1]}" for row in READ])
def test_a_bundled_number_is_the_one_that_was_read(name: str, cell: str, accuracy: float, sd: float | None) -> None:
    number = by_key(load(name))[(*cell.split("/"), "scratch")]  # type: ignore[index]
    assert (number.accuracy, number.sd, number.n) == (accuracy, sd, 3 if sd else number.n)
    assert number.verified is (number.quantizer != "DoReFa")  # FDA-BNN quotes it


def test_parq_has_four_columns_of_six_rows() -> None:
    assert len(load("parq").numbers) == 24


@pytest.mark.parametrize("name", bundled())
def test_what_a_bundled_file_requires_are_params_of_a_recipe(name: str) -> None:
    sections: dict[str, type[Frozen]] = {"data": Data, "training": Training, "quantization": Quantization}
    known = {f"{section}.{key}" for section, model in sections.items() for key in model.model_fields}
    publication = load(name)
    for part in (publication, *publication.numbers):
        assert (part.requires or {}).keys() <= known


@pytest.mark.parametrize("name", ["ir-net", "reste"])
def test_who_reports_the_best_epoch_is_never_comparable(name: str) -> None:
    publication = load(name)
    for number in publication.numbers:
        found = differences(number, publication, {"data.validation_fraction": "0.0"})
        assert found == ("published is the best epoch on the test set, ours the last",)


def test_cells_with_parqs_recipe_are_comparable_with_its_numbers() -> None:
    publication = load("parq")
    follows = {
        "training.epochs": "200",
        "training.batch_size": "128",
        "training.optimizer": "sgd",
        "training.learning_rate": "0.1",
        "training.weight_decay": "0.0002",
        "training.schedule": "step",
        "training.decay_epochs": "[80, 120, 150]",
        "training.decay_rate": "0.1",
        "data.validation_fraction": "0.0",
        "quantization.full_precision": "none",
        "quantization.scale": "tensor",
    }
    number = by_key(publication)["cifar10", "resnet20", "bc", "bw", "scratch"]
    assert differences(number, publication, follows) == ()
    assert differences(number, publication, {**follows, "quantization.scale": "channel"}) == (
        "quantization.scale is channel, published with tensor",
    )
    for name in follows:
        without = {key: value for key, value in follows.items() if key != name}
        assert differences(number, publication, without) == (f"{name} is not set, published with {_wanted(name)}",)


def _wanted(name: str) -> str:
    number = by_key(load("parq"))["cifar10", "resnet20", "bc", "bw", "scratch"]
    wanted = {**(load("parq").requires or {}), **(number.requires or {}), "quantization.scale": "tensor"}
    return wanted[name]


def test_a_recipe_is_compared_as_the_runs_record_it() -> None:
    """The paper's own full-precision recipe, in the form of a cell's params."""
    training = {
        "epochs": 164,
        "batch_size": 128,
        "learning_rate": 0.1,
        "weight_decay": 1e-4,
        "schedule": "step",
        "decay_epochs": [82, 123],
    }
    cell = Cell.model_validate(
        {
            "dataset": "cifar10",
            "model": "resnet20",
            "quantizer": "fp",
            "seed": 0,
            "data": {"validation_fraction": 0},
            "training": training,
            "quantization": {},
        }
    )
    params = {name: str(value) for name, value in recipe(cell)}
    publication = load("resnet-cifar10")
    assert differences(publication.numbers[0], publication, params) == ()
    assert differences(publication.numbers[0], publication, {**params, "training.decay_epochs": "[82, 124]"}) == (
        "training.decay_epochs is [82, 124], published with [82, 123]",
    )


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (
            "accuracy: 99.0",
            "accuracy: 990",
            ":12: numbers.accuracy: input should be less than or equal to 100, got 990",
        ),
        ("99.0, verified", "99.0, margin: 1, verified", ":12: numbers.margin: unknown key 'margin'"),
        ("verified: false", "verfied: false", ":13: numbers.verfied: unknown key 'verfied'; did you mean 'verified'"),
        ("sd: 0.3, n: 5", "sd: 0.3", ":13: numbers: sd: 0.3 needs the n of its runs, two or more"),
        ("doi: 10.1000/1\n", "", "arxiv:, doi: or repository: is required, so that readers find the source"),
        ("doi: 10.1000/1", "repository: nobody", ":5: repository: string should match pattern"),
        ("table: Table 2\n", "", "table: or read_in: is required, so that readers find the numbers in the source"),
        ("verified_in: the paper\n", "", "verified_in: or read_in: is required, for some numbers are said to be"),
        ("quantizer: bc", "quantizer: fp", "numbers: two for digits/resnet20/fp/bw/scratch"),
        ("title: A Paper", "title: [", "not YAML"),
        ("title: A Paper", "title: !text A Paper", ":2: title: the tag !text means nothing here; leave it out"),
        ("name: Paper\n", "", ":1: name: is required"),
        ("accuracy: 99.0", "accuracy: true", ":12: numbers.accuracy: true is no number"),
        ("epoch: last", "epoch: first", ":8: epoch: unknown value 'first'"),
        ("scale: tensor", "scale: layer", ":9: scale: unknown value 'layer'"),
        ("training.epochs: 200", "epochs: 200", ":10: requires: epochs: expected a recipe param"),
        (
            "training.epochs: 200",
            "quantization.scale: none",
            "quantization.scale: leave it out, it follows from scale:",
        ),
        ("training.epochs: 200", "training.epochs: null", ":10: requires.training.epochs: expected the value that the"),
    ],
)
def test_a_fault_in_a_file_is_told_with_its_line(tmp_path: Path, old: str, new: str, fault: str) -> None:
    path = published(tmp_path, old, new)
    with pytest.raises(UserError) as caught:
        load(str(path))
    assert str(caught.value).startswith(f"{path}:")
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "citation"),
    [
        ("", "", "Somebody (2020), A Paper, doi 10.1000/1, Table 2"),
        ("title: A Paper\n", "", "Somebody (2020), Paper, doi 10.1000/1, Table 2"),
        ("doi: 10.1000/1", "arxiv: '2001.00001'", "Somebody (2020), A Paper, arXiv 2001.00001, Table 2"),
        (
            FILE[: FILE.index("verified_in")],
            "name: IR-Net\nrepository: htqin/IR-Net\nread_in: README\n",
            "IR-Net, github.com/htqin/IR-Net, README",
        ),
    ],
)
def test_a_citation_has_what_is_known_of_the_source(tmp_path: Path, old: str, new: str, citation: str) -> None:
    assert load(str(published(tmp_path, old, new))).citation == citation


def test_each_requirement_that_a_recipe_does_not_meet_is_one_phrase(tmp_path: Path) -> None:
    publication = load(str(published(tmp_path)))
    bc, fp = (number_of(publication, name) for name in ("bc", "fp"))
    assert differences(bc, publication, FOLLOWS) == ()
    assert differences(bc, publication, {**FOLLOWS, "training.weight_decay": "2e-4"}) == ()
    assert differences(bc, publication, {"training.epochs": "300", "training.weight_decay": "None"}) == (
        "training.epochs is 300, published with 200",
        "training.weight_decay is not set, published with 0.0002",
        "quantization.scale is not set, published with tensor",
    )
    without_scale = {name: value for name, value in FOLLOWS.items() if name != "quantization.scale"}
    assert differences(fp, publication, without_scale) == ()  # there is no binary weight to scale


def test_a_numbers_own_protocol_comes_before_its_publications(tmp_path: Path) -> None:
    own = "row: B, epoch: best, scale: channel, requires: {training.epochs: 90}"
    publication = load(str(published(tmp_path, "row: B", own)))
    assert differences(number_of(publication, "bc"), publication, FOLLOWS) == (
        "published is the best epoch on the test set, ours the last",
        "training.epochs is 200, published with 90",
        "quantization.scale is tensor, published with channel",
    )


def test_a_number_of_unknown_protocol_is_not_comparable(tmp_path: Path) -> None:
    unknown = load(str(published(tmp_path, "requires: {training.epochs: 200, training.weight_decay: 2.0e-4}\n", "")))
    number = number_of(unknown, "fp")
    assert differences(number, unknown, FOLLOWS) == (UNKNOWN_PROTOCOL,)
    assert reproduction(number, unknown, CLOSE, 0.005, FOLLOWS).verdict is Verdict.not_comparable


@pytest.mark.parametrize(
    ("accuracies", "verdict"),
    [
        (CLOSE, Verdict.reproduced),
        ({0: 0.60, 1: 0.61, 2: 0.62, 3: 0.61}, Verdict.differs),
        ({0: 0.97, 1: 0.99, 2: 1.0}, Verdict.inconclusive),
        ({0: 0.99}, Verdict.untestable),
        ({}, Verdict.untestable),
    ],
)
def test_verdicts_follow_the_runs_and_their_number(
    tmp_path: Path, accuracies: dict[int, float], verdict: Verdict
) -> None:
    found = reproduced(tmp_path, accuracies)
    assert found.verdict is verdict
    assert (found.accuracy, found.verified, found.row, found.margin) == (0.99, True, "fp", 0.005)
    assert (found.test is None) == (not accuracies)


def test_without_a_margin_no_test_is_made(tmp_path: Path) -> None:
    found = reproduced(tmp_path, CLOSE, margin=None)
    assert (found.verdict.value, found.test, found.margin) == ("no margin declared", None, None)


def test_runs_of_another_protocol_are_not_tested(tmp_path: Path) -> None:
    publication = load(str(published(tmp_path)))
    number = number_of(publication, "fp")
    other = reproduction(number, publication, CLOSE, 0.005, {**FOLLOWS, "training.epochs": "20"})
    assert (other.verdict.value, other.test) == ("not comparable", None)
    assert other.differences == ("training.epochs is 20, published with 200",)
    unknown = reproduction(number, publication, CLOSE, 0.005, None)
    assert (unknown.verdict, unknown.test, unknown.differences) == (Verdict.not_comparable, None, (NO_RECIPE,))


def test_of_many_numbers_each_is_tested_at_its_share_of_the_level(tmp_path: Path) -> None:
    """The p of equivalence is about 0.02: enough for one number but not for ten."""
    values = {0: 0.9878, 1: 0.9905, 2: 0.9921}
    one, ten = (reproduced(tmp_path, values, num_tests=count) for count in (1, 10))
    assert one.test is not None
    assert ten.test is not None
    assert one.test.p_equivalent == ten.test.p_equivalent
    assert one.test.p_equivalent is not None
    assert 0.005 < one.test.p_equivalent < 0.05
    assert (one.verdict, ten.verdict) == (Verdict.reproduced, Verdict.inconclusive)
    assert (one.test.confidence, ten.test.confidence) == pytest.approx((0.90, 0.99))
    assert ten.test.low is not None
    assert one.test.low is not None
    assert ten.test.low < one.test.low
    with pytest.raises(ValueError, match="num_tests 0; expected one or more"):
        reproduced(tmp_path, values, num_tests=0)


@pytest.mark.parametrize(("grid", "num_rows"), [("parq-cifar10", 4), ("parq-imagenet", 8)])
def test_bundled_protocol_grids_follow_the_protocol_of_the_rows_that_they_name(grid: str, num_rows: int) -> None:
    """For each number that has cells in the grid: fp, and bc, which PARQ's tables call STE."""
    publication, numbers = load("parq"), by_key(load("parq"))
    followed = set()
    for cell in load_grid(grid).cells():
        key = (cell.dataset, cell.model, cell.quantizer, cell.task, cell.init)
        if key in numbers:
            assert differences(numbers[key], publication, dict(_params(cell))) == (), cell.name
            followed.add(key)
    assert len(followed) == num_rows
    assert {quantizer for _, _, quantizer, _, _ in followed} == {"fp", "bc"}


def _params(cell: Cell) -> Iterator[tuple[str, str]]:
    return ((name, str(value)) for name, value in recipe(cell))
