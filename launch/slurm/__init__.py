"""Asking SLURM (client), what jobs request (profile, resources), and handing workers over to it (hand_over)."""
