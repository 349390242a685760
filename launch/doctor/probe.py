"""Reports what a machine offers to a run, as one line of JSON: `python -m launch.doctor.probe FOLDER DATA_DIR`.

`launch doctor` runs it where jobs run. It needs nothing but Python, so that it can report missing packages.
"""

import argparse
import fcntl
import importlib
import json
import os
import platform
import signal
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

REPORT, SIGNALLED, AGAIN = "report.json", "signalled", "again"
"""Files of a probe that runs as a worker's job."""
NUM_MEGABYTES = 64
HTTP_SECONDS = 5.0
WAIT_SECONDS = 300.0


def probe(folder: Path, data_dir: Path, tracking_uri: str | None) -> dict[str, Any]:
    """The report on this machine.

    Args:
        folder: the doctor's folder in ROOT, with `nonce` and `lock`; the probe writes `answer` to it.
        data_dir: folder of the data sets.
        tracking_uri: the MLflow server to contact; None: no server.
    """
    return {
        "node": os.environ.get("SLURMD_NODENAME") or platform.node(),
        "python": sys.executable,
        "package": trouble_with("suite.train"),
        "num_gpus": _num_gpus(),
        "folder": _trouble_with_folder(folder),
        "nonce": _read(folder / "nonce"),
        "megabytes_per_second": write_speed(folder),
        "lock_is_seen": _is_locked(folder / "lock"),
        "data_dir": data_dir.is_dir(),
        "ffcv": trouble_with("ffcv"),
        # No deeper: a folder of ImageNet's images takes minutes to list.
        "num_betons": len([*data_dir.glob("*.beton"), *data_dir.glob("*/*.beton")]),
        "tracking": trouble_with_server(tracking_uri) if tracking_uri else None,
        "time": time.time(),  # last: the reader compares it with its own clock
    }


def serve(folder: Path, data_dir: Path, tracking_uri: str | None, *, is_again: bool) -> bool:
    """Runs as a worker's job: reports, then waits for SIGUSR2 and records it. Returns whether to restart the job."""
    if is_again:
        (folder / AGAIN).touch()
        return False
    came = threading.Event()
    signal.signal(signal.SIGUSR2, lambda _number, _frame: came.set())
    text = json.dumps(probe(folder, data_dir, tracking_uri))
    (folder / f".{REPORT}").write_text(text, encoding="utf-8")
    (folder / f".{REPORT}").replace(folder / REPORT)
    if not came.wait(WAIT_SECONDS):
        return False
    (folder / SIGNALLED).touch()
    return True


def trouble_with(module: str) -> str | None:
    """Why the module cannot be imported; None if it can."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def trouble_with_server(uri: str) -> str | None:
    """Why the MLflow server at this address does not answer; None if it does."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=HTTP_SECONDS) as answer:  # noqa: S310
            return None if answer.status == 200 else f"HTTP status {answer.status}"  # noqa: PLR2004
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def write_speed(folder: Path) -> float | None:
    """Speed of writing a file and flushing it to disk, in megabytes per second; None if it cannot be written."""
    path, block = folder / "speed", os.urandom(1 << 20)
    try:
        started = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(NUM_MEGABYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return NUM_MEGABYTES / (time.perf_counter() - started)
    except OSError:
        return None
    finally:
        path.unlink(missing_ok=True)


def _trouble_with_folder(folder: Path) -> str | None:
    try:
        (folder / "answer").write_text(_read(folder / "nonce") or "", encoding="utf-8")
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


def _is_locked(path: Path) -> bool | None:
    """Whether another process holds the lock (see suite.run.locks); None without the file."""
    try:
        with path.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _num_gpus() -> int | None:
    """The number of GPUs that torch sees; None if torch cannot be imported."""
    if trouble_with("torch"):
        return None
    import torch

    return torch.cuda.device_count()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--tracking-uri")
    given = parser.parse_args()
    print(json.dumps(probe(given.folder, given.data_dir, given.tracking_uri)), flush=True)


if __name__ == "__main__":
    main()
