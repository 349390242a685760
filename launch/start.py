"""Turns a command's options into workers: checks everything, records the launch, then starts it here or on SLURM."""

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import typer
from rich.console import Console
from rich.progress import track

from launch import launches, snapshot
from launch.launches import Launch
from launch.options import Where
from launch.plan import Standing, choosable, hopeless, ready
from launch.preflight import LaunchError, preflight
from launch.selection import fail
from launch.slurm import client
from launch.status import standing, standings
from launch.view import matrix, plural, problems, summary
from launch.worker import registry
from launch.worker.slots import slots_here
from launch.worker.spec import WorkerSpec
from suite.recipe.cell import Cell
from suite.recipe.choices import FILE, Choices
from suite.run.directory import Planned, RunDir, read_plan, write_plan
from suite.run.locks import locked
from suite.run.tuning import Tuning, forget_tuning, read_choices, read_tuning, write_choices

if TYPE_CHECKING:
    from launch.slurm.profile import Profile
    from launch.slurm.resources import Resources

EXIT_INTERRUPTED = 130  # the shells' number for Ctrl-C
Former = Literal["keep", "cancel"]


@dataclass
class Start:
    """A requested launch. `planned` is the whole grid; `wanted` has the ids of the cells to run.

    `again`: cells whose failure or cancellation is forgotten. `former`: what to do with unfinished cells that the grid
    no longer has; None: ask the user. A grid that tunes also has `tuning`, the `choices` made so far, and `later`: the
    cells that will follow from choices, with placeholder values.
    """

    grid_dir: Path
    launch: Launch
    planned: Mapping[str, Planned]
    wanted: frozenset[str]
    where: Where
    profile: "Profile"
    again: frozenset[str] = frozenset()
    former: Former | None = None
    is_sure: bool = False
    confirm_gpu_hours: float = 100.0
    tuning: Tuning | None = None
    choices: Choices = field(default_factory=Choices)
    later: Sequence[Cell] = ()
    console: Console = field(default_factory=Console)

    def run(self) -> None:
        """Starts the launch, here or on SLURM."""
        if self.where.local:
            self._here()
        self._on_slurm()

    def _here(self) -> NoReturn:
        """Runs the launch here and prints the outcome. Exits with status 1 if a wanted cell is not done."""
        from launch.here import work_here
        from launch.worker.worker import finish
        from suite.run.mlflow_replica import browse

        slots = slots_here(self._spec())
        wanted = self.wanted.union(self._commit())
        spec = replace(self._spec(), cells=tuple(wanted))
        outcome, reason = work_here(spec, slots, self.launch.tracking_uri, self.console, stays=True)
        if outcome != "again":
            finish(self.grid_dir)
        every = standings(self.grid_dir, read_plan(self.grid_dir))
        rows = [
            row for row in every if row.cell.id in wanted or (row.planned.is_later and row.state.state != "planned")
        ]
        show(self.console, self.grid_dir.name, rows, self.grid_dir)
        if outcome == "again":
            print(f"{reason}; the cells keep their progress: launch again to resume", file=sys.stderr)
            raise SystemExit(EXIT_INTERRUPTED)
        if outcome == "retired":
            print(f"the worker {reason}", file=sys.stderr)
        place = f"{self.grid_dir.name} --root {self.grid_dir.parent}"
        if self.tuning is not None:
            print(f"tuning: python -m analysis tuning {place}  (choices: {self.grid_dir / FILE})")
        if any(not row.cell.trial for row in rows):
            print(f"table:  python -m analysis tables {place}")
        print(f"browse: {browse(self.grid_dir, self.launch.tracking_uri)}")
        # A trial that failed is a result of tuning, not of the grid.
        is_done = all(row.state.state == "done" or (row.cell.trial and row.is_settled) for row in rows)
        raise SystemExit(0 if is_done and not hopeless(every) | choosable(every) else 1)

    def _spec(self) -> WorkerSpec:
        """The instructions for a local worker."""
        asked = self.profile.for_cell(None)
        return WorkerSpec(
            self.grid_dir.resolve(),
            Path(self.launch.data_dir),
            Path(self.launch.code),
            cells=tuple(self.wanted),
            gpus_per_cell=asked.gpus_per_cell,
            cells_per_gpu=asked.cells_per_gpu,
            cpus_per_cell=asked.cpus_per_cell,
            max_slots=self.profile.workers,
            train_options=self.launch.train_options,
        )

    def _on_slurm(self) -> None:
        """Submits workers and prints where to look."""
        from launch.slurm import hand_over
        from launch.slurm.resources import check
        from launch.supply import jobs, supply

        rows = self._rows()
        starting = [row for row in rows if row.state.state != "done" and row.cell.id in self.wanted]
        resources = self.resources(row.planned for row in starting).values()
        check(resources)
        for each in resources:
            hand_over.test(each, self.grid_dir.resolve() / "jobs" / "test")
        has_former = bool(self._commit())
        try:
            made = supply(self.grid_dir, is_asked=True, rows=None if has_former else rows)
        except KeyboardInterrupt:
            handed = ", ".join(jobs(self.grid_dir)) or "none"
            print(f"stopped; jobs in the queue: {handed}; launch again to submit the rest", file=sys.stderr)
            raise SystemExit(EXIT_INTERRUPTED) from None
        place = f"{self.grid_dir.name} --root {self.grid_dir.parent}"
        if made.num_workers:
            told = ", ".join(made.job_ids)
            print(f"submitted {plural(made.num_workers, 'worker')} for {self._to_do(rows)} (job {told})")
        else:
            print(self._nothing_new(rows))
        if made.held_back:
            print(f"{plural(made.held_back, 'more worker')} will be submitted as SLURM's limits allow")
        print(f"status: python -m launch status {place} --watch")
        print(f"MLflow: python -m launch sync {place} --watch  (prints where to look)")

    def _to_do(self, rows: Sequence[Standing]) -> str:
        to_do = plural(sum(row.cell.id in self.wanted and not row.is_settled for row in rows), "cell")
        return f"{to_do}, {self._to_come()}" if self.later else to_do

    def _to_come(self) -> str:
        return f"and {len(self.later):,} more with the values that trials choose"

    def _nothing_new(self, rows: Sequence[Standing]) -> str:
        said = summary(rows)
        if any(row.state.state == "failed" for row in rows):
            return f"nothing to submit: {said} (retry: python -m launch retry --failed)"
        return f"nothing to submit: {said}"

    def resources(self, planned: Iterable[Planned]) -> "dict[str, Resources]":
        """What the cells' workers request, by shape."""
        found = {}
        for each in planned:
            resources = self.profile.for_cell(each.cell)
            found[resources.shape] = resources
        return found

    def _rows(self) -> list[Standing]:
        """The cells' states; cells to be retried, and newly requested ones, count as queued."""
        rows = standings(self.grid_dir, self.planned)
        return [
            replace(row, state=replace(row.state, state="queued"))
            if row.cell.id in self.again or (row.state.state == "planned" and row.cell.id in self.wanted)
            else row
            for row in rows
        ]

    def _commit(self) -> Collection[str]:
        """Runs the remaining checks, then records the launch. From then on, live workers take the cells.

        Returns:
            Ids of the former cells that are kept.
        """
        rows = self._rows()
        starting = [row.cell for row in rows if row.cell.id in self.wanted and not row.is_settled]
        executions = {cell_id: each.execution for cell_id, each in self.planned.items()}
        preflight(starting, executions, Path(self.launch.data_dir), self.console)
        former = self._former_cells()
        kept = self._what_becomes_of(former)
        self._confirm_cost(starting)
        self.grid_dir.mkdir(parents=True, exist_ok=True)
        code = snapshot.folder_of(self.grid_dir, snapshot.take(self.grid_dir, starting))
        before = launches.last(self.grid_dir)
        known = {**(before.resources if before else {}), **self.launch.resources}
        left = former.values() if kept == "keep" else ()
        shapes = {each.shape for each in (*self.planned.values(), *left)}
        tuning = self._tuning()
        shapes |= set(tuning.shapes.values()) if tuning is not None else set()
        resources = {shape: each for shape, each in known.items() if shape in shapes}
        self.launch = replace(self.launch, code=str(code), resources=resources)
        launches.remember(self.grid_dir, self.launch)
        if not self.where.local:
            registry.set_limit(self.grid_dir, self.profile.workers)
        for cell_id in former if kept == "cancel" else ():
            RunDir(self.grid_dir / cell_id).cancel("the grid has no such cell any more")
        with locked(self.grid_dir / "tuning.lock"):
            self._write_choices()
            write_plan(self.grid_dir, {**self.planned, **self._meantime(), **{p.cell.id: p for p in left}}.values())
        for cell_id in self.again:
            RunDir(self.grid_dir / cell_id).plan_again()
        self._create([each.cell for each in self.planned.values() if each.cell.id in self.wanted])
        return former.keys() if kept == "keep" else ()

    def _write_choices(self) -> None:
        if self.tuning is not None:
            before = read_choices(self.grid_dir / FILE)
            if (choices := before.under(self.choices)) != before:
                write_choices(self.grid_dir / FILE, choices)
            self.tuning.write(self.grid_dir)
        elif self.launch.command == "grid":
            forget_tuning(self.grid_dir)

    def _tuning(self) -> Tuning | None:
        """The grid's tuning after this launch; a retry does not change it."""
        return self.tuning or (read_tuning(self.grid_dir) if self.launch.command == "retry" else None)

    def _meantime(self) -> dict[str, Planned]:
        """Cells that a worker's choice has added to the plan since this command read it."""
        tuning = self._tuning()
        if tuning is None:
            return {}
        known = {cell.id for cell in tuning.grid.resolve(read_choices(self.grid_dir / FILE).under(self.choices)).cells}
        return {
            cell_id: each
            for cell_id, each in read_plan(self.grid_dir).items()
            if cell_id in known and cell_id not in self.planned
        }

    def _create(self, cells: Sequence[Cell]) -> None:
        """Creates the cells' run directories, several at a time because the disk is slow."""
        with ThreadPoolExecutor(8) as pool:
            made = pool.map(lambda cell: RunDir.create(self.grid_dir / cell.id, cell), cells)
            is_quiet = not self.console.is_terminal
            for _ in track(made, "run directories", len(cells), console=self.console, transient=True, disable=is_quiet):
                pass

    def _former_cells(self) -> dict[str, Planned]:
        """Unfinished cells that were requested before and that this grid does not have."""
        former = {}
        meantime = self._meantime()
        for cell_id, each in read_plan(self.grid_dir).items():
            if cell_id not in self.planned and cell_id not in meantime:
                row = standing(RunDir(self.grid_dir / cell_id), each)
                if not row.is_settled and row.state.state != "planned":
                    former[cell_id] = replace(each, is_former=True)
        return former

    def _what_becomes_of(self, former: Mapping[str, Planned]) -> Former:
        if not former or self.former is not None:
            return self.former or "cancel"
        words = f"the former recipe has {plural(len(former), 'unfinished cell')}"
        if not sys.stdin.isatty():
            raise LaunchError(f"{words}: give --keep-former or --cancel-former")
        return "cancel" if typer.confirm(f"{words}: cancel them?", default=True) else "keep"

    def _confirm_cost(self, cells: Sequence[Cell]) -> None:
        """Prints the estimated GPU-hours, and asks before a launch that exceeds --confirm-gpu-hours."""
        if self.where.local:
            uses_gpus = bool(slots_here(self._spec())[0].devices)
        else:
            asked = self.resources(self.planned[cell.id] for cell in cells)
            uses_gpus = any(resources.num_gpus for resources in asked.values())
        if not cells or not uses_gpus:
            return
        from launch.cost import gpu_hours

        hours = gpu_hours([*cells, *self.later])
        if hours is None or hours < 1:
            return
        print(f"{self.grid_dir.name}: an estimated {hours:,.0f} GPU-hours of an A100 (docs/reproducing.md)")
        tuning = gpu_hours(cell for cell in (*cells, *self.later) if cell.trial)
        if tuning:
            print(f"{tuning:,.0f} of them for trials: --set tune=null skips them, --choices FILE uses existing choices")
        if hours <= self.confirm_gpu_hours or self.is_sure:
            return
        if not sys.stdin.isatty():
            raise LaunchError(f"that exceeds --confirm-gpu-hours {self.confirm_gpu_hours:g}: confirm with --yes")
        if not typer.confirm("launch it?"):
            fail("nothing was launched")

    def show(self) -> None:
        """Prints what `run` would do; changes nothing."""
        rows = [row for row in self._rows() if row.cell.id in self.wanted]
        show(self.console, f"{self.grid_dir.name}: {len(rows)} cells", rows, self.grid_dir)
        for line in layers([row.cell for row in rows]):
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        if self.later:
            print(f"{self._to_come()}: see --only-tune and --choices in python -m launch grid --help")
        if self.profile.is_for_slurm and not self.where.local and client.available():
            self._show_scripts(rows)
            return
        at_once = f"{len(slots_here(self._spec()))} at a time on this machine"
        print(f"{plural(len(ready(rows)), 'cell')} ready to start, {at_once}; nothing was started")
        print("(to see the SLURM script, add --partition or --cluster)")

    def _show_scripts(self, rows: Sequence[Standing]) -> None:
        from launch.slurm import hand_over
        from launch.slurm.resources import check
        from launch.supply import lacking

        resources = self.resources([row.planned for row in rows if not row.is_settled])
        check(resources.values())
        slots = {shape: each.num_slots for shape, each in resources.items()}
        for shape, count in lacking(rows, slots, {}, self.profile.workers).items():
            folder = self.grid_dir.resolve() / "jobs" / "<token>"
            print(f"# ---- {plural(count, 'worker')}, {plural(slots[shape], 'cell')} at a time each")
            print(hand_over.script(resources[shape], folder / "spec.json", count))
        from launch.cost import gpu_hours

        hours = gpu_hours([*(row.cell for row in rows if not row.is_settled), *self.later])
        if hours is not None:
            print(f"an estimated {hours:,.0f} GPU-hours of an A100; nothing was submitted")


def layers(cells: Sequence[Cell]) -> list[str]:
    """One line per model: how much is binary, and the layers in full precision, by entry of `full_precision`."""
    import models

    found: dict[str, None] = {}
    for cell in cells:
        if cell.quantizer == "fp" and cell.task != "ba":
            continue
        network = models.skeleton(cell.model, image_size=cell.data.image_size)
        kept = models.kept_layers(network, cell.quantization.full_precision)
        exact = {name for names in kept.values() for name in names}
        sizes = {name: network.get_parameter(f"{name}.weight").numel() for name in models.matrices(network)}
        binary = [size for name, size in sizes.items() if name not in exact]
        by_name = ", ".join(f"{item} {plural(len(names), 'layer')}" for item, names in kept.items()) or "no layer"
        what = "the inputs of " if cell.task == "ba" else ""
        count = f"{sum(binary):,} weights in {plural(len(binary), 'layer')}"
        found[f"{cell.model}: {what}{count} binary; in full precision {by_name}"] = None
    return list(found)


def show(console: Console, title: str, rows: Sequence[Standing], grid_dir: Path) -> None:
    """Prints the matrix of the rows, then their problems."""
    console.print(matrix(rows, title))
    for problem in problems(rows, grid_dir):
        console.print(problem, markup=False, highlight=False, soft_wrap=True)


def require_a_place(where: Where) -> None:
    """Fails if a launch needs SLURM and this machine has none."""
    if not where.local and not client.available():
        fail("no SLURM here (sbatch is not on PATH); add --local to run on this machine")
