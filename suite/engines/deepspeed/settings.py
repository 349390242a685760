"""DeepSpeed's configuration, in one function: the user may override anything that the recipe does not define."""

from collections.abc import Mapping
from typing import Any

from suite.engines.process_group import EngineError, Layout
from suite.recipe.grid_file import laid_over
from suite.recipe.settings import Execution, Training

LARGEST_BUCKET = 500_000_000  # DeepSpeed's default, in elements; a small model gets a smaller one
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
"""Keys that must not be overridden, and where to set each instead."""


def configuration(training: Training, execution: Execution, layout: Layout, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a run, with the overrides of `execution.deepspeed`.

    Raises:
        EngineError: an override would change the recipe.
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
        # Not "bf16": that makes the parameters and norms 16-bit, which changes the recipe. As under DDP, no gradients
        # are exchanged in 16 bits.
        "torch_autocast": {
            "enabled": training.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "gradient_clipping": 0.0,  # the default, 1, clips the norm of grad; ours clips B . grad
        "steps_per_print": 1_000_000_000,
    }
    if execution.offload:
        pinned = layout.device.type == "cuda"
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    _require_no_recipe(execution.deepspeed)
    return laid_over(settings, execution.deepspeed)


def _require_no_recipe(overrides: Mapping[str, Any]) -> None:
    """Raises EngineError if an override belongs in another setting or would change the cell's recipe."""
    for key, place in PLACES.items():
        if key in overrides:
            raise EngineError(f"execution.deepspeed.{key}: take {place}")
    if "stage" in overrides.get("zero_optimization", {}):
        raise EngineError("execution.deepspeed.zero_optimization.stage: take execution.zero_stage")
