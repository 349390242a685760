"""One run: what it is (recipe), its directory (run), its training, engines, data, and the file it is exported to.

Open `train` first: the command, from a cell file to a result.
"""
