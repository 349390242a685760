"""Building what a cell describes, and training it: model, loss, epochs, evaluation, averaging, mixup, seeds.

Open `trainer` first.
"""
