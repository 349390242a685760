"""Published numbers from YAML files, with source and protocol, and their comparison with runs.

A number is verified where somebody has read it in the source itself, a copy of its full text, or its authors' own
record of it; `verified_in` or `read_in` says where. What other papers or repositories quote is not verified.

A number is tested only against cells that follow its protocol, as far as the protocol is known. Otherwise it is shown
with what differs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, ValidationError, field_validator, model_validator

from analysis.compare.family import FULL_PRECISION
from analysis.runs.frame import require_known
from analysis.stats.equivalence import Equivalence, Verdict, equivalence
from analysis.stats.equivalence import Published as Mean
from analysis.stats.stratified import ALPHA, finite
from suite.errors import UserError
from suite.recipe.faults import Faults
from suite.recipe.settings import Frozen, Task
from suite.recipe.yaml_lines import read

FOLDER = Path(__file__).parent / "published"
SCALE = "quantization.scale"
SECTIONS = ("data.", "training.", "quantization.", "distillation.")
"""What the names of a cell's recipe params start with."""
NO_RECIPE = "recipe not recorded"
UNKNOWN_PROTOCOL = "the published training protocol is not known"
BEST_EPOCH = "published is the best epoch on the test set, ours the last"

Percent = Annotated[float, Field(ge=0, le=100)]
Key = tuple[str, str, str, str, str]
"""Data set, model, quantizer, task, init."""


def _text(value: Any) -> str:  # noqa: ANN401  (any YAML value)
    """The value as the recipe param of a cell is written: `200`, `step`, `[80, 120, 150]`."""
    entries = value if isinstance(value, list) else [value]
    if any(entry is None or isinstance(entry, dict | list) for entry in entries):
        raise ValueError("expected the value that the recipe param has: a number, a text or a list of them")
    return str(value)


class Protocol(Frozen):
    """How a number was measured. What is left out of a number is its publication's; None in both is not known."""

    epoch: Literal["last", "best"] | None = Field(
        None, description="whose test accuracy is published; best is the best one on the test set"
    )
    scale: Literal["none", "tensor", "channel"] | None = Field(
        None, description="real factors of the binary weights: none, one per weight tensor, one per output channel"
    )
    split: str = Field("", description="images it was trained and tested on, where that may differ from this project")
    requires: dict[str, Annotated[str, BeforeValidator(_text)]] | None = Field(
        None,
        description="recipe param of a cell: the value that the published protocol has. A number's are added to its "
        "publication's. Without any, here and there, the protocol is not known and the number is not tested",
    )

    @field_validator("requires")
    @classmethod
    def _params_of_a_recipe(cls, requires: dict[str, str] | None) -> dict[str, str] | None:
        for name in requires or {}:
            if not name.startswith(SECTIONS):
                raise ValueError(f"{name}: expected a recipe param; their names start with {', '.join(SECTIONS)}")
            if name == SCALE:
                raise ValueError(f"{name}: leave it out, it follows from scale:")
        return requires


class Number(Protocol):
    """A published top-1 test accuracy. Accuracy and sd in %."""

    dataset: str
    model: str
    quantizer: str = Field(description="our name where we have the method, else the field's")
    task: Task = "bw"
    init: str = "scratch"
    row: str = Field(description="row, and column where needed, of the source's table")
    accuracy: Percent
    sd: Percent | None = Field(None, description="sample standard deviation over n runs")
    n: PositiveInt | None = Field(None, description="runs it is the mean of; without n it is taken as exact")
    verified: bool
    comment: str = ""

    @model_validator(mode="after")
    def _sd_with_its_runs(self) -> "Number":
        if self.sd is not None and (self.n is None or self.n < 2):  # noqa: PLR2004 - an sd takes two
            raise ValueError(f"sd: {self.sd:g} needs the n of its runs, two or more")
        return self

    @property
    def key(self) -> Key:
        """The cells it is compared with."""
        return (self.dataset, self.model, self.quantizer, self.task, self.init)


class Publication(Protocol):
    """Where the numbers of one file are from: a paper, or a repository in which its authors report them."""

    name: str = Field(description="what the field calls it")
    title: str = ""
    authors: str = ""
    year: PositiveInt | None = None
    arxiv: str = ""
    doi: str = ""
    repository: str = Field("", pattern=r"^([\w.-]+/[\w.-]+)?$", description="owner/name on GitHub")
    table: str = Field("", description="the numbers' place in the source: Table 6")
    read_in: str = Field("", description="the numbers' place, and what was read: README")
    verified_in: str = Field("", description="what was read to verify the numbers; default: read_in")
    protocol: str = Field("", description="how the source measures, in words")
    numbers: Annotated[tuple[Number, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _traceable(self) -> "Publication":
        if not (self.arxiv or self.doi or self.repository):
            raise ValueError("arxiv:, doi: or repository: is required, so that readers find the source")
        if not (self.table or self.read_in):
            raise ValueError("table: or read_in: is required, so that readers find the numbers in the source")
        if any(number.verified for number in self.numbers) and not (self.verified_in or self.read_in):
            raise ValueError("verified_in: or read_in: is required, for some numbers are said to be verified")
        keys = [number.key for number in self.numbers]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"numbers: two for {'/'.join(twice[0])}")
        return self

    @property
    def citation(self) -> str:
        """`He et al. (2016), Deep Residual Learning for Image Recognition, arXiv 1512.03385, Table 6`."""
        if self.arxiv:
            source = f"arXiv {self.arxiv}"
        else:
            source = f"doi {self.doi}" if self.doi else f"github.com/{self.repository}"
        who = " ".join([self.authors, *([f"({self.year})"] if self.year else [])]).strip()
        return ", ".join(part for part in (who, self.title or self.name, source, self.table or self.read_in) if part)


@dataclass(frozen=True)
class Reproduction:
    """A published number beside ours; accuracy and margin are fractions.

    `margin` is None where the grid declares none, `test` where no test was made. `differences` has one phrase for
    each part of the published protocol that our cells do not follow.
    """

    accuracy: float
    verified: bool
    row: str
    margin: float | None
    test: Equivalence | None
    differences: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """The test's; without one, the first reason of: another protocol, no margin, no runs."""
        if self.differences:
            return Verdict.not_comparable
        if self.margin is None:
            return Verdict.no_margin
        return Verdict.untestable if self.test is None else self.test.verdict


def load(name: str) -> Publication:
    """The publication of a bundled file's name, or of a YAML file's path.

    Raises:
        UserError: no such file, or what is wrong in it, with file and line.
    """
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        require_known("publication", name, bundled(), "analysis/compare/published")
        path = FOLDER / f"{name}.yaml"
    raw, lines = read(path, "a publication", Publication.model_fields, UserError)
    try:
        return Publication.model_validate(raw)
    except ValidationError as error:
        faults = Faults(path, lines)
        faults.add_all(error, Publication, ())
        raise UserError("\n".join(faults)) from error


def bundled() -> list[str]:
    """Names of the publications that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def by_key(publication: Publication | None) -> dict[Key, Number]:
    """Its numbers by the cells they are compared with; none of no publication."""
    return {} if publication is None else {number.key: number for number in publication.numbers}


def requirements(number: Number, publication: Publication) -> dict[str, str] | None:
    """Recipe param -> value that a cell needs to follow the number's protocol; None where nothing of it is known.

    The number's own take precedence over its publication's. A full-precision number needs nothing of `quantization`.
    """
    if number.requires is None and publication.requires is None:
        return None
    required = {**(publication.requires or {}), **(number.requires or {})}
    if scale := number.scale or publication.scale:
        required[SCALE] = scale
    if number.quantizer == FULL_PRECISION:
        return {name: value for name, value in required.items() if not name.startswith("quantization.")}
    return required


def differences(number: Number, publication: Publication, recipe: Mapping[str, str]) -> tuple[str, ...]:
    """One phrase for each part of the published protocol that a cell does not follow; none: they are comparable.

    Args:
        number: one of the publication's numbers.
        publication: gives what the number itself leaves out.
        recipe: the cell's params, `suite.run.mlflow_replica.recipe`, as text. Numbers are compared as numbers, lists
            number by number, and a param that the recipe lacks is not met.
    """
    found = [BEST_EPOCH] if (number.epoch or publication.epoch) == "best" else []
    required = requirements(number, publication)
    if required is None:
        return (*found, UNKNOWN_PROTOCOL)
    for name, value in required.items():
        ours = recipe.get(name)
        if ours is None or _comparable(ours) != _comparable(value):
            found.append(f"{name} is {'not set' if ours in {None, 'None'} else ours}, published with {value}")
    return tuple(found)


def reproduction(
    number: Number,
    publication: Publication,
    accuracies: Mapping[int, float],
    margin: float | None,
    recipe: Mapping[str, str] | None,
    num_tests: int = 1,
) -> Reproduction:
    """The number against our runs.

    Args:
        number: one of the publication's numbers.
        publication: where it is from.
        accuracies: seed -> hard test accuracy, fractions; empty leaves the number untested.
        margin: largest difference that still counts as reproduced, a fraction, declared in the grid; None: no test.
        recipe: params of the runs' cells; None, where they are not recorded, is not comparable.
        num_tests: published numbers tested in the same table; the test is made at level ALPHA / num_tests.

    Raises:
        ValueError: num_tests below 1, an accuracy that is not finite, a margin that is not positive.
    """
    if num_tests < 1:
        raise ValueError(f"num_tests {num_tests}; expected one or more")
    ours = finite(list(accuracies.values()), at_least=0)
    different = (NO_RECIPE,) if recipe is None else differences(number, publication, recipe)
    mean = Mean(number.accuracy / 100, None if number.sd is None else number.sd / 100, number.n)
    test = None
    if not different and margin is not None and len(ours):
        test = equivalence(ours, mean, margin, ALPHA / num_tests)
    return Reproduction(mean.mean, number.verified, number.row, margin, test, different)


def _comparable(value: str) -> str | tuple[float, ...]:
    """The numbers of a number or of a list, else the text in lower case: 1e-4 is 0.0001, and true is True."""
    try:
        return tuple(float(part) for part in value.strip("[]() ").split(","))
    except ValueError:
        return value.casefold()
