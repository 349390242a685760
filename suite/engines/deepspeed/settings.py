"""The configuration that DeepSpeed gets, in one function: the recipe's numbers are the recipe's, the rest is open."""

from collections.abc import Mapping
from typing import Any

from suite.engines.process_group import EngineError, Layout
from suite.recipe.grid_file import laid_over
from suite.recipe.settings import Execution, Training

LARGEST_BUCKET = 500_000_000  # DeepSpeed's own default, in numbers, which a small model need not reserve
PLACES = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "execution.micro_batch_size",
    "gradient_accumulation_steps": "execution.micro_batch_size",
    "gradient_clipping": "training.clip_grad_norm",
    "optimizer": "training.optimizer",
    "scheduler": "training.schedule",
    "torch_autocast": "training.precision: bf16",
    "bf16": "training.precision: bf16",
    "fp16": "training.precision: bf16",
    "amp": "training.precision: bf16",
}
"""Keys that may not be overridden, and where each is set instead."""


def configuration(training: Training, execution: Execution, layout: Layout, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a run; `execution.deepspeed` is laid over it.

    Raises:
        EngineError: an override would make another recipe of it.
    """
    share = training.batch_size // layout.world_size
    size = min(execution.micro_batch_size or share, share)
    settings: dict[str, Any] = {
        "train_batch_size": training.batch_size,
        "train_micro_batch_size_per_gpu": size,
        "gradient_accumulation_steps": share // size,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": execution.zero_stage,
            "reduce_bucket_size": min(num_parameters + num_parameters % 2, LARGEST_BUCKET),
            "memory_efficient_linear": False,  # true replaces torch.nn.functional.linear, for all models
        },
        # Not "bf16": that makes the parameters and norms 16-bit, which is another recipe. No module's gradients are
        # exchanged in 16 bits either; DDP's are not.
        "torch_autocast": {
            "enabled": training.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "gradient_clipping": 0.0,  # its default is 1, and of the norm of grad, where ours is of B . grad
        "steps_per_print": 1_000_000_000,
    }
    if execution.offload:
        pinned = layout.device.type == "cuda"
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    _require_no_recipe(execution.deepspeed)
    return laid_over(settings, execution.deepspeed)


def _require_no_recipe(overrides: Mapping[str, Any]) -> None:
    """EngineError where an override has a place of its own, or would make another recipe of the cell's."""
    for key, place in PLACES.items():
        if key in overrides:
            raise EngineError(f"execution.deepspeed.{key}: take {place}")
    if "stage" in overrides.get("zero_optimization", {}):
        raise EngineError("execution.deepspeed.zero_optimization.stage: take execution.zero_stage")
