"""Exports: the bundle for reviewers, and the frames for notebooks."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from analysis_samples import cells_of, frame_of
from tiny_cells import put, tiny_cell

import analysis
from analysis.runs import folders
from suite.errors import UserError
from suite.run.directory import Planned, RunDir, write_plan
from suite.run.journal import Journal


def make_runs(root: Path, seeds: int = 3) -> None:
    """ROOT/tiny with cells of two methods: journals, results and predictions; one cell failed."""
    cells = [tiny_cell(quantizer=name, seed=seed) for name in ("bc", "bnn++") for seed in range(seeds)]
    write_plan(root / "tiny", map(Planned, cells))
    for k, cell in enumerate(cells):
        run = RunDir.create(root / "tiny" / cell.id, cell)
        attempt = put(run, state="running")
        if k == 0:
            put(run, state="failed", cause="oom", reason="out of memory", attempt=1)
            continue
        book = Journal(run.journal, attempt)
        book.append(1, {"val/top1": 0.5, "mu": 2.0})
        book.close()
        attempt.finish(state="done")
        np.savez_compressed(run.predictions_path, hard=np.arange(20) % (k + 2) > 0, soft=np.ones(20, dtype=bool))
        result = {"top1_hard": 0.5 + k / 16, "top1_soft": 0.5, "num_binary_parameters": 80, "weights_sha256": f"w{k}"}
        run.result_path.write_text(json.dumps({**result, "num_full_precision_parameters": 5}), encoding="utf-8")
        (run.path / "checkpoints").mkdir()
        (run.path / "checkpoints" / "0001.pt").write_bytes(b"not for reviewers")


def call(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "analysis", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("roots", [["runs"], ["here", "there"]], ids=["one root", "two roots"])
def test_a_bundle_rebuilds_its_tables_byte_for_byte_and_has_no_checkpoints(tmp_path: Path, roots: list[str]) -> None:
    for number, root in enumerate(roots):
        make_runs(tmp_path / root, seeds=3 + number)
    options = [option for root in roots for option in ("--root", root)]
    assert call(tmp_path, "bundle", "tiny", *options, "--output", "sent.tar.xz") == "sent.tar.xz\n"
    call(tmp_path, "bundle", "tiny", *options, "--output", "again.tar.xz")
    assert (tmp_path / "sent.tar.xz").read_bytes() == (tmp_path / "again.tar.xz").read_bytes()
    away = tmp_path / "reviewer"
    with tarfile.open(tmp_path / "sent.tar.xz") as archive:
        names = archive.getnames()
        archive.extractall(away, filter="data")
    assert not any("checkpoints" in name for name in names)
    assert sum(name.endswith("predictions.npz") for name in names) == (5 if len(roots) == 1 else 12)
    bundle = away / "tiny"
    lines = (bundle / "README.txt").read_text(encoding="utf-8").splitlines()
    commands = [line.split() for line in lines if line.startswith("    ")]
    assert [command[0] for command in commands] == ["python", "python", "cmp", "cmp"]
    for command in commands:
        program = sys.executable if command[0] == "python" else command[0]
        subprocess.run([program, *command[1:]], check=True, cwd=bundle, timeout=120)
    assert "design too small" in (bundle / "tables.md").read_text(encoding="utf-8")
    assert "For new test images" in (bundle / "report.html").read_text(encoding="utf-8")


def test_a_notebook_gets_a_tidy_frame_of_one_root_or_several(tmp_path: Path) -> None:
    make_runs(tmp_path / "a", seeds=2)
    make_runs(tmp_path / "b", seeds=4)
    assert len(analysis.load(tmp_path / "a", "tiny")) == 4
    merged = analysis.load([tmp_path / "a", tmp_path / "b"])
    assert len(merged) == 8
    assert merged["top1_hard"].notna().sum() == 7
    first, second = (folders.load([tmp_path / name for name in order]) for order in ("ab", "ba"))
    assert first.frame["run"].str.startswith(str(tmp_path / "a")).sum() == 4
    assert second.frame["run"].str.startswith(str(tmp_path / "b")).sum() == 8
    assert not any("disagree" in doubt for doubt in first.doubts if "bc/s1" in doubt)
    with pytest.raises(UserError, match="no such folder of runs"):
        analysis.load("nowhere")


def test_rliable_gets_runs_by_tasks_of_the_seeds_that_all_have() -> None:
    frame = frame_of(
        *(cells_of("bc", [0.1, 0.2, 0.3], model=model) for model in ("m10", "m9")),
        *(cells_of("pc", [0.5, 0.6, 0.7], model=model) for model in ("m10", "m9")),
        cells_of("bnn", [0.3, "failed: oom", 0.4], model="m9"),
        cells_of("bnn", [0.3, 0.2, 0.6], model="m10"),
    )
    scores = analysis.to_rliable(frame)
    assert {name: array.shape for name, array in scores.items()} == {"bc": (2, 2), "bnn": (2, 2), "pc": (2, 2)}
    assert scores["bnn"] == pytest.approx(np.array([[0.3, 0.3], [0.4, 0.6]]))


def test_without_a_common_seed_rliable_is_told_what_is_missing() -> None:
    frame = frame_of(cells_of("bc", [0.1, "queued"]), cells_of("pc", ["queued", 0.2]))
    with pytest.raises(ValueError, match=r"complete seeds are bc: \[0\], pc: \[1\]"):
        analysis.to_rliable(frame)
    doubled = frame_of(cells_of("bc", [0.1]), cells_of("bc", [0.2], init="finetune"))
    with pytest.raises(ValueError, match="several cells"):
        analysis.to_rliable(doubled)
