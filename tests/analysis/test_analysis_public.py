"""Reference values through the public command: `python -m analysis tables` on runs with known numbers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_analysis_references import C45_AUC, CLINIC_1
from test_analysis_stratified import DARWIN, SHOES
from tiny_cells import put, tiny_cell
from typer.testing import CliRunner

from analysis.__main__ import app
from suite.run.directory import Planned, RunDir, write_plan


def study(root: Path, runs: Mapping[tuple[str, str], Sequence[float]], margin_points: float | None = None) -> None:
    """ROOT/known: one done run per accuracy of each (model, quantizer), seeds from 0; declared with this margin."""
    planned = []
    for (model, quantizer), accuracies in runs.items():
        for seed, accuracy in enumerate(accuracies):
            # Copied without validation: the models have no network and the recipe does not exist.
            cell = tiny_cell().model_copy(update={"model": model, "quantizer": quantizer, "seed": seed})
            planned.append(Planned(cell))
            run = RunDir.create(root / "known" / cell.id, cell)
            attempt = put(run, state="running")
            run.result_path.write_text(json.dumps({"top1_hard": accuracy, "top1_soft": accuracy}), encoding="utf-8")
            attempt.finish(state="done")
    write_plan(root / "known", planned)
    declared: dict[str, Any] = {"primary": "bnn++", "margin_points": margin_points, "settings": []}
    (root / "known" / "launches.jsonl").write_text(json.dumps({"declared": declared}) + "\n", encoding="utf-8")


def printed(root: Path, *options: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["tables", "known", "--root", str(root), "--format", "json", *options])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_demsars_ranks_are_printed(tmp_path: Path) -> None:
    """Demsar (2006), p. 14: average ranks 3.143, 2.000, 2.893, 1.964 of four versions of C4.5 on 14 data sets."""
    names = ("bc", "pc", "bnn", "bnn+")
    table = C45_AUC.copy()
    table[12, 2] = 0.9751
    study(tmp_path, {(f"data{k}", name): [table[k, q]] for k in range(14) for q, name in enumerate(names)})
    (ranks,) = printed(tmp_path)["ranks"]
    average = dict(zip(ranks["ranking"]["methods"], ranks["ranking"]["average_ranks"], strict=True))
    assert [average[name] for name in names] == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=5e-4)
    assert ranks["ranking"]["friedman"]["chi2"] == pytest.approx(10.2283464566929)
    assert ranks["ranking"]["critical_difference"] == pytest.approx(1.25, abs=5e-3)


def test_fishers_and_boxs_p_are_printed_with_holms_adjustment(tmp_path: Path) -> None:
    """Darwin's maize and the boys' shoes as differences of accuracies: 1,726 / 32,768 and 14 / 1,024."""
    maize, shoes = (0.5 + np.array(values) / scale for values, scale in ((DARWIN, 1000), (SHOES, 10)))
    study(tmp_path / "a", {("m", "bnn++"): maize.tolist(), ("m", "bc"): [0.5] * 15})
    (answer,) = printed(tmp_path / "a")["comparisons"][:1]
    assert (answer["n"], answer["family_size"]) == (15, 1)
    assert answer["p"] == pytest.approx(2 * 863 / 32_768)
    assert answer["verdict"] == "not distinguishable"
    study(tmp_path / "b", {("m", "bnn++"): shoes.tolist(), ("m", "bc"): [0.5] * 10, ("m", "pc"): shoes.tolist()})
    bc, pc = printed(tmp_path / "b")["comparisons"][:2]
    assert (bc["p"], bc["adjusted_p"]) == pytest.approx((14 / 1024, 2 * 14 / 1024))
    assert (pc["p"], pc["verdict"]) == (1.0, "not distinguishable")
    assert bc["low"] > 0


def test_equivalence_to_a_published_number_is_rs(tmp_path: Path) -> None:
    """From R's package equivalence, tost(differences, eps = 0.6), as quoted in statsmodels' test_tost.py."""
    differences = np.subtract(*CLINIC_1)
    study(tmp_path, {("resnet20", "bc"): (0.5 + differences / 100).tolist()}, margin_points=0.6)
    source = tmp_path / "source.yaml"
    number = {"dataset": "digits", "model": "resnet20", "quantizer": "bc", "row": "one", "accuracy": 50.0}
    publication = {"name": "known", "arxiv": "1", "table": "1", "verified_in": "here", "requires": {}}
    source.write_text(json.dumps({**publication, "numbers": [{**number, "verified": True}]}), encoding="utf-8")
    entry = printed(tmp_path, "--against", str(source))["entries"][0]
    assert entry["published_verdict"] == "reproduced"
    assert entry["published_p_equivalent"] == pytest.approx(0.003166881489265175)
    ends = (100 * entry["published_low"], 100 * entry["published_high"])
    assert ends == pytest.approx((-0.0744336620516462, 0.4037669953849797))
