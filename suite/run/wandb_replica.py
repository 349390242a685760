"""Replicates the run directories to Weights & Biases: one run for each, identified by the token of its journal."""

import json
from pathlib import Path
from typing import Any

from suite.errors import UserError
from suite.run import journal
from suite.run.atomic import write_json
from suite.run.directory import run_dirs
from suite.run.mlflow_replica import recipe


def sync(grid_dir: Path, project: str) -> int:
    """Sends the epochs that the project does not have yet; returns the number of runs they belong to.

    With WANDB_MODE=offline, writes them to files under GRID/wandb, for `wandb sync`. GRID/wandb.json records what was
    sent.

    Raises:
        UserError: W&B is not installed, or denies access.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb: not installed: pip install 'proxbench[wandb]'") from error
    place = grid_dir / "wandb.json"
    sent: dict[str, int] = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
    num_changed = 0
    for each in run_dirs(grid_dir):
        cell, token = each.cell(), journal.token(each.journal)
        key = f"{project}/{token}"
        new = {epoch: own for epoch, own in journal.read_metrics(each.journal).items() if epoch > sent.get(key, 0)}
        if not new:
            continue
        settings = wandb.Settings(silent=True, disable_git=True, x_disable_stats=True, console="off")
        names: dict[str, Any] = {
            "id": token,
            "name": cell.name,
            "group": cell.name.rpartition("/s")[0],
            "resume": "allow",
        }
        config = {**dict(recipe(cell)), **{k: getattr(cell, k) for k in ("dataset", "model", "quantizer", "seed")}}
        try:
            with wandb.init(project=project, dir=str(grid_dir), config=config, settings=settings, **names) as run:
                for epoch, metrics in sorted(new.items()):
                    run.log(metrics, step=epoch)
        except wandb.errors.Error as error:
            raise UserError(
                f"--wandb {project}: {' '.join(str(error).split())}; WANDB_MODE=offline writes files instead"
            ) from error
        sent[key] = max(new)
        write_json(place, sent)  # after each run, so that an interrupted sync sends nothing twice
        num_changed += 1
    return num_changed
