"""Imported first by the server that data workers are forked from: signals to stop are for those who can save.

SLURM sends them to every process of a job; a worker that died of one would fail its training. They are blocked, not
ignored: a worker inherits that when it is forked, and keeps it when torch sets its own handler of SIGTERM.
"""

import signal

signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR2))
