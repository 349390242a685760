"""From a command's options to jobs: shows what would start, or starts it, here or on SLURM."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from suite.recipe.cell import Cell, Execution

if TYPE_CHECKING:  # they import what a command of another kind must not wait for
    from rich.console import Console

    from launch.arrays import Array
    from launch.cluster import SlurmCluster
    from launch.plan import Standing
    from launch.resources import Profile
    from launch.submissions import Submission

EXIT_INTERRUPTED = 130  # the shells' number for Ctrl-C


@dataclass(frozen=True)
class Start:
    """The `wanted` ones of the grid's `cells`, to run as `executions` (by cell id) and the profile say.

    `train_options` go to suite.train.
    """

    grid_dir: Path
    cells: list[Cell]
    wanted: list[Cell]
    executions: Mapping[str, Execution]
    data_dir: Path
    tracking_uri: str
    profile: "Profile"
    train_options: tuple[str, ...]

    def locally(self) -> NoReturn:
        """Runs them here and says what came of it. Exit status 1 if one of them is not done."""
        from rich.console import Console

        from launch.cluster import LocalCluster
        from launch.local import launch
        from suite.run.mlflow_replica import browse

        cluster = LocalCluster(self.data_dir, self.profile.max_parallel, self.train_options)
        console = Console()
        try:
            rows = launch(self.grid_dir, self.cells, self.wanted, self.executions, cluster, self.tracking_uri, console)
        except KeyboardInterrupt:
            print("stopped; the cells keep what they learnt: launch again to go on", file=sys.stderr)
            raise SystemExit(EXIT_INTERRUPTED) from None
        show(console, self.grid_dir.name, rows, self.grid_dir)
        print(f"table:  python -m analysis tables {self.grid_dir.name} --root {self.grid_dir.parent}")
        print(f"browse: {browse(self.grid_dir, self.tracking_uri)}")
        raise SystemExit(0 if all(row.state.state == "done" for row in rows) else 1)

    def on_slurm(self) -> None:
        """Submits them and says where to look."""
        from rich.console import Console

        from launch.cluster import SlurmCluster
        from launch.remote import launch

        cluster = partial(SlurmCluster, self.grid_dir, self.data_dir, train_options=self.train_options)
        made = launch(self.grid_dir, self.cells, self.wanted, self.executions, self.profile, cluster, Console())
        place = f"{self.grid_dir.name} --root {self.grid_dir.parent}"
        print(_submitted(made) if made else "nothing to submit: every cell is settled, or has a job in the queue")
        print(f"status: python -m launch status {place} --watch")
        print(f"MLflow: python -m launch sync {place} --watch, which prints where to look")

    def show_local(self) -> None:
        """Prints what `locally` would do."""
        from rich.console import Console

        from launch.plan import ready
        from launch.status import standings

        rows = standings(self.grid_dir, self.wanted)
        show(Console(), f"{self.grid_dir.name}: {len(rows)} cells", rows, self.grid_dir)
        print(f"{len(ready(rows))} would start at once; nothing was started (with --partition: the SLURM scripts)")

    def show_on_slurm(self) -> None:
        """Prints what `on_slurm` would submit: the arrays, and the script of the first of each shape, whole."""
        from rich.console import Console

        from launch import slurm, snapshot
        from launch.cluster import SlurmCluster
        from launch.remote import planned_arrays
        from launch.resources import check
        from launch.status import standings

        queue = slurm.queue()
        planned = planned_arrays(self.grid_dir, self.wanted, queue, self.profile)
        check(array.resources for array in planned)
        rows = standings(self.grid_dir, self.wanted, queue)
        show(Console(), f"{self.grid_dir.name}: {len(rows)} cells", rows, self.grid_dir)
        cluster = SlurmCluster(self.grid_dir, self.data_dir, snapshot.name(self.wanted), self.train_options)
        _print_scripts(planned, cluster)
        _print_sizes(planned)


def show(console: "Console", title: str, rows: "list[Standing]", grid_dir: Path) -> None:
    """Prints the matrix of the rows, and what is wrong with some."""
    from launch.view import matrix, problems

    console.print(matrix(rows, title))
    for problem in problems(rows, grid_dir):
        console.print(problem, markup=False, highlight=False, soft_wrap=True)


def _submitted(made: "list[Submission]") -> str:
    num_cells = sum(len(task) for record in made for task in record.tasks)
    jobs = ", ".join(str(record.job_id) for record in made[:5]) + (", ..." if len(made) > 5 else "")  # noqa: PLR2004
    return f"submitted {_count(num_cells, 'cell')} as {_count(len(made), 'job')} ({jobs})"


def _print_scripts(planned: "list[Array]", cluster: "SlurmCluster") -> None:
    """The first script of each shape, as sbatch would get it: only its name's token is drawn anew at submission."""
    from launch.arrays import dependency
    from launch.submissions import new_token

    for number, array in enumerate(planned):
        cells = _count(sum(len(task) for task in array.tasks), "cell")
        print(f"# ---- job {number + 1} of {len(planned)}: {_count(len(array.tasks), 'task')}, {cells}")
        words = dependency(array, [f"<job {place + 1}>" for place in range(number)], f"<job of {array.parent}>")
        print(cluster.script(array, new_token(number), words if array.parent or array.after else None))


def _print_sizes(planned: "list[Array]") -> None:
    num_cells = sum(len(task) for array in planned for task in array.tasks)
    hours = [len(array.tasks) * array.resources.nodes * array.resources.time / 60 for array in planned]
    gpus = sum(each * (array.resources.gpus_per_node or 0) for each, array in zip(hours, planned, strict=True))
    print(f"{_count(num_cells, 'cell')} as {_count(len(planned), 'job')} would be submitted; nothing was")
    print(f"at most {gpus:,.0f} GPU-hours ({sum(hours):,.0f} node-hours): tasks x time limit")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
