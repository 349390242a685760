"""Run configurations: cells, the grids that produce them, and grid files in YAML. Start reading at `cell`."""
