"""Run directories give the same frame and findings as MLflow for the same runs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_cells import plan, put

from analysis.runs import folders
from analysis.runs import store as runs
from suite.errors import UserError
from suite.run.atomic import write_json
from suite.run.directory import RunDir
from suite.run.journal import Journal
from suite.run.mlflow_replica import default_uri, sync


def finish(run: RunDir, hard: float, commit: str = "c0ffee") -> None:
    """Writes the files that a run leaves behind: journal, result, provenance."""
    code = {"commit": commit, "digest": "new" if commit == "c0ffee" else "old"}
    execution = {"determinism": "strict"}
    provenance = {"code": code, "data_checksum": "d1", "num_threads": 1, "num_processes": 2, "execution": execution}
    attempt = put(run, state="running", attempt=1, job_id="7")
    write_json(attempt.provenance_path, provenance)
    journal = Journal(run.journal, attempt)
    journal.append(2, {"test/top1_hard": hard, "test/top1_soft": hard + 0.001})
    journal.close()
    result = {"cell": run.path.name, "top1_hard": hard, "top1_soft": hard + 0.001, "weights_sha256": f"w{hard}"}
    sizes = {"num_train_images": 1294, "num_binary_parameters": 9216, "num_full_precision_parameters": 1274}
    run.result_path.write_text(json.dumps({**result, **sizes}), encoding="utf-8")


@pytest.fixture
def root(make_run: Callable[..., RunDir], tmp_path: Path) -> Path:
    """bnn++: three seeds from two commits; bc: one failed, one died after its last record; and an old cell."""
    made = [make_run("tiny", seed=seed) for seed in range(3)]
    for seed, run in enumerate(made):
        finish(run, 0.9 + seed / 30, commit="c0ffee" if seed else "decaf")
    failed, died = (make_run("tiny", quantizer="bc", seed=seed) for seed in range(2))
    put(failed, state="failed", cause="oom", reason="out of memory")
    finish(died, 0.5)
    died.result_path.unlink()
    make_run("tiny", training__epochs=7)
    plan(*made, failed, died)
    return tmp_path


def test_folders_and_store_give_the_same_frame_and_findings(root: Path) -> None:
    uri = default_uri(root)
    sync(root / "tiny", uri)
    read, stored = folders.load(root, "tiny"), runs.load(uri, "tiny")
    assert read.frame.drop(columns="run").equals(stored.frame.drop(columns="run"))
    assert (read.doubts, read.remarks) == (stored.doubts, stored.remarks)
    assert read.frame["num_binary_parameters"].tolist()[-3:] == [9216.0] * 3
    assert read.frame["data_checksum"].tolist()[-3:] == ["d1"] * 3
    assert read.frame["weights_sha256"].str.startswith("w").tolist()[-3:] == [True] * 3
    assert read.declared == stored.declared


def test_what_is_amiss_is_found_without_a_store(root: Path) -> None:
    results = folders.load(root)
    assert results.doubts == (
        "tiny: done cells come from 2 versions of the code: new (2 cells, commit c0ffee), old (1 cells, commit decaf)",
        "1 of 5 cells failed: oom (digits/resnet8/bc/s0)",
        "1 of 5 cells running (digits/resnet8/bc/s1)",
        "digits/resnet8/bc has no cell for 1 of 3 seeds (2)",
    )
    assert results.remarks == (
        "1 cells that the grid had before its last launch are left out (digits/resnet8/bnn++/s0)",
    )
    assert not (root / "mlflow.db").exists()


def test_rows_name_the_run_directory(root: Path) -> None:
    frame = folders.load(root).frame
    assert all((Path(run) / "cell.yaml").exists() for run in frame["run"])


def test_runs_without_a_plan_are_all_read(make_run: Callable[..., RunDir], tmp_path: Path) -> None:
    finish(make_run("alone"), 0.75)
    assert folders.load(tmp_path, "alone").frame["top1_hard"].tolist() == [0.75]


@pytest.mark.parametrize(
    "name", ["attempts/0001/end.json", "result.json", "attempts/0001/provenance.json", "cell.yaml"]
)
@pytest.mark.parametrize("content", ["{", "[1, 2]", '"text"'])
def test_a_torn_file_is_refused_in_one_line_that_names_it(
    make_run: Callable[..., RunDir], tmp_path: Path, name: str, content: str
) -> None:
    run = make_run("torn")
    finish(run, 0.5)
    (run.path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        folders.load(tmp_path)
    assert str(caught.value).startswith(f"{run.path / name}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("grid", "message"), [("tinny", "unknown grid 'tinny'; did you mean 'tiny'?"), ("digits", "in .*: tiny$")]
)
def test_an_unknown_grid_is_refused_with_those_there_are(root: Path, grid: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        folders.load(root, grid)


def test_a_root_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no cells"):
        folders.load(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        folders.load(tmp_path / "nowhere")
