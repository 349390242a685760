"""Files that people take away from a run: `python -m suite.export RUN`. Open `one_bit` for the format."""
