"""The comparisons of a study, the source of every table, sentence and figure; open `comparison.py` first."""
