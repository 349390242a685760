"""What SLURM says (client), what a job asks of it (resources), and handing workers over to it (hand_over)."""
