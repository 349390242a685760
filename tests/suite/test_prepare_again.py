"""`prepare` resumes after any interruption and produces the same bytes."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import malformed
import misplaced
import numpy as np
import pytest
from rich.console import Console

from suite.data.beton import partial
from suite.data.decoding import Storage
from suite.errors import DataError
from suite.prepare.pipeline import prepare

STORAGE = Storage.of(64, 90, 0.5)
ODD_FILES = malformed.files()


def console() -> Console:
    return Console(quiet=True)


def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "suite.data", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `source`, which has every odd file in one class, and its prepared files in `out`."""
    place = tmp_path_factory.mktemp("odd")
    misplaced.odd_source(place / "source")
    prepare("imagefolder", place / "source", place / "out", STORAGE, 1, console(), leave_out_broken=True)
    return place


def test_what_is_there_already_is_left_alone_and_never_overwritten(tmp_path: Path) -> None:
    source, out = misplaced.good_source(tmp_path / "source"), tmp_path / "out"
    prepare("imagefolder", source, out, STORAGE, 1, console())
    before = (out / "train.beton").stat()
    prepare("imagefolder", source, out, STORAGE, 1, console())
    assert (out / "train.beton").stat() == before
    with pytest.raises(
        DataError, match=r"train.beton: was made with --max-resolution 64 --quality 90 --jpeg-share 0.5, "
    ):
        prepare("imagefolder", source, out, Storage.of(64, 80, 0.5), 1, console())
    (source / "train" / "cat" / "0.jpg").unlink()
    with pytest.raises(
        DataError, match=r"was made from different files than .*; delete it and train.json to remake it"
    ):
        prepare("imagefolder", source, out, STORAGE, 1, console())
    (out / "train.json").unlink()
    with pytest.raises(DataError, match=r"train.json: not there"):
        prepare("imagefolder", source, out, STORAGE, 1, console())


def test_after_a_broken_file_is_mended_what_lies_before_it_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = misplaced.good_source(tmp_path / "source"), tmp_path / "out"
    victim = source / "train" / "dog" / "0.jpg"
    good = victim.read_bytes()
    victim.write_bytes(bytes(len(good)))  # of the same size
    with pytest.raises(DataError, match=r"dog/0.jpg: not an image of a known format\n1 broken files"):
        prepare("imagefolder", source, out, STORAGE, 1, Console())
    victim.write_bytes(good)
    prepare("imagefolder", source, out, STORAGE, 1, Console())
    assert "train: resuming after 2 of 4 images" in capsys.readouterr().out
    prepare("imagefolder", source, tmp_path / "undisturbed", STORAGE, 1, console())
    assert (out / "train.beton").read_bytes() == (tmp_path / "undisturbed" / "train.beton").read_bytes()
    assert not list(out.glob(".*.record")) + list(out.glob(".*.partial"))


def test_a_split_begun_with_other_settings_is_started_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = misplaced.good_source(tmp_path / "source"), tmp_path / "out"
    for split in ("train", "test"):
        (source / split / "dog" / "0.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="2 broken files, listed in"):
        prepare("imagefolder", source, out, STORAGE, 1, Console())
    storage = Storage.of(32, 90, 0.5)
    prepare("imagefolder", source, out, storage, 1, Console(), leave_out_broken=True)
    assert "train: files or settings have changed, starting over" in capsys.readouterr().out
    prepare("imagefolder", source, tmp_path / "undisturbed", storage, 1, console(), leave_out_broken=True)
    assert (out / "train.beton").read_bytes() == (tmp_path / "undisturbed" / "train.beton").read_bytes()


def test_two_at_once_do_not_write_the_same_files(tmp_path: Path) -> None:
    from suite.run.locks import locked

    source, out = misplaced.good_source(tmp_path / "source"), tmp_path / "out"
    with locked(out / ".prepare.lock"), pytest.raises(DataError, match="another process prepares files there"):
        prepare("imagefolder", source, out, STORAGE, 1, console())


SLOWLY = """
import sys, time
from suite.prepare import resume
from suite.prepare import workers
from suite.data import decoding
resume.COMMIT_SECONDS = 0.0
store = decoding.store
def slow(task, storage):
    time.sleep(0.004)
    return store(task, storage)
workers.store = slow
from suite.data.__main__ import app
app(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment_and_started_again_it_ends_with_the_same_bytes(odd: Path, workers: int) -> None:
    out, rng = odd / f"killed{workers}", np.random.default_rng(workers)
    arguments = ["prepare", "imagefolder", "--source", str(odd / "source"), "--out", str(out), "--max-resolution", "64"]
    command = [sys.executable, "-c", SLOWLY, *arguments, "--leave-out-broken", "--workers", str(workers)]
    num_kills = 0
    while num_kills < 8:
        start, growth = recorded(out), int(rng.integers(1, 4000))
        process = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and recorded(out) - start < growth:
            time.sleep(0.002)
        time.sleep(0.02 * rng.random())
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        num_kills += 1
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert num_kills > 1
    for name in ("train.beton", "train.json", "test.beton", "test.json"):
        assert (out / name).read_bytes() == (odd / "out" / name).read_bytes()


def recorded(out: Path) -> int:
    """Size in bytes of the current split's record."""
    with suppress(FileNotFoundError):
        return sum(path.stat().st_size for path in out.glob(".*.record"))
    return 0


def test_a_record_torn_anywhere_is_gone_on_from(odd: Path, tmp_path: Path) -> None:
    source = odd / "source"
    with pytest.raises(DataError, match="broken files"):
        prepare("imagefolder", source, tmp_path, STORAGE, 1, console())
    record, unfinished = tmp_path / ".train.beton.record", partial(tmp_path / "train.beton")
    lines, stored = record.read_bytes(), unfinished.read_bytes()
    rng = np.random.default_rng(0)
    for ending in (b"", b"\0" * 100, b"[1]\n", b"17\n", b'["cat/x", 1'):
        record.write_bytes(lines[: int(rng.integers(len(lines)))] + ending)
        unfinished.write_bytes(stored[: int(rng.integers(len(stored) // 2, len(stored)))])
        (tmp_path / "train.beton").unlink(missing_ok=True)
        prepare("imagefolder", source, tmp_path, STORAGE, 1, console(), leave_out_broken=True)
        assert (tmp_path / "train.beton").read_bytes() == (odd / "out" / "train.beton").read_bytes()


def test_a_worker_that_is_killed_costs_one_line_and_nothing_else(tmp_path: Path) -> None:
    source = misplaced.good_source(tmp_path / "source")
    fatal = (
        "import os, sys\nfrom suite.prepare import workers\n"
        "def die(tasks, storage): os.kill(os.getpid(), 9)\n"
        "workers.store_all = die\n"
        "from suite.data.__main__ import app\nfrom suite.errors import UserError\n"
        "try:\n    app(sys.argv[1:])\nexcept UserError as error:\n    sys.exit(str(error))\n"
    )
    file = tmp_path / "fatal.py"
    file.write_text(f"if True:\n    {fatal.replace(chr(10), chr(10) + '    ')}\n")
    command = [
        sys.executable,
        str(file),
        "prepare",
        "imagefolder",
        "--source",
        str(source),
        "--out",
        str(tmp_path / "out"),
    ]
    result = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 1
    assert result.stderr.startswith("a worker process was killed"), result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_full_disk_costs_one_line_and_what_is_recorded_stays(tmp_path: Path) -> None:
    source, out = misplaced.good_source(tmp_path / "source"), tmp_path / "out"
    limited = (
        "import resource, sys\nfrom suite.data.__main__ import app\nfrom suite.errors import UserError\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({(8 << 20) + 9000}, {(8 << 20) + 9000}))\n"
        "try:\n    app(sys.argv[1:])\nexcept UserError as error:\n    sys.exit(str(error))\n"
    )
    arguments = ["prepare", "imagefolder", "--source", str(source), "--out", str(out), "--jpeg-share", "0"]
    result = subprocess.run(
        [sys.executable, "-c", limited, *arguments, "--workers", "1"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "File too large; fix this and run the same command again to resume" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert run(*arguments).returncode == 0


def test_orphaned_workers_end(odd: Path, tmp_path: Path) -> None:
    arguments = ["prepare", "imagefolder", "--source", str(odd / "source"), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-c", "import suite.data.__main__ as m; m.app()", *arguments, "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 20
    while len(in_session(process.pid)) < 5 and process.poll() is None:  # itself, a server, a tracker, two workers
        time.sleep(0.01)
    num_at_work = len(in_session(process.pid))
    process.kill()
    process.wait()
    while in_session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert num_at_work >= 5
    assert not in_session(process.pid)


def in_session(session: int) -> list[int]:
    """Ids of the processes of a command, including itself while it is alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError):
            if os.getsid(int(path.name)) == session:
                found.append(int(path.name))
    return found
