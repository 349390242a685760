"""Images and labels: named data sets, their readers, and the loader that makes batches from sample numbers.

Start reading at `loader`.
"""
