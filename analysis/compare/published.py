"""Published numbers from YAML files, with source and protocol, and their comparison with runs.

A number counts as verified if it was read in the source itself, in a copy of its full text, or in the authors' own
record; `verified_in` or `read_in` says where. Numbers quoted by other papers or repositories are not verified.

A number is tested only against cells that follow its protocol, as far as that protocol is known. Otherwise it is shown
with the differences in protocol.
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
"""Prefixes of a cell's recipe params."""
NO_RECIPE = "recipe not recorded"
UNKNOWN_PROTOCOL = "the published training protocol is not known"
BEST_EPOCH = "published is the best epoch on the test set, ours the last"

Percent = Annotated[float, Field(ge=0, le=100)]
Key = tuple[str, str, str, str, str]
"""Data set, model, quantizer, task, init."""


def _text(value: Any) -> str:  # noqa: ANN401  (any YAML value)
    """The value in the form that a cell's recipe param has: `200`, `step`, `[80, 120, 150]`."""
    entries = value if isinstance(value, list) else [value]
    if any(entry is None or isinstance(entry, dict | list) for entry in entries):
        raise ValueError("expected the value that the recipe param has: a number, a text or a list of them")
    return str(value)


class Protocol(Frozen):
    """How a number was measured. A number inherits fields it lacks from its publication; None in both means unknown."""

    epoch: Literal["last", "best"] | None = Field(
        None, description="epoch whose test accuracy is published; best: chosen on the test set"
    )
    scale: Literal["none", "tensor", "channel"] | None = Field(
        None, description="real scale of the binary weights: none, one per weight tensor, one per output channel"
    )
    split: str = Field("", description="training and test images, if they may differ from this project's")
    requires: dict[str, Annotated[str, BeforeValidator(_text)]] | None = Field(
        None,
        description="recipe params of a cell -> values in the published protocol. A number's own are added to its "
        "publication's. If neither has any, the protocol is unknown and the number is not tested",
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
    """A published top-1 test accuracy, with accuracy and sd in %."""

    dataset: str
    model: str
    quantizer: str = Field(description="our name if we implement the method, else the usual one")
    task: Task = "bw"
    init: str = "scratch"
    row: str = Field(description="row (and column if needed) of the source's table")
    accuracy: Percent
    sd: Percent | None = Field(None, description="sample standard deviation over n runs")
    n: PositiveInt | None = Field(None, description="number of runs averaged; without n the number is taken as exact")
    verified: bool
    comment: str = ""

    @model_validator(mode="after")
    def _sd_with_its_runs(self) -> "Number":
        if self.sd is not None and (self.n is None or self.n < 2):  # noqa: PLR2004 - an sd takes two
            raise ValueError(f"sd: {self.sd:g} needs the n of its runs, two or more")
        return self

    @property
    def key(self) -> Key:
        """Identifies the cells that the number is compared with."""
        return (self.dataset, self.model, self.quantizer, self.task, self.init)


class Publication(Protocol):
    """Source of the numbers in one file: a paper, or a repository in which its authors report them."""

    name: str = Field(description="usual name of the method or paper")
    title: str = ""
    authors: str = ""
    year: PositiveInt | None = None
    arxiv: str = ""
    doi: str = ""
    repository: str = Field("", pattern=r"^([\w.-]+/[\w.-]+)?$", description="owner/name on GitHub")
    table: str = Field("", description="where the source gives the numbers: Table 6")
    read_in: str = Field("", description="where the numbers are, and the text that was read: README")
    verified_in: str = Field("", description="the text that verified the numbers; default: read_in")
    protocol: str = Field("", description="how the source measures, in prose")
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
    """A published number with our result; accuracy and margin are fractions.

    `margin` is None if the grid declares none, `test` if no test was made. `differences` has one phrase for each part
    of the published protocol that our cells do not follow.
    """

    accuracy: float
    verified: bool
    row: str
    margin: float | None
    test: Equivalence | None
    differences: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """The test's verdict; without a test, the first reason that applies: other protocol, no margin, no runs."""
        if self.differences:
            return Verdict.not_comparable
        if self.margin is None:
            return Verdict.no_margin
        return Verdict.untestable if self.test is None else self.test.verdict


def load(name: str) -> Publication:
    """Loads a publication by the name of a bundled file or the path of a YAML file.

    Raises:
        UserError: no such file, or an invalid one; the message gives file, line and error.
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
    """Names of the bundled publications."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def by_key(publication: Publication | None) -> dict[Key, Number]:
    """The publication's numbers by the cells they are compared with; empty for None."""
    return {} if publication is None else {number.key: number for number in publication.numbers}


def requirements(number: Number, publication: Publication) -> dict[str, str] | None:
    """Recipe param -> value that a cell needs to follow the number's protocol; None if the protocol is unknown.

    The number's own values take precedence over its publication's. A full-precision number ignores all of
    `quantization`.
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
    """One phrase for each part of the published protocol that a cell does not follow; empty if they are comparable.

    Args:
        number: one of the publication's numbers.
        publication: supplies the fields that the number lacks.
        recipe: the cell's params as text, from `suite.run.mlflow_replica.recipe`. Numbers are compared as numbers,
            lists element by element. A required param that the recipe lacks counts as a difference.
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
    """Compares the published number with our runs.

    Args:
        number: one of the publication's numbers.
        publication: the number's source.
        accuracies: seed -> hard test accuracy, fractions; empty: the number is not tested.
        margin: largest difference that counts as reproduced, a fraction declared in the grid; None: no test.
        recipe: params of the runs' cells; None if not recorded, which makes the number not comparable.
        num_tests: published numbers tested in the same table; the test's level is ALPHA / num_tests.

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
    """Numbers and lists of numbers as floats, other text in lower case: 1e-4 equals 0.0001, and true equals True."""
    try:
        return tuple(float(part) for part in value.strip("[]() ").split(","))
    except ValueError:
        return value.casefold()
