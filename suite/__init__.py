"""One run: its configuration (recipe), directory (run), training, engines, data, and the file it is exported to.

Start reading at `train`, the command that turns a cell file into a result.
"""
