"""What a job asks of SLURM, from defaults, a cluster's profile and flags, in this order.

A profile, ~/.config/proxbench/clusters/NAME.yaml, has the flags' names as keys; `cells` asks otherwise for some:

    partition: gpu
    time: 12h
    cells:
      resnet50: {gpus_per_node: 4, mem: 120G}
      resnet50/fp: {time: 1-00:00:00}
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError

from launch import slurm
from launch.plan import matches
from launch.slurm import Partition
from suite.errors import UserError
from suite.recipe.cell import Cell
from suite.recipe.faults import Faults, unknown
from suite.recipe.yaml_lines import read

DEFAULT_MINUTES = 24 * 60


class ProfileError(UserError):
    """A profile or a flag asks for what does not exist; one line per fault."""


def _minutes(value: object) -> object:
    if not isinstance(value, str):
        return value
    if (found := slurm.minutes(value)) is None:
        raise ValueError(f"{value!r} is no limit, and a job needs one to save before it")
    return found


def _memory(value: str) -> str:
    if not re.fullmatch(r"\d+[KMGT]?B?", value):
        raise ValueError(f"{value!r} is no amount of memory; write 32G, or 500M")
    return value


Text = Annotated[str, Field(min_length=1)]
Minutes = Annotated[PositiveInt, BeforeValidator(_minutes)]
Memory = Annotated[str, AfterValidator(_memory)]


class Resources(BaseModel):
    """What one job asks for: `pack` cells side by side, each with a process per GPU, or with one. `time` in minutes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    partition: Text | None = None
    nodes: PositiveInt = 1
    gpus_per_node: int = Field(0, ge=0)
    cpus_per_task: PositiveInt = 1
    mem: Memory | None = None
    time: Minutes = DEFAULT_MINUTES
    account: Text | None = None
    qos: Text | None = None
    constraint: Text | None = None
    setup: tuple[str, ...] = ()
    container: Text | None = None
    python: Text | None = None
    pack: PositiveInt = 1

    @property
    def num_processes(self) -> int:
        """Training processes on each node, of all its cells."""
        return self.pack * max(self.gpus_per_node, 1)


class _File(Resources):
    """The keys of a profile."""

    max_parallel: PositiveInt | None = None
    root: Path | None = None
    data_dir: Path | None = None
    tracking_uri: Text | None = None
    cells: dict[str, dict[str, Any]] = Field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """What is asked for: `given` for every cell, `cells` by pattern on top (the last that fits wins), then `flags`."""

    given: Mapping[str, Any] = field(default_factory=dict)
    cells: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    partitions: Mapping[str, Partition] = field(default_factory=dict)
    max_parallel: int | None = None
    root: Path | None = None
    data_dir: Path | None = None
    tracking_uri: str | None = None

    @property
    def names_a_partition(self) -> bool:
        """Whether it is about SLURM at all."""
        return any("partition" in keys for keys in (self.given, self.flags, *self.cells.values()))

    def on(self, partitions: Mapping[str, Partition]) -> "Profile":
        """With defaults that suit a cluster: a GPU where there are any, its share of the CPUs, a time allowed."""
        return replace(self, partitions=partitions)

    def for_cell(self, cell: Cell | None) -> Resources:
        """What a job of this cell asks for; of no cell in particular where it is None."""
        given = dict(self.given)
        for pattern, changes in self.cells.items():
            if cell is not None and matches(cell, pattern):
                given |= changes
        given |= self.flags
        return Resources.model_validate(self._suited(given) | given)

    def _suited(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults that follow from the partition and from what is given."""
        partition = self.partitions.get(given.get("partition", ""))
        num_gpus = given.get("gpus_per_node", 1 if partition and partition.has_gpus else 0)
        share = partition.cpus_per_gpu * num_gpus if partition else 0
        limit = partition and partition.time_limit_minutes
        return {
            "gpus_per_node": num_gpus,
            "cpus_per_task": max(given.get("pack", 1) * max(num_gpus, 1), share),
            "time": min(limit or DEFAULT_MINUTES, DEFAULT_MINUTES),
            "python": "python" if "container" in given else None,  # this one is not in the image
        }


def load_profile(name: str | None, flags: Mapping[str, Any] | None = None) -> Profile:
    """The profile of that name, or of the file with that path, or an empty one; with flags on top.

    Raises:
        ProfileError: no such profile, or anything wrong with it or with the flags, all faults at once.
    """
    ours = _checked_flags(flags or {})
    max_parallel = ours.pop("max_parallel", None)
    if name is None:
        return Profile(flags=ours, max_parallel=max_parallel)
    path = _find(name)
    keys = list(_File.model_fields)
    raw, lines = read(path, "a profile", keys, ProfileError, as_text=True)
    faults, profile = Faults(path, lines), _File()
    try:
        profile = _File.model_validate(raw)
    except ValidationError as error:
        faults.add_all(error, _File, ())
    cells = {}
    for pattern, changes in _mappings(raw.get("cells")):  # also where the rest has faults
        try:
            cells[pattern] = Resources.model_validate(changes).model_dump(exclude_unset=True)
        except ValidationError as error:
            faults.add_all(error, Resources, ("cells", pattern))
    if faults:
        raise ProfileError("\n".join(faults))
    given = profile.model_dump(exclude_unset=True, include=set(Resources.model_fields))
    return Profile(
        given,
        cells,
        ours,
        max_parallel=max_parallel or profile.max_parallel,
        root=profile.root and profile.root.expanduser(),
        data_dir=profile.data_dir and profile.data_dir.expanduser(),
        tracking_uri=profile.tracking_uri,
    )


def check(resources: Iterable[Resources]) -> None:
    """Passes where SLURM would take such jobs.

    Raises:
        ProfileError: no such partition, account or QOS, more than its nodes or its time limit have; one line each.
    """
    partitions = slurm.partitions()
    associations = slurm.accounts_and_qos() or []
    faults: dict[str, None] = {}
    for each in resources:
        if each.partition not in partitions:
            faults[_no_partition(each.partition, partitions)] = None
            continue
        faults |= dict.fromkeys(_beyond(each, partitions[each.partition]))
        faults |= dict.fromkeys(_refused(each, associations))
    if faults:
        raise ProfileError("\n".join(faults))


def sbatch_parameters(resources: Resources, mounts: Iterable[Path] = ()) -> dict[str, Any]:
    """The keyword arguments for `update_parameters` of submitit's SlurmExecutor; a container sees the `mounts`."""
    asked = {
        "partition": resources.partition,
        "time": resources.time,
        "nodes": resources.nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": resources.gpus_per_node or None,
        "cpus_per_task": resources.cpus_per_task,
        "mem": resources.mem,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "setup": list(resources.setup) or None,
        "stderr_to_stdout": True,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    # wckey: submitit's own, which a cluster that knows its keys refuses.
    return given | {"wckey": None, "srun_args": srun_arguments(resources, mounts)}


def srun_arguments(resources: Resources, mounts: Iterable[Path] = ()) -> list[str]:
    """What a job's srun has to be told again: since SLURM 22.05 it does not take the CPUs over from sbatch."""
    cpus = f"--cpus-per-task={resources.cpus_per_task}"
    if resources.container is None:
        return [cpus]
    folders = ",".join(f"{path.resolve()}:{path.resolve()}" for path in mounts)
    return [cpus, f"--container-image={resources.container}", *([f"--container-mounts={folders}"] if folders else [])]


def _mappings(raw: object) -> list[tuple[str, dict[str, Any]]]:
    """The entries that are mappings, as they should be."""
    return [entry for entry in raw.items() if isinstance(entry[1], dict)] if isinstance(raw, dict) else []


def _checked_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in flags.items() if value is not None}
    try:
        given = _File.model_validate(kept)
    except ValidationError as error:
        faults = [(fault["loc"], fault.get("ctx", {}).get("error", fault["msg"])) for fault in error.errors()]
        raise ProfileError(
            "\n".join(f"--{str(location[0]).replace('_', '-')}: {what}" for location, what in faults)
        ) from error
    return given.model_dump(exclude_unset=True)


def _find(name: str) -> Path:
    path = Path(name).expanduser()
    if path.suffix in {".yaml", ".yml"}:
        try:
            if path.is_file():
                return path
        except OSError as error:  # a folder on the way may not be entered
            raise ProfileError(f"{path}: {error.strerror}") from error
        raise ProfileError(f"{path}: no such profile")
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "proxbench" / "clusters"
    names = sorted(each.stem for each in folder.glob("*.yaml"))
    if name in names:
        return folder / f"{name}.yaml"
    if not names:
        raise ProfileError(f"unknown cluster {name!r}: {folder} holds no profile; write {folder / name}.yaml")
    raise ProfileError(f"{unknown('cluster', name, names)}; or write {folder / name}.yaml")


def _no_partition(name: str | None, partitions: Mapping[str, Partition]) -> str:
    if name is None:
        return f"name a partition with --partition, or in a profile ({', '.join(partitions)})"
    return unknown("partition", name, partitions)


def _beyond(resources: Resources, partition: Partition) -> Iterable[str]:
    """What the partition's nodes and limits don't have."""
    where, limit = f"partition {partition.name!r}", partition.time_limit_minutes
    if not partition.is_up:
        yield f"{where} is down: name another, or ask its administrators"
    if limit is not None and resources.time > limit:
        yield f"--time: {resources.time} minutes are more than the {limit} that {where} allows; say --time {limit}m"
    if resources.nodes > partition.num_nodes:
        yield f"--nodes: {where} has {partition.num_nodes}, not {resources.nodes}"
    if resources.gpus_per_node > partition.max_gpus_per_node:
        yield f"--gpus-per-node: nodes of {where} have {partition.max_gpus_per_node}, not {resources.gpus_per_node}"
    if resources.cpus_per_task > partition.max_cpus_per_node:
        yield f"--cpus-per-task: nodes of {where} have {partition.max_cpus_per_node}, not {resources.cpus_per_task}"
    if resources.cpus_per_task < resources.num_processes:
        yield (
            f"--cpus-per-task: {resources.num_processes} processes on each node (--pack {resources.pack}, one per GPU "
            f"and cell) need as many, not {resources.cpus_per_task}"
        )


def _refused(resources: Resources, associations: Sequence[slurm.Association]) -> Iterable[str]:
    """The account and QOS that this user has not; nothing where SLURM tells of none."""
    here = [each for each in associations if each.partition in {"", resources.partition}]
    accounts = sorted({each.account for each in here})
    if resources.account is not None and accounts and resources.account not in accounts:
        yield unknown("account", resources.account, accounts)
        return
    allowed = [each.qos for each in here if resources.account in {None, each.account}]
    names = sorted({name for qos in allowed for name in qos})
    if resources.qos is not None and names and resources.qos not in names:
        yield unknown("QOS", resources.qos, names)
