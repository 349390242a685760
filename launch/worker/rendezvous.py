"""How the first node of a worker's job tells the others which cell to train, and the address for their processes.

The first node picks one of its free ports and writes it to a file. If another program takes the port before torchrun
does, all nodes move on to the next generation.
"""

import json
import random
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from suite.run.atomic import write_json

MAX_GENERATIONS = 5
"""How many ports are tried for one attempt."""
WAIT_SECONDS = 600.0
"""How long an idle node waits for the first node's next word."""
POLL_SECONDS = 0.5
_PORTS = range(20000, 32000)
"""Below the ports that the kernel assigns automatically."""


@dataclass(frozen=True)
class Word:
    """A message of the first node. `start` identifies this start of the job: its id and restart count.

    `endpoint` is `host:port`; None: stop the running process. An empty `cell`: no cells are left, exit.
    """

    start: str
    generation: int = 0
    cell: str = ""
    attempt: int = 0
    endpoint: str | None = None


def say(path: Path, word: Word) -> None:
    """Writes the word to the file, for all nodes of the job to read."""
    write_json(path, asdict(word))


def heard(path: Path, start: str, after: int) -> Word | None:
    """The word for this start of the job, if it is newer than generation `after`; else None."""
    if not path.exists():
        return None
    word = Word(**json.loads(path.read_text(encoding="utf-8")))
    return word if word.start == start and word.generation > after else None


def free_endpoint(seed: str) -> str:
    """A `host:port` with a free port of this machine. The order in which ports are tried depends only on the seed."""
    ports = random.Random(seed).sample(_PORTS, len(_PORTS))  # noqa: S311  (no secret)
    return f"{socket.gethostname()}:{next(port for port in ports if _is_free(port))}"


def is_taken(said: str) -> bool:
    """Whether torchrun's output says that another program listens at its address."""
    return any(words in said.lower() for words in ("eaddrinuse", "address already in use"))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
