"""One run, from its cell to its result.

    torchrun --nproc-per-node 8 -m suite.train CELL.yaml       over eight processes
    python -m suite.train CELL.yaml                            in one
    python -m suite.train CELL.yaml --max-steps 20             the first steps only, recorded nowhere

Where CELL.yaml lies in a run directory, the run happens there and goes on from its newest checkpoint; otherwise in
runs/adhoc/<cell id>/. docs/resume.md says what a run survives. Exit status: 0 done, 1 failed or preempted (state.json
says which, and why), 2 bad input, 3 another process has the run.
"""

import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml
from pydantic import ValidationError

from suite.errors import UserError
from suite.recipe.cell import Cell
from suite.run.atomic import clean, write_json
from suite.run.directory import RunDir
from suite.run.failures import Heartbeat, PreemptedError
from suite.run.locks import locked
from suite.run.saving import Checkpoints, Record

if TYPE_CHECKING:  # torch and timm come with it, and a bad cell file should be told at once
    from suite.engines.process_group import Layout
    from suite.training.trainer import Trainer, Wishes

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_BUSY = 1, 2, 3
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""What a scheduler sends before it takes the machine back."""
log = logging.getLogger("suite.train")


class CellError(UserError):
    """A cell file cannot be read."""


class ResumeError(UserError):
    """There is something to go on from, and that was not wanted."""


class StopTrainingError(Exception):
    """Enough steps were taken."""


@dataclass(frozen=True)
class Options:
    """What changes no number: when checkpoints are saved, and how long a process waits for the others."""

    checkpoint_steps: int | None = None
    checkpoint_minutes: float = 10.0
    timeout_seconds: float = 600.0


def train(run: RunDir, data_dir: Path, max_steps: int | None = None, options: Options = Options()) -> None:
    """Trains the run's cell to its end in this process (one rank of torchrun's, or alone); rank 0 keeps the record.

    With `max_steps`, stops after so many steps and writes nothing.
    """
    from suite.engines.process_group import joined
    from suite.run.failures import told
    from suite.training.trainer import Trainer

    cell = run.cell()
    with joined(options.timeout_seconds) as layout:
        if max_steps is not None:
            _first_steps(Trainer(cell, layout, data_dir, _parent_weights(run, cell)), max_steps)
            return
        with told(run, cell, layout) as heartbeat:
            _train(run, cell, layout, data_dir, heartbeat, options)


def _train(run: RunDir, cell: Cell, layout: "Layout", data_dir: Path, heartbeat: Heartbeat, options: Options) -> None:
    from suite.run.provenance import collect
    from suite.training.trainer import Trainer

    trainer = Trainer(cell, layout, data_dir, _parent_weights(run, cell))
    _resume(trainer, run)
    _collect_from_here()
    checkpoints = Checkpoints(run, trainer, options.checkpoint_steps, options.checkpoint_minutes)
    with ExitStack() as stack:
        record = Record(run, trainer) if layout.is_main else None
        if record is not None:
            stack.callback(record.close)
            one_pass = trainer.optimizer.is_fused
            provenance = collect(layout, trainer.data_checksum, trainer.weights_checksum, one_pass=one_pass)
            write_json(run.provenance_path, provenance)

        def on_step(number: int, _loss: float) -> None:
            heartbeat.beat(number)
            if record is not None:
                record.step()
            if checkpoints.step(number):
                raise PreemptedError(signals[0] if signals else "a signal to another process")

        with _asked_by_signals(trainer.wishes) as signals:
            while trainer.epoch < cell.training.epochs:
                metrics = trainer.train_epoch(on_step)
                if record is not None:
                    record.epoch(metrics)
                checkpoints.epoch()
        results, digest = trainer.test(), trainer.weights_digest()
        if record is not None:
            record.result(results, digest)


@contextmanager
def _asked_by_signals(wishes: "Wishes") -> Iterator[list[str]]:
    """Inside, a signal to stop waits for the step under way, which all processes finish; names of those that came.

    After an exception, too: torchrun sends SIGTERM to those that are left, which still have to say why they end. So the
    handler outlives the trainer, and must not refer to it.
    """
    names: list[str] = []

    def ask(number: int, _frame: FrameType | None) -> None:
        names.append(signal.Signals(number).name)
        wishes.stop = True

    before = {number: signal.signal(number, ask) for number in STOP_SIGNALS}
    yield names
    for number, handler in before.items():
        signal.signal(number, handler)


def _first_steps(trainer: "Trainer", max_steps: int) -> None:
    _collect_from_here()

    def on_step(step: int, loss: float) -> None:
        log.info("step %d  loss %.4f", step, loss)
        if step + 1 >= max_steps:
            raise StopTrainingError

    with suppress(StopTrainingError):
        while trainer.epoch < trainer.cell.training.epochs:
            trainer.train_epoch(on_step)


def _collect_from_here() -> None:
    """Has garbage collected again, where this process has put it off, and never walks what start-up has made."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def _resume(trainer: "Trainer", run: RunDir) -> None:
    from suite.run import checkpoint

    layout, cell_id = trainer.layout, trainer.cell.id
    found = checkpoint.load_newest(run.checkpoints, cell_id, layout.device) if layout.is_main else None
    # Of one process's choosing: where a file can be read by some only, the others would go on from another step.
    name = layout.tell(found[0].name if found is not None else "")
    if not name:
        return
    state = found[1] if found is not None else checkpoint.load(run.checkpoints / name, cell_id, layout.device)
    trainer.load_state_dict(state)
    if layout.is_main:
        log.info("going on from epoch %d, step %d (%s)", trainer.epoch, trainer.step, name)


def _parent_weights(run: RunDir, cell: Cell) -> dict[str, Any] | None:
    import torch

    from suite.run import checkpoint

    if cell.parent is None:
        return None
    parent = RunDir(run.path.parent / cell.parent)
    found = checkpoint.load_newest(parent.checkpoints, cell.parent, torch.device("cpu")) if parent.result() else None
    if found is None:
        raise checkpoint.CheckpointError(
            f"{parent.path}: the full-precision cell that this one starts from is not done"
        )
    weights: dict[str, Any] = found[1]["engine"]["model"]
    return weights


def open_run(cell_path: Path) -> RunDir:
    """The run directory of a cell file: where it lies, if that is named by the cell's id, else runs/adhoc/<id>/.

    Raises:
        CellError: the file is missing or not a cell.
    """
    try:
        cell = Cell.model_validate(yaml.safe_load(cell_path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CellError(f"{cell_path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise CellError(f"{cell_path}: not a cell: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except yaml.YAMLError as error:
        raise CellError(f"{cell_path}: not YAML") from error
    place = cell_path.resolve().parent
    return RunDir.create(place if place.name == cell.id else Path("runs") / "adhoc" / cell.id, cell)


def main(
    cell: Annotated[
        Path, typer.Argument(help="Cell file, for instance runs/digits/<id>/cell.yaml.", metavar="CELL.yaml")
    ],
    data_dir: Annotated[Path, typer.Option(envvar="PROXBENCH_DATA", help="Where data sets lie or are put.")] = Path(
        "data"
    ),
    max_steps: Annotated[int | None, typer.Option(help="Only the first steps, recorded nowhere.")] = None,
    resume: Annotated[
        Literal["auto", "never"],
        typer.Option(help="auto: go on from the newest whole checkpoint; never: refuse to, where there is one."),
    ] = "auto",
    checkpoint_steps: Annotated[
        int | None, typer.Option(min=1, help="Save every so many steps, besides the ends of epochs.")
    ] = None,
    checkpoint_minutes: Annotated[float, typer.Option(min=0, help="Save when the last time is so long ago.")] = 10.0,
    timeout_seconds: Annotated[
        float, typer.Option(min=1, help="How long a process waits for the others before the run fails as hung.")
    ] = 600.0,
) -> None:
    """Train one cell in this process; under torchrun, as one rank of many."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    is_main = int(os.environ.get("RANK", "0")) == 0
    for number in STOP_SIGNALS:  # first of all: until then they kill the process
        signal.signal(number, _stop)
    try:
        run = open_run(cell)
        if resume == "never" and max_steps is None:
            _require_fresh(run)
    except UserError as error:
        if is_main:
            print(error, file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from error
    if max_steps is not None:
        train(run, data_dir, max_steps)
        return
    options = Options(checkpoint_steps, checkpoint_minutes, timeout_seconds)
    if not is_main:
        _train_and_record_the_end(run, data_dir, options, is_main=False)
        return
    with locked(run.lock) as mine:
        if not mine:
            print(f"{run.path}: another process has this run", file=sys.stderr)
            raise SystemExit(EXIT_BUSY)
        _train_and_record_the_end(run, data_dir, options, is_main=True)


def _require_fresh(run: RunDir) -> None:
    """ResumeError where the run has learnt something. No flag throws that away: a folder is deleted by hand."""
    if run.result_path.exists() or any(run.checkpoints.glob("*.pt")):
        raise ResumeError(f"--resume never: {run.path} has checkpoints or a result; delete it to train from the start")


def _train_and_record_the_end(run: RunDir, data_dir: Path, options: Options, *, is_main: bool) -> None:
    """However training ends, state.json says so; done is written with the result."""
    from suite.run import failures

    if run.result() is not None:
        return
    if is_main:
        _begin(run)
    try:
        train(run, data_dir, options=options)
    except (PreemptedError, KeyboardInterrupt) as stop:
        for number in STOP_SIGNALS:  # asked once is enough: schedulers and torchrun ask again
            signal.signal(number, signal.SIG_IGN)
        if is_main and run.state().state == "running":  # not where another process failed, and torchrun stopped this
            run.update(state="preempted", reason=f"stopped by {stop or 'Ctrl-C'}")
        raise SystemExit(EXIT_FAILED) from None
    except Exception as error:
        if isinstance(error, UserError) or failures.kind_of(error) != "own":
            print(error, file=sys.stderr)
        else:
            traceback.print_exc()
        # The processes have told why, unless they could not even find each other, or the disk is full.
        if is_main and run.state().state == "running":
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            with suppress(OSError):
                run.update(state="failed", cause="error", reason=reason)
        raise SystemExit(EXIT_FAILED) from error


def _begin(run: RunDir) -> None:
    """Clears up after earlier attempts and starts this one. The lock is held: nobody else writes here."""
    from suite.run import failures

    for folder in (run.path, run.checkpoints):
        clean(folder)
    failures.clear(run.processes)
    num_epochs = run.cell().training.epochs
    run.update(state="running", attempt=run.state().attempt + 1, cause=None, reason="", num_epochs=num_epochs)


def _stop(number: int, _frame: FrameType | None) -> None:
    raise PreemptedError(signal.Signals(number).name)


def _leave(status: int) -> None:
    """Exits; without finalizing Python where threads of gloo's are left, which may abort that (see `joined`).

    DeepSpeed keeps its process groups, and so their threads, for as long as the process lives.
    """
    if _has_gloo_threads():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    gc.freeze()  # the interpreter's last collection would walk all of torch's objects, for a second
    raise SystemExit(status)


def _has_gloo_threads() -> bool:
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # a thread that has just ended
            if path.read_text(encoding="utf-8").startswith("pt_gloo"):
                return True
    return False


if __name__ == "__main__":
    # Imports make a million objects that stay; to look for garbage among them takes a tenth of the start.
    gc.disable()
    code = 0
    try:
        typer.run(main)
    except SystemExit as stop:
        code = int(stop.code or 0)
    _leave(code)
