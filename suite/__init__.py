"""One run: a cell's configuration, its data, its training, its record."""
