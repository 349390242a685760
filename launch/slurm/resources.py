"""What a worker's job requests from SLURM, and whether the cluster can provide it."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PositiveInt,
    model_validator,
)

from launch.slurm import client as slurm
from launch.slurm.client import Partition
from suite.errors import SettingError, UserError
from suite.recipe.faults import unknown

DEFAULT_MINUTES = 24 * 60
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
"""sbatch options that one of our flags sets -> that flag."""
_RESERVED = frozenset(("chdir", "dependency", "error", "hold", "job-name", "ntasks", "ntasks-per-node", "open-mode"))
_RESERVED |= {"output", "parsable", "quiet", "requeue", "signal", "test-only", "wait", "wckey", "wrap"}
"""sbatch options whose values this program depends on."""
_MEMORY_OPTIONS = ("mem-per-cpu", "mem-per-gpu")


class ProfileError(UserError):
    """A profile or a flag makes an impossible request; one line per fault."""


def _minutes(value: object) -> object:
    found = slurm.minutes(value) if isinstance(value, str) else value
    if found is None:
        raise ValueError(f"{value!r} is no limit; a job needs one, to save a checkpoint before it: write 12h")
    if isinstance(found, int) and found < 1:
        raise ValueError(f"a job needs at least a minute, not {value}")
    return found


def _memory(value: str) -> str:
    """Memory in sbatch's form: `32g` becomes 32G, `1.5T` becomes 1536G. 0 is all of a node's memory."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([KMGT])B?)?", value.upper())
    if found is None:
        raise ValueError(f"{value!r} is not an amount of memory; write 32G, or 500M")
    amount, unit = Fraction(found[1]), found[2]
    if unit is None:
        if amount:
            raise ValueError(f"SLURM reads {value} as {value} MB: write {value}G")
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
    """Options of sbatch as sorted pairs, empty values for bare options; from a mapping, or strings `KEY=VALUE`."""
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
            raise SettingError(key, f"use {_INSTEAD[name]} instead")
        if name in _RESERVED:
            raise SettingError(key, "remove it: this program sets it")
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
        nodes: nodes of a job; with more than one, a cell uses all GPUs of all nodes.
        gpus_per_node: a number, or type and number, `a100:4`.
        gres: replaces gpus_per_node at sites that require this form: `gpu:4`.
        gpus_per_cell: GPUs that a cell trains on, one process each.
        cells_per_gpu: cells that share a GPU; only with gpus_per_cell 1.
        cpus_per_task: cores of the job on each node.
        cpus_per_cell: cores per cell in a job without GPUs; None: all.
        mem: memory of each node, in SLURM's form; 0 is all of it.
        setup: shell lines to run before Python starts.
        container: image that Python runs in.
        python: command that starts Python; None: the launcher's own.
        sbatch: further sbatch options, sorted; an empty value is a bare option, `false` omits it.
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
            raise SettingError("gres", "conflicts with gpus_per_node: give one of them")
        if self.cells_per_gpu > 1 and self.gpus_per_cell > 1:
            raise SettingError("cells_per_gpu", "cells share a GPU only if each takes one, with gpus_per_cell 1")
        if given >= {"gpus_per_cell", "gpus_per_node"} and 0 < self.num_gpus < self.gpus_per_cell:
            raise SettingError("gpus_per_cell", f"a node of the job has {self.num_gpus}, not {self.gpus_per_cell}")
        has_both = given >= {"cpus_per_cell", "cpus_per_task"} and not self.num_gpus
        if has_both and (self.cpus_per_cell or 0) > self.cpus_per_task:
            raise SettingError("cpus_per_cell", f"the job has {self.cpus_per_task}, not {self.cpus_per_cell}")
        if self.mem is not None and (rival := [name for name, _ in self.sbatch if name in _MEMORY_OPTIONS]):
            raise SettingError("mem", f"conflicts with sbatch's {rival[0]}: give one of them")
        return self

    @property
    def partitions(self) -> tuple[str, ...]:
        """The named partitions; empty for the site's default."""
        return tuple(filter(None, (self.partition or "").split(",")))

    @property
    def num_gpus(self) -> int:
        """GPUs of each node."""
        return num_gpus_of(self.gpus_per_node, self.gres)

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


def check(resources: Iterable[Resources]) -> None:
    """Checks that SLURM would accept such jobs, as far as its client commands show.

    Raises:
        ProfileError: no such partition, account or QOS, or a request that exceeds nodes or time limits; one line each.
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
    """Keyword arguments for `update_parameters` of submitit's SlurmExecutor. A container mounts `mounts`."""
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
    # wckey: submitit sets its own, which a cluster that checks these keys refuses.
    return given | {"wckey": None, "srun_args": srun_arguments(resources, mounts), "additional_parameters": options}


def srun_arguments(resources: Resources, mounts: Iterable[Path] = ()) -> list[str]:
    """Arguments of the job's srun. Since SLURM 22.05 it does not inherit the CPUs per task from sbatch."""
    cpus = f"--cpus-per-task={resources.cpus_per_task}"
    if resources.container is None:
        return [cpus]
    folders = ",".join(f"{path.resolve()}:{path.resolve()}" for path in mounts)
    return [cpus, f"--container-image={resources.container}", *([f"--container-mounts={folders}"] if folders else [])]


def num_gpus_of(gpus_per_node: int | str, gres: str | None) -> int:
    """GPUs of a node: of `gres`, `gpu:a100:4`, if it is given, else of `gpus_per_node`, 4 or `a100:4`."""
    if gres is None:
        return int(str(gpus_per_node).rpartition(":")[2])
    words = [part.removeprefix("gres/").replace("=", ":").split(":") for part in gres.split(",")]
    counts = [each[-1] for each in words if each[0] == "gpu"]
    return sum(int(count) if count.isdecimal() else 1 for count in counts)


def _beyond_all(resources: Resources, partitions: Mapping[str, Partition]) -> list[str]:
    """Why no partition accepts such a job; empty if one does."""
    names = resources.partitions or tuple(name for name, each in partitions.items() if each.is_default)
    unknown_names = [unknown("partition", name, partitions) for name in names if name not in partitions]
    faults = [list(_beyond(resources, partitions[name])) for name in names if name in partitions]
    return unknown_names or ([line for each in faults for line in each] if all(faults) else [])


def _beyond(resources: Resources, partition: Partition) -> Iterable[str]:
    """Errors for requests that exceed the partition's nodes and limits."""
    where, limit = f"partition {partition.name!r}", partition.time_limit_minutes
    num_gpus, num_cpus, given = resources.num_gpus, resources.cpus_per_task, resources.model_fields_set
    if not partition.is_up:
        yield f"{where} is down: name another, or ask its administrators"
    if limit is not None and resources.time > limit:
        yield f"--time: {resources.time} minutes are more than the {limit} that {where} allows; use --time {limit}m"
    if resources.nodes > partition.num_nodes:
        yield f"--nodes: {where} has {partition.num_nodes}, not {resources.nodes}"
    num_processes = resources.num_slots * resources.num_processes
    if num_cpus < num_processes:
        yield f"--cpus-per-task: {num_processes} training processes per node need {num_processes} cores, not {num_cpus}"
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
        yield f"the share of cores for its GPUs is {num_cpus}, but {having}: give --cpus-per-task"


def _refused(resources: Resources, associations: Sequence[slurm.Association]) -> Iterable[str]:
    """Errors for an account or QOS that this user may not use; empty without accounting."""
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
