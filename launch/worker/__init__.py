"""A worker trains ready cells one after another in its slots, here or in a SLURM job. Start with worker.py."""
