"""What a run writes and leaves: its directory, journal, checkpoints, provenance, failures, and their MLflow replica.

Open `directory` first.
"""
