"""The epoch loop of one cell: train, checkpoint and resume after any step; at the end the test set, read once."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from suite.data.loader import Loader
from suite.engines.process_group import Layout
from suite.recipe.cell import AS_IS, Cell, Execution
from suite.run import checkpoint
from suite.run.failures import DivergedError
from suite.training.build import (
    build_engine,
    build_input_mu,
    build_loaders,
    build_lr_schedule,
    build_model,
    build_sharpness,
    load_source,
    pretrained_weights,
)
from suite.training.ema import MovingAverage
from suite.training.evaluation import Health, top1
from suite.training.mixup import mix, mixes
from suite.training.seeds import stream


@dataclass
class Wait:
    """How long the loader let training wait, in seconds: 0 where batches are ready when they are needed."""

    seconds: float = 0.0

    def for_each(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batches."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch


@dataclass
class Wishes:
    """What is to happen after the step under way: training stops, a checkpoint is saved."""

    stop: bool = False
    save: bool = False


class Trainer:
    """One cell on one process of its layout.

    `epoch` counts finished epochs, `step` those of the epoch under way. `wishes` are this process's own, which a signal
    handler may set at any moment; `agreed` are those that all processes acted upon after the last step: somebody's.
    """

    def __init__(
        self,
        cell: Cell,
        layout: Layout,
        data_dir: Path,
        parent_weights: dict[str, Tensor] | None,
        execution: Execution = AS_IS,
    ) -> None:
        self.cell, self.layout, self._execution = cell, layout, execution
        source = load_source(cell, layout, data_dir, execution)
        self.data_checksum, self.classes = source.checksum, source.classes
        self.weights_checksum: str | None = None
        self.num_test_images = len(source.test.labels)
        self.loaders = build_loaders(cell, source, layout, execution)
        if cell.init == "pretrained":
            parent_weights, self.weights_checksum = pretrained_weights(cell, source, layout, data_dir)
        model, self.split = build_model(cell, source, parent_weights)
        self.num_parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self.engine = build_engine(cell, model, self.split, layout, execution)
        self.optimizer = self.engine.optimizer
        self.steps_per_epoch = len(self.loaders.train)
        self.num_steps = cell.training.epochs * self.steps_per_epoch
        self.sharpness = build_sharpness(cell, self.optimizer, self.num_steps)
        self.input_mu = build_input_mu(cell)
        self.lr_schedule = build_lr_schedule(cell.training, self.optimizer, self.steps_per_epoch)
        self.health = Health(self.engine.latents)
        decay = cell.training.ema_decay
        binary = frozenset(self.split.binary)
        self.average = None if decay is None else MovingAverage(self.engine.model, self.optimizer, binary, decay)
        self.epoch = self.step = 0
        self.totals = self._no_totals()
        self.wishes, self.agreed = Wishes(), Wishes()
        self._sharpen_inputs()

    def train_epoch(self, on_step: Callable[[int, float], None]) -> dict[str, float]:
        """What is left of the epoch; the whole epoch's metrics, accuracy on validation data with hardened weights.

        `on_step(number of the step over all epochs, loss of this process)` may save `state_dict()`.

        Raises:
            DivergedError: the loss is not finite on some process; the message names the step. All processes raise.
        """
        self.engine.model.train()
        start, num_before = time.perf_counter(), float(self.totals[2])
        wait = Wait()
        # Closed, so that the loader's workers end with a training that fails: its traceback would keep them.
        with closing(self.loaders.train.epoch(self.epoch, self.step)) as batches:
            for images, labels in wait.for_each(batches):
                number, loss = self._num_steps_done, self._train_step(images, labels)
                on_step(number, loss)
        seconds, num_here = time.perf_counter() - start, float(self.totals[2]) - num_before
        loss_sum, num_correct, num_images = self.layout.sum(self.totals).tolist()
        self.epoch, self.step, self.totals = self.epoch + 1, 0, self._no_totals()
        self._sharpen_inputs()
        metrics = {"train/loss": loss_sum / num_images, "train/top1": num_correct / num_images}
        if self.loaders.validation is not None:
            metrics["val/top1"] = self._validate(self.loaders.validation)
        metrics |= self.health.measure()
        metrics |= {
            "time/images_per_second": num_here * self.layout.world_size / seconds,
            "time/loader_stall_share": wait.seconds / seconds,
        }
        if self.sharpness is not None:
            metrics["mu"] = self.optimizer.param_groups[-1]["mu"]
        return metrics

    def _train_step(self, images: Tensor, labels: Tensor) -> float:
        """One step, after which a checkpoint may be taken; this process's mean loss."""
        self.lr_schedule.step_update(self._num_steps_done)
        self._sharpen_inputs()
        if self.sharpness is not None:
            self.sharpness.step()
        # The only random numbers drawn outside the loaders are dropout's. Each step has a stream of its own, so that
        # there is no generator's state to be saved, and none to be lost.
        torch.manual_seed(stream(self.cell.seed, "dropout", self.epoch, self.step, self.layout.rank))
        loss, logits = self.engine.train_step(*self._mixed(images, labels))
        if self.average is not None:
            self.average.update()
        value = loss.item()
        self._agree(value)
        self.totals[0] += loss * len(labels)
        self.totals[1] += (logits.argmax(1) == labels).sum()
        self.totals[2] += len(labels)
        self.step += 1
        return value

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The step's images and labels, which are [B, classes] where the recipe mixes images."""
        if not mixes(self.cell.training):
            return images, labels
        seed = stream(self.cell.seed, "mixing", self.epoch, self.step, self.layout.rank)
        return mix(images, labels, self.cell.training, len(self.classes), seed)

    def _agree(self, loss: float) -> None:
        """One exchange a step, so that all processes do the same next."""
        diverged = 0 if math.isfinite(loss) else 1 + self.layout.rank
        diverged, stop, save = self.layout.agree(diverged, self.wishes.stop, self.wishes.save)
        if diverged:
            at = f"step {self._num_steps_done} (epoch {self.epoch + 1})"
            where = "" if self.layout.world_size == 1 else f" on process {diverged - 1}"
            raise DivergedError(f"the loss is {'not finite' if math.isfinite(loss) else loss} at {at}{where}")
        self.agreed = Wishes(bool(stop), bool(save))

    def test(self) -> dict[str, float]:
        """Accuracy on the test set: soft, with w = F(w*), then hard, with sign(w*). Leaves the network deployed."""
        with self.average.in_place() if self.average is not None else nullcontext():
            soft = self._top1(self.loaders.test)
        self.deploy()
        return {"test/top1_soft": soft, "test/top1_hard": self._top1(self.loaders.test)}

    def deploy(self) -> None:
        """Turns the trained network into the tested one: averages where kept, sign(w*), norms measured anew if asked.

        A function of the state that a checkpoint holds. Training does not go on from here.
        """
        if self.average is not None:
            self.average.swap()
        self.engine.harden()
        models.harden_inputs(self.engine.model)
        if self.cell.training.reestimate_norm:
            self._reestimate_norm()

    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from. All processes call it; what they get is the same.

        Tensors may be the live ones.
        """
        return {
            "cell": self.cell.id,
            "data": self.data_checksum,
            "epoch": self.epoch,
            "step": self.step,
            "totals": self.layout.gather(self.totals),
            "engine": self.engine.state_dict(),
            "sharpness": None if self.sharpness is None else self.sharpness.state_dict(),
            "health": self.health.state_dict(),
            "average": None if self.average is None else self.average.averages,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint of this cell.

        Raises:
            CheckpointError: it is another cell's, or was trained on other data.
        """
        if state["cell"] != self.cell.id:
            raise checkpoint.CheckpointError(f"the checkpoint is of cell {state['cell']}, this is {self.cell.id}")
        if state["data"] != self.data_checksum:
            raise checkpoint.CheckpointError(
                f"{self.cell.dataset} is not what this run was trained on so far (checksum {self.data_checksum[:12]}, "
                f"before {state['data'][:12]}): put the data back, or delete the run's directory to start anew"
            )
        self.epoch, self.step = state["epoch"], state["step"]
        self.totals = self._own_totals(state["totals"])
        self._sharpen_inputs()
        self.engine.load_state_dict(state["engine"])
        if self.sharpness is not None:
            self.sharpness.load_state_dict(state["sharpness"])
        self.health.load_state_dict(state["health"])
        if self.average is not None:
            self.average.averages = state["average"]

    def resolved_execution(self) -> dict[str, Any]:
        """How this attempt runs, every default replaced by what it came to."""
        share = self.cell.training.batch_size // self.layout.world_size
        return {
            **self._execution.model_dump(mode="json"),
            "device": self.layout.device.type,
            "num_processes": self.layout.world_size,
            "num_threads": torch.get_num_threads(),
            "micro_batch_size": min(self._execution.micro_batch_size or share, share),
            "fused": self.optimizer.is_fused,
            "loader": self.loaders.train.reader.name,
        }

    def weights_digest(self) -> str:
        """The digest of the network as it is: what result.json has of the tested one."""
        return weights_digest(self.engine.state_dict()["model"])

    def _validate(self, validation: Loader) -> float:
        """Accuracy with hardened weights; training goes on as if nothing had happened."""
        with self.average.in_place() if self.average is not None else nullcontext():
            self.engine.harden()
            models.harden_inputs(self.engine.model)
            accuracy = self._top1(validation)
            models.soften_inputs(self.engine.model)
            self.engine.soften()
        return accuracy

    @property
    def _num_steps_done(self) -> int:
        """Over all epochs."""
        return self.epoch * self.steps_per_epoch + self.step

    def _no_totals(self) -> Tensor:
        """Sum of losses, right answers and images, of this process in the epoch under way: float64 [3]."""
        return torch.zeros(3, dtype=torch.float64, device=self.layout.device)

    def _own_totals(self, totals: Tensor) -> Tensor:
        """This process's of each process's totals [world_size, 3]; on another number of processes, all for the first.

        Not the sum for everybody: the order of a sum is in its bits.
        """
        if len(totals) == self.layout.world_size:
            return totals[self.layout.rank].clone()
        return totals.sum(0) if self.layout.is_main else self._no_totals()

    def _sharpen_inputs(self) -> None:
        """Gives binary inputs the mu of the next forward pass: what w has there, too."""
        if self.input_mu is not None:
            models.set_input_mu(self.engine.model, self.input_mu(self._num_steps_done / self.num_steps))

    def _top1(self, loader: Loader) -> float:
        # Each process has norm statistics of its own batches; what is measured is the network that is saved.
        self.layout.broadcast(self.engine.model.buffers())
        return top1(self.engine, loader.evaluation(), self.layout)

    def _reestimate_norm(self) -> None:
        """Batch-norm statistics of the hardened network over one epoch of training data; process 0's share counts."""
        model = self.engine.model
        device = self.layout.device
        # Dropout is on while statistics are gathered: its own stream, so that a resumed run deploys the same network.
        torch.manual_seed(stream(self.cell.seed, "dropout", self.epoch, self.layout.rank))
        torch.optim.swa_utils.update_bn((images for images, _ in self.loaders.train.epoch(self.epoch)), model, device)
        self.layout.broadcast(model.buffers())


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over a model's parameters and statistics by name: equal digests, equal networks."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        # Flat before it is seen as bytes: a 1x1 convolution in channels-last order calls itself contiguous and is not.
        flat = value.cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data if value.ndim else repr(value.item()).encode())
    return digest.hexdigest()
