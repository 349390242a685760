"""Published numbers from YAML files, each with its source and whether it was verified there, compared with runs.

A number is verified where somebody has read it in the source itself, a copy of its full text, or its authors' own
record of it; `verified_in` says where. What other papers or repositories quote is not verified.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from analysis.runs.frame import require_known
from analysis.stats.equivalence import Equivalence, equivalence
from analysis.stats.equivalence import Published as Mean
from suite.errors import UserError
from suite.errors import UserError as FileError
from suite.recipe.cell import Frozen
from suite.recipe.faults import Faults
from suite.recipe.yaml_lines import read

FOLDER = Path(__file__).parent / "published"
Percent = Annotated[float, Field(ge=0, le=100)]
Key = tuple[str, str, str, str, str]
"""Data set, model, quantizer, task, init."""


class Number(Frozen):
    """A published top-1 test accuracy. Accuracy and sd in %, margin in percentage points."""

    dataset: str
    model: str
    quantizer: str
    task: str = "bw"
    init: str = "scratch"
    row: str = Field(description="of the source's table, as it stands there")
    accuracy: Percent
    sd: Percent | None = Field(None, description="sample standard deviation over n runs")
    n: PositiveInt | None = Field(None, description="runs it is the mean of; without n it is taken as exact")
    margin: PositiveFloat = Field(description="what still counts as reproduced, declared before the runs")
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


class Publication(Frozen):
    """Where the numbers of one file are from."""

    title: str
    authors: str
    year: PositiveInt
    arxiv: str = ""
    doi: str = ""
    table: str
    verified_in: str = Field("", description="what was read to verify the numbers")
    protocol: str = Field("", description="how the source measures, where that may differ from this project")
    numbers: Annotated[tuple[Number, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _traceable(self) -> "Publication":
        if not (self.arxiv or self.doi):
            raise ValueError("arxiv: or doi: is required, so that readers find the source")
        if any(number.verified for number in self.numbers) and not self.verified_in:
            raise ValueError("verified_in: is required, for some numbers are said to be verified")
        keys = [number.key for number in self.numbers]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"numbers: two for {'/'.join(twice[0])}")
        return self

    @property
    def citation(self) -> str:
        """`He et al. (2016), Deep Residual Learning for Image Recognition, arXiv 1512.03385, Table 6`."""
        where = f"arXiv {self.arxiv}" if self.arxiv else f"doi {self.doi}"
        return f"{self.authors} ({self.year}), {self.title}, {where}, {self.table}"


@dataclass(frozen=True)
class Reproduction:
    """A published number beside ours, as fractions; `test` is None where no run of ours may be compared."""

    accuracy: float
    margin: float
    verified: bool
    row: str
    test: Equivalence | None


def load(name: str) -> Publication:
    """The publication of a bundled file's name, or of a YAML file's path.

    Raises:
        UserError: no such file, or what is wrong in it, with file and line.
    """
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        require_known("publication", name, bundled(), "analysis/published")
        path = FOLDER / f"{name}.yaml"
    try:
        raw, lines = read(path, "a publication", Publication.model_fields, FileError)
    except FileError as error:
        raise UserError(str(error)) from error
    try:
        return Publication.model_validate(raw)
    except ValidationError as error:
        faults = Faults(path, lines)
        faults.add_all(error, Publication, ())
        raise UserError("\n".join(faults)) from error


def bundled() -> list[str]:
    """Names of the publications that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def reproduction(number: Number, accuracies: Mapping[int, float]) -> Reproduction:
    """The number against accuracies by seed, fractions; none of these leaves it untested."""
    mean = Mean(number.accuracy / 100, None if number.sd is None else number.sd / 100, number.n)
    test = equivalence(list(accuracies.values()), mean, number.margin / 100) if accuracies else None
    return Reproduction(mean.mean, number.margin / 100, number.verified, number.row, test)


def by_key(publication: Publication | None) -> dict[Key, Number]:
    """Its numbers by the cells they are compared with; none of no publication."""
    return {} if publication is None else {number.key: number for number in publication.numbers}
