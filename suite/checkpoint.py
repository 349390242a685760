"""Checkpoints: written atomically, verified by checksum, the newest two kept, loaded without running code.

A file is 64 hex digits of SHA-256 over the rest, then what torch.save wrote. Loading a damaged file falls back to the
one before and says so.
"""

import hashlib
import io
import logging
from pathlib import Path
from typing import Any

import torch

from suite.errors import UserError
from suite.files import write_bytes

NUM_KEPT = 2
_DIGEST_CHARS = 64
log = logging.getLogger(__name__)


class CheckpointError(UserError):
    """The file is not what was written."""


def save(folder: Path, epoch: int, content: dict[str, Any]) -> Path:
    """Writes the state after `epoch` epochs (tensors, numbers, strings, and containers of them)."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getvalue()
    path = folder / f"epoch-{epoch:06d}.pt"
    write_bytes(path, hashlib.sha256(payload).hexdigest().encode() + payload)
    for old in _newest_first(folder)[NUM_KEPT:]:
        old.unlink()
    return path


def load_newest(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The newest whole checkpoint, or None where there is none.

    Raises:
        CheckpointError: there are checkpoints and none of them is whole.
    """
    paths = _newest_first(folder)
    for path in paths:
        try:
            return load(path, device)
        except CheckpointError as error:
            log.warning("%s; falling back to the checkpoint before", error)
    if paths:
        raise CheckpointError(f"{folder}: no checkpoint is whole; delete the folder to train from the start")
    return None


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """One checkpoint, verified.

    Raises:
        CheckpointError: its checksum does not match.
    """
    content = path.read_bytes()
    digest, payload = content[:_DIGEST_CHARS], content[_DIGEST_CHARS:]
    if digest != hashlib.sha256(payload).hexdigest().encode():
        raise CheckpointError(f"{path}: damaged (its checksum does not match)")
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
    return state


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*.pt"), reverse=True)
