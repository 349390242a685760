"""One run: its configuration (recipe), directory (run), training, engines, data, and its export to a file.

Start reading at `train`, the command that turns a cell file into a result.
"""
