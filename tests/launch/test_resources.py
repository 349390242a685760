"""Flags override the profile, the profile overrides defaults; all faults are reported at once, with their lines."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import submitit
from cluster.lab import obstacle

from launch.slurm.client import Partition
from launch.slurm.profile import Profile, load_profile
from launch.slurm.resources import ProfileError, Resources, sbatch_parameters
from suite.recipe.cell import Cell

PROFILE = """\
partition: gpu
time: 12:00:00
mem: 32g
account: 0815
setup: [module load cuda/12]
workers: 8
root: /scratch/runs
confirm_gpu_hours: 20
sbatch: {exclude: node7, exclusive: true}
cells:
  digits: {gpus_per_node: 2}
  "*/s0": {gpus_per_node: 4, time: 1-00:00:00}
"""
GPU = Partition("gpu", True, 4 * 60, 4, 4, 0, 0, ((16, 2),))
CPU = Partition("cpu", True, None, 4, 4, 0, 0, ((16, 0),))
PARTITIONS = {"gpu": GPU, "cpu": CPU}
MakeCell = Callable[..., Cell]


@pytest.fixture
def clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a user's profiles."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "proxbench" / "clusters"
    folder.mkdir(parents=True)
    return folder


def _refusal(name: str | None, **flags: object) -> list[str]:
    with pytest.raises(ProfileError) as caught:
        load_profile(name, flags)
    return str(caught.value).splitlines()


def test_without_profile_and_flags_there_are_defaults() -> None:
    assert load_profile(None).for_cell(None) == Resources()
    assert Resources().time == 24 * 60


def test_values_of_a_profile_are_what_stands_there(clusters: Path) -> None:
    (clusters / "lab.yaml").write_text(PROFILE, encoding="utf-8")
    profile = load_profile("lab")
    asked = profile.for_cell(None)
    assert (asked.partition, asked.time, asked.mem, asked.account) == ("gpu", 12 * 60, "32G", "0815")
    assert asked.setup == ("module load cuda/12",)
    assert asked.sbatch == (("exclude", "node7"), ("exclusive", ""))
    assert (profile.workers, profile.root, profile.data_dir) == (8, Path("/scratch/runs"), None)
    assert (profile.confirm_gpu_hours, load_profile(None).confirm_gpu_hours) == (20, 100)


def test_the_last_pattern_that_fits_a_cell_wins(clusters: Path, make_cell: MakeCell) -> None:
    (clusters / "lab.yaml").write_text(PROFILE, encoding="utf-8")
    profile = load_profile("lab")
    first, second = (profile.for_cell(make_cell(seed=seed)) for seed in (0, 1))
    assert (first.gpus_per_node, first.time) == (4, 24 * 60)
    assert (second.gpus_per_node, second.time) == (2, 12 * 60)


def test_flags_win_over_everything(clusters: Path, make_cell: MakeCell) -> None:
    (clusters / "lab.yaml").write_text(PROFILE, encoding="utf-8")
    profile = load_profile("lab", {"gpus_per_node": 0, "time": "30m", "workers": 2, "qos": None})
    asked = profile.for_cell(make_cell(seed=0))
    assert (asked.gpus_per_node, asked.time, asked.partition, asked.qos) == (0, 30, "gpu", None)
    assert profile.workers == 2


def test_a_profile_may_be_a_file_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("partition: gpu\n", encoding="utf-8")
    assert load_profile(str(path)).for_cell(None).partition == "gpu"
    assert _refusal(str(tmp_path / "other.yaml")) == [f"{tmp_path / 'other.yaml'}: no such profile"]


def test_an_unknown_profile_is_refused_with_those_there_are(clusters: Path) -> None:
    place = f"write {clusters / 'labb'}.yaml"
    assert _refusal("labb") == [f"unknown cluster 'labb': {clusters} holds no profile; {place}"]
    for name in ("lab", "juwels"):
        (clusters / f"{name}.yaml").touch()
    assert _refusal("labb") == [f"unknown cluster 'labb'; did you mean 'lab'? (juwels, lab); or {place}"]


def test_all_faults_of_a_profile_are_told_with_their_lines(clusters: Path) -> None:
    path = clusters / "lab.yaml"
    path.write_text(
        "partitoin: gpu\ntime: soon\nmem: 32Q\nnodes: 0\naccount:\n"
        "cells:\n  digits: {gpu_per_node: 4}\n  '*/s0':\n    time: later\n    workers: 3\n",
        encoding="utf-8",
    )
    lines = _refusal("lab")
    expected = {
        ":1: partitoin: unknown key 'partitoin'; did you mean 'partition'? (partition, nodes,",
        ":2: time: 'soon' is not a time; write 90m, 12h, 2d",
        ":3: mem: '32Q' is not an amount of memory; write 32G",
        ":4: nodes: input should be greater than 0, got '0'",
        ":5: account: string should have at least 1 character",
        ":7: gpu_per_node: unknown key 'gpu_per_node'; did you mean 'gpus_per_node'?",
        ":9: time: 'later' is not a time",
        ":10: workers: unknown key 'workers'",
    }
    assert len(lines) == len(expected)
    for start in expected:
        assert any(line.startswith(f"{path}{start}") for line in lines), (start, lines)


def test_a_profile_that_is_no_mapping_is_refused(clusters: Path) -> None:
    (clusters / "lab.yaml").write_text("- partition\n", encoding="utf-8")
    assert _refusal("lab")[0].startswith(f"{clusters / 'lab.yaml'}:1: a profile is a mapping with the keys partition, ")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("partition: !env X\n", ":1: partition: the tag !env means nothing here; leave it out"),
        ("cells:\n  a: {nodes: 1, nodes: 2}\n", ":2: cells.a.nodes: given twice, first in line 2"),
        (
            "partition: {{queue}}\n",
            ":1: partition: {queue}: a key has to be text; text with braces or brackets needs quotes",
        ),
        ("nodes: yes\n", ":1: nodes: input should be a valid integer, unable to parse string as an integer, got 'yes'"),
    ],
)
def test_a_profile_that_is_not_plain_yaml_is_one_line(clusters: Path, text: str, fault: str) -> None:
    path = clusters / "lab.yaml"
    path.write_text(text, encoding="utf-8")
    assert _refusal("lab") == [f"{path}{fault}"]


def test_values_of_a_profile_are_the_text_that_stands_there(clusters: Path) -> None:
    text = "x-short: &short {time: 12:00:00}\naccount: 0123\nqos: no\ncells:\n  resnet8: *short\n"
    (clusters / "lab.yaml").write_text(text, encoding="utf-8")
    profile = load_profile("lab")
    assert (profile.given["account"], profile.given["qos"]) == ("0123", "no")
    assert profile.cells["resnet8"]["time"] == 12 * 60


def test_all_faults_of_flags_are_told_by_their_names() -> None:
    lines = _refusal(None, time="soon", mem="32Q", gpus_per_node=-1)
    assert [line.split(":")[0] for line in lines] == ["--gpus-per-node", "--mem", "--time"]


def test_a_job_without_a_limit_is_refused() -> None:
    assert _refusal(None, time="infinite") == [
        "--time: 'infinite' is no limit; a job needs one, to save a checkpoint before it: write 12h"
    ]


def test_defaults_suit_the_partition() -> None:
    def asked(**flags: object) -> tuple[int | str, int, int]:
        shape = load_profile(None, flags).on(PARTITIONS).for_cell(None)
        return shape.gpus_per_node, shape.cpus_per_task, shape.time

    assert asked(partition="gpu") == (1, 8, 4 * 60)
    assert asked(partition="gpu", gpus_per_node=2) == (2, 16, 4 * 60)
    assert asked(partition="gpu", gpus_per_node=0, cpus_per_cell=3) == (0, 3, 4 * 60)
    assert asked(partition="gpu", cpus_per_task=2, time="6h") == (1, 2, 6 * 60)
    assert asked(partition="gpu", cells_per_gpu=12) == (1, 12, 4 * 60)
    assert asked(partition="gpu", gpus_per_cell=2) == (2, 16, 4 * 60)
    assert asked(partition="gpu", gres="gpu:2") == (0, 16, 4 * 60)
    assert asked(partition="cpu") == (0, 1, 24 * 60)
    assert asked(partition="cpu,gpu") == (0, 1, 24 * 60)
    assert asked(partition="elsewhere") == (0, 1, 24 * 60)
    assert asked() == (0, 1, 24 * 60)
    default = {"gpu": replace(GPU, is_default=True), "cpu": CPU}
    assert load_profile(None).on(default).for_cell(None).gpus_per_node == 1


def test_a_container_has_a_python_of_its_own() -> None:
    assert load_profile(None, {"container": "image.sqsh"}).for_cell(None).python == "python"
    assert load_profile(None, {"container": "image.sqsh", "python": "py"}).for_cell(None).python == "py"
    assert load_profile(None).for_cell(None).python is None


def test_equal_shapes_are_one_key(make_cell: MakeCell) -> None:
    profile = Profile({"partition": "gpu", "setup": ("true",)}).on(PARTITIONS)
    assert len({profile.for_cell(make_cell(seed=seed)) for seed in range(3)}) == 1


def test_submitit_writes_what_is_asked_into_the_script(tmp_path: Path) -> None:
    if submitit.SlurmExecutor.affinity() < 0:
        pytest.skip(obstacle() or "no srun")
    flags: dict[str, object] = {
        "partition": "gpu",
        "mem": "32G",
        "account": "lab",
        "qos": "high",
        "constraint": "a100|h100",
        "nodes": 2,
    }
    flags |= {"sbatch": ["exclude=node7", "--exclusive", "mail_type=END", "nice=false"]}
    shape = load_profile(None, {**flags, "container": "i.sqsh", "setup": ["module load cuda"]}).on(PARTITIONS)
    executor = submitit.SlurmExecutor(folder=tmp_path)
    executor.update_parameters(**sbatch_parameters(shape.for_cell(None), [tmp_path]))
    script = executor._make_submission_file_text("python job", uid="")
    asked = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert asked >= {
        "partition=gpu",
        "nodes=2",
        "ntasks-per-node=1",
        "gpus-per-node=1",
        "cpus-per-task=8",
        "mem=32G",
        "time=240",
        "account=lab",
        "qos=high",
        "constraint='a100|h100'",
        "exclude=node7",
        "exclusive",
        "mail-type=END",
    }
    assert not any(line.startswith("nice") for line in asked)
    assert not any(line.startswith("wckey") for line in asked)
    assert "\nmodule load cuda\n" in script
    mounts = f"--container-mounts={tmp_path}:{tmp_path}"
    assert f"--cpus-per-task=8 --container-image=i.sqsh {mounts} python job" in script


def test_without_gpus_none_are_asked_for() -> None:
    assert "gpus_per_node" not in sbatch_parameters(Resources(partition="cpu"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"gpus_per_node": "a100:4"}, {"gpus_per_node": "a100:4"}),
        ({"gpus_per_node": "4"}, {"gpus_per_node": 4}),
        ({"gres": "gpu:a100:4"}, {"gres": "gpu:a100:4"}),
    ],
)
def test_gpus_may_be_typed_or_a_gres(flags: dict[str, object], expected: dict[str, object]) -> None:
    shape = load_profile(None, flags).on(PARTITIONS).for_cell(None)
    parameters = sbatch_parameters(shape)
    assert {key: parameters[key] for key in ("gpus_per_node", "gres") if key in parameters} == expected
    assert (shape.num_gpus, shape.num_slots, shape.num_processes) == (4, 4, 1)


@pytest.mark.parametrize(
    ("flags", "num_slots", "num_processes"),
    [
        ({}, 1, 1),
        ({"gpus_per_node": 4, "gpus_per_cell": 2}, 2, 2),
        ({"gpus_per_cell": 4}, 1, 4),
        ({"gpus_per_node": 2, "cells_per_gpu": 3}, 6, 1),
        ({"gpus_per_node": 4, "nodes": 2}, 1, 4),
        ({"nodes": 2}, 1, 1),
        ({"cpus_per_task": 16}, 1, 1),
        ({"cpus_per_task": 16, "cpus_per_cell": 3}, 5, 1),
        ({"gres": "gpu:2,nvme:1"}, 2, 1),
        ({"gres": "gpu"}, 1, 1),
        ({"gres": "gpu:a100"}, 1, 1),
    ],
)
def test_cells_share_a_job(flags: dict[str, object], num_slots: int, num_processes: int) -> None:
    shape = load_profile(None, flags).for_cell(None)
    assert (shape.num_slots, shape.num_processes) == (num_slots, num_processes)


def test_workers_of_one_shape_take_the_same_cells() -> None:
    def shape(**flags: object) -> str:
        return load_profile(None, flags).for_cell(None).shape

    assert re.fullmatch(r"[0-9a-f]{8}", shape())
    assert shape(gpus_per_node=2) == shape(gpus_per_node="2", partition="gpu", time="3h", sbatch=["exclude=node7"])
    assert shape(gres="gpu:a100:2") == shape(gpus_per_node="a100:2")
    different: list[dict[str, object]] = [
        {},
        {"gpus_per_node": 2},
        {"gpus_per_node": "a100:2"},
        {"gpus_per_node": 2, "gpus_per_cell": 2},
        {"gpus_per_node": 2, "cells_per_gpu": 2},
        {"cpus_per_task": 2},
        {"cpus_per_task": 2, "cpus_per_cell": 1},
        {"mem": "2G"},
        {"sbatch": ["mem-per-cpu=2G"]},
        {"constraint": "a100"},
        {"nodes": 2},
    ]
    assert len({shape(**flags) for flags in different}) == len(different)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("32g", "32G"), ("1.5T", "1536G"), ("0.3G", "308M"), ("500MB", "500M"), ("1.5K", "2K"), ("0", "0")],
)
def test_memory_is_written_as_sbatch_takes_it(given: str, expected: str) -> None:
    assert load_profile(None, {"mem": given}).for_cell(None).mem == expected


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"mem": "32"}, "--mem: SLURM reads 32 as 32 MB: write 32G"),
        ({"mem": "32B"}, "--mem: '32B' is not an amount of memory; write 32G, or 500M"),
        ({"time": "0m"}, "--time: a job needs at least a minute, not 0m"),
        ({"nodes": 0}, "--nodes: must be greater than 0, not 0"),
        ({"gpus_per_node": "a100"}, "--gpus-per-node: 'a100' is not a number of GPUs; write 4, or a100:4"),
        ({"sbatch": ["array=0-3"]}, "--sbatch: array: use --workers instead"),
        ({"sbatch": ["--partition=gpu"]}, "--sbatch: --partition: use --partition instead"),
        ({"sbatch": ["hold"]}, "--sbatch: hold: remove it: this program sets it"),
        ({"sbatch": ["p=gpu"]}, "--sbatch: p: write an sbatch option by its long name, such as exclude"),
        ({"sbatch": ["=gpu"]}, "--sbatch: '': write an sbatch option by its long name, such as exclude"),
        ({"gres": "gpu:1", "gpus_per_node": 1}, "--gres: conflicts with gpus_per_node: give one of them"),
        ({"gpus_per_node": 1, "gpus_per_cell": 2}, "--gpus-per-cell: a node of the job has 1, not 2"),
        ({"cpus_per_task": 1, "cpus_per_cell": 2}, "--cpus-per-cell: the job has 1, not 2"),
        (
            {"cells_per_gpu": 2, "gpus_per_cell": 2},
            "--cells-per-gpu: cells share a GPU only if each takes one, with gpus_per_cell 1",
        ),
        (
            {"mem": "2G", "sbatch": ["mem-per-gpu=2G"]},
            "--mem: conflicts with sbatch's mem-per-gpu: give one of them",
        ),
    ],
)
def test_a_wrong_flag_is_refused_in_plain_words(flags: dict[str, object], said: str) -> None:
    assert _refusal(None, **flags) == [said]


def test_options_of_sbatch_are_merged_one_by_one(clusters: Path) -> None:
    (clusters / "lab.yaml").write_text("sbatch:\n  exclude: node7\n  reservation: vision\n", encoding="utf-8")
    asked = load_profile("lab", {"sbatch": ["reservation=false", "nice=10"]}).for_cell(None)
    assert sbatch_parameters(asked)["additional_parameters"] == {"exclude": "node7", "nice": "10"}


def test_resources_of_a_launch_are_read_again_from_json() -> None:
    resources = Resources(partition="gpu", time=60, setup=("true",), sbatch={"exclude": "node7", "exclusive": "true"})
    assert Resources.model_validate_json(resources.model_dump_json()) == resources


def test_an_option_of_sbatch_that_a_profile_may_not_set_is_refused_with_its_line(clusters: Path) -> None:
    path = clusters / "lab.yaml"
    path.write_text("partition: gpu\nsbatch:\n  exclude: node7\n  array: 0-3\n", encoding="utf-8")
    assert _refusal("lab") == [f"{path}:4: sbatch.array: use --workers instead"]


def test_gpus_in_one_form_replace_those_in_the_other(clusters: Path) -> None:
    (clusters / "lab.yaml").write_text("gres: gpu:4\n", encoding="utf-8")
    assert load_profile("lab", {"gpus_per_node": 0}).for_cell(None).num_gpus == 0
    (clusters / "lab.yaml").write_text("gpus_per_node: 4\n", encoding="utf-8")
    assert load_profile("lab", {"gres": "gpu:2"}).for_cell(None).num_gpus == 2


def test_a_profile_and_flags_that_contradict_each_other_are_refused(clusters: Path) -> None:
    (clusters / "lab.yaml").write_text("gpus_per_node: 2\n", encoding="utf-8")
    profile = load_profile("lab", {"gpus_per_cell": 4})
    with pytest.raises(ProfileError, match=r"^--gpus-per-cell: a node of the job has 2, not 4$"):
        profile.for_cell(None)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({"time": "1h"}, True), ({"account": "lab"}, True), ({"cells_per_gpu": 2}, False), ({"workers": 2}, False)],
)
def test_what_only_slurm_can_give_makes_a_profile_one_for_slurm(flags: dict[str, Any], expected: bool) -> None:
    assert load_profile(None, flags).is_for_slurm is expected
