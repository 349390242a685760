"""Where the nodes of a job meet for a cell, told by its first node in RUN/rendezvous.json.

The first node picks a free port of its own and writes it down; should another program take it before torchrun does,
all nodes go on to the next generation. An endpoint of None ends it: there is nothing, or nothing more, to run.
"""

import json
import random
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from suite.run.atomic import write_json

MAX_GENERATIONS = 5
WAIT_SECONDS = 300.0
POLL_SECONDS = 0.5
_PORTS = range(20000, 32000)
"""Below the ports that the kernel hands out on its own."""


@dataclass(frozen=True)
class Word:
    """What the first node says. `start` is the job's start it is about: job id and restart; endpoint `host:port`."""

    start: str
    generation: int
    attempt: int
    endpoint: str | None


def say(run_path: Path, word: Word) -> None:
    """For all nodes of the job to read."""
    write_json(_path(run_path), asdict(word))


def heard(run_path: Path, start: str, after: int) -> Word | None:
    """The word about this start of the job, if it is newer than generation `after`."""
    path = _path(run_path)
    if not path.exists():
        return None
    word = Word(**json.loads(path.read_text(encoding="utf-8")))
    return word if word.start == start and word.generation > after else None


def free_endpoint(seed: str) -> str:
    """A `host:port` of this machine that nobody listens at now; which port is tried first depends on the seed only."""
    ports = random.Random(seed).sample(_PORTS, len(_PORTS))  # noqa: S311  (no secret)
    return f"{socket.gethostname()}:{next(port for port in ports if _is_free(port))}"


def is_taken(said: str) -> bool:
    """Whether torchrun complained, in what it said, that another program listens at its address."""
    return any(words in said.lower() for words in ("eaddrinuse", "address already in use"))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _path(run_path: Path) -> Path:
    return run_path / "rendezvous.json"
