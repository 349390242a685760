"""Decides how an attempt's end changes its run's state: pure functions of the worker's observations."""

import signal
from dataclasses import dataclass
from typing import Any

from launch.plan import after_failure
from suite.run.directory import Cause, State
from suite.train import EXIT_BAD_INPUT, STOP_SIGNALS

CTRL_C = "Ctrl-C"
"""Stands for SIGINT where a signal's name is expected."""
_OUT_OF_MEMORY = "the job ran out of memory; request more with --mem"
_KILLED = 128
"""A shell's or torchrun's exit status for signal n is this plus n; Popen's is -n."""


@dataclass(frozen=True)
class End:
    """How the training process of an attempt ended.

    `asked_by`: name of the signal that asked the worker to stop, or empty; `is_out_of_time`: it was the time limit's.
    `is_begun`: training wrote a heartbeat; `is_group`: the process was torchrun, with several below it. `last_line`: of
    its log. `checkpoint_before`, `checkpoint`: name of the newest one before the attempt and now, or empty.
    """

    exit_code: int
    asked_by: str = ""
    is_out_of_memory: bool = False
    is_out_of_time: bool = False
    is_begun: bool = True
    is_group: bool = False
    last_line: str = ""
    checkpoint_before: str = ""
    checkpoint: str = ""


def after_attempt(now: State, end: End) -> dict[str, Any]:
    """Changes to the end that the attempt's processes recorded, `now`; empty if that is complete."""
    if now.state in {"done", "cancelled"}:
        return {}
    if end.exit_code == EXIT_BAD_INPUT and not end.is_begun:
        reason = end.last_line or "bad input: see its log"
        counted = {"failures": now.failures, "failed_at": now.failed_at}
        return {"state": "failed", "cause": "error", "reason": reason, **counted}
    # With a cause, the end was recorded by processes that had lost another one.
    is_orderly = now.state == "preempted" and now.cause is None
    stopped_by = end.asked_by or _stop_signal(end.exit_code)
    if now.state != "failed" and (is_orderly or stopped_by):
        is_told = is_orderly and end.asked_by != CTRL_C  # the worker forwards Ctrl-C as SIGTERM
        return _after_stop(now, end, now.reason if is_told else f"stopped by {stopped_by}")
    return after_failure(now, *_failure(now, end), end.checkpoint)


def _failure(now: State, end: End) -> tuple[Cause, str]:
    """Cause and reason: as training recorded them, if it could."""
    if now.state == "failed":
        return now.cause or "error", now.reason
    if end.is_out_of_memory:
        return "oom", f"killed by the kernel: {_OUT_OF_MEMORY}"
    if now.state == "preempted":
        return now.cause or "node", now.reason
    if end.is_group and end.is_begun:  # e.g. it hung in NCCL until torchrun killed it
        return "node", "a training process died without an error message, and ended the others: see its log"
    if end.exit_code < 0:
        name = signal.Signals(-end.exit_code).name
        return "error", f"killed by {name} (by hand, or by the kernel when memory ran out)"
    return "error", f"the training process ended with status {end.exit_code} before it could say why: see its log"


def after_lost_worker(state: State, asked_by: str, checkpoint: str, *, is_out_of_memory: bool) -> dict[str, Any]:
    """Changes to the state of a run that is recorded as running although its worker is gone.

    `asked_by`: the stop signal that the worker recorded, or empty; `is_out_of_memory`: whether its whole job was killed
    because it ran out of memory.
    """
    if is_out_of_memory:
        return after_failure(state, "oom", f"its whole job was killed: {_OUT_OF_MEMORY}", checkpoint)
    if asked_by:
        reason = f"stopped by {asked_by}, and killed before it could say so"
        return {"state": "preempted", "cause": None, "reason": reason}
    return after_failure(state, "node", "its worker was killed, or its node went away", checkpoint)


def _after_stop(now: State, end: End, reason: str) -> dict[str, Any]:
    if end.is_out_of_time and end.checkpoint == end.checkpoint_before:
        return after_failure(now, "timeout", "no checkpoint within the time limit: give more --time", end.checkpoint)
    return {"state": "preempted", "cause": None, "reason": reason}


def _stop_signal(exit_code: int) -> str:
    """Name of the stop signal that killed the process before it set its handlers; empty for any other end."""
    return next((number.name for number in STOP_SIGNALS if exit_code in {-number, _KILLED + number}), "")
