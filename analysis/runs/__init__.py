"""Run directories or an MLflow store -> one tidy frame, one row per cell; open `frame.py` first."""
