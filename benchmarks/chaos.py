"""Disturbs a grid on a real SLURM cluster at random; it must end bit-identical to an undisturbed one.

    python benchmarks/chaos.py --seed 0
    for seed in $(seq 0 9); do python benchmarks/chaos.py --seed $seed --reference digests.json; done
    python benchmarks/chaos.py --seed 0 --two-hosts

Starts a private cluster of four nodes (like tests/cluster: needs root and `make setup`) and launches a tuned grid of
small cells: trials, and the cells that follow from their choices. While they train, it kills nodes, preempts workers
with and without a requeue, requeues them, sends them USR2, and kills launchers, the first one in the middle of its
launch. Then it launches again, as a user would, until every cell is settled. With --two-hosts, ROOT has no flock, two
launchers start at once, workers cannot see each other's processes (each has its own process id namespace), and some
workers are paused beyond their lease and then woken. The result is clean if all cells are done with the undisturbed
weights, each result.json was written only once, and no attempt wrote to a journal after a later one had begun. The
last line of standard output is the verdict in JSON. Exit status: 0 if clean, else 1; then the runs are kept.
"""

import heapq
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cluster import processes
from cluster.configuration import Settings
from cluster.lab import Lab, obstacle

from suite.run.attempt import LEASE_SECONDS

GRID: dict[str, Any] = {
    "name": "chaos",
    "dataset": "digits",
    "models": ["resnet8"],
    "quantizers": ["fp", "bc", "bnn++"],
    "seeds": [0, 1, 2, 3],
    "data": {"crop": "padded", "crop_padding": 1},
    "training": {"epochs": 6, "batch_size": 64, "optimizer": "adamw", "learning_rate": 0.003},
    "quantization": {"sharpness": {"bnn++": {"shape": "exponential", "start": 2.0, "end": 500.0}}},
    "tune": {"training.learning_rate": [0.001, 0.003], "trials": 2, "seeds": [1000], "epochs": 3},
    "blocks": [{}, {"init": "finetune", "quantizers": ["bnn"]}],
}
ON_SLURM = ["--workers", "4", "--cpus-per-task", "1", "--mem", "2G", "--time", "1h"]
PAUSE_SECONDS = LEASE_SECONDS + 15
NO_FLOCK = "#include <errno.h>\nint flock(int file, int operation) { errno = ENOLCK; return -1; }\n"
LAUNCH_SECONDS = 30.0  # between a user's launches, after the last disturbance
PATIENCE_SECONDS = 1200.0


class Chaos:
    """A disturbed grid: the agenda of disturbances, the events so far, and the results seen."""

    def __init__(self, lab: Lab, root: Path, grid: Path, seed: int, *, two_hosts: bool = False) -> None:
        self.lab, self.root, self.grid, self.two_hosts = lab, root, grid, two_hosts
        self.environment = dict(lab.environment)
        if two_hosts:
            self.environment["LD_PRELOAD"] = str(without_flock(root))
        self.chance = random.Random(seed)  # noqa: S311  (no secret)
        self.start = time.monotonic()
        self.events: list[tuple[float, str, str]] = []
        self.results: dict[str, tuple[int, bytes]] = {}
        self.down: set[str] = set()
        self.launch_seconds = 0.0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()  # breaks ties: of two actions due at once, the earlier entry comes first

    def plan(self, num_disturbances: int) -> None:
        """Puts the disturbances, all kinds equally often, at random moments of the agenda."""
        kinds = [self.kill_node, self.preempt, self.requeue, self.send_usr2, self.kill_launcher, self.cancel_worker]
        chosen = [kinds[number % len(kinds)] for number in range(num_disturbances)]
        self.chance.shuffle(chosen)
        if self.two_hosts:  # early, because a pause would outlast the rest of the grid
            chosen[1:1] = [self.pause_worker] * 2
        after = 5.0
        for kind in chosen:
            after += self.chance.uniform(2, 14)
            self.later(after, kind)

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Puts an action on the agenda."""
        heapq.heappush(self._agenda, (time.monotonic() + seconds, next(self._numbers), action))

    def act(self) -> bool:
        """Performs the actions that are due; returns whether more are planned."""
        while self._agenda and self._agenda[0][0] <= time.monotonic():
            heapq.heappop(self._agenda)[2]()
        return bool(self._agenda)

    def note(self, event: str, target: str = "") -> None:
        """Adds an event to the story."""
        self.events.append((time.monotonic() - self.start, event, target))

    def kill_node(self) -> None:
        """Cuts a node's power, for a shorter or longer time than SLURM needs to notice; always leaves one node up."""
        up = [name for name in self.lab.nodes if name not in self.down]
        if len(up) == 1:
            self.note("no node to spare")
            return
        name = self.chance.choice(up)
        self.down.add(name)
        self.note("kill node", f"{name}: {self._job_on(name)}")
        self.lab.kill_node(name)

        def start() -> None:
            self.note("start node", name)
            self.lab.start_node(name)
            self.down.remove(name)

        self.later(self.chance.uniform(2, 45), start)

    def preempt(self) -> None:
        """A short job of a higher-priority partition claims a whole node."""
        name = self.chance.choice(self.lab.nodes)
        self.note("preempt", f"{name}: {self._job_on(name)}")
        where = ["--partition", "urgent", "--exclusive", "--nodelist", name, "--chdir", "/", "--output", "/dev/null"]
        self.lab.run("sbatch", *where, "--wrap", f"sleep {self.chance.uniform(1, 6):.1f}")

    def requeue(self) -> None:
        """Requeues a worker, as an administrator would."""
        self._on_a_task("requeue", "scontrol", "requeue")

    def cancel_worker(self) -> None:
        """Cancels a worker's job: like a preemption after which SLURM does not restart it."""
        self._on_a_task("cancel worker", "scancel")

    def pause_worker(self) -> None:
        """Pauses a worker and its children until other workers have taken over their cells, then resumes them."""
        tasks = self._running().split()
        if not tasks:
            self.note("no task to pause")
            return
        task = self.chance.choice(tasks)
        node = self.lab.run("squeue", "-h", "-j", task, "-o", "%N").strip()
        found = [pid for pid in processes.found(self.lab.mark, f"SLURMD_NODENAME={node}") if is_python(pid)]
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        self.note("pause worker", f"{task}: {len(found)} processes on {node}")

        def wake() -> None:
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            self.note("wake worker", task)

        self.later(PAUSE_SECONDS, wake)

    def send_usr2(self) -> None:
        """Sends a task's processes the signal of an approaching time limit."""
        self._on_a_task("USR2", "scancel", "--signal=USR2")

    def kill_launcher(self) -> None:
        """Launches the grid once more, and kills the launcher before it finishes."""
        with (self.root / "launchers.log").open("ab") as log:
            launcher = subprocess.Popen(self._launch(), stdout=log, stderr=log, env=self.environment)

        def kill() -> None:
            was_running = launcher.poll() is None
            launcher.kill()
            launcher.wait()
            self.note("kill launcher" if was_running else "launcher was through", f"process {launcher.pid}")

        self.later(self.chance.uniform(0, self.launch_seconds), kill)

    def launch_halfway(self) -> None:
        """Launches the grid for the first time, and kills the launcher at one of its steps."""
        step = self.chance.choice(["launches.jsonl", "plan.json", "*/cell.yaml", "jobs/*/spec.json", "jobs/*/*.pkl"])
        with (self.root / "launchers.log").open("ab") as log:
            launcher = subprocess.Popen(self._launch(), stdout=log, stderr=log, env=self.environment)
        while launcher.poll() is None and not list((self.root / GRID["name"]).glob(step)):
            time.sleep(0.005)
        launcher.kill()
        launcher.wait()
        self.note("kill launcher", f"after it wrote {step}")

    def launch(self) -> None:
        """Launches the grid as a user would; with two hosts, from two launchers at once.

        Raises:
            RuntimeError: a launch failed; its messages are in launchers.log.
        """
        self.note("launch")
        start = time.monotonic()
        with (self.root / "launchers.log").open("ab") as log:
            launchers = [
                subprocess.Popen(self._launch(), stdout=log, stderr=log, env=self.environment)
                for _ in range(1 + self.two_hosts)
            ]
        if any(launcher.wait() for launcher in launchers):
            raise RuntimeError(f"a launch failed; see {self.root / 'launchers.log'}")
        self.launch_seconds = time.monotonic() - start

    def statuses(self) -> list[dict[str, Any]]:
        """The cells' states according to `status --json`."""
        command = [sys.executable, "-m", "launch", "status", "--json", "--root", str(self.root)]
        found: list[dict[str, Any]] = json.loads(self.lab.run(*command))
        return found

    def watch(self) -> int:
        """Remembers each new result; returns the number of results."""
        for path in (self.root / GRID["name"]).glob("*/result.json"):
            if path.parent.name not in self.results:
                self.results[path.parent.name] = look(path)
        return len(self.results)

    def _launch(self) -> list[str]:
        where = ["--partition", "gpu"]
        if self.two_hosts:
            where += ["--python", f"unshare --pid --fork --mount-proc {sys.executable}"]
        return [sys.executable, "-m", "launch", "grid", str(self.grid), *where, *ON_SLURM, "--root", str(self.root)]

    def _job_on(self, node: str) -> str:
        return self._running("-w", node) or "idle"

    def _running(self, *options: str) -> str:
        return " ".join(self.lab.run("squeue", "-hr", "-p", "gpu", "-t", "RUNNING", "-o", "%i", *options).split())

    def _on_a_task(self, event: str, *command: str) -> None:
        tasks = self._running().split()
        if not tasks:
            self.note(f"no task to {event}")
            return
        task = self.chance.choice(tasks)
        done = subprocess.run(
            [*command, task], env=self.lab.environment, capture_output=True, text=True, check=False
        )  # the task may have just ended
        self.note(event, f"{task} {done.stderr.strip()}")


def without_flock(folder: Path) -> Path:
    """Builds a library that makes flock fail, as on a file system without locks."""
    source, library = folder / "noflock.c", folder / "noflock.so"
    source.write_text(NO_FLOCK, encoding="utf-8")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library


def is_python(pid: int) -> bool:
    """Whether the process is a worker's own, not SLURM's or the shell's."""
    with suppress(OSError):
        return b"python" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    return False


def look(path: Path) -> tuple[int, bytes]:
    """Modification time and content, which reveal that a file was rewritten."""
    return path.stat().st_mtime_ns, path.read_bytes()


def undisturbed(grid: Path, reference: Path | None) -> dict[str, str]:
    """Cell id -> weights_sha256 of the grid trained without SLURM; read from the `reference` file if it exists."""
    if reference and reference.exists():
        digests: dict[str, str] = json.loads(reference.read_text(encoding="utf-8"))
        return digests
    # One thread per cell, as on the cluster: more threads would change the order of sums.
    command = [sys.executable, "-m", "launch", "grid", str(grid), "--local", "--workers", str(os.cpu_count())]
    with tempfile.TemporaryDirectory() as root:
        subprocess.run([*command, "--root", root], check=True, stdout=subprocess.DEVNULL)
        results = [json.loads(path.read_text(encoding="utf-8")) for path in Path(root).glob("*/*/result.json")]
    digests = {result["cell"]: result["weights_sha256"] for result in results}
    if reference:
        reference.write_text(json.dumps(digests, indent=2), encoding="utf-8")
    return digests


def disturb(chaos: Chaos, num_cells: int, num_disturbances: int, console: Console) -> None:
    """Launches, disturbs, and launches again until all cells are settled. TimeoutError if that takes too long."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("disturbing", total=num_cells)
        chaos.launch_halfway()
        chaos.launch()
        chaos.plan(num_disturbances)
        while chaos.act():
            progress.update(bar, completed=chaos.watch(), description=chaos.events[-1][1].ljust(20))
            time.sleep(0.2)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_settled(chaos.statuses(), num_cells):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not settled {PATIENCE_SECONDS:.0f} s after the last disturbance")
            chaos.launch()
            end = time.monotonic() + LAUNCH_SECONDS
            while time.monotonic() < end and chaos.watch() < num_cells:
                progress.update(bar, completed=chaos.watch(), description="launching again".ljust(20))
                time.sleep(0.5)
        while chaos.lab.run("squeue", "-h"):  # a job still running after its result could rewrite it
            time.sleep(0.5)
        progress.update(bar, completed=chaos.watch())


def is_settled(statuses: list[dict[str, Any]], num_cells: int) -> bool:
    """Whether nothing is left to train, including the cells that follow from choices."""
    return len(statuses) >= num_cells and all(each["state"] in {"done", "failed", "cancelled"} for each in statuses)


def faults(chaos: Chaos, expected: dict[str, str]) -> list[str]:
    """Problems of the settled grid, one line each; empty if it is clean."""
    folder = chaos.root / GRID["name"]
    found = [
        f"{each['name']} ({each['cell']}): {each['state']}: {each['cause']}: {each['reason']}"
        for each in chaos.statuses()
        if each["state"] != "done"
    ]
    paths = sorted(folder.rglob("result.json"))
    if [path.parent for path in paths] != [folder / cell for cell in sorted(expected)]:
        found.append(f"{len(paths)} results for {len(expected)} cells")
    for path in paths:
        cell = path.parent.name
        if look(path) != chaos.results[cell]:
            found.append(f"{cell}: its result was written twice")
        if json.loads(path.read_bytes())["weights_sha256"] != expected.get(cell):
            found.append(f"{cell}: not the undisturbed weights")
    return found + [
        f"{path.parent.name}: attempts interleave" for path in folder.glob("*/journal.jsonl") if mixed(path)
    ]


def mixed(journal: Path) -> bool:
    """Whether an attempt wrote to the journal after a later attempt had: attempt numbers decrease."""
    found = [json.loads(line) for line in journal.read_bytes().splitlines() if line.endswith(b"}")]
    numbers = [each["attempt"] for each in found if "attempt" in each]
    return numbers != sorted(numbers)


def story(chaos: Chaos) -> Table:
    """The events with their times."""
    table = Table("seconds", "event", "target")
    for seconds, event, target in chaos.events:
        table.add_row(f"{seconds:.0f}", event, target)
    return table


def main(
    seed: Annotated[int, typer.Option(help="Random seed of the disturbances and their times.")] = 0,
    disturbances: Annotated[int, typer.Option(min=0, help="Number of disturbances.")] = 12,
    two_hosts: Annotated[
        bool, typer.Option("--two-hosts", help="No flock, two launchers at once, workers paused beyond their lease.")
    ] = False,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="JSON file of the undisturbed weights' digests; created if missing. Delete it when code changes."
        ),
    ] = None,
) -> None:
    """Disturb a grid on a real SLURM cluster at random; compare its results with an undisturbed one's."""
    if why := obstacle():
        print(why, file=sys.stderr)
        raise SystemExit(2)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the virtual nodes would share a GPU, which changes sums
    console, root = Console(stderr=True), Path(tempfile.mkdtemp(prefix="chaos-"))
    grid = root / "grid.yaml"
    grid.write_text(yaml.safe_dump(GRID, sort_keys=False), encoding="utf-8")
    with console.status("the undisturbed grid"):
        expected = undisturbed(grid, reference)
    # One core and so one cell per node. Preemption with a grace period sends USR2 first; without, it kills.
    settings = Settings(cpus_per_node=1, gpus_per_node=0, grace_seconds=random.Random(seed).choice([0, 20]))  # noqa: S311
    with Lab(settings) as lab:
        chaos = Chaos(lab, root, grid, seed, two_hosts=two_hosts)
        try:
            disturb(chaos, len(expected), disturbances, console)
            found = faults(chaos, expected)
        finally:
            console.print(story(chaos))
        seconds = time.monotonic() - chaos.start
    if found:
        console.print(*found, f"the runs are in {root}", sep="\n", markup=False, soft_wrap=True)
    else:
        shutil.rmtree(root)
    events = dict(Counter(event for _, event, _ in chaos.events))
    verdict = {"seed": seed, "clean": not found, "faults": len(found), "seconds": round(seconds), "events": events}
    print(json.dumps(verdict | {"grace_seconds": settings.grace_seconds, "two_hosts": two_hosts}))
    raise SystemExit(bool(found))


if __name__ == "__main__":
    typer.run(main)
