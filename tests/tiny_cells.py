"""A cell that trains in a second, and a grid of such."""

import secrets
import time
from dataclasses import asdict, replace
from typing import Any

from suite.recipe.cell import Cell
from suite.run.attempt import Attempt, newest_number
from suite.run.directory import Planned, RunDir, write_plan
from suite.run.processes import Process


def tiny_cell(**changes: object) -> Cell:
    """ResNet-8 on the digits for two epochs, with bnn++; keys of the sections go in as `training__epochs=3`."""
    raw: dict[str, Any] = {"model": "resnet8", "quantizer": "bnn++", "seed": 0, **_shared()}
    for key, value in changes.items():
        section, _, inner = key.partition("__")
        (raw[section] if inner else raw)[inner or section] = value
    if raw["data"].get("crop") != "padded":
        raw["data"].pop("crop_padding", None)
    return Cell.model_validate(raw)


def tiny_grid(**changes: object) -> dict[str, Any]:
    """A grid file's content: full precision and bnn++ under the tiny cell's recipe, one seed."""
    return {"name": "tiny", "models": ["resnet8"], "quantizers": ["fp", "bnn++"], "seeds": [0], **_shared(), **changes}


def _shared() -> dict[str, Any]:
    return {
        "dataset": "digits",
        "data": {"crop": "padded", "crop_padding": 1},
        "training": {"epochs": 2, "batch_size": 256, "optimizer": "adamw", "learning_rate": 0.003},
        "quantization": {"sharpness": {"bnn++": {"shape": "exponential", "start": 2.0, "end": 500.0}}},
    }


def put(run: RunDir, *, state: str, attempt: int = 0, job_id: str = "", **end: object) -> Attempt:
    """Has the run's files say where it stands; the attempt (default: the newest, or the first) is a dead process's."""
    number = attempt or newest_number(run.attempts) or 1
    made = Attempt(run.attempts, number)
    made.path.mkdir(parents=True, exist_ok=True)
    nobody = replace(Process.this(), start="0")
    made.note(token=secrets.token_hex(8), made=time.time(), **asdict(nobody), job_id=job_id)
    if state == "cancelled":
        run.cancel(str(end.get("reason", "")))
    elif state in {"done", "failed", "preempted"}:
        made.finish(state=state, **end)
    return made


def plan(run: RunDir, *others: RunDir) -> None:
    """Writes the plan of the runs' grid: these, in order."""
    write_plan(run.path.parent, [Planned(each.cell()) for each in (run, *others)])
