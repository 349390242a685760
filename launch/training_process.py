"""The process that trains a cell on one node, torchrun's where it has several: how it is started and asked to stop."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.rendezvous import Word

SHUTDOWN_SECONDS = 600
"""How long torchrun lets its processes finish a step and save: as long as they wait for each other."""
_ANOTHER_GROUPS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def command(train: Sequence[str], num_processes: int, num_nodes: int, node: int, word: Word) -> list[str]:
    """The command of one node. `train` is suite.train's arguments; `word` says where the nodes meet."""
    module = ["-m", "suite.train", *train]
    if num_processes * num_nodes == 1:
        return [sys.executable, *module]
    if num_nodes == 1:
        meeting = ["--standalone"]
    else:
        # Who hosts is said: torchrun would guess by host names, which nodes may share.
        meeting = ["--nnodes", str(num_nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", str(word.endpoint)]
        meeting += ["--rdzv-id", f"{word.start}-{word.generation}", "--rdzv-conf", f"is_host={int(node == 0)}"]
        meeting += ["--local-addr", socket.gethostname()]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_processes), "--max-restarts", "0"]
    return [sys.executable, *torchrun, *meeting, *module]


def environment(code: Path | None, num_threads: int, devices: str | None) -> dict[str, str]:
    """This process's, less another process group's, with the code snapshot first on the path."""
    ours = {name: value for name, value in os.environ.items() if name not in _ANOTHER_GROUPS}
    ours |= {"OMP_NUM_THREADS": str(num_threads), "PYTHONUNBUFFERED": "1"}
    # Options of torchrun's; as variables, which a torch that does not know them yet passes over.
    ours["PET_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"
    ours["PET_SHUTDOWN_TIMEOUT"] = str(SHUTDOWN_SECONDS)
    if code is not None:
        ours["PYTHONPATH"] = os.pathsep.join([str(code), *filter(None, [ours.get("PYTHONPATH")])])
    if devices is not None:
        ours["CUDA_VISIBLE_DEVICES"] = devices
    return ours


def devices_of(visible: str | None, index: int, num_processes: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of the pack's cell `index`: the job's GPUs go round. None: as the job has it."""
    gpus = [gpu for gpu in (visible or "").split(",") if gpu]
    if len(gpus) <= num_processes:
        return visible
    return ",".join(gpus[(index * num_processes + rank) % len(gpus)] for rank in range(num_processes))


class TrainingProcess:
    """A started command that writes to the end of `log`."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path | None, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("ab") as file:
            self._start = file.tell()
            self._process = subprocess.Popen(
                command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )
        self._was_asked = False

    def exit_code(self) -> int | None:
        """None while it runs; minus the signal's number where it died of one."""
        return self._process.poll()

    def ask(self, number: int) -> None:
        """Sends it a signal to stop; once, whatever is asked later."""
        if not self._was_asked and self._process.poll() is None:
            self._was_asked = True
            self._process.send_signal(number)

    def end(self) -> None:
        """Has it stop, and waits until it has."""
        self.ask(signal.SIGTERM)
        self._process.wait()

    def said(self) -> str:
        """What it has written."""
        with self.log.open("rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace")
