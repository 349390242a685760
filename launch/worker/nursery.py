"""Warm starts: a process that has imported everything training needs, and forks a child for each single-process cell.

    nursery = Nursery(environment, code)
    child = nursery.spawn([str(run.cell_path), "--attempt", "1"], {"CUDA_VISIBLE_DEVICES": "0"}, log)
    child.wait()

A child behaves like `python -m suite.train ARGUMENTS`, bit for bit and down to its exit status, but skips the seconds
of imports. The worker cannot fork it itself: it has threads, which a fork would lose while their locks stay held.
Worker and nursery exchange JSON lines over the nursery's standard input and output.

The nursery ignores the signals that a scheduler or Ctrl-C sends to the whole process group, and exits with the worker.
However it ends, its children get SIGTERM: they save and exit.
"""

import atexit
import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Condition, Thread
from typing import Any, NoReturn

from suite import train
from suite.run.processes import Process

IGNORED_SIGNALS = (signal.SIGINT, *train.STOP_SIGNALS)
POLL_SECONDS = 0.1
"""How often `wait` checks whether a child still exists once its nursery is gone."""
_SETTLE_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


class Child:
    """A process that trains a cell; usable in place of a subprocess.Popen."""

    def __init__(self, nursery: "Nursery", number: int, process: Process) -> None:
        self.pid = process.pid
        self._nursery, self._number, self._process = nursery, number, process

    def poll(self) -> int | None:
        """Its exit status, minus the signal's number if a signal killed it; None while it runs.

        -SIGTERM if the nursery ended before the child: the child got that signal, and its exit status is unknown.
        """
        is_gone = bool(self._nursery.fault)  # read first: it is set after all statuses
        status = self._nursery.statuses.get(self._number)
        if status is None and is_gone and not self._process.is_alive():
            return -signal.SIGTERM
        return status

    def send_signal(self, number: int) -> None:
        """Sends it the signal, unless it has ended."""
        if not self._nursery.fault:  # the nursery's process knows whether the process id is still the child's
            self._nursery.send(number=self._number, signal=number)
        elif self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        """Waits until it has ended; returns its exit status.

        Raises:
            subprocess.TimeoutExpired: it has not ended within `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired(train.__name__, timeout or 0.0)
            self._nursery.wait_for_news(self._number, left)
        return status


class Nursery:
    """The worker's handle to its nursery process, which starts with the first child. Thread-safe.

    `statuses` holds the exit statuses of ended children, by number; `fault` says why the nursery is unusable, and is
    empty while it is usable.

    Args:
        environment: of the nursery and its children: OMP_NUM_THREADS is read when torch is loaded, not later.
        folder: the working directory; None: this process's.
    """

    def __init__(self, environment: Mapping[str, str], folder: Path | None) -> None:
        self.statuses: dict[int, int] = {}
        self.fault = ""
        self._environment, self._folder = dict(environment), folder
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: Thread | None = None
        self._started: dict[int, Process | str] = {}  # str: why it was not started
        self._num_asked = 0
        self._news = Condition()

    def spawn(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Child:
        """Starts training in a child. The first call waits until the nursery has started.

        Args:
            arguments: suite.train's.
            environment: variables in addition to the nursery's, such as CUDA_VISIBLE_DEVICES.
            log: file that the child's output is appended to.

        Raises:
            OSError: the nursery cannot start or is gone, or the child cannot be started; the message is one line.
        """
        with self._news:
            if self._process is None and not self.fault:
                self._start()
            self._num_asked = number = self._num_asked + 1
            self.send(number=number, arguments=list(arguments), environment=dict(environment), log=str(log.absolute()))
            self._news.wait_for(lambda: number in self._started or self.fault)
            process = self._started.pop(number, self.fault)
        if isinstance(process, str):
            raise OSError(process)
        return Child(self, number, process)

    def send(self, **message: object) -> None:
        """Sends the nursery's process a message, unless it is gone."""
        with self._news:
            pipe = None if self._process is None else self._process.stdin
            if pipe is not None and not pipe.closed:
                with suppress(BrokenPipeError):  # the reader will set `fault`
                    pipe.write(f"{json.dumps(message)}\n".encode())
                    pipe.flush()

    def wait_for_news(self, number: int, timeout: float | None) -> None:
        """Waits until the child has ended, but no longer than POLL_SECONDS once the nursery's process is gone."""
        with self._news:
            if self.fault:
                timeout = POLL_SECONDS if timeout is None else min(timeout, POLL_SECONDS)
                self._news.wait(timeout)
            else:
                self._news.wait_for(lambda: number in self.statuses or self.fault, timeout)

    def close(self) -> None:
        """Ends the nursery's process; children that still run get SIGTERM."""
        with self._news:
            if self._process is None or self._process.stdin is None or self._reader is None:
                self.fault = "the nursery is closed"
                return
            with suppress(BrokenPipeError):  # data that a dead process did not read
                self._process.stdin.close()
        self._reader.join()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env=self._environment,
            cwd=self._folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._reader = Thread(target=self._read, args=(self._process,), name="nursery", daemon=True)
        self._reader.start()

    def _read(self, process: "subprocess.Popen[bytes]") -> None:
        for line in process.stdout or ():
            self._hear(**json.loads(line))
        status = process.wait()
        with self._news:
            self.fault = f"the nursery ended with status {status}; if it failed, its standard error says why"
            self._news.notify_all()
            if process.stdout is not None:
                process.stdout.close()

    def _hear(self, number: int, process: dict[str, Any] | None = None, fault: str = "", status: int = 0) -> None:
        with self._news:
            if process is not None:
                self._started[number] = Process(**process)
            elif fault:
                self._started[number] = fault
            else:
                self.statuses[number] = status
            self._news.notify_all()


class _Server:
    """The nursery's process: one thread, which waits for messages from the worker and for children to end."""

    def __init__(self, inherited: Mapping[int, Any]) -> None:
        self._inherited = inherited
        # Output of imports must not be mistaken for an answer, and a child must not read the worker's messages.
        self._requests, self._answers = os.dup(0), os.dup(1)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        os.dup2(2, 1)
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._numbers: dict[int, int] = {}  # of children, by process id

    def serve(self) -> None:
        """Serves the worker until it has closed its end."""
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        unread = b""
        while True:
            ready, _, _ = select.select([self._requests, self._woken], [], [])
            if self._woken in ready:
                os.read(self._woken, 4096)
                self._reap()
            if self._requests in ready:
                new = os.read(self._requests, 65536)
                if not new:
                    return
                *lines, unread = (unread + new).split(b"\n")
                for line in lines:
                    self._obey(json.loads(line))

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                self._answer(number=self._numbers.pop(ended[0]), status=os.waitstatus_to_exitcode(ended[1]))

    def _obey(self, message: dict[str, Any]) -> None:
        if "signal" in message:
            for pid, number in self._numbers.items():  # only unreaped children, whose process ids cannot be reused
                if number == message["number"]:
                    os.kill(pid, message["signal"])
            return
        try:
            pid = self._fork(message["arguments"], message["environment"], message["log"])
        except OSError as error:
            self._answer(number=message["number"], fault=str(error))
        else:
            self._numbers[pid] = message["number"]
            self._answer(number=message["number"], process=asdict(Process.of(pid)))

    def _answer(self, **message: object) -> None:
        with suppress(BrokenPipeError):  # `serve` returns at the end of the requests
            os.write(self._answers, f"{json.dumps(message)}\n".encode())

    def _fork(self, arguments: list[str], environment: dict[str, str], log: str) -> int:
        nursery = os.getpid()
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        # Otherwise the child would ignore a signal that arrives before it has set its handlers.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._train(nursery, arguments, environment, output, mask)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(output)
        return pid

    def _train(
        self, nursery: int, arguments: list[str], environment: dict[str, str], output: int, mask: Collection[int]
    ) -> NoReturn:
        """Runs training in the child, then exits."""
        try:
            for standard in (1, 2):
                os.dup2(output, standard)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number, handler in self._inherited.items():
                signal.signal(number, handler)
            for descriptor in (self._requests, self._answers, self._woken, self._wake, output):
                os.close(descriptor)
            _get_sigterm_with(nursery)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.environ.update(environment)
            sys.modules["__main__"] = train  # its name appears in messages, and data workers import it
            status = train.run(arguments)
            atexit._run_exitfuncs()  # noqa: SLF001  (multiprocessing removes its temporary folders)
            train.leave_at_once(status)
        except BaseException:  # noqa: BLE001  (nothing may get back to the nursery's own code)
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(train.EXIT_FAILED)


def _get_sigterm_with(parent: int) -> None:
    """Has the kernel send this process SIGTERM when its parent ends."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:
        signal.raise_signal(signal.SIGTERM)


def _require_forkable() -> None:
    """Raises RuntimeError if imports started threads, which children would lose, or CUDA, which they could not use.

    OpenBLAS, which comes with NumPy, stops its threads before a fork and restarts them when they are needed.
    """
    import torch

    pid = os.fork()
    if pid == 0:
        os._exit(torch.cuda._is_in_bad_fork())  # noqa: SLF001  (is_initialized() misses is_available()'s start)
    if os.waitpid(pid, 0)[1] != 0:
        raise RuntimeError("imports have started CUDA, which a forked process then cannot use")
    tasks = Path("/proc/self/task")
    deadline = time.monotonic() + _SETTLE_SECONDS
    while len(list(tasks.iterdir())) > 1:  # a joined thread stays listed for a moment
        if time.monotonic() > deadline:
            names = [(task / "comm").read_text(encoding="utf-8").strip() for task in tasks.iterdir()]
            raise RuntimeError(f"imports have started threads, which a fork would lose: {', '.join(names)}")
        time.sleep(0.001)


def main() -> None:
    """Runs the nursery's process."""
    server = _Server({number: signal.signal(number, signal.SIG_IGN) for number in IGNORED_SIGNALS})
    gc.disable()
    train.preload()
    _require_forkable()
    gc.collect()
    gc.freeze()  # a collection in a child would copy the pages that it shares with the others
    server.serve()
    train.leave_at_once(0)


if __name__ == "__main__":
    main()
