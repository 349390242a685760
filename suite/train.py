"""Trains one cell and writes its result.

    torchrun --nproc-per-node 8 -m suite.train CELL.yaml       on eight processes
    python -m suite.train CELL.yaml                            on one process
    python -m suite.train CELL.yaml --max-steps 20             only the first steps, without writing files

If CELL.yaml is in a run directory, the run uses that directory and resumes from its newest checkpoint; otherwise it
uses runs/adhoc/<cell id>/. docs/resume.md lists the failures that a run survives. Exit status: 0 done, 1 failed or
preempted (the attempt's end.json has the state and the reason), 2 bad input, 3 another process has the run.
"""

import gc
import importlib
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
import yaml
from pydantic import ValidationError

from suite.errors import UserError
from suite.recipe.cell import Cell
from suite.recipe.faults import first_fault
from suite.recipe.settings import AS_IS, Execution
from suite.recipe.yaml_lines import read_value
from suite.run.atomic import clean, write_json
from suite.run.attempt import Attempt, BusyError, SupersededError
from suite.run.directory import RunDir
from suite.run.failures import Heartbeat, PreemptedError
from suite.run.saving import Checkpoints, Record

if TYPE_CHECKING:  # imports torch and timm, which would delay reporting a bad cell file
    import torch
    from torch import Tensor

    from suite.engines.process_group import Layout
    from suite.training.build import Weights
    from suite.training.teacher import Teacher
    from suite.training.trainer import Wishes

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_BUSY = 1, 2, 3
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""The signals that a scheduler sends before it reclaims the machine."""
_IMPORTED_LATE = (
    *("pydantic.type_adapter", "ruamel.yaml", "timm.data", "timm.loss", "timm.optim", "timm.scheduler"),
    "torch._dynamo",
    *("torch.utils.serialization.config", "suite.data.readers.image_folder", "suite.run.provenance"),
    *("suite.training.pretrained", "suite.training.trainer"),
)
"""Modules that training or its libraries import late; a test checks that the list is complete."""
log = logging.getLogger("suite.train")


class CellError(UserError):
    """A cell file cannot be read."""


class ExecutionError(UserError):
    """--execution cannot be read."""


class ResumeError(UserError):
    """The run has checkpoints or a result, but --resume never was given."""


class StopTrainingError(Exception):
    """Raised to stop training after --max-steps."""


@dataclass(frozen=True)
class Options:
    """Settings outside the cell: execution, checkpoint intervals, and how long processes wait for each other."""

    execution: Execution = AS_IS
    checkpoint_steps: int | None = None
    checkpoint_minutes: float = 10.0
    timeout_seconds: float = 600.0


def train(run: RunDir, data_dir: Path, attempt: Attempt | None = None, options: Options = Options()) -> None:
    """Trains the run's cell to completion, as one rank under torchrun or as a single process; rank 0 writes the files.

    Args:
        run: the run whose cell is trained.
        data_dir: directory of the data sets.
        attempt: the attempt that rank 0 has already claimed; None: rank 0 claims one here and broadcasts its number.
        options: settings outside the cell.

    Raises:
        BusyError: another attempt has the run.
    """
    from suite.engines.process_group import joined
    from suite.run.failures import told

    cell = run.cell()
    if attempt is None and _is_main():
        attempt = run.claim()
    with joined(options.timeout_seconds, options.execution) as layout:
        number = int(layout.tell(str(attempt.number if attempt is not None else 0)))
        attempt = attempt or Attempt(run.attempts, number)
        with told(attempt, cell, options.execution, layout) as heartbeat:
            _train(run, attempt, layout, data_dir, heartbeat, options)


def first_steps(run: RunDir, data_dir: Path, max_steps: int, execution: Execution = AS_IS) -> None:
    """Trains the run's cell for `max_steps` steps, prints their losses, and writes nothing."""
    from suite.engines.process_group import joined
    from suite.training.trainer import Trainer

    cell = run.cell()
    with joined(execution=execution) as layout:
        teacher = _teacher(run, cell, layout)
        trainer = Trainer(cell, layout, data_dir, _parent_weights(run, cell), execution, teacher=teacher)
        _collect_from_here()

        def on_step(step: int, loss: "Tensor") -> None:
            log.info("step %d  loss %.4f", step, float(loss))
            if step + 1 >= max_steps:
                raise StopTrainingError

        with suppress(StopTrainingError):
            while trainer.epoch < cell.training.epochs:
                trainer.train_epoch(on_step)


def _train(
    run: RunDir, attempt: Attempt, layout: "Layout", data_dir: Path, heartbeat: Heartbeat, options: Options
) -> None:
    from suite.run.provenance import collect
    from suite.training.trainer import Trainer

    cell = run.cell()
    name, state = _newest_state(run, cell, layout, options.execution)
    weights = _parent_weights(run, cell) if state is None else None
    teacher = _teacher(run, cell, layout)
    trainer = Trainer(cell, layout, data_dir, weights, options.execution, is_resumed=state is not None, teacher=teacher)
    if state is not None:
        trainer.load_state_dict(state)
        del state  # otherwise latents, moments and weights would use memory twice
        if layout.is_main:
            log.info("resuming from epoch %d, step %d (%s)", trainer.epoch, trainer.step, name)
    _collect_from_here()
    checkpoints = Checkpoints(run, attempt, trainer, options.checkpoint_steps, options.checkpoint_minutes)
    with ExitStack() as stack:
        record = Record(run, attempt, trainer) if layout.is_main else None
        if record is not None:
            stack.callback(record.close)
            provenance = collect(trainer)
            write_json(attempt.provenance_path, provenance)
            attempt.note(data_checksum=trainer.data_checksum, execution=provenance["execution"])
        fence = _Fence(attempt)

        def on_step(number: int, _loss: "Tensor") -> None:
            fence.check()
            heartbeat.beat(number, trainer.epoch)
            if checkpoints.step(number):
                raise PreemptedError(signals[0] if signals else "a signal to another process")

        with _asked_by_signals(trainer.wishes) as signals:
            while trainer.epoch < cell.training.epochs:
                metrics = trainer.train_epoch(on_step)
                heartbeat.beat(trainer.epoch * trainer.steps_per_epoch - 1, trainer.epoch)
                if record is not None:
                    record.epoch(metrics)
                checkpoints.epoch()
        (soft, hard), digest = trainer.test(), trainer.weights_digest()
        if record is not None:
            record.result(soft, hard, digest)


class _Fence:
    """Checks, at most once a second, whether a later attempt has begun."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._looked = time.monotonic()

    def check(self) -> None:
        """Raises SupersededError if a later attempt has begun."""
        now = time.monotonic()
        if now - self._looked >= 1:
            self._looked = now
            self._attempt.require_newest()


@contextmanager
def _asked_by_signals(wishes: "Wishes") -> Iterator[list[str]]:
    """Delays stop signals in the block until after the current step, on all processes; yields the received names.

    After an exception, the handler remains installed: torchrun sends SIGTERM to the remaining processes, which must
    still record why they ended. So it outlives the trainer and must not refer to it.
    """
    names: list[str] = []

    def ask(number: int, _frame: FrameType | None) -> None:
        names.append(signal.Signals(number).name)
        wishes.stop = True

    before = {number: signal.signal(number, ask) for number in STOP_SIGNALS}
    yield names
    for number, handler in before.items():
        signal.signal(number, handler)


def _collect_from_here() -> None:
    """Re-enables garbage collection if this process disabled it, and excludes all objects created at start-up."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def _newest_state(run: RunDir, cell: Cell, layout: "Layout", execution: Execution) -> tuple[str, dict[str, Any] | None]:
    """Name and content of the checkpoint to resume from, on every process; ("", None) if there are no checkpoints."""
    import torch

    from suite.run import checkpoint

    # With ZeRO, the whole state may not fit on one device.
    device = torch.device("cpu") if execution.engine == "deepspeed" else layout.device
    found = checkpoint.load_newest(run.checkpoints, cell.id, device) if layout.is_main else None
    # Rank 0 chooses for all: otherwise a process that cannot read a file would resume from a different step.
    name = layout.tell(found[0].name if found is not None else "")
    if not name:
        return "", None
    return name, found[1] if found is not None else checkpoint.load(run.checkpoints / name, cell.id, device)


def _parent_weights(run: RunDir, cell: Cell) -> "Weights | None":
    import torch

    from suite.training.build import Weights

    if cell.parent is None:
        return None
    parent, state = _done(run, cell.parent, torch.device("cpu"))
    # Use the tested network: averages if the parent keeps them; for quantized weights, averages of latents.
    values: dict[str, Any] = state["engine"]["model"] if state["average"] is None else state["average"]
    if parent.quantizer == "fp":
        return Weights(values)
    latents = {name: own["w_star"] for name, own in state["engine"]["optimizer"]["state"].items() if "w_star" in own}
    return Weights(values if state["average"] is not None else {**values, **latents}, are_latents=True)


def _teacher(run: RunDir, cell: Cell, layout: "Layout") -> "Teacher | None":
    """The tested network of the cell that this one learns from."""
    from suite.data.source import Description
    from suite.engines.process_group import Layout
    from suite.training.teacher import Teacher
    from suite.training.trainer import Network

    if cell.teacher is None:
        return None
    theirs, state = _done(run, cell.teacher, layout.device)
    network = Network(theirs, Description.of(state["description"]), Layout(device=layout.device))
    network.load_state_dict(state)
    network.deploy()
    return Teacher(network.engine.model, cell.training.precision)


def _done(run: RunDir, cell_id: str, device: "torch.device") -> tuple[Cell, dict[str, Any]]:
    """A cell of the same grid that this one needs, and its state when it was tested.

    Raises:
        CheckpointError: the cell is not done, or its last checkpoint is missing.
    """
    from suite.run import checkpoint

    needed = RunDir(run.path.parent / cell_id)
    found = checkpoint.load_newest(needed.checkpoints, cell_id, device) if needed.result() else None
    if found is None:
        raise checkpoint.CheckpointError(f"{needed.path}: the cell that this one needs is not done")
    path, state = found
    cell = needed.cell()
    if state["epoch"] != (epochs := cell.training.epochs):
        raise checkpoint.CheckpointError(
            f"{path}: from epoch {state['epoch']}, but the result that this cell needs is from epoch {epochs}, whose "
            "checkpoint is damaged or missing: delete that cell's directory and train it again"
        )
    return cell, state


def open_run(cell_path: Path, adhoc: Path = Path("runs") / "adhoc") -> RunDir:
    """The run directory of a cell file: the file's own folder if its name is the cell's id, else adhoc/<id>/.

    Raises:
        CellError: the file is missing or not a cell.
    """
    try:
        raw = yaml.safe_load(cell_path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise CellError(f"{cell_path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # invalid dates or deeply nested brackets
        raise CellError(f"{cell_path}: not YAML") from error
    except OSError as error:
        raise CellError(f"{cell_path}: {error.strerror}") from error
    if not isinstance(raw, dict):
        raise CellError(f"{cell_path}: not a cell: a mapping with the keys {', '.join(Cell.model_fields)}")
    try:
        cell = Cell.model_validate(raw)
    except ValidationError as error:
        raise CellError(f"{cell_path}: not a cell: {first_fault(error)}") from error
    place = cell_path.absolute().parent  # does not resolve a link to another directory
    return RunDir.create(place if place.name == cell.id else adhoc / cell.id, cell)


def read_execution(text: str) -> Execution:
    """An execution from YAML, such as `{micro_batch_size: 64, compile: true}`.

    Raises:
        ExecutionError: the text is not a valid execution.
    """
    try:
        return Execution.model_validate(read_value(text) or {})
    except ValidationError as error:
        raise ExecutionError(f"--execution: {first_fault(error)}") from error
    except ValueError as error:
        raise ExecutionError(f"--execution {text}: {error}") from error


def main(
    cell: Annotated[
        Path, typer.Argument(help="Cell file, for instance runs/digits/<id>/cell.yaml.", metavar="CELL.yaml")
    ],
    data_dir: Annotated[Path, typer.Option(envvar="PROXBENCH_DATA", help="Folder of the data sets.")] = Path("data"),
    execution: Annotated[
        str,
        typer.Option(
            help="How to use the hardware, like a grid's `execution`: '{micro_batch_size: 64}'.", metavar="YAML"
        ),
    ] = "{}",
    attempt: Annotated[
        int | None, typer.Option(hidden=True, help="Number of the attempt claimed by the launcher.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Train only the first N steps, without writing files.")] = None,
    resume: Annotated[
        Literal["auto", "never"],
        typer.Option(help="auto: resume from the newest intact checkpoint; never: fail if the run has any."),
    ] = "auto",
    checkpoint_steps: Annotated[
        int | None, typer.Option(min=1, help="Save every N steps, in addition to the ends of epochs.")
    ] = None,
    checkpoint_minutes: Annotated[float, typer.Option(min=0, help="Save at least every N minutes.")] = 10.0,
    timeout_seconds: Annotated[
        float, typer.Option(min=1, help="How long a process waits for the others before the run fails as hung.")
    ] = 600.0,
) -> None:
    """Train one cell in this process; under torchrun, as one rank of many.

    [bold]python -m suite.train runs/digits/<id>/cell.yaml[/]
    [bold]torchrun --nproc-per-node 2 -m suite.train cell.yaml --data-dir data[/]
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    is_main = _is_main()
    for number in STOP_SIGNALS:  # first, because until then these signals kill the process
        signal.signal(number, _stop)
    try:
        options = Options(read_execution(execution), checkpoint_steps, checkpoint_minutes, timeout_seconds)
        if max_steps is not None:
            with tempfile.TemporaryDirectory() as adhoc:
                first_steps(open_run(cell, Path(adhoc)), data_dir, max_steps, options.execution)
            return
        run = open_run(cell)
        if resume == "never":
            _require_fresh(run)
    except UserError as error:
        if is_main:
            print(error, file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from error
    if run.result() is not None:
        return
    mine = None
    if is_main:
        try:
            mine = run.claim() if attempt is None else Attempt(run.attempts, attempt)
            mine.require_newest()
        except (BusyError, SupersededError) as error:
            print(error, file=sys.stderr)
            raise SystemExit(EXIT_BUSY) from error
        for folder in (run.path, run.checkpoints):
            clean(folder)
    _train_and_record_the_end(run, data_dir, mine, options)


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _require_fresh(run: RunDir) -> None:
    """Raises ResumeError if the run has checkpoints or a result. No flag discards those: delete the folder by hand."""
    if run.result_path.exists() or any(run.checkpoints.glob("*.pt")):
        raise ResumeError(f"--resume never: {run.path} has checkpoints or a result; delete it to train from the start")


def _train_and_record_the_end(run: RunDir, data_dir: Path, mine: Attempt | None, options: Options) -> None:
    """Trains, and records how training ended in every case. `mine` is the attempt on rank 0, None on other ranks."""
    from suite.run import failures

    try:
        train(run, data_dir, mine, options)
    except (PreemptedError, KeyboardInterrupt) as stop:
        for number in STOP_SIGNALS:  # schedulers and torchrun repeat them
            signal.signal(number, signal.SIG_IGN)
        if mine is not None and mine.end() is None:  # not if torchrun stopped this because another failed
            _finish(mine, "preempted", f"stopped by {stop or 'Ctrl-C'}")
        raise SystemExit(EXIT_FAILED) from None
    except SupersededError as error:
        print(error, file=sys.stderr)
        raise SystemExit(EXIT_BUSY) from error
    except Exception as error:
        if isinstance(error, UserError) or failures.kind_of(error) != "own":
            print(error, file=sys.stderr)
        else:
            traceback.print_exc()
        # The processes have recorded the reason, unless they never connected or the disk is full.
        if mine is not None and mine.end() is None:
            _finish(mine, "failed", f"{type(error).__name__}: {error}".splitlines()[0], cause="error")
        raise SystemExit(EXIT_FAILED) from error


def _finish(attempt: Attempt, state: str, reason: str, **more: str) -> None:
    with suppress(OSError, SupersededError):
        attempt.finish(state=state, reason=reason, **more)


def _stop(number: int, _frame: FrameType | None) -> None:
    raise PreemptedError(signal.Signals(number).name)


def run(arguments: Sequence[str]) -> int:
    """Trains like `python -m suite.train ARGUMENTS`; returns the exit status. Call it at most once per process.

    The caller may disable garbage collection to start faster: training enables it again.
    """
    sys.argv = [__file__, *arguments]
    try:
        typer.run(main)
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:  # noqa: BLE001  (like the interpreter; includes a stop at start-up)
        sys.excepthook(*sys.exc_info())
        return EXIT_FAILED
    return 0


def preload() -> None:
    """Imports all that `run` would import, for processes forked from this one. Starts no thread and uses no GPU."""
    for name in _IMPORTED_LATE:
        importlib.import_module(name)
    import models

    models.names()


def leave_at_once(status: int) -> NoReturn:
    """Exits without Python's finalization, after flushing all output."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _leave(status: int) -> NoReturn:
    """Exits; skips Python's finalization if gloo threads remain, because they may abort the process (see `joined`).

    DeepSpeed keeps its process groups, and therefore their threads, until the process ends.
    """
    if _has_gloo_threads():
        leave_at_once(status)
    gc.freeze()  # otherwise the interpreter's final collection walks all of torch's objects for a second
    raise SystemExit(status)


def _has_gloo_threads() -> bool:
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # the thread has just ended
            if path.read_text(encoding="utf-8").startswith("pt_gloo"):
                return True
    return False


if __name__ == "__main__":
    # Imports create a million permanent objects; collecting garbage among them takes a tenth of the start-up time.
    gc.disable()
    _leave(run(sys.argv[1:]))
