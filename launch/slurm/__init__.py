"""SLURM: its client commands (client), what jobs request (profile, resources), and submitting workers (hand_over)."""
