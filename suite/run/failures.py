"""Why a run of several processes ended, told in state.json whichever of them failed.

    RUN/processes/heartbeat-0001.json     where process 1 is: rewritten after each step
    RUN/processes/fault-0001.json         its last words
    RUN/processes/stop.json               the signal by which the run's job was asked to stop

A process that fails drags the others along: their exchanges break or time out. So each one that ends with an exception
leaves its last words, and the lowest of those that did writes the verdict over all of them.
"""

import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from suite.recipe.cell import Cell
from suite.run.atomic import write_json
from suite.run.directory import Cause, RunDir

if TYPE_CHECKING:  # torch comes with it, and signals are to be heard at once
    from suite.engines.process_group import Layout

GRACE_SECONDS = 5.0
"""How long a process that lost another waits for the others' last words."""
_BEAT_BYTES = 512
_STOP = "stop.json"
_GLOO = ("gloo", "closed by peer", "reset by peer", "broken pipe", "application timeout")

Kind = Literal["own", "lost", "timeout"]


class DivergedError(Exception):
    """The loss is NaN or infinite."""


class PreemptedError(BaseException):
    """The process was asked to stop; the message is by what. No `except Exception` of a library's swallows it."""


@dataclass(frozen=True)
class Fault:
    """Last words of a process. Its fault is its own, or an exchange with others broke (lost) or hung (timeout)."""

    rank: int
    time: float
    kind: Kind
    cause: Cause
    reason: str

    @classmethod
    def of(cls, error: Exception, rank: int, hint: str) -> "Fault":
        """`hint` is appended where memory ran out."""
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
    """Where a process was at `time` (unix seconds): `step` is the last one it finished, over all epochs."""

    rank: int
    host: str
    pid: int
    step: int | None
    time: float


class Heartbeat:
    """A process's sign of life. A small write to a file held open: microseconds, and no flush to the disk."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rank = rank
        self._file = os.open(folder / f"heartbeat-{rank:04d}.json", os.O_WRONLY | os.O_CREAT, 0o644)

    def beat(self, step: int | None) -> None:
        """The process is alive and has finished `step`."""
        beat = Beat(self.rank, platform.node(), os.getpid(), step, time.time())
        os.pwrite(self._file, json.dumps(asdict(beat)).encode().ljust(_BEAT_BYTES - 1) + b"\n", 0)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def clear(folder: Path) -> None:
    """Forgets what an earlier attempt left. Before the processes of this one are joined."""
    for path in folder.glob("*.json"):
        path.unlink()


def note_stop(folder: Path, signal_name: str) -> None:
    """Notes that the attempt was asked to stop, for when all its processes are killed before they can say so."""
    write_json(folder / _STOP, {"signal": signal_name})


def noted_stop(folder: Path) -> str:
    """Name of the signal by which the attempt was asked to stop; empty where it was not."""
    return next((str(value["signal"]) for value in _read(folder.glob(_STOP))), "")


def beats(folder: Path) -> dict[int, Beat]:
    """The processes' heartbeats, by rank."""
    return {value["rank"]: Beat(**value) for value in _read(folder.glob("heartbeat-*.json"))}


def faults(folder: Path) -> list[Fault]:
    """The processes' last words, by rank."""
    return [Fault(**value) for value in _read(sorted(folder.glob("fault-*.json")))]


def kind_of(error: Exception) -> Kind:
    """Whether the fault is one's own or an exchange broke: by type where torch has one, else by gloo's words."""
    from torch import distributed

    text = str(error).lower()
    is_gloos = isinstance(error, RuntimeError) and any(words in text for words in _GLOO)
    if not isinstance(error, distributed.DistError) and not is_gloos:
        return "own"
    return "timeout" if "timed out" in text or "timeout" in text else "lost"


@contextmanager
def told(run: RunDir, cell: Cell, layout: "Layout") -> Iterator[Heartbeat]:
    """Inside, an exception but PreemptedError ends in state.json, as this process's fault or as another's."""
    heartbeat = Heartbeat(run.processes, layout.rank)
    heartbeat.beat(None)
    try:
        yield heartbeat
    except PreemptedError:
        raise
    except Exception as error:
        with suppress(OSError):  # the disk may be what is at fault; the run's log has the traceback
            _tell(run, layout, Fault.of(error, layout.rank, _hint(cell, layout)))
        raise
    finally:
        heartbeat.close()


def _tell(run: RunDir, layout: "Layout", fault: Fault) -> None:
    write_json(run.processes / f"fault-{fault.rank:04d}.json", asdict(fault))
    if fault.kind != "own":
        time.sleep(GRACE_SECONDS)
    spoken = faults(run.processes)
    # The first verdict stands: who wakes up from a hang finds the others gone, and would blame them.
    if fault.rank == spoken[0].rank and run.state().state == "running":
        run.update(**verdict(spoken, beats(run.processes), layout.world_size, time.time()))


def verdict(spoken: list[Fault], alive: Mapping[int, Beat], world_size: int, now: float) -> dict[str, Any]:
    """The changes to the run's state that the processes' last words amount to.

    The first fault that a process has of its own is the run's. Where there is none, those that said nothing are at
    fault: they hang, if somebody waited for them in vain, or died, which counts as their node's failure; a run that
    lost a process may be taken up again.
    """
    own = [fault for fault in spoken if fault.kind == "own"]
    if own:
        first = min(own, key=lambda fault: fault.time)
        where = f" (process {first.rank})" if world_size > 1 and first.cause != "nan" else ""
        return {"state": "failed", "cause": first.cause, "reason": f"{first.reason}{where}"}
    silent = sorted(set(range(world_size)) - {fault.rank for fault in spoken})
    seen = "; ".join(_last_seen(rank, alive, now) for rank in silent)
    if any(fault.kind == "timeout" for fault in spoken):
        reason = f"hung: {seen}" if seen else "the processes wait for each other"
        return {"state": "failed", "cause": "timeout", "reason": reason}
    reason = f"died without a word (killed, or out of memory?): {seen}" if seen else spoken[0].reason
    return {"state": "preempted", "cause": "node", "reason": reason}


def _last_seen(rank: int, alive: Mapping[int, Beat], now: float) -> str:
    if rank not in alive:
        return f"process {rank}, before it began"
    beat = alive[rank]
    where = "before its first step" if beat.step is None else f"after step {beat.step}"
    return f"process {rank} (pid {beat.pid} on {beat.host}), last seen {where}, {now - beat.time:.0f} s ago"


def _hint(cell: Cell, layout: "Layout") -> str:
    share = cell.training.batch_size // layout.world_size
    present = min(cell.execution.micro_batch_size or share, share)
    if present == 1:
        return ""
    size = max(part for part in range(1, present // 2 + 1) if share % part == 0)
    return f"; a step of {share} images took {present} at a time: try --set execution.micro_batch_size={size}"


def _read(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        with suppress(ValueError):  # torn: its writer was killed
            yield json.loads(path.read_text(encoding="utf-8"))
