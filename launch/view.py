"""Renders standings: a matrix of model x quantizer, the problems below it, JSON for programs."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from launch.logs import last_lines, newest_log
from launch.plan import Standing, blocked, hopeless, is_over, ready
from launch.status import Cost, Later, cost, later
from launch.worker import registry
from suite.run.directory import RunDir, StateName

COLOURS: Mapping[StateName, str] = {
    "done": "green",
    "running": "cyan",
    "queued": "yellow",
    "preempted": "magenta",
    "planned": "bright_black",
    "failed": "bold red",
    "cancelled": "red",
}
WATCH_SECONDS = 30.0
NUM_SHOWN = 10
NUM_DEATHS = 3
SHOWN_HOURS = 0.05
"""A smaller cost is not shown."""
NUM_LOG_LINES = 3
_LOG_WIDTH = 200
Groups = Mapping[tuple[str, str], Sequence[Standing]]


def matrix(rows: Sequence[Standing], title: str) -> RenderableType:
    """Models down, quantizers across, the number of seeds in each state; one line per pair if that is too wide.

    Omits the numbers if no pair has more than one seed.
    """
    groups: dict[tuple[str, str], list[Standing]] = {}
    has_datasets = len({row.cell.dataset for row in rows}) > 1
    for row in rows:
        groups.setdefault((_label(row, with_dataset=has_datasets), row.cell.quantizer), []).append(row)
    return Group(Text(title, style="bold"), _FirstThatFits((_matrix(groups), _list(groups))), Text(summary(rows)))


@dataclass(frozen=True)
class _FirstThatFits:
    tables: Sequence[Table]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        endless = options.update(max_width=10**6)  # otherwise the measured width is capped at the screen's
        fitting = (
            table for table in self.tables if Measurement.get(console, endless, table).maximum <= options.max_width
        )
        yield next(fitting, self.tables[-1])


def _matrix(groups: Groups) -> Table:
    models, quantizers = (list(dict.fromkeys(key[part] for key in groups)) for part in (0, 1))
    is_counted = _has_several_seeds(groups)
    texts = {key: Text("\n").join(_states(rows, is_counted=is_counted)) for key, rows in groups.items()}
    has_stacks = any("\n" in text.plain for text in texts.values())
    table = Table("model", *quantizers, show_lines=has_stacks)
    for model in models:
        table.add_row(model, *(texts.get((model, quantizer), Text("")) for quantizer in quantizers))
    return table


def _list(groups: Groups) -> Table:
    table = Table("model", "quantizer", "seeds")
    is_counted = _has_several_seeds(groups)
    last_model = ""
    for (model, quantizer), rows in groups.items():
        states = Text(", ").join(_states(rows, is_counted=is_counted))
        table.add_row(model if model != last_model else "", quantizer, states)
        last_model = model
    return table


def _has_several_seeds(groups: Groups) -> bool:
    return any(len(rows) > 1 for rows in groups.values())


def _label(row: Standing, *, with_dataset: bool) -> str:
    cell = row.cell
    setting: list[str] = [cell.init] * (cell.init != "scratch") + [cell.task] * (cell.task != "bw")
    setting += ["trials"] * cell.trial + ["former recipe"] * row.planned.is_former
    return f"{cell.dataset}/" * with_dataset + cell.model + f" ({', '.join(setting)})" * bool(setting)


def _states(rows: Sequence[Standing], *, is_counted: bool) -> list[Text]:
    """`3 done`, `2 running 45%`, `1 failed: oom`: each state that occurs."""
    texts = []
    for state, colour in COLOURS.items():
        those = [row for row in rows if row.state.state == state]
        if those:
            words = _words(state, those)
            texts.append(Text(f"{len(those)} {words}" if is_counted else words, style=colour))
    return texts


def _words(state: StateName, rows: Sequence[Standing]) -> str:
    if state == "failed":
        return "failed: " + ", ".join(sorted({str(row.state.cause) for row in rows}))
    of = [(row.state.epoch, row.state.num_epochs) for row in rows if row.state.num_epochs]
    if state != "running" or not of:
        return state
    if len(rows) == 1:
        return f"running {of[0][0]}/{of[0][1]}"
    return f"running {sum(epoch / total for epoch, total in of) / len(rows):.0%}"


def summary(rows: Sequence[Standing]) -> str:
    """`12 done, 2 running, 22 planned`."""
    counts = Counter(row.state.state for row in rows)
    return ", ".join(f"{counts[state]} {state}" for state in COLOURS if counts[state])


def plural(number: int, noun: str) -> str:
    """`1 worker`, `2,000 workers`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def problems(rows: Sequence[Standing], grid_dir: Path | None = None) -> list[str]:
    """Lines on failed cells (cause, end of the log) and on cells that therefore will not start; at most ten of each.

    Args:
        rows: the cells.
        grid_dir: folder of their logs; None: omit logs.
    """
    failed = [row for row in rows if row.state.state == "failed"]
    lines = []
    for row in failed[:NUM_SHOWN]:
        lines.append(f"{row.cell.name} ({row.cell.id}) failed: {row.state.cause}: {row.state.reason}")
        lines += [] if grid_dir is None else _log_lines(RunDir(grid_dir / row.cell.id))
    lines += _rest(len(failed)) + _held_up(rows)
    without = sorted(hopeless(rows))
    lines += [
        f"{name}: no trial succeeded, so no values are chosen and no cell follows (python -m launch retry --failed)"
        for name in without[:NUM_SHOWN]
    ]
    return lines + _rest(len(without))


def _log_lines(run: RunDir) -> list[str]:
    path = newest_log(run)
    return [] if path is None else [f"    {line[:_LOG_WIDTH]}" for line in last_lines(path, NUM_LOG_LINES)]


def _held_up(rows: Sequence[Standing]) -> list[str]:
    """Lines on cells that were cancelled or stopped, or that wait for a failed one, by reason."""
    waiting = blocked(rows)
    by_reason: dict[str, list[Standing]] = {}
    for row in rows:
        if row.cell.id in waiting:
            by_reason.setdefault(f"waits: {waiting[row.cell.id]}", []).append(row)
        elif row.state.state in {"cancelled", "preempted"} and row.state.reason:
            by_reason.setdefault(f"{row.state.state}: {row.state.reason}", []).append(row)
    lines = []
    for reason, those in list(by_reason.items())[:NUM_SHOWN]:
        more = f" and {len(those) - 1} more" if len(those) > 1 else ""
        lines.append(f"{those[0].cell.name} ({those[0].cell.id}){more} {reason}")
    return lines + _rest(len(by_reason))


def _rest(num_all: int) -> list[str]:
    return [f"… and {num_all - NUM_SHOWN} more: --json lists them"] if num_all > NUM_SHOWN else []


def as_json(rows: Sequence[Standing]) -> list[dict[str, Any]]:
    """One object per cell, with the fields of its State."""
    return [
        {"cell": row.cell.id, "name": row.cell.name, "is_former": row.planned.is_former, **vars(row.state)}
        for row in rows
    ]


def watch(
    console: Console,
    look: Callable[[], list[Standing]],
    more: Callable[[list[Standing]], list[str]],
    name: str,
    seconds: float = WATCH_SECONDS,
) -> list[Standing]:
    """Shows the matrix, refreshed every `seconds`, until the grid has ended or Ctrl-C; returns the last rows.

    Without a terminal it prints a line whenever the counts change. `more` returns lines to show below the matrix.
    """
    rows = look()
    with Live(console=console, auto_refresh=False) as live:
        last = ""
        try:
            while True:
                now = datetime.now().astimezone()
                if console.is_terminal:
                    below = Text("\n".join(more(rows)))
                    live.update(Group(matrix(rows, f"{name}, {now:%H:%M:%S}"), below), refresh=True)
                elif (line := summary(rows)) != last:
                    console.print(f"{now:%Y-%m-%d %H:%M:%S} {name}: {line}", highlight=False)
                    last = line
                if is_over(rows):
                    return rows
                time.sleep(seconds)
                rows = look()
        except KeyboardInterrupt:
            return rows


def overview(grid_dir: Path, rows: Sequence[Standing]) -> list[str]:
    """Lines on live workers, workers that could not start, why jobs wait, and the grid's cost so far and to go."""
    found = registry.workers(grid_dir)
    live = [worker for worker in found if worker.is_live]
    lines = [_on_worker(worker) for worker in live[:NUM_SHOWN]]
    lines += [f"… and {plural(len(live) - NUM_SHOWN, 'more worker')}"] if len(live) > NUM_SHOWN else []
    is_on_slurm = (grid_dir / "jobs").is_dir()
    waiting = _on_jobs(grid_dir) if is_on_slurm else []
    lines += waiting
    lines += [f"worker {each.number} {each.reason}" for each in found if each.reason.startswith(registry.RETIRED)]
    lines += _on_deaths(grid_dir) if is_on_slurm else []
    if not live and not waiting and ready(rows):
        lines.append(f"no worker; to resume: python -m launch grid {grid_dir.name} (as before)")
    to_come = later(grid_dir, rows)
    lines += _on_tuning(rows, to_come) + _on_cost(cost(rows, found, to_come.num_epochs))
    limit = registry.limit(grid_dir)
    if limit is not None and live:
        lines.append(f"at most {plural(limit, 'worker')}: python -m launch scale N")
    return lines


def _on_worker(worker: registry.Worker) -> str:
    job = f", job {worker.job_id}" if worker.job_id else ""
    hours, slots = (time.time() - worker.made) / 3600, plural(worker.num_slots, "cell")
    return f"worker {worker.number} on {worker.host}{job}: {slots} at a time, for {hours:.1f} h"


def _on_jobs(grid_dir: Path) -> list[str]:
    """Lines on waiting jobs, by reason; or the error if SLURM does not answer."""
    from launch.slurm import client  # late: they import pydantic and submitit, which a local grid does not need
    from launch.supply import jobs

    if not client.available():
        return []
    try:
        queued = [job.info for job in jobs(grid_dir).values() if job.info.state != "RUNNING"]
    except client.SlurmError as error:
        return [str(error)]
    reasons = Counter((job.state.lower(), job.reason) for job in queued)
    return [
        f"{plural(number, 'worker')} {state}{f': {reason}' if reason else ''}"
        for (state, reason), number in reasons.items()
    ]


def _on_deaths(grid_dir: Path) -> list[str]:
    """Lines on the last jobs that ended before their worker could say why."""
    from launch.supply import deaths

    return [f"job {death.job} on {death.node}: {death.reason}" for death in deaths(grid_dir)[-NUM_DEATHS:]]


def _on_tuning(rows: Sequence[Standing], to_come: Later) -> list[str]:
    """A line on the trials and the cells that their choices will add; none after the last choice."""
    trials = [row for row in rows if row.cell.trial]
    if not (trials and to_come.num_cells):
        return []
    settled = sum(row.is_settled for row in trials)
    return [f"tuning: {settled} of {plural(len(trials), 'trial')} ended; {plural(to_come.num_cells, 'cell')} follow"]


def _on_cost(price: Cost) -> list[str]:
    if price.spent < SHOWN_HOURS:
        return []
    to_go = "" if price.to_go is None else f", about {price.to_go:,.1f} to go"
    ready_at = None if price.eta is None else datetime.fromtimestamp(price.eta).astimezone()
    eta = "" if ready_at is None else f", ready about {ready_at:%a %d %b %H:%M}"
    return [f"{price.spent:,.1f} {price.unit} spent{to_go}{eta}"]


def attempts(row: Standing, grid_dir: Path) -> RenderableType:
    """A table of one cell's attempts: where each ran, how it ended, and where its log is."""
    run = RunDir(grid_dir / row.cell.id)
    table = Table("attempt", "began", "on", "job", "how it ended", Column("log", overflow="fold"))
    for attempt in run.all_attempts():
        facts, end = attempt.facts, attempt.end() or {}
        began = datetime.fromtimestamp(facts.get("made", attempt.last_seen())).astimezone()
        words = ": ".join(str(each) for each in (end.get("state"), end.get("cause"), end.get("reason")) if each)
        is_open = "is running" if attempt.is_live() else "its worker is gone"
        where = f"{facts.get('host', '')} (worker {facts['worker']})" if facts.get("worker") else facts.get("host", "")
        log = str(attempt.log().relative_to(run.path)) if attempt.log().exists() else ""
        table.add_row(str(attempt.number), f"{began:%d %b %H:%M:%S}", where, attempt.job_id, words or is_open, log)
    state = row.state
    words = ": ".join(str(each) for each in (state.state, state.cause, state.reason) if each)
    progress = f", epoch {state.epoch} of {row.cell.training.epochs}"
    return Group(Text(f"{row.cell.name} ({row.cell.id}) {words}{progress}", style="bold"), table, Text(str(run.path)))
