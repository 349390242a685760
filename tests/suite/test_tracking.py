"""MLflow has the content of the run directories, however often and whenever it is synced."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from tiny_cells import plan, put

from suite.run.atomic import write_json
from suite.run.directory import RunDir
from suite.run.journal import Journal
from suite.run.mlflow_replica import default_uri, sync


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for all tests: making a sqlite store takes MLflow seconds."""
    return default_uri(tmp_path_factory.mktemp("store"))


@pytest.fixture
def run(make_run: Callable[..., RunDir], tmp_path: Path) -> RunDir:
    """A run whose grid, and so experiment, is named after the test."""
    run = make_run(tmp_path.name)
    plan(run)
    return run


def _stored(run: RunDir, uri: str) -> list[Run]:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(run.path.parent.name)
    return list(client.search_runs([experiment.experiment_id]))


def _history(run: RunDir, uri: str, metric: str) -> list[tuple[int, float]]:
    (stored,) = _stored(run, uri)
    client = MlflowClient(tracking_uri=uri)
    return sorted((point.step, point.value) for point in client.get_metric_history(stored.info.run_id, metric))


def _append(run: RunDir, epoch: int, **metrics: float) -> None:
    """Appends a record to the newest attempt; starts the first one if needed."""
    book = Journal(run.journal, run.newest() or put(run, state="running"))
    book.append(epoch, {name.replace("__", "/"): value for name, value in metrics.items()})
    book.close()


def test_a_cell_that_has_not_run_is_there_as_queued(run: RunDir, uri: str) -> None:
    assert sync(run.path.parent, uri)[0] == 1
    (stored,) = _stored(run, uri)
    assert stored.info.run_name == "digits/resnet8/bnn++/s0"
    assert stored.info.status == "SCHEDULED"
    tags = stored.data.tags
    assert {key: tags[key] for key in ("cell_id", "dataset", "model", "quantizer", "seed", "state", "current")} == {
        "cell_id": run.path.name,
        "dataset": "digits",
        "model": "resnet8",
        "quantizer": "bnn++",
        "seed": "0",
        "state": "queued",
        "current": "true",
    }
    assert stored.data.params["training.epochs"] == "2"
    assert stored.data.params["quantization.sharpness.end"] == "500.0"


def test_a_second_sync_changes_nothing(run: RunDir, uri: str) -> None:
    _append(run, 1, train__loss=0.5)
    assert sync(run.path.parent, uri)[0] == 1
    assert sync(run.path.parent, uri)[0] == 0
    assert _history(run, uri, "train/loss") == [(1, 0.5)]


def test_only_what_is_new_is_added(run: RunDir, uri: str) -> None:
    _append(run, 1, train__loss=0.5)
    sync(run.path.parent, uri)
    _append(run, 2, train__loss=0.4)
    assert sync(run.path.parent, uri)[0] == 1
    assert _history(run, uri, "train/loss") == [(1, 0.5), (2, 0.4)]


def test_a_sync_that_died_before_noting_its_progress_doubles_nothing(
    run: RunDir, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _append(run, 1, train__loss=0.5)
    log_batch = MlflowClient.log_batch

    def die_on_tags(self: MlflowClient, run_id: str, **content: object) -> None:
        if content.get("tags"):
            raise KeyboardInterrupt
        log_batch(self, run_id, **content)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", die_on_tags)
        with pytest.raises(KeyboardInterrupt):
            sync(run.path.parent, uri)
    assert _history(run, uri, "train/loss") == [(1, 0.5)]
    assert sync(run.path.parent, uri)[0] == 1
    assert _history(run, uri, "train/loss") == [(1, 0.5)]


def test_a_sync_that_died_after_making_a_run_completes_it(
    run: RunDir, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_arguments: object, **_content: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", die)
        with pytest.raises(KeyboardInterrupt):
            sync(run.path.parent, uri)
    sync(run.path.parent, uri)
    (stored,) = _stored(run, uri)
    assert stored.data.params["training.epochs"] == "2"


def test_the_end_of_a_run_is_its_status(run: RunDir, uri: str) -> None:
    put(run, state="failed", cause="nan", reason="the loss is nan at step 7")
    sync(run.path.parent, uri)
    (stored,) = _stored(run, uri)
    assert (stored.info.status, stored.data.tags["cause"]) == ("FAILED", "nan")
    put(run, state="running", attempt=2)
    sync(run.path.parent, uri)
    assert _stored(run, uri)[0].info.status == "RUNNING"


def test_cells_of_an_earlier_recipe_are_marked(make_run: Callable[..., RunDir], run: RunDir, uri: str) -> None:
    earlier = make_run(run.path.parent.name, training__epochs=7)
    sync(run.path.parent, uri)
    assert {stored.data.tags["cell_id"]: stored.data.tags["current"] for stored in _stored(run, uri)} == {
        run.path.name: "true",
        earlier.path.name: "false",
    }


def test_a_lost_store_is_rebuilt_from_the_run_directories(run: RunDir, uri: str, tmp_path: Path) -> None:
    for epoch in range(1, 4):
        _append(run, epoch, train__loss=1 / epoch)
    sync(run.path.parent, uri)
    other = default_uri(tmp_path)
    sync(run.path.parent, other)
    assert _history(run, other, "train/loss") == _history(run, uri, "train/loss")
    assert len(_history(run, other, "train/loss")) == 3


def test_a_dead_server_costs_seconds_and_an_error(run: RunDir) -> None:
    import time

    start = time.monotonic()
    with pytest.raises(Exception, match="Max retries exceeded"):
        sync(run.path.parent, "http://127.0.0.1:9")
    assert time.monotonic() - start < 30


def test_the_task_is_a_tag_and_the_quantizer_of_inputs_a_parameter(
    make_run: Callable[..., RunDir], tmp_path: Path, uri: str
) -> None:
    run = make_run(tmp_path.name, task="bwa", quantization__inputs={"quantizer": "bnn"})
    sync(run.path.parent, uri)
    (stored,) = _stored(run, uri)
    assert (stored.info.run_name, stored.data.tags["task"]) == ("digits/resnet8/bnn++/s0/bwa", "bwa")
    assert stored.data.params["quantization.inputs.quantizer"] == "bnn"
    assert stored.data.params["quantization.full_precision"] == "ends"


def test_sizes_and_the_checksum_of_the_data_are_tags_once_the_run_is_done(run: RunDir, uri: str) -> None:
    keys = ("num_train_images", "num_binary_parameters", "num_full_precision_parameters", "data_checksum")
    sync(run.path.parent, uri)
    assert [_stored(run, uri)[0].data.tags[key] for key in keys] == [""] * 4
    counts = {"num_train_images": 1294, "num_binary_parameters": 9216, "num_full_precision_parameters": 1274}
    write_json(put(run, state="done").provenance_path, {"data_checksum": "d1"})
    run.result_path.write_text(json.dumps({"cell": run.path.name, **counts}), encoding="utf-8")
    sync(run.path.parent, uri)
    assert [_stored(run, uri)[0].data.tags[key] for key in keys] == ["1294", "9216", "1274", "d1"]
