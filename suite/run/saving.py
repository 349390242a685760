"""Saving during a run: checkpoints (a collective operation), and the files that only rank 0 writes."""

import io
import logging
import time
from typing import TYPE_CHECKING

from suite.run.atomic import as_json, write_bytes, write_once
from suite.run.attempt import Attempt, SupersededError
from suite.run.directory import RunDir
from suite.run.journal import Journal

if TYPE_CHECKING:  # imports torch and timm, which would delay reporting a bad cell file
    from suite.training.evaluation import Evaluation
    from suite.training.trainer import Trainer

SAVING_SHARE = 0.005
"""Maximum share of training time spent on saving at the ends of epochs."""
log = logging.getLogger("suite.train")


class Checkpoints:
    """Writes the run's checkpoints: every `every_steps` steps or `every_minutes` minutes, and at the ends of epochs.

    Not every short epoch is saved, only one at whose end the last save's duration is at most SAVING_SHARE of the time
    elapsed since. This does not apply to the first save or the last epoch. Each process has one instance and calls the
    same methods.
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
        """Call after step `number`, counted over all epochs. Returns True if training must stop, after saving."""
        trainer, stop = self.trainer, self.trainer.agreed.stop
        is_due = trainer.agreed.save or (self.every_steps is not None and (number + 1) % self.every_steps == 0)
        # `epoch` saves an epoch's last step, right after its metrics are recorded.
        self._is_due_with_epoch = is_due and trainer.step == trainer.steps_per_epoch
        if stop or (is_due and not self._is_due_with_epoch):
            self.save()
        # The processes' clocks differ, so rank 0 decides; all save after the step at which they receive its request.
        trainer.wishes.save = trainer.layout.is_main and time.monotonic() - self._last >= self.every_seconds
        return stop

    def epoch(self) -> None:
        """Call after each epoch."""
        is_last = self.trainer.epoch == self.trainer.cell.training.epochs
        is_affordable = SAVING_SHARE * (time.monotonic() - self._last) >= self._cost
        [is_due] = self.trainer.layout.agree(is_last or is_affordable or self._is_due_with_epoch)
        if is_due:
            self.save()

    def save(self) -> None:
        """Saves the current state; returns when it is on disk."""
        from suite.run import checkpoint

        self.trainer.require_finite()  # never save a diverged network
        start = time.monotonic()
        state = self.trainer.state_dict()
        if self.trainer.layout.is_main:
            checkpoint.save(self.run.checkpoints, state, self.attempt.require_newest)
        self.trainer.layout.wait()
        self._last = time.monotonic()
        self._cost = self._last - start


class Record:
    """The files that only rank 0 writes: journal, predictions and result."""

    def __init__(self, run: RunDir, attempt: Attempt, trainer: "Trainer") -> None:
        self.run, self.attempt, self.trainer = run, attempt, trainer
        self.journal = Journal(run.journal, attempt)

    def epoch(self, metrics: dict[str, float]) -> None:
        """Records an epoch. Call before saving its checkpoint, so that it may be recorded twice but is never lost."""
        self.journal.append(self.trainer.epoch, metrics)
        log.info("epoch %d/%d %s", self.trainer.epoch, self.trainer.cell.training.epochs, _line(metrics))

    def result(self, soft: "Evaluation", hard: "Evaluation", weights_sha256: str) -> None:
        """Writes predictions.npz, and last result.json, because its presence means done.

        A trial's numbers (`val_top1_hard` etc.) are for the validation part, and it has no predictions.
        """
        import numpy as np

        trainer = self.trainer
        num_binary = sum(trainer.num_parameters[name] for name in trainer.split.binary)
        part = "val" if trainer.cell.trial else "test"
        results = soft.metrics(part, "_soft") | hard.metrics(part, "_hard")
        self.journal.append(trainer.epoch, results)
        self.attempt.require_newest()
        if not trainer.cell.trial:
            content = io.BytesIO()
            # Which test images are classified correctly, in the data set's order, to compare runs image by image.
            np.savez_compressed(content, hard=hard.right.numpy(), soft=soft.right.numpy())
            write_bytes(self.run.predictions_path, content.getvalue(), self.attempt.require_newest)
        is_first = write_once(
            self.run.result_path,
            as_json(
                {
                    "cell": trainer.cell.id,
                    "name": trainer.cell.name,
                    **{name.removeprefix("test/").replace("/", "_"): value for name, value in results.items()},
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
