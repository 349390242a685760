"""What is run: cells, the grids that they come from, and grid files in YAML. Open `cell` first."""
