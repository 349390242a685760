"""Renders comparisons as tables, sentences, figures and a report; computes nothing. Open `words.py` first."""
