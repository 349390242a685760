"""FFCV files from image files: `python -m suite.data prepare`. Open `pipeline` first."""
