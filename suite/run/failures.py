"""Determines why an attempt of several processes ended, and writes it to end.json, whichever process failed.

    heartbeat-0001.json     progress of process 1: rewritten at most once a second and at least every ten seconds
    fault-0001.json         the exception that ended process 1
    stop.json               the signal that asked the attempt's job to stop

All are in the attempt's folder. When a process fails, the others fail, too: their collectives break or time out. So
each process that ends with an exception writes a fault file, and the lowest rank among them writes the verdict.
"""

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from suite.recipe.cell import Cell
from suite.recipe.settings import Execution
from suite.run.atomic import write_json
from suite.run.attempt import Attempt, SupersededError
from suite.run.directory import Cause
from suite.run.processes import Process

if TYPE_CHECKING:  # imports torch, which would delay the handling of signals
    from suite.engines.process_group import Layout

GRACE_SECONDS = 5.0
"""How long a process that lost another one waits for the other fault files."""
BEAT_SECONDS, QUIET_SECONDS = 1.0, 10.0
"""Minimum and maximum time between two heartbeats."""
PATIENCE_SECONDS = 15.0
"""How long a process has to stop by itself, without saving, after another has failed, before it is ended."""
EXIT_LOST = 1
_BEAT_BYTES = 1024
_STOP = "stop.json"
_GLOO = ("gloo", "closed by peer", "reset by peer", "broken pipe", "application timeout")

Kind = Literal["own", "lost", "timeout"]


class DivergedError(Exception):
    """The loss is NaN or infinite."""


class PreemptedError(BaseException):
    """The process was asked to stop; the message names the signal. A library's `except Exception` cannot catch it."""


@dataclass(frozen=True)
class Fault:
    """The exception that ended a process: its own, or a collective that broke (lost) or hung (timeout)."""

    rank: int
    time: float
    kind: Kind
    cause: Cause
    reason: str

    @classmethod
    def of(cls, error: Exception, rank: int, hint: str) -> "Fault":
        """The fault of an exception; `hint` is appended to the reason if memory ran out."""
        import torch

        cause: Cause = "error"
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, DivergedError):
            cause = "nan"
        elif isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in reason:
            cause, reason = "oom", f"{reason}{hint}"
        return cls(rank, time.time(), kind_of(error), cause, reason)


@dataclass(frozen=True)
class Beat:
    """A process's progress at `time` (unix seconds); `step` is the last finished one, counted over all epochs."""

    rank: int
    process: Process
    step: int | None
    epoch: int
    num_epochs: int
    time: float


class Heartbeat:
    """A process's heartbeat, written by a separate thread, so that it continues during a long step.

    Training continues if the file cannot be written.
    """

    def __init__(self, folder: Path, rank: int, num_epochs: int) -> None:
        self.rank = rank
        self._num_epochs = num_epochs
        self._where: tuple[int | None, int] = (None, 0)
        self._written: tuple[int | None, int] = self._where
        self._process = Process.this()
        self._file = os.open(folder / f"heartbeat-{rank:04d}.json", os.O_WRONLY | os.O_CREAT, 0o644)
        self._closed = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._keep_writing, name="heartbeat", daemon=True)
        self._thread.start()

    def beat(self, step: int, epoch: int) -> None:
        """Reports that the process has finished step `step`, counted over all epochs, and `epoch` epochs."""
        self._where = step, epoch

    def close(self) -> None:
        """Writes the final progress and closes the file."""
        self._closed.set()
        self._thread.join()
        self._write()
        os.close(self._file)

    def _keep_writing(self) -> None:
        quiet = 0.0
        while not self._closed.wait(BEAT_SECONDS):
            quiet += BEAT_SECONDS
            if self._where != self._written or quiet >= QUIET_SECONDS:
                self._write()
                quiet = 0.0

    def _write(self) -> None:
        self._written = self._where
        beat = Beat(self.rank, self._process, *self._written, self._num_epochs, time.time())
        with suppress(OSError):
            os.pwrite(self._file, json.dumps(asdict(beat)).encode().ljust(_BEAT_BYTES - 1) + b"\n", 0)


def note_stop(folder: Path, signal_name: str) -> None:
    """Records that the attempt was asked to stop, in case its processes are killed before they can record it."""
    write_json(folder / _STOP, {"signal": signal_name})


def noted_stop(folder: Path) -> str:
    """Name of the signal that asked the attempt to stop; empty if there was none."""
    return next((str(value["signal"]) for value in _read(folder.glob(_STOP))), "")


def beats(folder: Path) -> dict[int, Beat]:
    """The processes' heartbeats, by rank."""
    return {
        value["rank"]: Beat(**{**value, "process": Process(**value["process"])})
        for value in _read(folder.glob("heartbeat-*.json"))
    }


def faults(folder: Path) -> list[Fault]:
    """The processes' faults, by rank."""
    return [Fault(**value) for value in _read(sorted(folder.glob("fault-*.json")))]


def kind_of(error: Exception) -> Kind:
    """Whether the fault is the process's own or a collective broke: by torch's type if any, else by gloo's message."""
    from torch import distributed

    text = str(error).lower()
    is_gloos = isinstance(error, RuntimeError) and any(words in text for words in _GLOO)
    if not isinstance(error, distributed.DistError) and not is_gloos:
        return "own"
    return "timeout" if "timed out" in text or "timeout" in text else "lost"


@contextmanager
def told(attempt: Attempt, cell: Cell, execution: Execution, layout: "Layout") -> Iterator[Heartbeat]:
    """Records any exception that ends the block in the attempt's end.json: a stop, or a fault and its process."""
    heartbeat = Heartbeat(attempt.path, layout.rank, cell.training.epochs)
    watch = Watch(attempt, layout)
    try:
        yield heartbeat
    except (PreemptedError, KeyboardInterrupt) as stop:
        if layout.is_main and attempt.end() is None:  # not if torchrun stopped this because another failed
            with suppress(OSError, SupersededError):
                attempt.finish(state="preempted", cause=None, reason=f"stopped by {stop or 'Ctrl-C'}")
        raise
    except SupersededError:
        raise
    except Exception as error:
        with suppress(OSError, SupersededError):  # the disk may be the cause; the log has the traceback
            _tell(attempt, layout, Fault.of(error, layout.rank, _hint(cell, execution, layout)))
        raise
    finally:
        watch.close()
        heartbeat.close()


class Watch:
    """Ends this process if it waits in a collective for a failed one, and so cannot handle signals.

    A thread watches the other processes' fault files and, on this machine, whether they are alive. If this process has
    not left the block PATIENCE_SECONDS after a failure, the thread writes a fault for it and ends it.
    """

    def __init__(self, attempt: Attempt, layout: "Layout") -> None:
        self._attempt, self._layout = attempt, layout
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        if layout.world_size > 1:
            self._thread.start()

    def close(self) -> None:
        """Stops watching: the process has finished or is exiting."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        since: float | None = None
        while not self._closed.wait(BEAT_SECONDS):
            lost = self._lost()
            since = None if lost is None else since or time.monotonic()
            if lost is not None and since is not None and time.monotonic() - since >= PATIENCE_SECONDS:
                reason = f"waited for process {lost}, which had failed"
                with suppress(OSError, SupersededError):
                    _tell(self._attempt, self._layout, Fault(self._layout.rank, time.time(), "lost", "node", reason))
                os._exit(EXIT_LOST)

    def _lost(self) -> int | None:
        """The rank of a process that has failed."""
        with suppress(OSError):  # if the file system is unreachable, it is for the others, too
            for fault in faults(self._attempt.path):
                if fault.rank != self._layout.rank and fault.kind == "own":
                    return fault.rank
            for rank, beat in beats(self._attempt.path).items():
                if rank != self._layout.rank and beat.process.is_alive() is False and not self._is_over():
                    return rank
        return None

    def _is_over(self) -> bool:
        """Whether the run has its result, after which processes end one by one."""
        return (self._attempt.path.parents[1] / "result.json").exists()


def _tell(attempt: Attempt, layout: "Layout", fault: Fault) -> None:
    write_json(attempt.path / f"fault-{fault.rank:04d}.json", asdict(fault))
    if fault.kind != "own":
        time.sleep(GRACE_SECONDS)
    spoken = faults(attempt.path)
    # Keep the first verdict: a process that recovers from a hang finds the others gone and would blame them.
    if fault.rank == spoken[0].rank and attempt.end() is None:
        attempt.finish(**verdict(spoken, beats(attempt.path), layout.world_size, time.time()))


def verdict(spoken: list[Fault], alive: Mapping[int, Beat], world_size: int, now: float) -> dict[str, Any]:
    """The attempt's end.json, derived from the faults that its processes wrote.

    The earliest fault of kind "own" is the run's. If there is none, the processes that wrote no fault caused the end.
    They hang, if another process timed out waiting for them, or have died, which counts as a failure of their node:
    a run that lost a process may be restarted.
    """
    own = [fault for fault in spoken if fault.kind == "own"]
    if own:
        first = min(own, key=lambda fault: fault.time)
        where = f" (process {first.rank})" if world_size > 1 and first.cause != "nan" else ""
        return {"state": "failed", "cause": first.cause, "reason": f"{first.reason}{where}"}
    silent = sorted(set(range(world_size)) - {fault.rank for fault in spoken})
    seen = "; ".join(_last_seen(rank, alive, now) for rank in silent)
    if any(fault.kind == "timeout" for fault in spoken):
        reason = f"hung: {seen}" if seen else "the processes are waiting for each other"
        return {"state": "failed", "cause": "timeout", "reason": reason}
    reason = f"died without an error (killed, or out of memory?): {seen}" if seen else spoken[0].reason
    return {"state": "preempted", "cause": "node", "reason": reason}


def _last_seen(rank: int, alive: Mapping[int, Beat], now: float) -> str:
    if rank not in alive:
        return f"process {rank}, before it began"
    beat = alive[rank]
    where = "before its first step" if beat.step is None else f"after step {beat.step}"
    who = f"process {rank} (pid {beat.process.pid} on {beat.process.host})"
    return f"{who}, last seen {where}, {now - beat.time:.0f} s ago"


def _hint(cell: Cell, execution: Execution, layout: "Layout") -> str:
    share = cell.training.batch_size // layout.world_size
    present = min(execution.micro_batch_size or share, share)
    if present == 1:
        return ""
    size = max(part for part in range(1, present // 2 + 1) if share % part == 0)
    retry = f"python -m launch retry --oom --set execution.micro_batch_size={size}"
    return f"; a step of {share} images took {present} at a time: {retry}"


def _read(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        with suppress(ValueError):  # torn: its writer was killed
            yield json.loads(path.read_text(encoding="utf-8"))
