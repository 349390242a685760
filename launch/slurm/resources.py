"""What a worker's job requests from SLURM: defaults, then a cluster's profile, then flags.

A profile, ~/.config/proxbench/clusters/NAME.yaml, has the flags' names as keys; `cells` overrides them for some cells:

    partition: gpu
    time: 12h
    sbatch: {reservation: vision, exclude: node7}
    cells:
      resnet50: {gpus_per_cell: 4, mem: 120G}
      resnet50/fp: {time: 1-00:00:00}
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PlainSerializer,
    PositiveInt,
    ValidationError,
    model_validator,
)

from launch.plan import matches
from launch.slurm import client as slurm
from launch.slurm.client import Partition
from suite.errors import SettingError, UserError
from suite.recipe.cell import Cell
from suite.recipe.faults import Faults, unknown
from suite.recipe.yaml_lines import read

DEFAULT_MINUTES = 24 * 60
DEFAULT_CONFIRM_GPU_HOURS = 100.0
_INSTEAD: Mapping[str, str] = {
    **{
        name: f"--{name}"
        for name in ("partition", "nodes", "gpus-per-node", "gres", "cpus-per-task", "mem", "time", "account", "qos")
    },
    "constraint": "--constraint",
    "gpus": "--gpus-per-node",
    "gpus-per-task": "--gpus-per-node",
    "cpus-per-gpu": "--cpus-per-task",
    "array": "--workers",
}
"""sbatch's options that a flag of ours sets, and that flag."""
_RESERVED = frozenset(("chdir", "dependency", "error", "hold", "job-name", "ntasks", "ntasks-per-node", "open-mode"))
_RESERVED |= {"output", "parsable", "quiet", "requeue", "signal", "test-only", "wait", "wckey", "wrap"}
"""sbatch's options whose values this program depends on."""
_MEMORY_OPTIONS = ("mem-per-cpu", "mem-per-gpu")
_LOCAL_KEYS = frozenset(("gpus_per_cell", "cells_per_gpu", "cpus_per_cell"))
"""Keys that say how cells share a machine, whether or not SLURM lends it."""
_ALTERNATIVES: Mapping[str, str] = {"gpus_per_node": "gres", "gres": "gpus_per_node"}


class ProfileError(UserError):
    """A profile or a flag requests what does not exist; one line per fault."""


def _minutes(value: object) -> object:
    found = slurm.minutes(value) if isinstance(value, str) else value
    if found is None:
        raise ValueError(f"{value!r} is not a limit: a job needs one, to save a checkpoint before it")
    if isinstance(found, int) and found < 1:
        raise ValueError(f"a job needs at least a minute, not {value}")
    return found


def _memory(value: str) -> str:
    """As sbatch takes it: `32g` is 32G, `1.5T` 1536G. 0 is all of a node's memory."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([KMGT])B?)?", value.upper())
    if found is None:
        raise ValueError(f"{value!r} is not an amount of memory; write 32G, or 500M")
    amount, unit = Fraction(found[1]), found[2]
    if unit is None:
        if amount:
            raise ValueError(f"{value} is {value} MB to SLURM: write {value}G")
        return "0"
    while amount.denominator > 1 and unit in {"T", "G"}:
        amount, unit = amount * 1024, "MG"[unit == "T"]
    return f"{math.ceil(amount)}{unit}"


def _gpus(value: object) -> object:
    """A number of GPUs, or their type and number: 4, a100:4."""
    if re.fullmatch(r"(?:[A-Za-z][\w.-]*:)?\d+", str(value)) is None:
        raise ValueError(f"{str(value)!r} is not a number of GPUs; write 4, or a100:4")
    return int(str(value)) if str(value).isdecimal() else value


def _options(value: object) -> object:
    """Options of sbatch as sorted pairs, an empty value for a bare one; from a mapping, or texts `KEY=VALUE`."""
    if isinstance(value, Mapping):
        pairs = [(str(key), "" if text is None else str(text)) for key, text in value.items()]
    elif isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
        pairs = [(key, text) for key, _, text in (each.partition("=") for each in value)]
    else:
        raise ValueError("write the options as a mapping, such as {exclude: node7, exclusive: true}")
    options = {}
    for key, text in pairs:
        name = key.strip().lstrip("-").replace("_", "-").lower()
        if re.fullmatch(r"[a-z0-9][a-z0-9-]+", name) is None:
            raise SettingError(key or "''", "write an sbatch option by its long name, such as exclude")
        if name in _INSTEAD:
            raise SettingError(key, f"is set by a flag of its own: {_INSTEAD[name]}")
        if name in _RESERVED:
            raise SettingError(key, "is set by this program")
        options[name] = "" if text.lower() == "true" else text
    return tuple(sorted(options.items()))


Text = Annotated[str, Field(min_length=1)]
Minutes = Annotated[PositiveInt, BeforeValidator(_minutes)]
Memory = Annotated[str, AfterValidator(_memory)]
Gpus = Annotated[int | str, BeforeValidator(_gpus)]
Options = Annotated[tuple[tuple[str, str], ...], BeforeValidator(_options), PlainSerializer(dict)]


class Resources(BaseModel):
    """What a worker's job requests, and how its cells share it. `time` is in minutes.

    Args:
        partition: one, several as `a,b`, or None for the site's default.
        nodes: of a job; with more than one, a cell takes all GPUs of all of them.
        gpus_per_node: a number, or type and number, `a100:4`.
        gres: instead of gpus_per_node where a site insists on it: `gpu:4`.
        gpus_per_cell: GPUs that a cell trains on, one process each.
        cells_per_gpu: cells that share a GPU; only with gpus_per_cell 1.
        cpus_per_task: cores of the job on each node.
        cpus_per_cell: cores of a cell of a job without GPUs; None: all.
        mem: memory of each node, in SLURM's form; 0 is all of it.
        setup: lines of shell before Python starts.
        container: image that Python runs in.
        python: command that starts Python; None: the launcher's own.
        sbatch: further sbatch options, sorted; an empty value is a bare option, `false` leaves it out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    partition: Text | None = None
    nodes: PositiveInt = 1
    gpus_per_node: Gpus = 0
    gres: Text | None = None
    gpus_per_cell: PositiveInt = 1
    cells_per_gpu: PositiveInt = 1
    cpus_per_task: PositiveInt = 1
    cpus_per_cell: PositiveInt | None = None
    mem: Memory | None = None
    time: Minutes = DEFAULT_MINUTES
    account: Text | None = None
    qos: Text | None = None
    constraint: Text | None = None
    setup: tuple[str, ...] = ()
    container: Text | None = None
    python: Text | None = None
    sbatch: Options = ()

    @model_validator(mode="after")
    def _consistent(self) -> "Resources":
        given = self.model_fields_set
        if self.gres is not None and self.gpus_per_node:
            raise SettingError("gres", "requests GPUs instead of gpus_per_node: give one of them")
        if self.cells_per_gpu > 1 and self.gpus_per_cell > 1:
            raise SettingError("cells_per_gpu", "cells share a GPU only if each takes one, with gpus_per_cell 1")
        if given >= {"gpus_per_cell", "gpus_per_node"} and 0 < self.num_gpus < self.gpus_per_cell:
            raise SettingError("gpus_per_cell", f"a node of the job has {self.num_gpus}, not {self.gpus_per_cell}")
        has_both = given >= {"cpus_per_cell", "cpus_per_task"} and not self.num_gpus
        if has_both and (self.cpus_per_cell or 0) > self.cpus_per_task:
            raise SettingError("cpus_per_cell", f"the job has {self.cpus_per_task}, not {self.cpus_per_cell}")
        if self.mem is not None and (rival := [name for name, _ in self.sbatch if name in _MEMORY_OPTIONS]):
            raise SettingError("mem", f"requests memory instead of sbatch's {rival[0]}: give one of them")
        return self

    @property
    def partitions(self) -> tuple[str, ...]:
        """The partitions named; none for the site's default."""
        return tuple(filter(None, (self.partition or "").split(",")))

    @property
    def num_gpus(self) -> int:
        """GPUs of each node."""
        return _num_gpus(self.gpus_per_node, self.gres)

    @property
    def num_slots(self) -> int:
        """Cells that a worker trains at a time."""
        if self.nodes > 1:
            return 1
        if self.num_gpus:
            return max(self.num_gpus // self.gpus_per_cell, 1) * self.cells_per_gpu
        return max(self.cpus_per_task // (self.cpus_per_cell or self.cpus_per_task), 1)

    @property
    def num_processes(self) -> int:
        """Training processes of each cell on each node."""
        if self.nodes > 1:
            return max(self.num_gpus, 1)
        return min(self.gpus_per_cell, max(self.num_gpus, 1))

    @property
    def shape(self) -> str:
        """8 hex digits: the same for all workers that may take the same cells."""
        parts = [self.nodes, self.gres or f"gpu:{self.gpus_per_node}", self.gpus_per_cell, self.cells_per_gpu]
        parts += [self.cpus_per_task, self.cpus_per_cell, self.mem, self.constraint]
        parts += [[name, value] for name, value in self.sbatch if name in _MEMORY_OPTIONS]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


class _File(Resources):
    """The keys of a profile."""

    workers: PositiveInt | None = None
    root: Path | None = None
    data_dir: Path | None = None
    tracking_uri: Text | None = None
    confirm_gpu_hours: NonNegativeFloat = DEFAULT_CONFIRM_GPU_HOURS
    on_finish: Text | None = None
    cells: dict[str, dict[str, Any]] = Field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """What is requested: `given` for every cell, `cells` by pattern on top (the last that fits wins), then `flags`.

    Args:
        given: keys of Resources.
        cells: pattern -> keys of Resources.
        flags: keys of Resources.
        partitions: the cluster's, for defaults.
        workers: most workers at a time; None: no limit but the cells.
        root: where runs are stored.
        data_dir: where data sets are stored.
        tracking_uri: the MLflow store.
        confirm_gpu_hours: a launch asks before it requests more GPU-hours.
        on_finish: shell command that runs once the grid has ended.
    """

    given: Mapping[str, Any] = field(default_factory=dict)
    cells: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    partitions: Mapping[str, Partition] = field(default_factory=dict)
    workers: int | None = None
    root: Path | None = None
    data_dir: Path | None = None
    tracking_uri: str | None = None
    confirm_gpu_hours: float = DEFAULT_CONFIRM_GPU_HOURS
    on_finish: str | None = None

    @property
    def is_for_slurm(self) -> bool:
        """Whether it requests anything that only SLURM can give."""
        return any(set(keys) - _LOCAL_KEYS for keys in (self.given, self.flags, *self.cells.values()))

    def on(self, partitions: Mapping[str, Partition]) -> "Profile":
        """With defaults that suit the cluster: a GPU if it has any, a GPU's share of the cores, an allowed time."""
        return replace(self, partitions=partitions)

    def for_cell(self, cell: Cell | None) -> Resources:
        """What a worker for this cell requests; `model_fields_set` tells what the user gave.

        Args:
            cell: None: for no cell in particular.

        Raises:
            ProfileError: the profile and the flags contradict each other.
        """
        given: dict[str, Any] = dict(self.given)
        for pattern, changes in self.cells.items():
            if cell is not None and matches(cell, pattern):
                given = _merged(given, changes)
        given = _merged(given, self.flags)
        try:
            suited = Resources.model_validate(self._suited(given) | given)
        except ValidationError as error:
            raise _fault_of_flags(error) from error
        return Resources.model_construct(_fields_set=set(given), **dict(suited))

    def _suited(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults that follow from the first partition and from what is given."""
        partition = self._first_partition(given)
        if "gpus_per_node" in given or "gres" in given:
            num_gpus = _num_gpus(given.get("gpus_per_node", 0), given.get("gres"))
        else:
            num_gpus = given.get("gpus_per_cell", 1 if partition and partition.has_gpus else 0)
        limit = partition and partition.time_limit_minutes
        least = num_gpus * given.get("cells_per_gpu", 1) or given.get("cpus_per_cell", 1)
        share = partition.cpus_per_gpu * num_gpus if partition else 0
        return {
            "gpus_per_node": 0 if "gres" in given else num_gpus,
            "cpus_per_task": max(least, share),
            "time": min(limit or DEFAULT_MINUTES, DEFAULT_MINUTES),
            "python": "python" if "container" in given else None,  # this one is not in the image
        }

    def _first_partition(self, given: Mapping[str, Any]) -> Partition | None:
        if named := given.get("partition"):
            return self.partitions.get(named.split(",")[0])
        return next((each for each in self.partitions.values() if each.is_default), None)


def load_profile(name: str | None, flags: Mapping[str, Any] | None = None) -> Profile:
    """The profile of that name, or of the file with that path, or an empty one; with flags on top.

    Raises:
        ProfileError: no such profile, or anything wrong with it or with the flags, all faults at once.
    """
    given_flags = _checked_flags(flags or {})
    ours, settings = _split(given_flags)
    if name is None:
        return Profile(flags=ours, **settings)
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
    given, of_profile = _split(profile.model_dump(exclude_unset=True, exclude={"cells"}))
    for folder in {"root", "data_dir"} & of_profile.keys():
        of_profile[folder] = of_profile[folder] and of_profile[folder].expanduser()
    return Profile(given, cells, ours, **of_profile | settings)


def check(resources: Iterable[Resources]) -> None:
    """Returns if SLURM would accept such jobs, as far as its client commands tell.

    Raises:
        ProfileError: no such partition, account or QOS, or a request beyond nodes or time limits; one line each.
    """
    partitions = slurm.partitions()
    associations = (slurm.accounts_and_qos() if slurm.config().enforces_accounts else None) or []
    faults: dict[str, None] = {}
    for each in resources:
        faults |= dict.fromkeys(_beyond_all(each, partitions))
        faults |= dict.fromkeys(_refused(each, associations))
    if faults:
        raise ProfileError("\n".join(faults))


def sbatch_parameters(resources: Resources, mounts: Iterable[Path] = ()) -> dict[str, Any]:
    """The keyword arguments for `update_parameters` of submitit's SlurmExecutor; a container sees the `mounts`."""
    requested = {
        "partition": resources.partition,
        "time": resources.time,
        "nodes": resources.nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": resources.gpus_per_node or None,
        "gres": resources.gres,
        "cpus_per_task": resources.cpus_per_task,
        "mem": resources.mem,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "setup": list(resources.setup) or None,
        "stderr_to_stdout": True,
    }
    given = {name: value for name, value in requested.items() if value is not None}
    options = {name: value or True for name, value in resources.sbatch if value.lower() != "false"}
    # wckey: submitit's own, which a cluster that knows its keys refuses.
    return given | {"wckey": None, "srun_args": srun_arguments(resources, mounts), "additional_parameters": options}


def srun_arguments(resources: Resources, mounts: Iterable[Path] = ()) -> list[str]:
    """Arguments of the job's srun. Since SLURM 22.05 it does not inherit the CPUs per task from sbatch."""
    cpus = f"--cpus-per-task={resources.cpus_per_task}"
    if resources.container is None:
        return [cpus]
    folders = ",".join(f"{path.resolve()}:{path.resolve()}" for path in mounts)
    return [cpus, f"--container-image={resources.container}", *([f"--container-mounts={folders}"] if folders else [])]


def _mappings(raw: object) -> list[tuple[str, dict[str, Any]]]:
    """The entries that are mappings, as they should be."""
    return [entry for entry in raw.items() if isinstance(entry[1], dict)] if isinstance(raw, dict) else []


def _merged(given: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes on top of what is given: sbatch's options one by one, GPUs in either form."""
    replaced = {_ALTERNATIVES[key] for key in changes if key in _ALTERNATIVES}
    kept = {key: value for key, value in given.items() if key not in replaced}
    options = dict(given.get("sbatch", ())) | dict(changes.get("sbatch", ()))
    return {**kept, **changes, **({"sbatch": options} if options else {})}


def _split(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of Resources, and the others."""
    inside = {key: value for key, value in given.items() if key in Resources.model_fields}
    return inside, {key: value for key, value in given.items() if key not in inside}


def _num_gpus(gpus_per_node: int | str, gres: str | None) -> int:
    if gres is None:
        return int(str(gpus_per_node).rpartition(":")[2])
    words = [part.removeprefix("gres/").replace("=", ":").split(":") for part in gres.split(",")]
    counts = [each[-1] for each in words if each[0] == "gpu"]
    return sum(int(count) if count.isdecimal() else 1 for count in counts)


def _checked_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in flags.items() if value is not None}
    try:
        given = _File.model_validate(kept)
    except ValidationError as error:
        raise _fault_of_flags(error) from error
    return given.model_dump(exclude_unset=True)


def _fault_of_flags(error: ValidationError) -> ProfileError:
    """One line for each flag that is wrong."""
    lines: dict[str, None] = {}
    for fault in error.errors():
        cause = fault.get("ctx", {}).get("error")
        location = fault["loc"] or (cause.location if isinstance(cause, SettingError) else ())
        reason = cause.reason if isinstance(cause, SettingError) and not fault["loc"] else cause
        lines[f"--{str(location[0]).replace('_', '-')}: {reason or _plainly(fault)}"] = None
    return ProfileError("\n".join(lines))


def _plainly(fault: Any) -> str:  # noqa: ANN401  (pydantic's ErrorDetails)
    bound = fault.get("ctx", {})
    if "gt" in bound or "ge" in bound:
        least = f"greater than {bound['gt']}" if "gt" in bound else f"at least {bound['ge']}"
        return f"must be {least}, not {fault['input']}"
    return f"{fault['msg'][0].lower()}{fault['msg'][1:]}, got {fault['input']!r}"


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


def _beyond_all(resources: Resources, partitions: Mapping[str, Partition]) -> list[str]:
    """Why none of the partitions takes such a job; empty if one does."""
    names = resources.partitions or tuple(name for name, each in partitions.items() if each.is_default)
    unknown_names = [unknown("partition", name, partitions) for name in names if name not in partitions]
    faults = [list(_beyond(resources, partitions[name])) for name in names if name in partitions]
    return unknown_names or ([line for each in faults for line in each] if all(faults) else [])


def _beyond(resources: Resources, partition: Partition) -> Iterable[str]:
    """What exceeds the partition's nodes and limits."""
    where, limit = f"partition {partition.name!r}", partition.time_limit_minutes
    num_gpus, num_cpus, given = resources.num_gpus, resources.cpus_per_task, resources.model_fields_set
    if not partition.is_up:
        yield f"{where} is down: name another, or ask its administrators"
    if limit is not None and resources.time > limit:
        yield f"--time: {resources.time} minutes are more than the {limit} that {where} allows; say --time {limit}m"
    if resources.nodes > partition.num_nodes:
        yield f"--nodes: {where} has {partition.num_nodes}, not {resources.nodes}"
    num_processes = resources.num_slots * resources.num_processes
    if num_cpus < num_processes:
        yield f"--cpus-per-task: {num_processes} training processes on each node need as many, not {num_cpus}"
    if num_gpus > partition.max_gpus_per_node:
        flag = next((key for key in ("gres", "gpus_per_node", "gpus_per_cell") if key in given), "gpus_per_node")
        yield f"--{flag.replace('_', '-')}: nodes of {where} have {partition.max_gpus_per_node} GPUs, not {num_gpus}"
        return
    if any(num_cpus <= cpus and num_gpus <= gpus for cpus, gpus in partition.kinds):
        return
    most = max(cpus for cpus, gpus in partition.kinds if num_gpus <= gpus)
    with_gpus = f" with {num_gpus} GPU{'s' * (num_gpus > 1)}" if num_gpus else ""
    having = f"nodes of {where}{with_gpus} have {most} cores"
    if "cpus_per_task" in given:
        yield f"--cpus-per-task: {having}, not {num_cpus}"
    elif "cells_per_gpu" in given or "cpus_per_cell" in given:
        flag = "cells-per-gpu" if num_gpus else "cpus-per-cell"
        yield f"--{flag}: {having}, not {num_cpus}"
    else:
        yield f"its GPUs' share of the cores is {num_cpus}, but {having}: give --cpus-per-task"


def _refused(resources: Resources, associations: Sequence[slurm.Association]) -> Iterable[str]:
    """The account and QOS that this user may not use; nothing without accounting."""
    where = {"", *resources.partitions}
    here = [each for each in associations if not resources.partitions or each.partition in where]
    accounts = sorted({each.account for each in here})
    account = resources.account and resources.account.lower()  # as sbatch does
    if account is not None and accounts and account not in accounts:
        yield unknown("account", account, accounts)
        return
    allowed = [each.qos for each in here if account in {None, each.account}]
    names = sorted({name for qos in allowed for name in qos})
    if resources.qos is not None and names and resources.qos not in names:
        yield unknown("QOS", resources.qos, names)
