"""Flags win over the profile, the profile over defaults; what is wrong is told at once, with its line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import submitit
from cluster.lab import obstacle

from launch.resources import Profile, ProfileError, Resources, load_profile, sbatch_parameters
from launch.slurm import Partition
from suite.recipe.cell import Cell

PROFILE = """\
partition: gpu
time: 12:00:00
mem: 32
account: 0815
setup: [module load cuda/12]
max_parallel: 8
root: /scratch/runs
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
    assert (asked.partition, asked.time, asked.mem, asked.account) == ("gpu", 12 * 60, "32", "0815")
    assert asked.setup == ("module load cuda/12",)
    assert (profile.max_parallel, profile.root, profile.data_dir) == (8, Path("/scratch/runs"), None)


def test_the_last_pattern_that_fits_a_cell_wins(clusters: Path, make_cell: MakeCell) -> None:
    (clusters / "lab.yaml").write_text(PROFILE, encoding="utf-8")
    profile = load_profile("lab")
    first, second = (profile.for_cell(make_cell(seed=seed)) for seed in (0, 1))
    assert (first.gpus_per_node, first.time) == (4, 24 * 60)
    assert (second.gpus_per_node, second.time) == (2, 12 * 60)


def test_flags_win_over_everything(clusters: Path, make_cell: MakeCell) -> None:
    (clusters / "lab.yaml").write_text(PROFILE, encoding="utf-8")
    profile = load_profile("lab", {"gpus_per_node": 0, "time": "30m", "max_parallel": 2, "qos": None})
    asked = profile.for_cell(make_cell(seed=0))
    assert (asked.gpus_per_node, asked.time, asked.partition, asked.qos) == (0, 30, "gpu", None)
    assert profile.max_parallel == 2


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
        "cells:\n  digits: {gpu_per_node: 4}\n  '*/s0':\n    time: later\n    max_parallel: 3\n",
        encoding="utf-8",
    )
    lines = _refusal("lab")
    expected = {
        ":1: partitoin: unknown key 'partitoin'; did you mean 'partition'? (partition, nodes,",
        ":2: time: 'soon' is no time; write 90m, 12h, 2d",
        ":3: mem: '32Q' is no amount of memory; write 32G",
        ":4: nodes: input should be greater than 0, got '0'",
        ":5: account: string should have at least 1 character",
        ":7: gpu_per_node: unknown key 'gpu_per_node'; did you mean 'gpus_per_node'?",
        ":9: time: 'later' is no time",
        ":10: max_parallel: unknown key 'max_parallel'",
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
    assert _refusal(None, time="infinite") == ["--time: 'infinite' is no limit, and a job needs one to save before it"]


def test_defaults_suit_the_partition() -> None:
    def asked(**flags: object) -> tuple[int, int, int]:
        shape = load_profile(None, flags).on(PARTITIONS).for_cell(None)
        return shape.gpus_per_node, shape.cpus_per_task, shape.time

    assert asked(partition="gpu") == (1, 8, 4 * 60)
    assert asked(partition="gpu", gpus_per_node=2) == (2, 16, 4 * 60)
    assert asked(partition="gpu", gpus_per_node=0, pack=3) == (0, 3, 4 * 60)
    assert asked(partition="gpu", cpus_per_task=2, time="6h") == (1, 2, 6 * 60)
    assert asked(partition="cpu", pack=4) == (0, 4, 24 * 60)
    assert asked(partition="elsewhere") == (0, 1, 24 * 60)


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
    flags = {"partition": "gpu", "mem": "32G", "account": "lab", "qos": "high", "constraint": "a100|h100", "nodes": 2}
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
    }
    assert not any(line.startswith("wckey") for line in asked)
    assert "\nmodule load cuda\n" in script
    mounts = f"--container-mounts={tmp_path}:{tmp_path}"
    assert f"--cpus-per-task=8 --container-image=i.sqsh {mounts} python job" in script


def test_without_gpus_none_are_asked_for() -> None:
    assert "gpus_per_node" not in sbatch_parameters(Resources(partition="cpu"))
