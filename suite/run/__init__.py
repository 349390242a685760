"""A run's files: its directory, journal, checkpoints, provenance, failures, and their MLflow replica.

Start reading at `directory`.
"""
