"""The comparisons of a study, from which every table, sentence and figure is drawn; open `comparison.py` first."""
