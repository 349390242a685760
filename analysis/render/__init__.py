"""Comparisons as tables, sentences, figures, a report; nothing is computed here. Open `words.py` first."""
