"""The epoch loop of one cell: train, record, checkpoint, resume; at the end the test set, read once."""

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from suite import checkpoint
from suite.assemble import (
    Loader,
    build_criterion,
    build_input_mu,
    build_loaders,
    build_lr_schedule,
    build_model,
    build_optimizer,
    build_sharpness,
)
from suite.averaging import MovingAverage
from suite.config import Cell
from suite.data import sources
from suite.distributed import Layout
from suite.engine.plain import PlainEngine
from suite.evaluate import Health, top1
from suite.seeds import stream


class DivergedError(Exception):
    """The loss is NaN or infinite."""


class Trainer:
    """One cell on one process of its layout. `epoch` counts finished epochs."""

    def __init__(self, cell: Cell, layout: Layout, data_dir: Path, parent_weights: dict[str, Tensor] | None) -> None:
        self.cell, self.layout = cell, layout
        source = sources.load(cell.dataset, data_dir)
        self.data_checksum, self.classes = source.checksum, source.classes
        self.num_test_images = len(source.test.labels)
        self.loaders = build_loaders(cell, source, layout)
        model, self.split = build_model(cell, source, parent_weights)
        model.to(layout.device).to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(cell, model, self.split)
        steps_per_epoch = len(self.loaders.train)
        self.num_steps = cell.training.epochs * steps_per_epoch
        self.sharpness = build_sharpness(cell, self.optimizer, self.num_steps)
        self.input_mu = build_input_mu(cell)
        self.lr_schedule = build_lr_schedule(cell.training, self.optimizer, steps_per_epoch)
        self.health = Health(self.optimizer)
        decay = cell.training.ema_decay
        binary = frozenset(self.split.binary)
        self.average = None if decay is None else MovingAverage(model, self.optimizer, binary, decay)
        self.engine = PlainEngine(
            model,
            self.optimizer,
            build_criterion(cell.training),
            layout,
            bf16=cell.training.precision == "bf16",
            clip_grad_norm=cell.training.clip_grad_norm,
        )
        self.epoch = 0
        self._sharpen_inputs(0)

    def train_epoch(self, on_step: Callable[[int, float], None]) -> dict[str, float]:
        """One epoch; its metrics, accuracy on validation data measured with hardened weights.

        Raises:
            DivergedError: the loss is not finite; the message names the step.
        """
        # The only random numbers drawn outside the loaders are dropout's: its own stream, per process and epoch.
        torch.manual_seed(stream(self.cell.seed, "dropout", self.epoch, self.layout.rank))
        self.engine.model.train()
        start = time.perf_counter()
        totals = torch.zeros(3, dtype=torch.float64, device=self.layout.device)
        first = self.epoch * len(self.loaders.train)
        for step, (images, labels) in enumerate(self.loaders.train.epoch(self.epoch), first):
            self.lr_schedule.step_update(step)
            self._sharpen_inputs(step)
            if self.sharpness is not None:
                self.sharpness.step()
            loss, logits = self.engine.train_step(images, labels)
            if self.average is not None:
                self.average.update()
            if not math.isfinite(value := loss.item()):
                raise DivergedError(f"the loss is {value} at step {step} (epoch {self.epoch + 1})")
            totals[0] += loss * len(labels)
            totals[1] += (logits.argmax(1) == labels).sum()
            totals[2] += len(labels)
            on_step(step, value)
        loss_sum, num_correct, num_images = self.layout.sum(totals).tolist()
        seconds = time.perf_counter() - start
        self.epoch += 1
        self._sharpen_inputs(self.epoch * len(self.loaders.train))
        metrics = {"train/loss": loss_sum / num_images, "train/top1": num_correct / num_images}
        if self.loaders.validation is not None:
            metrics["val/top1"] = self._validate(self.loaders.validation)
        metrics |= self.health.measure()
        metrics |= {"time/images_per_second": num_images / seconds}
        if self.sharpness is not None:
            metrics["mu"] = self.optimizer.param_groups[-1]["mu"]
        return metrics

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
        self.optimizer.harden()
        models.harden_inputs(self.engine.model)
        if self.cell.training.reestimate_norm:
            self._reestimate_norm()

    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from."""
        return {
            "cell": self.cell.id,
            "epoch": self.epoch,
            "model": self.engine.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sharpness": None if self.sharpness is None else self.sharpness.state_dict(),
            "average": None if self.average is None else self.average.averages,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint of this cell.

        Raises:
            CheckpointError: it is another cell's.
        """
        if state["cell"] != self.cell.id:
            raise checkpoint.CheckpointError(f"the checkpoint is of cell {state['cell']}, this is {self.cell.id}")
        self.epoch = state["epoch"]
        self._sharpen_inputs(self.epoch * len(self.loaders.train))
        self.engine.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.sharpness is not None:
            self.sharpness.load_state_dict(state["sharpness"])
        if self.average is not None:
            self.average.averages = state["average"]
        self.health = Health(self.optimizer)

    def weights_digest(self) -> str:
        """The digest of the network as it is: what result.json has of the tested one."""
        return weights_digest(self.engine.model)

    def _validate(self, validation: Loader) -> float:
        """Accuracy with hardened weights; training goes on as if nothing had happened."""
        with self.average.in_place() if self.average is not None else nullcontext():
            self.optimizer.harden()
            models.harden_inputs(self.engine.model)
            accuracy = self._top1(validation)
            models.soften_inputs(self.engine.model)
            self.optimizer.soften()
        return accuracy

    def _sharpen_inputs(self, step: int) -> None:
        """Gives binary inputs the mu of the forward pass of `step`, counted over all epochs: what w has there, too."""
        if self.input_mu is not None:
            models.set_input_mu(self.engine.model, self.input_mu(step / self.num_steps))

    def _top1(self, loader: Loader) -> float:
        return top1(self.engine, loader.evaluation(), self.layout)

    def _reestimate_norm(self) -> None:
        """Batch-norm statistics of the hardened network over one epoch of training data; process 0's share counts."""
        model = self.engine.model
        device = self.layout.device
        # Dropout is on while statistics are gathered: its own stream, so that a resumed run deploys the same network.
        torch.manual_seed(stream(self.cell.seed, "dropout", self.epoch, self.layout.rank))
        torch.optim.swa_utils.update_bn((images for images, _ in self.loaders.train.epoch(self.epoch)), model, device)
        if self.layout.world_size > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the model's parameters and statistics: equal digests, equal networks."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        # Flat before it is seen as bytes: a 1x1 convolution in channels-last order calls itself contiguous and is not.
        flat = value.cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy() if value.ndim else repr(value.item()).encode())
    return digest.hexdigest()
