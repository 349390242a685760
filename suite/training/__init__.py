"""Builds and trains a cell: model, loss, epochs, evaluation, averaging, mixup, seeds.

Start reading at `trainer`.
"""
