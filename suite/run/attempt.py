"""Attempts at a run: RUN/attempts/0001/ etc. Creating the folder claims the run; its number fences off older attempts.

    attempt.yaml         its creator and how it runs: token, process, job, execution, data checksum
    provenance.json      code, versions, device: needed to interpret the numbers
    heartbeat-0000.json  progress of its process 0; fault-0000.json: the error that ended it (see failures)
    log.txt              training's output; log-node1.txt: on the second node
    end.json             how and why it ended

If two processes both find no live attempt at the same run, both try to create the next folder, and the file system
lets only one succeed. A process that was paused while another took over checks for a higher number before it next
writes, and stops. This needs no locks, on any file system.
"""

import os
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from suite.run.atomic import DamagedFileError, as_json, read_json, write_bytes, write_json, write_once
from suite.run.processes import Process

if TYPE_CHECKING:
    from suite.run.failures import Beat

LEASE_SECONDS = 120.0
"""Maximum age of the last heartbeat of an attempt on another machine; after that, a new attempt may begin."""


class BusyError(Exception):
    """Another live attempt has claimed the run."""


class SupersededError(Exception):
    """A later attempt has taken over the run; this one must not write anymore."""


class Attempt:
    """One attempt at a run, by this process or another: its folder."""

    def __init__(self, folder: Path, number: int) -> None:
        self.number = number
        self.path = folder / f"{number:04d}"
        self.provenance_path, self._end_path = self.path / "provenance.json", self.path / "end.json"
        self._facts_path = self.path / "attempt.yaml"
        self._read: tuple[tuple[int, int, int], dict[str, Any]] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """Content of attempt.yaml; empty until it is written. Parsed again only if the file has been replaced.

        Raises:
            DamagedFileError: the file has other content.
        """
        try:
            status = self._facts_path.stat()
            version = (status.st_ino, status.st_mtime_ns, status.st_size)
            if self._read is None or self._read[0] != version:
                facts = yaml.load(self._facts_path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
                if not isinstance(facts, dict):
                    raise DamagedFileError(self._facts_path, f"a {type(facts).__name__}")
                self._read = (version, facts)
        except FileNotFoundError:
            return {}
        except yaml.YAMLError as error:
            raise DamagedFileError(self._facts_path, str(error).splitlines()[0]) from error
        return dict(self._read[1])

    @cached_property
    def token(self) -> str:
        """Random name, unique among all attempts of all runs."""
        return str(self.facts["token"])

    @property
    def job_id(self) -> str:
        """Id of the job that the attempt is part of; empty if there is none."""
        return str(self.facts.get("job_id", ""))

    def note(self, **facts: Any) -> None:  # noqa: ANN401  (anything YAML holds)
        """Adds facts to attempt.yaml."""
        text = yaml.dump({**self.facts, **facts}, Dumper=yaml.CSafeDumper, sort_keys=False)
        write_bytes(self._facts_path, text.encode())

    def touch(self) -> None:
        """Updates the time of the last sign of life, for other machines."""
        with suppress(OSError):
            os.utime(self._facts_path)

    def last_seen(self) -> float:
        """Unix time of the attempt's last sign of life, by the file server's clock."""
        files = [self.path, self._facts_path, *self.path.glob("heartbeat-*.json")]
        return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)

    def provenance(self) -> dict[str, Any]:
        """Provenance of the attempt's numbers; empty before training began."""
        return read_json(self.provenance_path)

    def log(self, node: int = 0) -> Path:
        """The file with training's output on this node of the job."""
        return self.path / (f"log-node{node}.txt" if node else "log.txt")

    def beat(self) -> "Beat | None":
        """Last heartbeat of process 0; None before it began."""
        from suite.run.failures import beats

        return beats(self.path).get(0)

    def device_hours(self) -> float | None:
        """Device-hours: processes times hours from claim to end or last heartbeat; None if unknown."""
        num_processes, end = self.provenance().get("num_processes"), self.end() or {}
        made, last = end.get("made", None) or self.facts.get("made"), end.get("time")
        if last is None:
            beat = self.beat()
            last = None if beat is None else beat.time
        if not num_processes or made is None or last is None:
            return None
        return float(num_processes * max(0.0, last - made) / 3600)

    def end(self) -> dict[str, Any] | None:
        """How the attempt ended: state, cause, reason, failures, failed_at, time; None until recorded."""
        return read_json(self._end_path) or None

    def is_judged(self) -> bool:
        """Whether the recorded end is final; a failure becomes final when the worker has decided whether to retry."""
        end = self.end()
        if end is None:
            return False
        if end["state"] != "failed" or "failures" in end or not self.facts.get("is_jobs", False):
            return True
        return not self._has_process()

    def finish(self, **changes: Any) -> None:  # noqa: ANN401  (fields of directory.State)
        """Records or corrects how the attempt ended; SupersededError if a later attempt has begun."""
        self.require_newest()
        self.write_end(**changes)

    def write_end(self, **changes: Any) -> None:  # noqa: ANN401  (anything JSON holds)
        """Like `finish`, for a folder made by `enrol`, which may run concurrently with later ones."""
        facts = {name: self.facts[name] for name in ("made", "job_id") if name in self.facts}
        write_json(self._end_path, {**facts, **(self.end() or {}), **changes, "time": time.time()})

    def require_newest(self) -> None:
        """Raises SupersededError if a later attempt has begun. Call it before writing anything."""
        if (newest := newest_number(self.path.parent)) > self.number:
            raise SupersededError(f"{self.path}: attempt {newest} has taken this run over")

    def is_live(self, job_id: str = "") -> bool:
        """Whether the attempt's processes are still running, as far as this machine can tell.

        Decided by process ids on the same machine, elsewhere by the heartbeat's age on the file server's clock. A job
        that SLURM restarted passes its `job_id`, so that its own earlier attempt counts as over.
        """
        if self.end() is not None:
            return False
        facts = self.facts
        if job_id and facts.get("job_id") == job_id and facts.get("token"):
            return any(process.is_alive() for process in _processes(facts, self.beat()))
        return self._has_process()

    def _has_process(self) -> bool:
        alive = [process.is_alive() for process in _processes(self.facts, self.beat())]
        if any(alive):
            return True
        if alive and None not in alive:
            return False
        return self._silent_seconds() < LEASE_SECONDS

    def _silent_seconds(self) -> float:
        """Time since the last sign of life, by the file server's clock, because machines' clocks differ."""
        last = self.last_seen()
        probe = self.path.parent / f".clock.{secrets.token_hex(4)}"
        try:
            probe.touch()
            return probe.stat().st_mtime - last
        except OSError:
            return time.time() - last
        finally:
            probe.unlink(missing_ok=True)


def claim(folder: Path, job_id: str = "", **facts: Any) -> Attempt:  # noqa: ANN401  (anything YAML holds)
    """Claims the run for this process by creating the next attempt.

    Args:
        folder: RUN/attempts.
        job_id: id of the job that the attempt is part of.
        facts: further entries for attempt.yaml.

    Raises:
        BusyError: the newest attempt is alive, or another process claimed the run first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = newest_number(folder)
    if number:
        before = Attempt(folder, number)
        if before.is_live(job_id):
            raise BusyError(f"{folder.parent}: another process has this run ({_who(before)})")
        if before.end() is None:  # its processes died before they could write it
            write_once(before.path / "end.json", as_json(_lost(before)))
    try:
        return _create(folder, number + 1, job_id, **facts)
    except FileExistsError:
        raise BusyError(f"{folder.parent}: another process has this run (it was quicker)") from None


def enrol(folder: Path, job_id: str = "", **facts: Any) -> Attempt:  # noqa: ANN401  (anything YAML holds)
    """Creates the next numbered folder for this process, one of several concurrent ones: a grid's workers."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        with suppress(FileExistsError):
            return _create(folder, newest_number(folder) + 1, job_id, **facts)


def _create(folder: Path, number: int, job_id: str, **facts: Any) -> Attempt:  # noqa: ANN401
    attempt = Attempt(folder, number)
    attempt.path.mkdir()
    attempt.note(token=secrets.token_hex(8), made=time.time(), **asdict(Process.this()), job_id=job_id, **facts)
    return attempt


def newest(folder: Path) -> Attempt | None:
    """The attempt with the highest number."""
    number = newest_number(folder)
    return Attempt(folder, number) if number else None


def newest_number(folder: Path) -> int:
    """Number of the newest attempt; 0 before the first."""
    try:
        return max((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), default=0)
    except FileNotFoundError:
        return 0


def _lost(attempt: Attempt) -> dict[str, Any]:
    from suite.run.failures import noted_stop

    asked_by = noted_stop(attempt.path)
    if asked_by:
        reason = f"stopped by {asked_by}, and killed before it could say so"
        return {"state": "preempted", "reason": reason, "time": time.time()}
    reason = "its processes were killed, or their node went away"
    return {"state": "preempted", "cause": "node", "reason": reason, "time": time.time()}


def _processes(facts: Mapping[str, Any], beat: "Beat | None") -> list[Process]:
    """The process that claimed the attempt, and process 0, which may be a different one and outlive the first."""
    found = [] if beat is None else [beat.process]
    if "pid" in facts:
        found.append(Process(facts["host"], facts["machine"], facts["pid"], facts["start"]))
    return found


def _who(attempt: Attempt) -> str:
    facts = attempt.facts
    if not facts:
        return f"attempt {attempt.number}, just begun"
    job = f", job {facts['job_id']}" if facts.get("job_id") else ""
    return f"attempt {attempt.number}: process {facts['pid']} on {facts['host']}{job}"
