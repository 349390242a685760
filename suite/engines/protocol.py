"""How a training step runs on the hardware at hand, behind one small protocol.

`plain` is one process or DDP; `deepspeed` is ZeRO. Every method is collective: all processes call it, in one order.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from quantizers import ProxConnect, Quantizer
from suite.engines.process_group import EngineError, Layout


class Latent(NamedTuple):
    """A quantized parameter's w*, unsharded (in the parameter's shape), with its catalogue row and current mu."""

    name: str
    w_star: Tensor
    row: Quantizer
    mu: float


class Engine(Protocol):
    """Forward, backward and optimizer step of one global batch.

    `optimizer.param_groups` holds the settings (lr, mu) that schedules change; its tensors belong to the engine.
    """

    model: nn.Module
    optimizer: ProxConnect

    def train_step(self, images: Tensor, labels: Tensor, soft: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step on this process's share [B, C, H, W]; (mean loss [], logits [B, classes]), both detached.

        `soft`: a teacher's logits [B, classes], also passed to the criterion.
        """

    def logits(self, images: Tensor) -> Tensor:
        """Forward pass [B, C, H, W] -> [B, classes] in the recipe's precision, without gradients."""

    def weights(self) -> dict[str, Tensor]:
        """The current network, parameters (w) and buffers, as full tensors by name on every process.

        They may be live tensors instead of copies. Here, in `state_dict` and in `harden`, all processes use the norm
        statistics of the first one, as under DDP.
        """

    def state_dict(self) -> dict[str, Any]:
        """The complete training state, independent of sharding: full tensors by parameter name, on every process.

        {"model": weights(),
         "optimizer": {"update", "state": {name: {"w_star", "mu", the base's entries}},
                       "param_groups": [{..., "params": names}]},
         "scaler": of fp16, else None}
        They may be live tensors instead of copies.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a state of any engine and number of processes; bit-exactly if both are the same.

        Raises:
            ValueError: the state belongs to another recipe.
        """

    def harden(self) -> None:
        """Puts the deployed weights into the model: sign(w*), times its scale if the recipe has one.

        F(w*) if the quantizer's row is not binary.
        """

    def soften(self) -> None:
        """Undoes harden(): restores the training weights w, bit for bit."""

    def latents(self) -> Iterator[Latent]:
        """The latents, one by one, in the order of the groups. Collective: iterate to the end."""


def require_same_recipe(saved: Mapping[str, Any], optimizer: ProxConnect, names: list[list[str]]) -> None:
    """Raises ValueError unless a state's "optimizer" part has the same update, quantizers and parameters, by group."""
    theirs, ours = saved["param_groups"], optimizer.param_groups
    for what, there, here in (
        ("update", saved["update"], optimizer.update),
        ("quantizers", [group.get("quantizer") for group in theirs], [group.get("quantizer") for group in ours]),
        ("numbers of parameters", [len(group["params"]) for group in theirs], [len(group) for group in names]),
    ):
        if there != here:
            raise ValueError(f"the state is of another recipe: {what}: {there} in the state, {here} here")
    for group, mine in zip(theirs, names, strict=True):
        if odd := sorted(set(group["params"]) ^ set(mine)):
            raise ValueError(f"the state is of another model: not in both: {', '.join(odd)}")


def require_agreement(optimizer: ProxConnect, layout: Layout) -> None:
    """Raises EngineError unless all processes use the fused step, or none does. Collective.

    The two steps differ in the last bits, so replicas that used different ones would drift apart and flip signs.
    """
    is_fused = optimizer.is_fused
    if layout.agree(is_fused, not is_fused) == [1, 1]:
        here = "can" if is_fused else "cannot"
        raise EngineError(
            f"this process {here} use the fused optimizer step and another differs: install g++ on all nodes, or set "
            "execution.fused: false"
        )


def copied(value: Any) -> Any:  # noqa: ANN401  (an entry of a base optimizer's state)
    """A copy, on the CPU if it is a tensor (a step count, say): torch's optimizers move it as needed."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
