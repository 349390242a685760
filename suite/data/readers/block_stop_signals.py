"""Blocks stop signals in data workers, which cannot save; imported first by the server that workers are forked from.

SLURM signals every process of a job, and a worker killed by such a signal would make its run fail. The signals are
blocked, not ignored: forked workers inherit the block, and it remains when torch sets its own SIGTERM handler.
"""

import signal

signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR2))
