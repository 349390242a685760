"""On a real tracking server: users' runs are not mixed, nothing blocks a sync, nothing is stored twice."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

import pytest
from mlflow.entities import Experiment, Run
from mlflow.tracking import MlflowClient
from tiny_cells import plan, put, tiny_cell

from suite.run.atomic import write_json
from suite.run.directory import RunDir
from suite.run.journal import Journal
from suite.run.mlflow_replica import ROOT, default_uri, how_to_browse, sync

pytestmark = pytest.mark.slow


@contextmanager
def _server(store: str, folder: Path) -> Iterator[str]:
    """The address of an MLflow server on a store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--workers", "1", "--artifacts-destination", str(folder / "artifacts")]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, (folder / "log").read_text(encoding="utf-8")
            with suppress(OSError), urlopen(f"{uri}/health"):  # noqa: S310  (http, see above)
                break
            time.sleep(0.1)
        yield uri
    finally:
        os.killpg(process.pid, 15)
        process.wait()


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    with _server(default_uri(folder), folder) as address:
        yield address


def _grid(root: Path, name: str, *losses: float) -> RunDir:
    """A grid with one cell, trained for one epoch per loss."""
    cell = tiny_cell()
    run = RunDir.create(root / name / cell.id, cell)
    plan(run)
    attempt = put(run, state="running")
    book = Journal(run.journal, attempt)
    for epoch, loss in enumerate(losses, 1):
        book.append(epoch, {"train/loss": loss})
    book.close()
    return run


def _runs(uri: str, experiment_id: str) -> list[Run]:
    return list(MlflowClient(uri).search_runs([experiment_id]))


def _losses(uri: str, run: Run) -> list[float]:
    history = MlflowClient(uri).get_metric_history(run.info.run_id, "train/loss")
    return [point.value for point in sorted(history, key=lambda point: point.step)]


def _experiment(uri: str, experiment_id: str) -> Experiment:
    return MlflowClient(uri).get_experiment(experiment_id)


def test_two_users_with_one_grid_have_an_experiment_each(tmp_path: Path, uri: str) -> None:
    first, second = (_grid(tmp_path / name, tmp_path.name, loss) for name, loss in (("ada", 0.5), ("bob", 0.25)))
    ids = [sync(run.path.parent, uri)[1] for run in (first, second)]
    assert ids == [sync(run.path.parent, uri)[1] for run in (first, second)]
    assert ids[0] != ids[1]
    assert [_losses(uri, *_runs(uri, each)) for each in ids] == [[0.5], [0.25]]
    names = [_experiment(uri, each).name for each in ids]
    assert names[0] == tmp_path.name
    assert names[1] == f"{tmp_path.name} ({_experiment(uri, ids[1]).tags[ROOT][:6]})"


def test_a_folder_that_was_deleted_and_trained_anew_is_another_run(tmp_path: Path, uri: str) -> None:
    run = _grid(tmp_path, tmp_path.name, 0.5, 0.4, 0.3)
    _, experiment = sync(run.path.parent, uri)
    shutil.rmtree(run.path)
    _grid(tmp_path, tmp_path.name, 0.25)
    assert sync(run.path.parent, uri)[0] == 2, "the new one is stored, the old one retired"
    assert sync(run.path.parent, uri)[0] == 0
    found = {each.data.tags["current"]: _losses(uri, each) for each in _runs(uri, experiment)}
    assert found == {"true": [0.25], "false": [0.5, 0.4, 0.3]}


def test_an_experiment_deleted_in_the_ui_comes_back_with_its_runs_once(tmp_path: Path, uri: str) -> None:
    run = _grid(tmp_path, tmp_path.name, 0.5)
    _, experiment = sync(run.path.parent, uri)
    MlflowClient(uri).delete_experiment(experiment)
    assert sync(run.path.parent, uri)[1] == experiment
    assert [_losses(uri, each) for each in _runs(uri, experiment)] == [[0.5]]


def test_a_run_deleted_in_the_ui_stays_so(tmp_path: Path, uri: str) -> None:
    run = _grid(tmp_path, tmp_path.name, 0.5)
    _, experiment = sync(run.path.parent, uri)
    (stored,) = _runs(uri, experiment)
    MlflowClient(uri).delete_run(stored.info.run_id)
    assert sync(run.path.parent, uri) == (0, experiment)
    assert _runs(uri, experiment) == []


def test_a_cell_that_begins_leaves_its_placeholder_so_that_waiting_is_not_running(tmp_path: Path, uri: str) -> None:
    cell = tiny_cell()
    run = RunDir.create(tmp_path / tmp_path.name / cell.id, cell)
    plan(run)
    _, experiment = sync(run.path.parent, uri)
    (waiting,) = _runs(uri, experiment)
    begun = time.time()
    attempt = run.claim()
    Journal(run.journal, attempt).close()
    sync(run.path.parent, uri)
    (running,) = _runs(uri, experiment)
    assert running.info.run_id != waiting.info.run_id
    assert running.info.start_time >= int(1000 * begun)
    provenance = {"data_checksum": "d1" * 32, "code": {"commit": "c0ffee"}, "device": "a CPU"}
    write_json(attempt.provenance_path, provenance | {"execution": {"loader": "memory", "device": "cpu"}})
    attempt.finish(state="failed", cause="oom", reason="no room")
    sync(run.path.parent, uri)
    (ended,) = _runs(uri, experiment)
    assert 0 <= ended.info.end_time - ended.info.start_time < 60_000
    (dataset,) = ended.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("digits", ("d1" * 32)[:36])
    assert ended.data.tags["mlflow.source.name"] == str(run.path)
    assert ended.data.tags["execution.loader"] == "memory"
    again = put(run, state="running", attempt=2)
    write_json(again.provenance_path, provenance | {"device": "a GPU"})
    sync(run.path.parent, uri)
    assert _runs(uri, experiment)[0].data.tags["attempts_differ_in"] == "device"


def _syncs_at_once(grid_dir: Path, uri: str, num: int, *, with_locks: bool) -> None:
    unlocked = "import errno, fcntl\ndef flock(*_): raise OSError(errno.ENOLCK, '')\nfcntl.flock = flock\n"
    program = (
        f"{'' if with_locks else unlocked}import sys, pathlib, time\nfrom suite.run.mlflow_replica import sync\n"
        "import mlflow.tracking\ngrid = pathlib.Path(sys.argv[1])\n"
        "while not (grid / 'go').exists(): time.sleep(0.01)\nsync(grid, sys.argv[2])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(grid_dir), uri]
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(num)]
    (grid_dir / "go").touch()
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors


@pytest.mark.parametrize("with_locks", [True, False])
def test_syncs_at_once_store_nothing_twice(tmp_path: Path, uri: str, *, with_locks: bool) -> None:
    run = _grid(tmp_path, tmp_path.name, *(1 / epoch for epoch in range(1, 6)))
    _syncs_at_once(run.path.parent, uri, 2, with_locks=with_locks)
    _, experiment = sync(run.path.parent, uri)
    (stored,) = _runs(uri, experiment)
    assert _losses(uri, stored) == [1 / epoch for epoch in range(1, 6)]


def test_on_postgresql_as_on_sqlite(tmp_path: Path, postgresql: str) -> None:
    with _server(postgresql, tmp_path) as uri:
        run = _grid(tmp_path, "tiny", 0.5, 0.4)
        _syncs_at_once(run.path.parent, uri, 2, with_locks=False)
        sync(run.path.parent, uri)  # in case each of the two deleted its run as a duplicate
        num_changed, experiment = sync(run.path.parent, uri)
        assert num_changed == 0
        (stored,) = _runs(uri, experiment)
        assert _losses(uri, stored) == [0.5, 0.4]


@pytest.fixture
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a database on its own server, which listens only on a socket in its folder."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path(shutil.which("pg_ctl") or "").parent]
    if not (folders[-1] / "initdb").exists():
        pytest.skip("no PostgreSQL; on Debian: sudo apt-get install postgresql")
    pytest.importorskip("psycopg2", reason="no psycopg2: pip install psycopg2-binary")
    folder = tmp_path_factory.mktemp("postgresql")
    folder.chmod(0o700)
    as_user: list[str] = []
    if os.geteuid() == 0:  # the server refuses to run as root
        for parent in (folder, *folder.parents[:-2]):
            parent.chmod(0o755)
        shutil.chown(folder, "nobody")
        as_user = ["setpriv", "--reuid=nobody", "--clear-groups"]

    def call(program: str, *arguments: str) -> None:
        command = [*as_user, str(folders[-1] / program), *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        assert answer.returncode == 0, answer.stderr + answer.stdout

    call("initdb", "-D", f"{folder}/data", "-U", "mlflow", "--auth=trust")
    options = f"-c listen_addresses='' -c unix_socket_directories={folder}"
    call("pg_ctl", "-D", f"{folder}/data", "-l", f"{folder}/log", "-o", options, "-w", "start")
    try:
        yield f"postgresql+psycopg2://mlflow@/postgres?host={folder}"
    finally:
        call("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")


def test_a_root_may_have_any_name_a_folder_may_have(tmp_path: Path) -> None:
    for name in ("what?", "100%25", "a b#c"):
        run = _grid(tmp_path / name, "tiny", 0.5)
        address = default_uri(tmp_path / name)
        _, experiment = sync(run.path.parent, address)
        assert [_losses(address, each) for each in _runs(address, experiment)] == [[0.5]]
        assert (tmp_path / name / "mlflow.db").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["100%25", "a b#c", "what?"]


def test_the_link_leads_to_the_runs() -> None:
    page = "#/experiments/7/runs?workflowType=machine_learning"
    assert how_to_browse("http://mlflow:5000/", "7") == f"http://mlflow:5000/{page}"
    local = how_to_browse("sqlite:////tmp/mlflow.db", "7")
    assert local == f"mlflow ui --backend-store-uri 'sqlite:////tmp/mlflow.db', then http://127.0.0.1:5000/{page}"
