"""Tests, intervals and plans as pure functions of float64 arrays, without pandas; open `stratified.py` first."""
