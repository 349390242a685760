"""A run's files: directory, journal, checkpoints, provenance and failures; and replicas, for instance in MLflow.

Start reading at `directory`.
"""
