"""Lists the files of a launched grid that nothing uses any more, and deletes them on request."""

import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.plan import Standing
from launch.worker.spec import WorkerSpec
from suite.run.directory import RunDir, run_dirs


@dataclass(frozen=True)
class Waste:
    """A deletable file or folder, a description and its size. `run`: the run it belongs to; kept while that is live."""

    path: Path
    what: str
    num_bytes: int
    run: RunDir | None = None


def old_jobs(
    grid_dir: Path, live_jobs: Collection[Path] | None, last_code: str, *, has_live_workers: bool
) -> list[Waste]:
    """Folders of jobs that left the queue, and code snapshots that no worker uses, except the last launch's snapshot.

    Args:
        grid_dir: the grid.
        live_jobs: folders of the jobs in the queue; None: SLURM does not answer, so nothing is listed.
        last_code: the last launch's code snapshot.
        has_live_workers: live workers may use any snapshot, so no code is listed.
    """
    if live_jobs is None:
        return []
    jobs = [path for path in _folders(grid_dir / "jobs") if path not in live_jobs]
    used = {Path(last_code), *filter(None, (WorkerSpec.read(path / "spec.json").code for path in live_jobs))}
    code = [path for path in _folders(grid_dir / "code") if path.resolve() not in used and not has_live_workers]
    return [
        *(_waste(path, "folder of a job that has ended") for path in jobs),
        *(_waste(path, "code that no worker uses") for path in code),
    ]


def old_checkpoints(grid_dir: Path, rows: Iterable[Standing]) -> list[Waste]:
    """All but the newest checkpoint of each done cell; finetuning and 1-bit export use the newest."""
    return [
        _waste(path, f"checkpoint of {row.cell.name}, done with a newer one", RunDir(grid_dir / row.cell.id))
        for row in rows
        if row.state.state == "done"
        for path in sorted(RunDir(grid_dir / row.cell.id).checkpoints.glob("epoch-*.pt"))[:-1]
    ]


def orphans(grid_dir: Path, planned: Collection[str]) -> list[Waste]:
    """Run directories of former recipes: no longer in the plan, and not live."""
    return [
        _waste(run.path, f"run of a former recipe, {run.cell().name}, {run.state().state}", run)
        for run in run_dirs(grid_dir)
        if run.path.name not in planned and not run.is_live()
    ]


def delete(waste: Sequence[Waste]) -> int:
    """Deletes the waste, but skips runs that are live by now; returns the number of bytes deleted."""
    num_bytes = 0
    for each in waste:
        if each.run is not None and each.run.is_live():  # checked when listed, perhaps hours before the user answered
            continue
        _remove(each.path)
        num_bytes += each.num_bytes
    return num_bytes


def _folders(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_dir()) if path.is_dir() else []


def _waste(path: Path, what: str, run: RunDir | None = None) -> Waste:
    files = path.rglob("*") if path.is_dir() else [path]
    return Waste(path, what, sum(file.lstat().st_size for file in files if not file.is_dir()), run)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # a job's last process may still write; run clean again
    else:
        path.unlink(missing_ok=True)
