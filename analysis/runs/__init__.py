"""Run directories or an MLflow store -> one tidy frame, a row for each cell; open `frame.py` first."""
