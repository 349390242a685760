"""Images and labels: data sets by name, their readers, and the loader that makes batches of samples by number.

Start reading at `loader`.
"""
