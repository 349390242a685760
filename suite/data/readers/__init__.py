"""From sample numbers to pixels: from memory, image files or FFCV files."""
