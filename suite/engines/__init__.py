"""How a training step runs on the hardware: one process, DDP, or DeepSpeed ZeRO, behind the Engine of `protocol`."""
