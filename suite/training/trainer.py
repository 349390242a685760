"""A cell's network and its training loop. Checkpoints are possible after any step; the test set is used once."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from suite.data.loader import Loader
from suite.data.source import Description
from suite.engines.process_group import Agreement, Layout
from suite.recipe.cell import Cell
from suite.recipe.settings import AS_IS, Execution
from suite.run import checkpoint
from suite.run.failures import DivergedError
from suite.training.build import (
    Weights,
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
from suite.training.evaluation import Evaluation, Health, evaluate
from suite.training.mixup import mix, mixes
from suite.training.seeds import stream
from suite.training.teacher import Teacher, published

Batch = tuple[Tensor, Tensor]


class Staged:
    """A loader's batches, each fetched during the previous step; `seconds` is the time spent waiting for them.

    On a GPU, a step is only queued when its call returns, so the next batch is prepared while the step runs.
    """

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.seconds = 0.0
        self._batches = batches
        self._next = self._fetch()

    def __iter__(self) -> "Staged":
        return self

    def __next__(self) -> Batch:
        if self._next is None:
            raise StopIteration
        batch, self._next = self._next, None
        return batch

    def stage(self) -> None:
        """Fetches the batch after the current one."""
        self._next = self._fetch()

    def _fetch(self) -> Batch | None:
        start = time.perf_counter()
        batch = next(self._batches, None)
        self.seconds += time.perf_counter() - start
        return batch


@dataclass
class Wishes:
    """Requests that take effect after the current step: stop training, save a checkpoint."""

    stop: bool = False
    save: bool = False


class LateLoss:
    """The loss [] of a step, read later. On a GPU, its copy is queued behind the step, and read() waits for it."""

    def __init__(self, number: int, loss: Tensor) -> None:
        self.number, self._loss = number, loss
        self._copied: torch.cuda.Event | None = None
        if loss.device.type == "cuda":
            self._loss = torch.empty((), dtype=loss.dtype, pin_memory=True).copy_(loss, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def read(self) -> float:
        """The loss's value."""
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._loss)


class Network:
    """A cell's network with its optimizer and averages, on one process of its layout; needs no data.

    Args:
        cell: the network's cell.
        description: description of the data set.
        layout: this process's rank, world size and device.
        weights: initial weights; None: drawn from the cell's seed.
        execution: how the cell runs.
    """

    def __init__(
        self,
        cell: Cell,
        description: Description,
        layout: Layout,
        weights: Weights | None = None,
        execution: Execution = AS_IS,
    ) -> None:
        self.cell, self.description, self.layout, self.execution = cell, description, layout, execution
        model, self.split = build_model(cell, description, weights)
        self.num_parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self.engine = build_engine(cell, model, self.split, layout, execution)
        self.optimizer = self.engine.optimizer
        decay, binary = cell.training.ema_decay, frozenset(self.split.binary)
        average = partial(MovingAverage, self.engine.model, self.optimizer, binary, warmup=cell.training.ema_warmup)
        self.average = None if decay is None else average(decay)
        self.epoch = 0

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a checkpoint of this cell.

        Raises:
            CheckpointError: the checkpoint belongs to another cell.
        """
        if state["cell"] != self.cell.id:
            raise checkpoint.CheckpointError(f"the checkpoint is of cell {state['cell']}, this is {self.cell.id}")
        self.epoch = state["epoch"]
        self.engine.load_state_dict(state["engine"])
        if self.average is not None:
            self.average.averages = {name: value.to(self.layout.device) for name, value in state["average"].items()}

    def deploy(self) -> None:
        """Turns the trained network into the tested one: uses averages if kept, sign(w*), and scales as layers' gains.

        The result depends only on the state in a checkpoint. Training cannot continue afterwards.
        """
        if self.average is not None:
            self.average.swap()
        self.engine.harden()
        models.harden_inputs(self.engine.model)
        if self.cell.quantization.scale != "none":
            models.fold_scales(self.engine.model, self.split)

    def weights_digest(self) -> str:
        """SHA-256 of the current network; result.json holds the tested network's."""
        return weights_digest(self.engine.weights())


class Trainer(Network):
    """Trains one cell on one process of its layout.

    `epoch` counts finished epochs, `step` finished steps of the current epoch. `wishes` has this process's requests,
    which a signal handler may set at any time; `agreed` has the requests of any process, which all now act on.

    Args:
        cell: the cell to train.
        layout: this process's rank, world size and device.
        data_dir: directory of the data sets.
        weights: initial weights, from the parent cell.
        execution: how the cell runs.
        is_resumed: a checkpoint's state is loaded next, so published weights are not fetched.
        teacher: the network that a distilled cell learns from, if it belongs to another cell.
    """

    def __init__(
        self,
        cell: Cell,
        layout: Layout,
        data_dir: Path,
        weights: Weights | None,
        execution: Execution = AS_IS,
        *,
        is_resumed: bool = False,
        teacher: Teacher | None = None,
    ) -> None:
        source = load_source(cell, layout, data_dir, execution)
        self.data_checksum = source.checksum
        self.weights_checksum: str | None = None
        self.teacher_checksum: str | None = None
        self.loaders = build_loaders(cell, source, layout, execution)
        if cell.init == "pretrained" and not is_resumed:
            values, self.weights_checksum = pretrained_weights(cell, source.description, layout, data_dir)
            weights = Weights(values)
        self.teacher = teacher
        if cell.distillation is not None and cell.distillation.weights is not None:
            self.teacher, self.teacher_checksum = published(
                cell, source.description, layout, data_dir, self.loaders.train.normalization
            )
        super().__init__(cell, source.description, layout, weights, execution)
        self.steps_per_epoch = len(self.loaders.train)
        self.num_steps = cell.training.epochs * self.steps_per_epoch
        self.sharpness = build_sharpness(cell, self.optimizer, self.num_steps)
        self.input_mu = build_input_mu(cell)
        self.lr_schedule = build_lr_schedule(cell.training, self.optimizer, self.steps_per_epoch)
        self.health = Health(self.engine.latents)
        self.step = 0
        self.totals = self._no_totals()
        self.wishes, self.agreed = Wishes(), Wishes()
        self._agreement = Agreement(layout)
        self._unread: LateLoss | None = None
        self._last_bad = 0
        self._bad_loss = "not finite"
        self._sharpen_inputs()

    def train_epoch(self, on_step: Callable[[int, Tensor], None]) -> dict[str, float]:
        """Trains the rest of the epoch; returns the whole epoch's metrics. Validates with hardened weights.

        `on_step(number of the step over all epochs, loss [] of this process)` may save `state_dict()`.

        Raises:
            DivergedError: the loss is not finite on some process; the message names the step. All processes raise it.
        """
        self.engine.model.train()
        start, num_before = time.perf_counter(), float(self.totals[2])
        # Close the loader even if training fails: otherwise the traceback would keep its workers alive.
        with closing(self.loaders.train.epoch(self.epoch, self.step)) as loaded:
            batches = Staged(loaded)
            for images, labels in batches:
                number, loss = self._num_steps_done, self._train_step(images, labels)
                batches.stage()
                self._look_back(number, loss)
                on_step(number, loss)
        self.require_finite()
        seconds, num_here = time.perf_counter() - start, float(self.totals[2]) - num_before
        loss_sum, num_correct, num_images = self.layout.sum(self.totals).tolist()
        self.epoch, self.step, self.totals = self.epoch + 1, 0, self._no_totals()
        self._sharpen_inputs()
        metrics = {"train/loss": loss_sum / num_images, "train/top1": num_correct / num_images}
        if self.loaders.validation is not None:
            metrics |= self._validate(self.loaders.validation).metrics("val")
        metrics |= self.health.measure()
        metrics |= {
            "time/images_per_second": num_here * self.layout.world_size / seconds,
            "time/loader_stall_share": batches.seconds / seconds,
        }
        if self.sharpness is not None:
            metrics["mu"] = self.optimizer.param_groups[-1]["mu"]
        return metrics

    def _train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step; returns this process's mean loss []. A checkpoint may follow. Never waits for the device."""
        self.lr_schedule.step_update(self._num_steps_done)
        self._sharpen_inputs()
        if self.sharpness is not None:
            self.sharpness.step()
        # Only dropout draws random numbers outside the loaders. Each step has its own stream, so there is no generator
        # state to save.
        torch.manual_seed(stream(self.cell.seed, "dropout", self.epoch, self.step, self.layout.rank))
        images, targets = self._mixed(images, labels)
        soft = None if self.teacher is None else self.teacher.logits(images)
        loss, logits = self.engine.train_step(images, targets, soft)
        if self.average is not None:
            self.average.update(self._num_steps_done)
        self.totals[0] += loss * len(labels)
        self.totals[1] += (logits.argmax(1) == labels).sum()
        self.totals[2] += len(labels)
        self.step += 1
        return loss

    def _mixed(self, images: Tensor, labels: Tensor) -> Batch:
        """The step's images and labels; labels are [B, classes] if the recipe mixes images."""
        if not mixes(self.cell.training):
            return images, labels
        seed = stream(self.cell.seed, "mixing", self.epoch, self.step, self.layout.rank)
        return mix(images, labels, self.cell.training, len(self.description.classes), seed)

    def _look_back(self, number: int, loss: Tensor) -> None:
        """Reads the loss of the step before `number` and, if an exchange was started, the other processes' requests.

        Both have arrived by now, so the device never waits for this process.
        """
        self._last_bad = max(self._last_bad, self._read_loss())
        self._unread = LateLoss(number, loss)
        if self.layout.world_size == 1:
            self._require_converging(self._last_bad)
            self.agreed = Wishes(self.wishes.stop, self.wishes.save)
            return
        diverged, stop, save = self._agreement.result() or (0, 0, 0)
        self._require_converging(diverged)
        self.agreed = Wishes(bool(stop), bool(save))
        if save:
            self.wishes.save = False
        self._agreement.start(self._last_bad, self.wishes.stop, self.wishes.save)

    def require_finite(self) -> None:
        """Raises DivergedError, on all processes, if the loss of any step so far is not finite. Collective."""
        self._last_bad = max(self._last_bad, self._read_loss())
        self._require_converging(self.layout.agree(self._last_bad)[0])

    def _read_loss(self) -> int:
        """Reads the pending loss; returns its step number + 1 if it is not finite, else 0."""
        unread, self._unread = self._unread, None
        if unread is None or math.isfinite(value := unread.read()):
            return 0
        self._bad_loss = f"{value}"
        return unread.number + 1

    def _require_converging(self, diverged: int) -> None:
        if diverged:
            epoch = (diverged - 1) // self.steps_per_epoch + 1
            raise DivergedError(f"the loss is {self._bad_loss} at step {diverged - 1} (epoch {epoch})")

    def test(self) -> tuple[Evaluation, Evaluation]:
        """(soft, with w = F(w*); hard, with sign(w*)) on the test set; for a trial, on the validation part.

        The network is deployed afterwards.
        """
        with self.average.in_place() if self.average is not None else nullcontext():
            soft = self._evaluate(self.loaders.final)
        self.deploy()
        return soft, self._evaluate(self.loaders.final)

    def deploy(self) -> None:
        """Like Network.deploy, and re-estimates batch-norm statistics if the recipe requests it."""
        super().deploy()
        if self.cell.training.reestimate_norm:
            self._reestimate_norm()

    def state_dict(self) -> dict[str, Any]:
        """The complete training state, the same on all processes. Collective.

        Tensors may be live instead of copies.
        """
        return {
            "cell": self.cell.id,
            "data": self.data_checksum,
            "description": self.description.as_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "totals": self.layout.gather(self.totals),
            "engine": self.engine.state_dict(),
            "sharpness": None if self.sharpness is None else self.sharpness.state_dict(),
            "health": self.health.state_dict(),
            "average": None if self.average is None else self.average.averages,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a checkpoint of this cell.

        Raises:
            CheckpointError: the checkpoint belongs to another cell or was trained on other data.
        """
        if state["data"] != self.data_checksum:
            raise checkpoint.CheckpointError(
                f"{self.cell.dataset} differs from the data of this run so far (checksum {self.data_checksum[:12]}, "
                f"before {state['data'][:12]}): restore the data, or delete the run's directory to start over"
            )
        super().load_state_dict(state)
        self.step = state["step"]
        self.totals = self._own_totals(state["totals"].to(self.layout.device))
        self._sharpen_inputs()
        if self.sharpness is not None:
            self.sharpness.load_state_dict(state["sharpness"])
        self.health.load_state_dict(state["health"])

    def resolved_execution(self) -> dict[str, Any]:
        """How this attempt runs, with every default resolved to its actual value."""
        share = self.cell.training.batch_size // self.layout.world_size
        return {
            **self.execution.model_dump(mode="json"),
            "device": self.layout.device.type,
            "tf32": self.layout.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32,
            "num_processes": self.layout.world_size,
            "num_threads": torch.get_num_threads(),
            "micro_batch_size": min(self.execution.micro_batch_size or share, share),
            "fused": self.optimizer.is_fused,
            "loader": self.loaders.train.reader.name,
        }

    def _validate(self, validation: Loader) -> Evaluation:
        """Evaluates with hardened weights, then restores the training state."""
        with self.average.in_place() if self.average is not None else nullcontext():
            self.engine.harden()
            models.harden_inputs(self.engine.model)
            found = self._evaluate(validation)
            models.soften_inputs(self.engine.model)
            self.engine.soften()
        return found

    @property
    def _num_steps_done(self) -> int:
        """Finished steps over all epochs."""
        return self.epoch * self.steps_per_epoch + self.step

    def _no_totals(self) -> Tensor:
        """This process's sums of losses, correct predictions and images in the current epoch: float64 [3], all 0."""
        return torch.zeros(3, dtype=torch.float64, device=self.layout.device)

    def _own_totals(self, totals: Tensor) -> Tensor:
        """This process's row of the totals [processes, 3]; if the number of processes changed, rank 0 gets the sum.

        Not summed across ranks: floating-point sums depend on their order, and this must resume bit-exactly.
        """
        if len(totals) == self.layout.world_size:
            return totals[self.layout.rank].clone()
        return totals.sum(0) if self.layout.is_main else self._no_totals()

    def _sharpen_inputs(self) -> None:
        """Sets the mu of binary inputs for the next forward pass, at the same progress as the mu of w."""
        if self.input_mu is not None:
            models.set_input_mu(self.engine.model, self.input_mu(self._num_steps_done / self.num_steps))

    def _evaluate(self, loader: Loader) -> Evaluation:
        # Norm statistics differ between processes; evaluate with the ones that are saved.
        self.layout.broadcast(self.engine.model.buffers())
        return evaluate(self.engine, loader, self.layout, self.execution.micro_batch_size)

    def _reestimate_norm(self) -> None:
        """Re-estimates the hardened network's batch-norm statistics on one epoch of process 0's training data.

        Uses training's precision and micro-batches. All micro-batches have equal weight in the mean.
        """
        model = self.engine.model
        # Dropout stays on here; its own stream makes a resumed run deploy the same network.
        torch.manual_seed(stream(self.cell.seed, "dropout", self.epoch, self.layout.rank))
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        momenta = {module: module.momentum for module in model.modules() if isinstance(module, kinds)}
        for norm in momenta:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative mean
        model.train()
        with closing(self.loaders.train.epoch(self.epoch)) as batches:
            for images, _ in batches:
                for part in torch.split(images, self.execution.micro_batch_size or len(images)):
                    self.engine.logits(part)
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        self.layout.broadcast(model.buffers())


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over a model's parameters and statistics by name: equal digests mean equal networks."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        # Flatten before viewing as bytes: a 1x1 convolution in channels-last order claims to be contiguous but is not.
        flat = value.cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data if value.ndim else repr(value.item()).encode())
    return digest.hexdigest()
