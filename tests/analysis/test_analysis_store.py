"""From a real sqlite MLflow store, shared by all tests, to a frame, and to the command line."""

import contextlib
import gc
import io
import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from analysis_samples import cells_of, example

from analysis.__main__ import main
from analysis.runs import store
from analysis.runs.frame import SCHEMA
from analysis.runs.store import load
from suite.errors import UserError

COUNTS = ["num_binary_parameters", "num_full_precision_parameters"]
TAGS = [column for column in SCHEMA if not column.startswith("top1") and column not in {*COUNTS, "run", "determinism"}]


@pytest.fixture(autouse=True)
def _no_store_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MLFLOW_TRACKING_URI", "PROXBENCH_ROOT"):
        monkeypatch.setenv(variable, "")  # so that monkeypatch restores what MLflow may write there
        monkeypatch.delenv(variable)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A ROOT whose mlflow.db has the grids digits (the example), again (a duplicate), large (1,050 cells), ..."""
    folder = tmp_path_factory.mktemp("runs")
    with warnings.catch_warnings():
        # SQLAlchemy 2.1 warns once about how MLflow 3.17 declares its tables, when they are first imported.
        warnings.filterwarnings("ignore", message="The ``noload`` loader strategy", category=DeprecationWarning)
        _fill(folder)
        yield folder


def _fill(folder: Path) -> None:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient

    client, artifacts = MlflowClient(uri(folder)), str(folder / "artifacts")
    _write(client, artifacts, "digits", example().frame.to_dict("records"))
    again = [*cells_of("bc", [0.5, "failed: oom"], grid="again"), *cells_of("bc", [0.625], grid="again")]
    _write(client, artifacts, "again", again)
    _write(client, artifacts, "large", cells_of("bc", ["planned"], grid="large"))
    _copy_the_last_run(folder / "mlflow.db", num_copies=1049)
    before = cells_of("bc", [0.5, 0.5], grid="edited", recipe_id="old", current="false")
    _write(client, artifacts, "edited", [*before, *cells_of("bc", [0.75], grid="edited", current="true")])
    _write(client, artifacts, "old", cells_of("bc", [0.5], grid="old", sizes=False))
    torn = cells_of("bc", ["running"], grid="torn")
    _write(client, artifacts, "torn", [{**torn[0], "top1_hard": 0.5, "top1_soft": 0.5, "has_metrics": True}])
    _write(client, artifacts, "odd", [{**cells_of("bc", ["queued"], grid="odd")[0], "seed": "zero"}])
    (again_id,) = (item.experiment_id for item in client.search_experiments() if item.name == "again")
    client.create_run(again_id, run_name="by hand")
    others = cells_of("pc", [0.75], grid="old", sizes=False)
    _write(client, artifacts, "old (a1b2c3)", others)
    foreign = client.create_experiment("foreign", artifact_location=artifacts)
    client.create_run(foreign, run_name="somebody's", tags={"dataset": "digits"})


def _write(client: object, artifacts: str, grid: str, rows: Iterable[Mapping[Any, object]]) -> None:
    """Writes the rows as suite.run.mlflow_replica writes cells, started one millisecond apart."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    assert isinstance(client, MlflowClient)
    declared = json.dumps([{"primary": "bnn++", "margin_points": 0.5, "settings": []}])
    ours = {"proxbench.root": "a1b2c3d4", "proxbench.declared": declared if grid == "digits" else ""}
    experiment = client.create_experiment(grid, artifact_location=artifacts, tags=ours)
    for start, row in enumerate(rows, start=1):
        name = f"{row['dataset']}/{row['model']}/{row['quantizer']}/s{row['seed']}"
        tags = {tag: str(row[tag]) for tag in (*TAGS, "current") if tag in row}
        tags["execution.determinism"] = str(row["determinism"])
        tags |= {tag: f"{row[tag]:.0f}" if row["state"] == "done" else "" for tag in COUNTS if row.get("sizes", True)}
        run = client.create_run(experiment, start_time=start, tags=tags, run_name=name)
        if row["state"] == "done" or row.get("has_metrics"):
            metrics = [Metric(f"test/{key}", row[key], timestamp=0, step=9) for key in ("top1_hard", "top1_soft")]
            client.log_batch(run.info.run_id, metrics)


def _copy_the_last_run(database: Path, num_copies: int) -> None:
    """Copies as seeds 1, 2, ..., started later; through MLflow itself a thousand runs take half a minute."""
    with contextlib.closing(sqlite3.connect(database)) as store:
        run = pd.read_sql("SELECT * FROM runs ORDER BY rowid DESC LIMIT 1", store)
        tags = pd.read_sql("SELECT * FROM tags WHERE run_uuid = ?", store, params=[run["run_uuid"][0]])
        seeds = range(1, num_copies + 1)
        runs = pd.concat([run.assign(run_uuid=f"{seed:032x}", start_time=1 + seed) for seed in seeds])
        changed = {"seed": "{}", "cell_id": "cell {}", "mlflow.runName": "copy {}"}
        values = [
            [changed.get(key, value).format(seed) for key, value in zip(tags["key"], tags["value"], strict=True)]
            for seed in seeds
        ]
        all_tags = pd.concat(
            [tags.assign(run_uuid=f"{seed:032x}", value=value) for seed, value in zip(seeds, values, strict=True)]
        )
        runs.to_sql("runs", store, if_exists="append", index=False)
        all_tags.to_sql("tags", store, if_exists="append", index=False)


def uri(root: Path) -> str:
    return f"sqlite:///{root}/mlflow.db"


def test_what_was_written_is_read(root: Path) -> None:
    results = load(uri(root), "digits")
    key = ["model", "quantizer", "seed"]
    read, written = (frame.sort_values(key).reset_index(drop=True) for frame in (results.frame, example().frame))
    assert read.drop(columns="run").equals(written.drop(columns="run"))
    assert read["run"].str.fullmatch("[0-9a-f]{32}").all()
    assert results.findings[0] == "2 of 24 cells failed: nan (digits/resnet110/bc/s1, digits/resnet110/bc/s2)"


def test_more_than_a_thousand_runs_are_read_completely_and_in_order(root: Path) -> None:
    assert load(uri(root), "large").frame["seed"].tolist() == list(range(1050))


def test_of_two_runs_of_a_cell_the_newest_is_used_and_told(root: Path) -> None:
    results = load(uri(root), "again")
    assert results.frame["top1_hard"].tolist()[0] == 0.625
    assert "has 2 done runs that disagree on top1_hard (0.5, 0.625); 0.625 is used" in results.doubts[0]


def test_cells_from_before_a_grid_was_edited_are_left_out_and_told(root: Path) -> None:
    results = load(uri(root), "edited")
    assert results.frame["top1_hard"].tolist() == [0.75]
    assert results.findings == (
        "2 cells that the grid had before its last launch are left out (digits/resnet20/bc/s0, digits/resnet20/bc/s1)",
    )


def test_a_store_from_before_sizes_were_kept_is_read(root: Path) -> None:
    frame = load(uri(root), "old").frame
    assert frame["top1_hard"].tolist() == [0.5, 0.75]
    assert frame[COUNTS].isna().all(axis=None)


def test_a_metric_without_a_result_is_no_measurement(root: Path) -> None:
    assert load(uri(root), "torn").frame[["top1_hard", "top1_soft"]].isna().all(axis=None)


def test_a_seed_that_is_no_number_is_refused_by_name(root: Path) -> None:
    with pytest.raises(UserError, match="of odd: seed is 'zero', not a whole number"):
        load(uri(root), "odd")


def test_reading_turns_the_garbage_collector_on_again(root: Path) -> None:
    load(uri(root), "digits")
    assert gc.isenabled()


def test_reading_leaves_the_tracking_uri_alone(root: Path) -> None:
    load(uri(root), "digits")
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_an_unknown_grid_is_refused_with_the_grids_in_the_store(root: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(uri(root), "digit")
    assert str(caught.value) == (
        "unknown grid 'digit'; did you mean 'digits'? in the store: again, digits, edited, large, odd, old, torn"
    )


def test_experiments_and_runs_of_others_are_left_out(root: Path) -> None:
    """Previously, one foreign experiment on a shared server blocked every table."""
    with pytest.raises(UserError, match="unknown grid 'foreign'"):
        load(uri(root), "foreign")
    with pytest.raises(UserError, match="of odd: seed is 'zero'"):  # reads only ours, one of which is broken
        load(uri(root))
    assert load(uri(root), "again").remarks == ("1 runs of others are left out (by hand)",)


def test_another_roots_grid_of_the_same_name_is_the_same_grid(root: Path) -> None:
    results = load(uri(root), "old")
    assert results.frame["quantizer"].tolist() == ["bc", "pc"]


def test_a_look_at_a_store_is_not_recorded_in_a_folder_of_the_same_name(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, "tables", "digits", "--tracking-uri", uri(root)) == 0
    assert not (tmp_path / "runs" / "digits" / "looks.jsonl").exists()


def test_the_declared_margin_comes_with_the_experiment(root: Path) -> None:
    assert load(uri(root), "digits").declared["digits"].margin_points == 0.5
    assert load(uri(root), "again").declared["again"].margin_points is None


@pytest.mark.parametrize(("address", "size"), [("http://host:5000", 200), ("https://host", 200), ("sqlite:///x", 1000)])
def test_pages_are_small_over_http(address: str, size: int) -> None:
    assert store._page_size(address) == size


def test_a_store_that_does_not_exist_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no MLflow store there"):
        load(uri(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("root")
def test_a_file_that_is_no_store_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, though long enough to be read as one" * 40)
    with pytest.raises(UserError, match=r"cannot read sqlite.*not a database$"):
        load(uri(tmp_path))


@pytest.mark.usefixtures("root")
def test_a_dead_server_is_reported_within_seconds() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(UserError, match=f"cannot read http://127.0.0.1:{port}"):
        load(f"http://127.0.0.1:{port}")
    assert time.monotonic() - start < 30


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["analysis", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_tables_prints_the_grid(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "tables", "digits", "--tracking-uri", uri(root)) == 0
    golden = (Path(__file__).parent / "golden" / "comparison.md").read_text(encoding="utf-8")
    without_margin = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("- Margin of")]
    assert without_margin == golden.splitlines()


def test_tables_writes_the_output_file_and_reads_the_root_from_the_environment(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "digits.json"
    place = ["--tracking-uri", uri(root)]
    assert run_main(monkeypatch, "tables", "digits", *place, "--format", "json", "--output", str(output)) == 0
    assert len(json.loads(output.read_text(encoding="utf-8"))["entries"]) == 10
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("PROXBENCH_ROOT", str(tmp_path / "elsewhere"))
    assert run_main(monkeypatch, "tables", "digits") == 2
    assert "elsewhere: no such folder of runs" in capsys.readouterr().err


def test_strict_refuses_what_is_in_doubt_and_nothing_else(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "tables", "digits", "--tracking-uri", uri(root), "--strict") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("--strict: 4 findings put numbers in doubt: 2 of 24 cells failed: nan (digits/")
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert run_main(monkeypatch, "tables", "edited", "--tracking-uri", uri(root), "--strict") == 0
    assert "left out" in capsys.readouterr().out


def test_explain_lists_the_runs_behind_an_entry(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tables", "digits", "--tracking-uri", uri(root), "--explain", "digits/resnet20/bc"]
    assert run_main(monkeypatch, *arguments) == 0
    text = capsys.readouterr().out
    runs = load(uri(root), "digits").frame.set_index("cell_id")["run"]
    own = runs[runs.index.str.startswith("digits/resnet20/bc/")]
    assert len(own) == 3
    assert all(f"run {run};" in text for run in own)
    assert "2 of 3 cells are in the mean" in text
    assert "- seed 2: failed: oom (not in the mean);" in text
    assert run_main(monkeypatch, *arguments, "--format", "json") == 0
    cells = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["cells"]
    assert [(cell["seed"], cell["counts"], cell["top1_hard"]) for cell in cells] == [
        (0, True, 0.9702),
        (1, True, 0.9738),
        (2, False, None),
    ]
    assert run_main(monkeypatch, *arguments, "--format", "csv") == 0
    assert len(pd.read_csv(io.StringIO(capsys.readouterr().out))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tables", "digits", "--explain", "digits/resnet20/bnm"], "did you mean 'digits/resnet20/bnn'?"),
        (["tables", "digits", "--explain", "digits/resnet20/bnn", "--format", "html"], "choose markdown, csv or json"),
        (
            ["tables", "digits", "--against", "resnet-cifar"],
            "unknown publication 'resnet-cifar'; did you mean 'resnet-c",
        ),
        (["tables", "digits", "--against", "nowhere.yaml"], "nowhere.yaml"),
        (
            ["tables", "digits", "--tracking-uri", "sqlite:///nowhere/mlflow.db"],
            "nowhere/mlflow.db: no MLflow store there",
        ),
        (["tables", "digit"], "unknown grid 'digit'; did you mean 'digits'?"),
        (["tables", "digits", "--output", "/nowhere/at/all.md"], "No such file or directory: '/nowhere/at/all.md'"),
        (["tables", "--root", "nowhere"], "nowhere: no such folder of runs"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_status_2(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    if not {"--tracking-uri", "--root"} & set(arguments):
        arguments = [*arguments, "--tracking-uri", uri(root)]
    assert run_main(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"), [(["tabels"], "tabels"), (["tables", "digits", "--format", "word"], "latex")]
)
def test_a_word_that_is_no_command_or_choice_exits_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run_main(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["tables", "--help"]])
def test_help_teaches_with_an_example(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "analysis", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "python -m analysis tables digits" in result.stdout


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'mlflow', 'pandas', 'scipy', 'numpy', 'torch'}"
    code = f"import sys, analysis.__main__; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
