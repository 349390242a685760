"""The options of the commands that start jobs: where these run, and what they ask of SLURM."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # imports pydantic's models, which --help must not wait for
    from launch.resources import Profile

_ON_SLURM = "On SLURM"
_TRAINING = "Saving"


@dataclass(frozen=True)
class Where:
    """`resources` holds what was given of launch.resources.Resources' keys."""

    local: bool
    cluster: str | None
    resources: dict[str, Any]
    train_options: tuple[str, ...]

    def profile(self) -> "Profile":
        """What jobs ask for, with defaults that suit the cluster where one is asked for.

        Raises:
            ProfileError: no such profile, or anything wrong with it or the flags.
            SlurmError: the cluster is away.
        """
        from launch import slurm
        from launch.resources import load_profile

        profile = load_profile(self.cluster, self.resources)
        is_for_slurm = not self.local and profile.names_a_partition and slurm.available()
        return profile.on(slurm.partitions()) if is_for_slurm else profile


def with_where(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of this file; it gets them as one argument, `where`."""

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
    local: Annotated[bool, typer.Option("--local", help="Run on this machine, in parallel processes.")] = False,
    max_parallel: Annotated[
        int | None,
        typer.Option(min=1, help="Jobs at a time; default: on SLURM no limit, here one per GPU, else one per core."),
    ] = None,
    cluster: Annotated[
        str | None,
        _slurm(
            "--cluster",
            help="Profile that holds these options: ~/.config/proxbench/clusters/NAME.yaml, or a file's path.",
            metavar="NAME",
        ),
    ] = None,
    partition: Annotated[str | None, _slurm("--partition", help="Where jobs queue.")] = None,
    nodes: Annotated[int | None, _slurm("--nodes", help="Nodes of a job; default 1.", min=1)] = None,
    gpus_per_node: Annotated[
        int | None, _slurm("--gpus-per-node", help="One process each; default: 1 where the partition has GPUs.", min=0)
    ] = None,
    cpus_per_task: Annotated[int | None, _slurm("--cpus-per-task", help="Cores of a job on each node.", min=1)] = None,
    mem: Annotated[str | None, _slurm("--mem", help="Memory of a job on each node.", metavar="32G")] = None,
    time: Annotated[
        str | None,
        _slurm("--time", help="Limit of a job: near it, a run saves and queues again.", metavar="12h"),
    ] = None,
    account: Annotated[str | None, _slurm("--account", help="Who pays.")] = None,
    qos: Annotated[str | None, _slurm("--qos", help="Quality of service.")] = None,
    constraint: Annotated[str | None, _slurm("--constraint", help="Features that nodes must have.")] = None,
    setup: Annotated[
        list[str] | None,
        _slurm("--setup", help="Shell line before a job's Python, e.g. 'module load cuda'. Repeatable.", metavar="CMD"),
    ] = None,
    container: Annotated[
        str | None, _slurm("--container", help="Image to run in (srun --container-image, of pyxis).", metavar="IMAGE")
    ] = None,
    python: Annotated[
        str | None, _slurm("--python", help="Interpreter on the nodes; default: this one.", metavar="PATH")
    ] = None,
    pack: Annotated[int | None, _slurm("--pack", help="Cells side by side on a job's GPUs.", min=1)] = None,
    checkpoint_minutes: Annotated[
        float | None, typer.Option(min=0, help="Save when the last time is so long ago.", rich_help_panel=_TRAINING)
    ] = None,
    checkpoint_steps: Annotated[
        int | None, typer.Option(min=1, help="Save every so many steps.", rich_help_panel=_TRAINING)
    ] = None,
) -> Where:
    given = {
        "partition": partition,
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "cpus_per_task": cpus_per_task,
        "mem": mem,
        "time": time,
        "account": account,
        "qos": qos,
        "constraint": constraint,
        "setup": setup,
        "container": container,
        "python": python,
        "pack": pack,
        "max_parallel": max_parallel,
    }
    saving = {"--checkpoint-minutes": checkpoint_minutes, "--checkpoint-steps": checkpoint_steps}
    return Where(
        local,
        cluster,
        {name: value for name, value in given.items() if value is not None},
        tuple(word for name, value in saving.items() if value is not None for word in (name, str(value))),
    )
