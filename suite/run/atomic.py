"""Atomic writes: even after a crash, a reader sees either the complete old file or the complete new one."""

import errno
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from suite.errors import UserError

_TEMPORARY = ".tmp"
_WITHOUT_FOLDER_SYNC = frozenset((errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES))
_WITHOUT_LINKS = frozenset((errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK))


class DamagedFileError(UserError):
    """A file that only this project writes has unexpected content."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path}: not what a run writes there: {what}; restore it, or delete the run directory")


def write_bytes(path: Path, content: bytes | memoryview, check: Callable[[], None] = lambda: None) -> None:
    """Replaces the file: writes a temporary one beside it, flushes it to disk, renames it, flushes the folder.

    `check` is called right before the rename and can prevent it by raising an exception.
    """
    with _written(path, content) as temporary:
        check()
        temporary.replace(path)
    _sync_folder(path.parent)


def write_once(path: Path, content: bytes) -> bool:
    """Like write_bytes, but leaves an existing file unchanged and returns False."""
    with _written(path, content) as temporary:
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _WITHOUT_LINKS:
                raise
            if path.exists():  # the best option on a file system without hard links
                return False
            temporary.replace(path)
    _sync_folder(path.parent)
    return True


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401  (anything JSON holds)
    """Like write_bytes, indented for human readers."""
    write_bytes(path, as_json(value))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file written by write_json; {} if it does not exist.

    Raises:
        DamagedFileError: the file has other content.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DamagedFileError(path, str(error)) from error
    if not isinstance(found, dict):
        raise DamagedFileError(path, f"a {type(found).__name__}")
    return found


def as_json(value: Any) -> bytes:  # noqa: ANN401  (anything JSON holds)
    """The bytes that write_json writes."""
    return (json.dumps(value, indent=2) + "\n").encode()


def clean(folder: Path) -> None:
    """Removes temporary files of killed writers. A writer that is still alive fails with an error."""
    for temporary in folder.glob(f".*{_TEMPORARY}"):
        temporary.unlink(missing_ok=True)


@contextmanager
def _written(path: Path, content: bytes | memoryview) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Containers on two nodes may have the same process ids.
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}{_TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    """Flushes the folder's entries, if the file system supports it: CIFS and several FUSE file systems do not."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _WITHOUT_FOLDER_SYNC:
            raise
    finally:
        os.close(folder)
