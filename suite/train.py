"""One run, from its cell to its result.

    torchrun --nproc-per-node 8 -m suite.train CELL.yaml       over eight processes
    python -m suite.train CELL.yaml                            in one
    python -m suite.train CELL.yaml --max-steps 20             the first steps only, recorded nowhere

Where CELL.yaml lies in a run directory, the run happens there and goes on from its newest checkpoint; otherwise in
runs/adhoc/<cell id>/. Exit status: 0 done, 1 failed (state.json says why), 2 bad input, 3 another process has the run.
"""

import logging
import os
import signal
import sys
import time
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from pydantic import ValidationError

from suite.config import Cell
from suite.errors import UserError
from suite.files import write_json
from suite.journal import Journal
from suite.locks import locked
from suite.rundir import Cause, RunDir

if TYPE_CHECKING:  # torch and timm come with it, and a bad cell file should be told at once
    from suite.trainer import Trainer

HEARTBEAT_SECONDS = 10.0
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_BUSY = 1, 2, 3
log = logging.getLogger("suite.train")


class CellError(UserError):
    """A cell file cannot be read."""


class PreemptedError(Exception):
    """The process was asked to stop."""


class StopTrainingError(Exception):
    """Enough steps were taken."""


def train(run: RunDir, data_dir: Path, max_steps: int | None = None) -> None:
    """Trains the run's cell to its end in this process (one rank of torchrun's, or alone); rank 0 keeps the record.

    With `max_steps`, stops after so many steps and writes nothing.
    """
    from suite.distributed import joined
    from suite.provenance import collect
    from suite.trainer import Trainer

    cell = run.cell()
    with joined() as layout, ExitStack() as stack:
        trainer = Trainer(cell, layout, data_dir, _parent_weights(run, cell))
        if max_steps is not None:
            _first_steps(trainer, max_steps)
            return
        _resume(trainer, run)
        record = _Record(run, cell) if layout.is_main else None
        if record is not None:
            stack.callback(record.close)
            write_json(run.provenance_path, collect(layout, trainer.data_checksum))
        while trainer.epoch < cell.training.epochs:
            metrics = trainer.train_epoch(record.step if record is not None else lambda _step, _loss: None)
            if record is not None:
                record.epoch(trainer, metrics)
        results = trainer.test()
        if record is not None:
            record.result(trainer, results)


class _Record:
    """Everything rank 0 writes while a run goes on."""

    def __init__(self, run: RunDir, cell: Cell) -> None:
        self.run, self.cell = run, cell
        self.journal = Journal(run.journal, run.state().attempt)
        self._last_beat = time.monotonic()

    def step(self, _step: int, _loss: float) -> None:
        """A sign of life every ten seconds."""
        if time.monotonic() - self._last_beat > HEARTBEAT_SECONDS:
            self._last_beat = time.monotonic()
            self.run.update()

    def epoch(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        """Journal first, then the checkpoint: an epoch that is trained again is recorded again, never lost."""
        from suite import checkpoint

        self.journal.append(trainer.epoch, metrics)
        checkpoint.save(self.run.checkpoints, trainer.epoch, trainer.state_dict())
        self.run.update(epoch=trainer.epoch)
        log.info("epoch %d/%d %s", trainer.epoch, self.cell.training.epochs, _line(metrics))

    def result(self, trainer: "Trainer", results: dict[str, float]) -> None:
        """result.json: its presence means done, so it comes after all else."""
        parameters = dict(trainer.engine.model.named_parameters())
        num_binary = sum(parameters[name].numel() for name in trainer.split.binary)
        self.journal.append(trainer.epoch, results)
        write_json(
            self.run.result_path,
            {
                "cell": self.cell.id,
                "name": self.cell.name,
                "top1_hard": results["test/top1_hard"],
                "top1_soft": results["test/top1_soft"],
                "num_train_images": trainer.loaders.num_train_images,
                "num_binary_parameters": num_binary,
                "num_full_precision_parameters": sum(p.numel() for p in parameters.values()) - num_binary,
                "weights_sha256": trainer.weights_digest(),
            },
        )
        self.run.update(state="done", epoch=trainer.epoch)
        log.info("done %s", _line(results))

    def close(self) -> None:
        self.journal.close()


def _line(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _first_steps(trainer: "Trainer", max_steps: int) -> None:
    def on_step(step: int, loss: float) -> None:
        log.info("step %d  loss %.4f", step, loss)
        if step + 1 >= max_steps:
            raise StopTrainingError

    with suppress(StopTrainingError):
        while trainer.epoch < trainer.cell.training.epochs:
            trainer.train_epoch(on_step)


def _resume(trainer: "Trainer", run: RunDir) -> None:
    from suite import checkpoint

    state = checkpoint.load_newest(run.checkpoints, trainer.layout.device)
    if state is not None:
        trainer.load_state_dict(state)
        log.info("going on from epoch %d", trainer.epoch)


def _parent_weights(run: RunDir, cell: Cell) -> dict[str, Any] | None:
    import torch

    from suite import checkpoint

    if cell.parent is None:
        return None
    parent = RunDir(run.path.parent / cell.parent)
    state = checkpoint.load_newest(parent.checkpoints, torch.device("cpu")) if parent.result() else None
    if state is None:
        raise checkpoint.CheckpointError(
            f"{parent.path}: the full-precision cell that this one starts from is not done"
        )
    weights: dict[str, Any] = state["model"]
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
) -> None:
    """Train one cell in this process; under torchrun, as one rank of many."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    try:
        run = open_run(cell)
    except CellError as error:
        print(error, file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from error
    signal.signal(signal.SIGTERM, _stop)
    if max_steps is not None:
        train(run, data_dir, max_steps)
        return
    if int(os.environ.get("RANK", "0")) != 0:
        train(run, data_dir)
        return
    with locked(run.lock) as mine:
        if not mine:
            print(f"{run.path}: another process has this run", file=sys.stderr)
            raise SystemExit(EXIT_BUSY)
        _train_and_record_the_end(run, data_dir)


def _train_and_record_the_end(run: RunDir, data_dir: Path) -> None:
    """However training ends, state.json says so; done is written with the result."""
    if run.result() is not None:
        return
    num_epochs = run.cell().training.epochs
    run.update(state="running", attempt=run.state().attempt + 1, cause=None, reason="", num_epochs=num_epochs)
    try:
        train(run, data_dir)
    except (PreemptedError, KeyboardInterrupt) as stop:
        run.update(
            state="preempted", reason=f"stopped by {'SIGTERM' if isinstance(stop, PreemptedError) else 'Ctrl-C'}"
        )
        raise SystemExit(EXIT_FAILED) from None
    except Exception as error:
        traceback.print_exc()
        run.update(state="failed", cause=_cause(error), reason=f"{type(error).__name__}: {error}".splitlines()[0])
        raise SystemExit(EXIT_FAILED) from error


def _cause(error: Exception) -> Cause:
    import torch

    from suite.trainer import DivergedError

    if isinstance(error, DivergedError):
        return "nan"
    return "oom" if isinstance(error, MemoryError | torch.OutOfMemoryError) else "error"


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise PreemptedError


if __name__ == "__main__":
    typer.run(main)
