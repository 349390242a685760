"""Imported first by the server that data workers are forked from: signals to stop are for those who can save.

SLURM sends them to every process of a job; a worker that died of one would fail its training.
"""

import signal


def become_deaf(_worker: int = 0) -> None:
    """This process ignores signals to stop; in a worker once torch has set its own handler of SIGTERM."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


become_deaf()
