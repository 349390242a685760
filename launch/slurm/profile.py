"""A cluster's profile: workers request defaults, overridden by the profile, overridden by flags.

A profile, ~/.config/proxbench/clusters/NAME.yaml, has the flags' names as keys; `cells` overrides them for some cells:

    partition: gpu
    time: 12h
    sbatch: {reservation: vision, exclude: node7}
    cells:
      resnet50: {gpus_per_cell: 4, mem: 120G}
      resnet50/fp: {time: 1-00:00:00}
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeFloat, PositiveInt, ValidationError

from launch.plan import matches
from launch.slurm.client import Partition
from launch.slurm.resources import DEFAULT_MINUTES, ProfileError, Resources, Text, num_gpus_of
from suite.errors import SettingError
from suite.recipe.cell import Cell
from suite.recipe.faults import Faults, unknown
from suite.recipe.yaml_lines import read

DEFAULT_CONFIRM_GPU_HOURS = 100.0
_LOCAL_KEYS = frozenset(("gpus_per_cell", "cells_per_gpu", "cpus_per_cell"))
"""Keys for how cells share a machine, with or without SLURM."""
_ALTERNATIVES: Mapping[str, str] = {"gpus_per_node": "gres", "gres": "gpus_per_node"}


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
    """Requests: `given` for every cell, overridden by `cells` (the last matching pattern wins), then by `flags`.

    Args:
        given: keys of Resources.
        cells: pattern -> keys of Resources.
        flags: keys of Resources.
        partitions: the cluster's, for defaults.
        workers: maximum number of workers at a time; None: as many as cells need.
        root: where runs are stored.
        data_dir: where data sets are stored.
        tracking_uri: the MLflow store.
        confirm_gpu_hours: a launch that needs more GPU-hours asks first.
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
        """Whether it requests anything that only SLURM provides."""
        return any(set(keys) - _LOCAL_KEYS for keys in (self.given, self.flags, *self.cells.values()))

    def on(self, partitions: Mapping[str, Partition]) -> "Profile":
        """Adds defaults that suit the cluster: a GPU if it has any, a GPU's share of the cores, an allowed time."""
        return replace(self, partitions=partitions)

    def for_cell(self, cell: Cell | None) -> Resources:
        """What a worker for this cell requests; `model_fields_set` has the keys that the user gave.

        Args:
            cell: the cell; None: no cell in particular.

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
            num_gpus = num_gpus_of(given.get("gpus_per_node", 0), given.get("gres"))
        else:
            num_gpus = given.get("gpus_per_cell", 1 if partition and partition.has_gpus else 0)
        limit = partition and partition.time_limit_minutes
        least = num_gpus * given.get("cells_per_gpu", 1) or given.get("cpus_per_cell", 1)
        share = partition.cpus_per_gpu * num_gpus if partition else 0
        return {
            "gpus_per_node": 0 if "gres" in given else num_gpus,
            "cpus_per_task": max(least, share),
            "time": min(limit or DEFAULT_MINUTES, DEFAULT_MINUTES),
            "python": "python" if "container" in given else None,  # this interpreter is not in the image
        }

    def _first_partition(self, given: Mapping[str, Any]) -> Partition | None:
        if named := given.get("partition"):
            return self.partitions.get(named.split(",")[0])
        return next((each for each in self.partitions.values() if each.is_default), None)


def load_profile(name: str | None, flags: Mapping[str, Any] | None = None) -> Profile:
    """The profile with that name or path, or an empty one without a name; overridden by flags.

    Raises:
        ProfileError: no such profile, or faults in the flags or the profile, one line each.
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
    for pattern, changes in _mappings(raw.get("cells")):  # even if the rest has faults
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


def _mappings(raw: object) -> list[tuple[str, dict[str, Any]]]:
    """The entries whose values are mappings; validation reports all others."""
    return [entry for entry in raw.items() if isinstance(entry[1], dict)] if isinstance(raw, dict) else []


def _merged(given: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`given` overridden by `changes`: sbatch options one by one; GPUs in one form replace those in the other."""
    replaced = {_ALTERNATIVES[key] for key in changes if key in _ALTERNATIVES}
    kept = {key: value for key, value in given.items() if key not in replaced}
    options = dict(given.get("sbatch", ())) | dict(changes.get("sbatch", ()))
    return {**kept, **changes, **({"sbatch": options} if options else {})}


def _split(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of Resources, and the others."""
    inside = {key: value for key, value in given.items() if key in Resources.model_fields}
    return inside, {key: value for key, value in given.items() if key not in inside}


def _checked_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in flags.items() if value is not None}
    try:
        given = _File.model_validate(kept)
    except ValidationError as error:
        raise _fault_of_flags(error) from error
    return given.model_dump(exclude_unset=True)


def _fault_of_flags(error: ValidationError) -> ProfileError:
    """The error for the flags, one line for each invalid one."""
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
        except OSError as error:  # a parent folder may be inaccessible
            raise ProfileError(f"{path}: {error.strerror}") from error
        raise ProfileError(f"{path}: no such profile")
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "proxbench" / "clusters"
    names = sorted(each.stem for each in folder.glob("*.yaml"))
    if name in names:
        return folder / f"{name}.yaml"
    if not names:
        raise ProfileError(f"unknown cluster {name!r}: {folder} holds no profile; write {folder / name}.yaml")
    raise ProfileError(f"{unknown('cluster', name, names)}; or write {folder / name}.yaml")
