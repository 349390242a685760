"""Checkpoints: written atomically, verified by checksum, loaded without running code; the newest two are kept.

    epoch-000003-step-000120.pt     after 3 epochs and 120 steps of the fourth

A file starts with 64 hex digits, the SHA-256 of the rest, which is torch.save's output: tensors, numbers, strings, and
containers of them. docs/resume.md lists the keys of `Trainer.state_dict`. If a checkpoint is damaged (its checksum
does not match), loading falls back to the previous one with a warning. An intact checkpoint of another cell or format
is an error.
"""

import hashlib
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from suite.errors import UserError
from suite.run.atomic import write_bytes
from suite.run.provenance import own_version

FORMAT: Final = 4
"""Version of a checkpoint's content: `Engine.state_dict` and the other entries. Other versions are not loaded."""
NUM_KEPT = 2
_DIGEST_CHARS = 64
log = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint cannot be resumed from or written."""


class DamagedError(CheckpointError):
    """The file cannot be read, or its checksum does not match."""


def versions() -> dict[str, str]:
    """Versions of the software that writes a checkpoint."""
    return {"proxbench": own_version(), "torch": str(torch.__version__)}


def save(folder: Path, state: dict[str, Any], require_newest: Callable[[], None] = lambda: None) -> Path:
    """Writes a state to a file named by `epoch` (finished epochs) and `step` (finished steps of the current one).

    Args:
        folder: the run's checkpoints.
        state: from `Trainer.state_dict`.
        require_newest: raises if another attempt has taken over; called before the folder is changed.

    Raises:
        CheckpointError: the file cannot be written (for instance, disk full); earlier ones are unchanged.
    """
    buffer = io.BytesIO(b" " * _DIGEST_CHARS)
    buffer.seek(_DIGEST_CHARS)
    torch.save({"format": FORMAT, "versions": versions(), **state}, buffer)
    with buffer.getbuffer() as content:
        content[:_DIGEST_CHARS] = hashlib.sha256(content[_DIGEST_CHARS:]).hexdigest().encode()
        path = folder / f"epoch-{state['epoch']:06d}-step-{state['step']:06d}.pt"
        try:
            write_bytes(path, content, require_newest)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be written: {error.strerror}; earlier checkpoints are unchanged"
            ) from error
    require_newest()
    paths = newest_first(folder)
    place = paths.index(path)
    # Delete checkpoints of later steps, too: they were damaged, so training resumed from an earlier one.
    for other in paths[:place] + paths[place + NUM_KEPT :]:
        other.unlink()
    return path


def load_newest(folder: Path, cell_id: str, device: torch.device) -> tuple[Path, dict[str, Any]] | None:
    """Path and content of the newest intact checkpoint, or None if there are no checkpoints.

    Raises:
        CheckpointError: the newest intact one belongs to another cell or format, or no checkpoint is intact.
    """
    paths = newest_first(folder)
    for path in paths:
        try:
            return path, load(path, cell_id, device)
        except DamagedError as error:
            log.warning("%s; falling back to the checkpoint before", error)
    if paths:
        raise CheckpointError(f"{folder}: no checkpoint is intact; delete the folder to train from the start")
    return None


def load(path: Path, cell_id: str, device: torch.device) -> dict[str, Any]:
    """Loads one checkpoint and verifies it.

    Raises:
        DamagedError: it cannot be read, or its checksum does not match.
        CheckpointError: it belongs to another cell, has another format, or contains more than data.
    """
    state = _unpickled(path, _payload(path), device)
    if (found := state.get("format")) != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {found}; this proxbench reads format {FORMAT}")
    if (cell := state.get("cell")) != cell_id:
        raise CheckpointError(f"{path}: the checkpoint is of cell {cell}, this is {cell_id}")
    if (theirs := state["versions"]) != versions():
        log.warning("%s: written by %s, this is %s: results may round differently", path, theirs, versions())
    return state


def is_intact(path: Path) -> bool:
    """Whether the file's checksum matches."""
    try:
        _payload(path)
    except DamagedError:
        return False
    return True


def newest_first(folder: Path) -> list[Path]:
    """All checkpoints of a folder, intact or not."""
    return sorted(folder.glob("epoch-*.pt"), reverse=True)


def _payload(path: Path) -> memoryview:
    try:
        content = memoryview(path.read_bytes())
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror})") from error
    payload = content[_DIGEST_CHARS:]
    if content[:_DIGEST_CHARS] != hashlib.sha256(payload).hexdigest().encode():
        raise DamagedError(f"{path}: damaged (its checksum does not match)")
    return payload


def _unpickled(path: Path, payload: memoryview, device: torch.device) -> dict[str, Any]:
    try:
        state = torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
    except Exception as error:  # intact, so not damaged: a pickle of code, or not a pickle
        raise CheckpointError(
            f"{path}: not a checkpoint of proxbench: it holds something other than tensors, numbers and strings"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a checkpoint of proxbench: it holds a {type(state).__name__}")
    return state
