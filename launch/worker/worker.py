"""A worker: trains the ready cells of a grid in its slots until none is left for it, or its time is up.

It works the same on a developer's machine, in a SLURM job, and started by hand: `python -m launch worker GRID`. Workers
do not communicate: a cell belongs to the worker that creates its next attempt (see suite.run.attempt).
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Literal

from launch import status
from launch.plan import WAITING, Standing, blocked, choosable, is_over, matches, ready
from launch.worker import registry
from launch.worker.attempt import Site, Training, begin, follow
from launch.worker.ending import CTRL_C
from launch.worker.slots import Slot, num_cores, slots_of, visible_gpus
from launch.worker.spec import EXIT_AGAIN, Place, WorkerSpec
from suite.errors import UserError
from suite.run.directory import Planned, read_plan
from suite.train import STOP_SIGNALS

POLL_SECONDS = 0.2
CONTROL_SECONDS = 2.0
"""How often a worker checks the maximum number of workers."""
IDLE_SECONDS = 300.0
"""How long an idle worker waits for cells that depend on a running one."""
CHOICE_SECONDS = 30.0
"""How long a worker waits to retry a choice that failed, e.g. because the disk was full."""
SUPPLY_SECONDS = 60.0
"""How often the first live worker submits more workers, if cells are ready and the site has room."""
SICK_CELLS, SICK_SECONDS = 3, 300.0
"""If this many different cells fail within this time without having made a step, the machine is to blame."""
Outcome = Literal["over", "again", "scaled", "retired"]


class Worker:
    """The main loop. Calls `shown` with the cells' standings whenever it has read them."""

    def __init__(
        self,
        spec: WorkerSpec,
        place: Place,
        slots: Sequence[Slot],
        *,
        stays: bool = False,
        shown: Callable[[list[Standing]], None] = lambda _: None,
        supply: Callable[[], object] | None = None,
    ) -> None:
        """Registers a worker in this process.

        Args:
            spec: the cells to train.
            place: where the worker runs.
            slots: the GPUs and cores to train with.
            stays: wait for cells that other workers train, instead of exiting without work.
            shown: see the class.
            supply: submits more workers if the site has room; None: it cannot submit any.
        """
        self.spec, self.place, self.slots = spec, place, list(slots)
        self._stays, self._shown, self._supply = stays, shown, supply
        facts = {"node": place.host, "shape": spec.shape, "num_slots": len(slots), "num_gpus": _num_gpus(slots)}
        self.record = registry.register(spec.grid_dir, place.job_id, **facts)
        self.site = Site(spec, place, meeting_path(spec, place), self.record.number)
        self.reason = ""
        self._free, self._active = list(self.slots), list[Training]()
        self._asked: list[str] = []
        self._done: dict[str, Standing] = {}
        self._failed_at: dict[str, float] = {}
        self._gone: set[int] = set()
        self._next_look = self._next_control = self._next_choice = 0.0
        self._next_supply = time.monotonic() + SUPPLY_SECONDS
        self._idle_since: float | None = None
        self._is_surplus = False
        self.is_work_left = False
        """Whether the last look found more ready cells than this worker took."""

    def work(self) -> Outcome:
        """Trains until nothing is left to do here; on any exit, stops all processes that it started."""
        outcome: Outcome | None = None
        with self._listening(), self._touching():
            try:
                while outcome is None:
                    outcome = self._turn()
            finally:
                for training in self._active:
                    training.end()
                self.site.close()
        self.record.write_end(state=outcome, reason=self.reason)
        return outcome

    def _turn(self) -> Outcome | None:
        now = time.monotonic()
        for training in self._active:
            if self._asked or self._is_surplus:
                name = self._asked[0] if self._asked else "SIGTERM"
                training.ask(signal.SIGTERM if name == CTRL_C else signal.Signals[name])
        self._reap()
        if now >= self._next_control:
            self._next_control = now + CONTROL_SECONDS
            self._control()
        if self._asked or self._is_surplus:
            if not self._active:
                self.reason = f"stopped by {self._asked[0]}" if self._asked else "fewer workers were asked for"
                return "again" if self._asked else "scaled"
        elif self._is_sick():
            if not self._active:
                names = len(self._failed_at)
                self.reason = f"{registry.RETIRED}: {names} cells failed here without a step; look at {self.place.host}"
                return "retired"
        elif now >= self._next_look and (self._free or self._stays):
            outcome = self._look()
            if outcome is not None:
                return outcome
        time.sleep(POLL_SECONDS)
        return None

    def _reap(self) -> None:
        """Frees the slots of cells that have ended."""
        for training in list(self._active):
            if training.look(self._asked[0] if self._asked else "SIGTERM" if self._is_surplus else ""):
                continue
            self._active.remove(training)
            self._free.append(training.slot)
            self._next_look = 0.0
            if training.made_no_step():
                self._failed_at[training.run.path.name] = time.monotonic()

    def _look(self) -> Outcome | None:
        """Starts ready cells; returns the worker's outcome if no work is left for it, else None."""
        start = time.monotonic()
        rows = self._rows()
        if choosable(rows) and start >= self._next_choice:
            self._next_choice = 0.0 if choose(self.spec.grid_dir) else start + CHOICE_SECONDS
            rows = self._rows()
        self._shown(rows)
        seconds = time.monotonic() - start
        startable = ready(rows, self._failed_at)
        mine = [row for row in startable if self._is_mine(row)]
        num_active, is_short = len(self._active), self.place.is_short_of_time()
        if mine and not is_short:
            for row in mine:
                if not self._free or self._asked:
                    break
                training = begin(self.site, row, self._free[0])
                if training is not None:
                    self._free.pop(0)
                    self._active.append(training)
        self.is_work_left = len(startable) > len(self._active) - num_active
        # Reading thousands of files takes at most a twentieth of the time: the cells need the processor more.
        self._next_look = time.monotonic() + max(0.5, 20 * seconds)
        if self._active:
            self._idle_since = None
            return None
        if mine and is_short:
            self.reason = "little time is left"
            return "again"
        return None if mine or self._has_to_wait(rows) else "over"

    def _has_to_wait(self, rows: list[Standing]) -> bool:
        """Whether a cell may become ready here once other workers have trained theirs."""
        self._idle_since = self._idle_since or time.monotonic()
        ours = [row for row in rows if self._is_mine(row)]
        if self._stays:
            return not is_over(ours) and any(row.state.state == "running" for row in rows)
        held_up = blocked(rows)
        waits = any(
            (row.state.state in WAITING and row.cell.id not in held_up)
            or (row.state.state == "running" and row.cell.trial)
            for row in ours
        )
        return waits and time.monotonic() - self._idle_since < IDLE_SECONDS

    def _rows(self) -> list[Standing]:
        """The grid's cells with their states; done cells are not read again."""
        plan = read_plan_once(self.spec.grid_dir)
        rows = status.standings(self.spec.grid_dir, plan, self._done)
        self._done = {row.cell.id: row for row in rows if row.state.state == "done"}
        return rows

    def _is_mine(self, row: Standing) -> bool:
        if self.spec.shape and row.planned.shape != self.spec.shape:
            return False
        if self.spec.cells is None or row.cell.id in self.spec.cells:
            return True
        only = self.spec.only
        return row.planned.is_later and (not only or any(matches(row.cell, pattern) for pattern in only))

    def _control(self) -> None:
        """Applies a changed maximum of workers; the first live worker also submits missing ones."""
        limit = registry.limit(self.spec.grid_dir) if self.spec.cells is None else None
        if limit is None and self._supply is None:
            return
        live = registry.live_numbers(self.spec.grid_dir, self._gone)
        self._is_surplus = limit is not None and self.record.number in live[limit:]
        is_first = live[:1] == [self.record.number]
        if is_first and self._supply is not None and time.monotonic() >= self._next_supply:
            self._next_supply = time.monotonic() + SUPPLY_SECONDS
            if self.is_work_left:
                self._supply()

    def _is_sick(self) -> bool:
        since = time.monotonic() - SICK_SECONDS
        return sum(moment > since for moment in self._failed_at.values()) >= SICK_CELLS

    @contextmanager
    def _touching(self) -> Iterator[None]:
        """Shows other machines that this worker is alive, even during a long look."""
        closed = threading.Event()

        def touch() -> None:
            while not closed.wait(10.0):
                self.record.touch()

        thread = threading.Thread(target=touch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            closed.set()
            thread.join()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Records stop signals at once, here and in the attempts' folders."""

        def ask(number: int, _frame: FrameType | None) -> None:
            self._asked.append(CTRL_C if number == signal.SIGINT else signal.Signals(number).name)
            for training in self._active:
                training.note_stop(self._asked[0])

        with listening(ask, (*STOP_SIGNALS, signal.SIGINT)):
            yield


@contextmanager
def listening(ask: Callable[[int, FrameType | None], None], numbers: Sequence[int]) -> Iterator[None]:
    """Handles the signals with `ask` within the context."""
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(path: str) -> None:
    """The entry point of a SLURM job on each of its nodes. `path`: the file of its WorkerSpec.

    Raises:
        SystemExit: with EXIT_AGAIN if work is left, 1 if the node seems faulty.
    """
    spec_path = Path(path)
    spec, place = WorkerSpec.read(spec_path), Place.of_slurm()
    (spec_path.parent / f"{place.start}.began").touch()
    if spec.probe:
        from launch.doctor.probe import serve

        uri = None if spec.probe == "none" else spec.probe
        if serve(spec.grid_dir, spec.data_dir, uri, is_again=not place.start.endswith("-0")):
            raise SystemExit(EXIT_AGAIN)
        return
    slots = slots_in_job(spec)
    if place.node:
        asked: list[str] = []
        site = Site(spec, place, meeting_path(spec, place))
        with listening(lambda number, _: asked.append(signal.Signals(number).name), STOP_SIGNALS):
            follow(site, slots[0], asked, lambda cell: read_plan_once(spec.grid_dir)[cell].execution)
        for nursery in site.nurseries.values():
            nursery.close()
        return

    def supply() -> "subprocess.Popen[bytes]":
        # In a separate process: SLURM's commands may hang, and submitit changes its process's environment.
        return subprocess.Popen([sys.executable, "-m", "launch.worker", "supply", str(spec.grid_dir)])

    worker = Worker(spec, place, slots, supply=supply)
    outcome = worker.work()
    print(f"worker on {socket.gethostname()}: {outcome}", flush=True)
    if outcome == "again":
        raise SystemExit(EXIT_AGAIN)
    if outcome != "scaled" and worker.is_work_left:  # cells of another shape, or cells that it did not take
        supply().wait()
    if outcome == "retired":
        raise SystemExit(1)
    finish(spec.grid_dir)


def slots_in_job(spec: WorkerSpec) -> list[Slot]:
    """The slots of a job's node, divided from its GPUs, or from its cores if it has none."""
    gpus = visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES")) if spec.num_gpus else []
    cores = min(spec.num_cores or num_cores(), num_cores())  # if SLURM does not bind processes, they see all cores
    if spec.num_nodes > 1:
        return [Slot(tuple(gpus), max(len(gpus), 1), max(cores // max(len(gpus), 1), 1))]
    shares = spec.gpus_per_cell, spec.cells_per_gpu, spec.cpus_per_cell or cores, spec.max_slots
    return slots_of(gpus, cores, *shares)


def meeting_path(spec: WorkerSpec, place: Place) -> Path:
    """The file through which the nodes of one job communicate."""
    return spec.grid_dir / "workers" / f"meeting-{place.start}.json"


def finish(grid_dir: Path) -> None:
    """Makes the remaining choices; if the grid has ended, runs the last launch's --on-finish command, once."""
    from launch.launches import on_finish

    rows = status.standings(grid_dir, read_plan(grid_dir))
    if choosable(rows) and choose(grid_dir):  # the worker could not before
        rows = status.standings(grid_dir, read_plan(grid_dir))
    if is_over(rows):
        on_finish(grid_dir, rows)


def choose(grid_dir: Path) -> bool:
    """Makes the choices that can be made; returns whether cells follow. Prints a failure: a later look tries again."""
    from launch.tuning import advance  # late: it imports torch, which a grid that tunes nothing does not need

    try:
        return advance(grid_dir) > 0
    except (OSError, UserError) as error:
        print(f"no choice could be made: {error}", file=sys.stderr, flush=True)
        return False


_plans: dict[Path, tuple[tuple[int, int], dict[str, Planned]]] = {}


def read_plan_once(grid_dir: Path) -> dict[str, Planned]:
    """Like read_plan, but reads the file again only if it has changed."""
    found = (grid_dir / "plan.json").stat()
    key = (found.st_mtime_ns, found.st_ino)
    if grid_dir not in _plans or _plans[grid_dir][0] != key:
        _plans[grid_dir] = key, read_plan(grid_dir)
    return _plans[grid_dir][1]


def _num_gpus(slots: Sequence[Slot]) -> int:
    return len({device for slot in slots for device in slot.devices})
