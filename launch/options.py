"""Options of the commands that start workers: where workers run, and what they request from SLURM."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # imports pydantic's models, which --help must not wait for
    from launch.launches import Launch
    from launch.slurm.profile import Profile

GpusPerCell = Annotated[int | None, typer.Option(min=1, help="GPUs per cell, one process each; default 1.")]
CellsPerGpu = Annotated[int | None, typer.Option(min=1, help="Cells trained side by side on each GPU; default 1.")]
CpusPerCell = Annotated[
    int | None, typer.Option(min=1, help="Without GPUs: cores per cell; default: 1 here, all of the job's on SLURM.")
]
_ON_SLURM = "On SLURM"
_TRAINING = "Saving"


@dataclass(frozen=True)
class Where:
    """Where workers run. `flags`: the profile keys (see launch.slurm.profile) that were given as flags."""

    local: bool
    cluster: str | None
    flags: Mapping[str, Any]
    train_options: tuple[str, ...]

    def after(self, last: "Launch | None") -> "Where":
        """This, with the last launch's values for options that were not given."""
        if last is None:
            return self
        from launch.slurm.profile import load_profile

        is_local = self.local or (last.place == "local" and not load_profile(self.cluster, self.flags).is_for_slurm)
        options = self.train_options or last.train_options
        if is_local and last.place != "local":  # SLURM's flags do not apply here
            return replace(self, train_options=options)
        return Where(is_local, self.cluster or last.cluster, {**last.flags, **self.flags}, options)

    def profile(self) -> "Profile":
        """What workers request, with defaults that suit the cluster unless they run locally.

        Raises:
            ProfileError: no such profile, or an invalid profile or flag.
            SlurmError: SLURM does not answer.
        """
        from launch.slurm import client
        from launch.slurm.profile import load_profile

        profile = load_profile(self.cluster, self.flags)
        return profile.on(client.partitions()) if not self.local and client.available() else profile


def with_where(command: Callable[..., None]) -> Callable[..., None]:
    """Adds this module's options to a command, which receives them as one argument, `where`."""

    @wraps(command)
    def run(**given: Any) -> None:  # noqa: ANN401  (the command's own options)
        where = _where(**{name: given.pop(name) for name in ours})
        command(**given, where=where)

    theirs = [each for name, each in inspect.signature(command).parameters.items() if name != "where"]
    ours = inspect.signature(_where).parameters
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*theirs, *ours.values())]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _slurm(*names: str, help: str, metavar: str | None = None, **limits: Any) -> Any:  # noqa: A002, ANN401
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=_ON_SLURM, **limits)


def _where(
    local: Annotated[bool, typer.Option("--local", help="Run on this machine.")] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="On SLURM: jobs at a time; default: as many as find work. Here: cells at a time; default: all slots.",
        ),
    ] = None,
    gpus_per_cell: GpusPerCell = None,
    cells_per_gpu: CellsPerGpu = None,
    cpus_per_cell: CpusPerCell = None,
    cluster: Annotated[
        str | None,
        _slurm(
            "--cluster",
            help="Profile that holds these options: ~/.config/proxbench/clusters/NAME.yaml, or a file's path.",
            metavar="NAME",
        ),
    ] = None,
    partition: Annotated[
        str | None, _slurm("--partition", help="Partition, or several as a,b; default: the site's.")
    ] = None,
    nodes: Annotated[int | None, _slurm("--nodes", help="Nodes per cell; default 1.", min=1)] = None,
    gpus_per_node: Annotated[
        str | None,
        _slurm(
            "--gpus-per-node",
            help="GPUs of a job on each node; default: 1 if the partition has any.",
            metavar="[TYPE:]N",
        ),
    ] = None,
    gres: Annotated[
        str | None, _slurm("--gres", help="The same, for sites that require this form.", metavar="gpu:[TYPE:]N")
    ] = None,
    cpus_per_task: Annotated[int | None, _slurm("--cpus-per-task", help="Cores of a job on each node.", min=1)] = None,
    mem: Annotated[str | None, _slurm("--mem", help="Memory of a job on each node.", metavar="32G")] = None,
    time: Annotated[
        str | None,
        _slurm(
            "--time",
            help="Time limit of each job, not of a run: shortly before it, runs save and the job requeues.",
            metavar="12h",
        ),
    ] = None,
    account: Annotated[str | None, _slurm("--account", help="Account to charge.")] = None,
    qos: Annotated[str | None, _slurm("--qos", help="Quality of service.")] = None,
    constraint: Annotated[str | None, _slurm("--constraint", help="Features that nodes must have.")] = None,
    sbatch: Annotated[
        list[str] | None,
        _slurm(
            "--sbatch",
            help="Any other option of sbatch, e.g. exclude=node7, exclusive. Repeatable.",
            metavar="KEY[=VALUE]",
        ),
    ] = None,
    setup: Annotated[
        list[str] | None,
        _slurm("--setup", help="Shell line to run before Python, e.g. 'module load cuda'. Repeatable.", metavar="CMD"),
    ] = None,
    container: Annotated[
        str | None, _slurm("--container", help="Image to run in (pyxis: srun --container-image).", metavar="IMAGE")
    ] = None,
    python: Annotated[
        str | None, _slurm("--python", help="Interpreter on the nodes; default: this one.", metavar="PATH")
    ] = None,
    checkpoint_minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Save a checkpoint at least every N minutes; default 10.", rich_help_panel=_TRAINING),
    ] = None,
    checkpoint_steps: Annotated[
        int | None, typer.Option(min=1, help="Also save a checkpoint every N steps.", rich_help_panel=_TRAINING)
    ] = None,
) -> Where:
    given = {
        "workers": workers,
        "gpus_per_cell": gpus_per_cell,
        "cells_per_gpu": cells_per_gpu,
        "cpus_per_cell": cpus_per_cell,
        "partition": partition,
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "gres": gres,
        "cpus_per_task": cpus_per_task,
        "mem": mem,
        "time": time,
        "account": account,
        "qos": qos,
        "constraint": constraint,
        "sbatch": sbatch,
        "setup": setup,
        "container": container,
        "python": python,
    }
    saving = {"--checkpoint-minutes": checkpoint_minutes, "--checkpoint-steps": checkpoint_steps}
    return Where(
        local,
        cluster,
        {name: value for name, value in given.items() if value is not None},
        tuple(word for name, value in saving.items() if value is not None for word in (name, str(value))),
    )
