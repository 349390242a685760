"""Commands that jobs run in a separate process.

python -m launch.worker hand-on SPEC    run by the batch script: submits a successor if SLURM does not restart the job
python -m launch.worker supply GRID     run by a worker: submits more workers if cells are ready and the site has room
"""

import sys
from pathlib import Path

from launch.slurm.client import SlurmError
from launch.supply import hand_on, supply
from suite.errors import UserError


def main(arguments: list[str]) -> None:
    """Runs the command with its path."""
    word, path = arguments
    if word == "hand-on":
        print(f"submitted job {hand_on(Path(path))} to replace this one", flush=True)
        return
    try:
        made = supply(Path(path))
    except SlurmError as error:  # no sbatch on this node, or the controller is down: a later launch submits them
        print(f"could not submit more workers: {error}", flush=True)
    else:
        if made.num_workers:
            print(f"submitted {made.num_workers} more workers (job {', '.join(made.job_ids)})", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        raise SystemExit(str(error)) from None
