"""What some tests need of the machine. Without it they are skipped, and pytest says so in one line for each thing.

The line is the reason of the skip, so it has to be the same wherever the thing is missing.
"""

import os
import shutil
from functools import cache

NOT_ROOT = "not root: without a private SLURM cluster and a small disk"


@cache
def no_ffcv() -> str | None:
    """Why FFCV cannot be used, in one line; None where it can. It is imported: an FFCV may be there and not load."""
    try:
        import cv2  # noqa: F401 - FFCV's
        import ffcv  # noqa: F401
    except (ImportError, OSError) as error:
        return f"no FFCV ({error}): pip install 'proxbench[ffcv]'"
    return None


def no_latex() -> str | None:
    """Why no LaTeX can be run, in one line; None where it can."""
    return None if shutil.which("tectonic") or shutil.which("pdflatex") else "no LaTeX: neither tectonic nor pdflatex"


def not_root() -> str | None:
    """NOT_ROOT for other users."""
    return None if os.geteuid() == 0 else NOT_ROOT
