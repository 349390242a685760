"""Exports a run's network to a file: `python -m suite.export RUN`. Open `one_bit` for the format."""
