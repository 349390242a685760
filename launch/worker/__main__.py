"""What jobs call in a process of its own.

python -m launch.worker hand-on SPEC    the batch script, if SLURM does not start its job again: one more worker
python -m launch.worker supply GRID     a worker: more workers, if cells are ready and the site has room
"""

import sys
from pathlib import Path

from launch.slurm.client import SlurmError
from launch.supply import hand_on, supply
from suite.errors import UserError


def main(arguments: list[str]) -> None:
    """Does what the first word says to the path that follows."""
    word, path = arguments
    if word == "hand-on":
        print(f"handed in job {hand_on(Path(path))} in place of this one", flush=True)
        return
    try:
        made = supply(Path(path))
    except SlurmError as error:  # no sbatch on nodes, the controller is away: a later launch does it
        print(f"could not hand in more workers: {error}", flush=True)
    else:
        if made.num_workers:
            print(f"handed in {made.num_workers} more workers (job {', '.join(made.job_ids)})", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        raise SystemExit(str(error)) from None
