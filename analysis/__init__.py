"""Many results: an MLflow store -> one tidy frame -> paired comparisons -> tables; see `python -m analysis --help`."""
