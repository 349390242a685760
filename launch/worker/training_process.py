"""The process that trains a cell on one node: torchrun, plain Python, or a child forked from the worker's nursery."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from launch.worker.nursery import Nursery
from launch.worker.rendezvous import Word

SHUTDOWN_SECONDS = 600
"""How long torchrun gives its processes to finish a step and save: as long as they wait for each other."""
_ANOTHER_GROUPS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TAIL_BYTES = 64 * 1024


class Process(Protocol):
    """The common interface of Popen and a nursery's child."""

    def poll(self) -> int | None: ...  # noqa: D102
    def send_signal(self, sig: int, /) -> None: ...  # noqa: D102
    def wait(self, timeout: float | None = None) -> int: ...  # noqa: D102


def command(train: Sequence[str], num_processes: int, num_nodes: int, node: int, word: Word) -> list[str]:
    """The training command for one node. `train`: arguments of suite.train; `word`: contains the nodes' endpoint."""
    module = ["-m", "suite.train", *train]
    if num_processes * num_nodes == 1:
        return [sys.executable, *module]
    if num_nodes == 1:
        meeting = ["--standalone"]
    else:
        # Names the host explicitly: torchrun would guess from host names, which nodes may share.
        meeting = ["--nnodes", str(num_nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", str(word.endpoint)]
        meeting += ["--rdzv-id", f"{word.start}-{word.generation}", "--rdzv-conf", f"is_host={int(node == 0)}"]
        meeting += ["--local-addr", socket.gethostname()]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_processes), "--max-restarts", "0"]
    return [sys.executable, *torchrun, *meeting, *module]


def environment(code: Path | None, num_threads: int) -> dict[str, str]:
    """This process's environment without another process group's variables, and with the code first on PYTHONPATH."""
    ours = {name: value for name, value in os.environ.items() if name not in _ANOTHER_GROUPS}
    ours |= {"OMP_NUM_THREADS": str(num_threads), "PYTHONUNBUFFERED": "1"}
    # torchrun options, given as variables because an older torch ignores variables that it does not know.
    ours["PET_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"
    ours["PET_SHUTDOWN_TIMEOUT"] = str(SHUTDOWN_SECONDS)
    if code is not None:
        ours["PYTHONPATH"] = os.pathsep.join([str(code), *filter(None, [ours.get("PYTHONPATH")])])
    return ours


class TrainingProcess:
    """A running training process, whose output is appended to `log`."""

    def __init__(self, process: Process, log: Path, start: int) -> None:
        self._process, self._log, self._start = process, log, start
        self._was_asked = False

    @classmethod
    def of_command(
        cls, command: list[str], environment: dict[str, str], folder: Path | None, log: Path
    ) -> "TrainingProcess":
        """Starts the command."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            start = file.tell()
            process = subprocess.Popen(
                command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )
        return cls(process, log, start)

    @classmethod
    def forked(
        cls, nursery: Nursery, train: Sequence[str], environment: dict[str, str], log: Path
    ) -> "TrainingProcess":
        """Forks a child that has torch and the suite imported; raises OSError if the nursery does not work."""
        log.parent.mkdir(parents=True, exist_ok=True)
        start = log.stat().st_size if log.exists() else 0
        return cls(nursery.spawn(train, environment, log), log, start)

    def exit_code(self) -> int | None:
        """The exit status, minus the signal's number if a signal killed it; None while it runs."""
        return self._process.poll()

    def ask(self, number: int) -> None:
        """Sends it a stop signal. Only the first call has an effect."""
        if not self._was_asked and self._process.poll() is None:
            self._was_asked = True
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    def end(self) -> None:
        """Stops it with SIGTERM, and waits until it has ended."""
        self.ask(signal.SIGTERM)
        self._process.wait()

    def said(self) -> str:
        """The last 64 KiB of its output."""
        with self._log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._start, size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
