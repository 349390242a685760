"""Checks that grids can run, each with its fix. Start with examination.py."""
