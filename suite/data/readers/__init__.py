"""From sample numbers to pixels: held in memory, decoded from image files, or from FFCV files."""
