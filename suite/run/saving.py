"""What a run writes while it goes on: checkpoints, which all processes take part in, and rank 0's record."""

import io
import logging
import time
from typing import TYPE_CHECKING

from suite.run.atomic import as_json, write_bytes, write_once
from suite.run.attempt import Attempt, SupersededError
from suite.run.directory import RunDir
from suite.run.journal import Journal

if TYPE_CHECKING:  # torch and timm come with it, and a bad cell file should be told at once
    from suite.training.evaluation import Evaluation
    from suite.training.trainer import Trainer

SAVING_SHARE = 0.005
"""Of training time, that saving at the ends of epochs may take."""
log = logging.getLogger("suite.train")


class Checkpoints:
    """Writes the run's checkpoints: every so many steps or minutes, and at the ends of epochs.

    Where epochs are short, not of all: the next is saved once saving, as long as it took last time, is SAVING_SHARE of
    the time since. The first save has no such wait, nor has the last epoch's. Each process has one and calls the same
    methods.
    """

    def __init__(
        self, run: RunDir, attempt: Attempt, trainer: "Trainer", every_steps: int | None, every_minutes: float
    ) -> None:
        self.run, self.attempt, self.trainer = run, attempt, trainer
        self.every_steps, self.every_seconds = every_steps, 60 * every_minutes
        self._last = time.monotonic()
        self._cost = 0.0
        self._is_due_with_epoch = False

    def step(self, number: int) -> bool:
        """To be called after step `number` over all epochs; whether it is time to stop, in which case all is saved."""
        trainer, stop = self.trainer, self.trainer.agreed.stop
        is_due = trainer.agreed.save or (self.every_steps is not None and (number + 1) % self.every_steps == 0)
        # The last step's comes with the epoch's metrics, in a moment.
        self._is_due_with_epoch = is_due and trainer.step == trainer.steps_per_epoch
        if stop or (is_due and not self._is_due_with_epoch):
            self.save()
        # The processes' clocks differ: one of them looks, and all save after the step in which it says so.
        trainer.wishes.save = trainer.layout.is_main and time.monotonic() - self._last >= self.every_seconds
        return stop

    def epoch(self) -> None:
        """To be called after each epoch."""
        is_last = self.trainer.epoch == self.trainer.cell.training.epochs
        is_affordable = SAVING_SHARE * (time.monotonic() - self._last) >= self._cost
        [is_due] = self.trainer.layout.agree(is_last or is_affordable or self._is_due_with_epoch)
        if is_due:
            self.save()

    def save(self) -> None:
        """Saves where training stands; returns when it is on the disk."""
        from suite.run import checkpoint

        self.trainer.require_finite()  # a network that is lost is not worth keeping
        start = time.monotonic()
        state = self.trainer.state_dict()
        if self.trainer.layout.is_main:
            checkpoint.save(self.run.checkpoints, state, self.attempt.require_newest)
        self.trainer.layout.wait()
        self._last = time.monotonic()
        self._cost = self._last - start


class Record:
    """Everything rank 0 writes besides."""

    def __init__(self, run: RunDir, attempt: Attempt, trainer: "Trainer") -> None:
        self.run, self.attempt, self.trainer = run, attempt, trainer
        self.journal = Journal(run.journal, attempt)

    def epoch(self, metrics: dict[str, float]) -> None:
        """Journal first, then the checkpoint: an epoch that is trained again is recorded again, never lost."""
        self.journal.append(self.trainer.epoch, metrics)
        log.info("epoch %d/%d %s", self.trainer.epoch, self.trainer.cell.training.epochs, _line(metrics))

    def result(self, soft: "Evaluation", hard: "Evaluation", weights_sha256: str) -> None:
        """predictions.npz, then result.json: its presence means done, so it comes after all else."""
        trainer = self.trainer
        num_binary = sum(trainer.num_parameters[name] for name in trainer.split.binary)
        import numpy as np

        results = soft.metrics("test", "_soft") | hard.metrics("test", "_hard")
        self.journal.append(trainer.epoch, results)
        self.attempt.require_newest()
        content = io.BytesIO()
        # Which test images it gets right, in the data set's order: what a comparison over images starts from.
        np.savez_compressed(content, hard=hard.right.numpy(), soft=soft.right.numpy())
        write_bytes(self.run.predictions_path, content.getvalue(), self.attempt.require_newest)
        is_first = write_once(
            self.run.result_path,
            as_json(
                {
                    "cell": trainer.cell.id,
                    "name": trainer.cell.name,
                    **{name.removeprefix("test/"): value for name, value in results.items()},
                    "num_train_images": trainer.loaders.num_train_images,
                    "num_binary_parameters": num_binary,
                    "num_full_precision_parameters": sum(trainer.num_parameters.values()) - num_binary,
                    "weights_sha256": weights_sha256,
                }
            ),
        )
        if not is_first:
            raise SupersededError(f"{self.run.path}: another attempt has written the result")
        self.attempt.finish(state="done", cause=None, reason="")
        log.info("done %s", _line(results))

    def close(self) -> None:
        """Closes the journal."""
        self.journal.close()


def _line(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
