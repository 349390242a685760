"""The GPUs and cores of a machine are shared out among cells."""

from pathlib import Path

import pytest

from launch.worker.slots import Slot, SlotError, slots_of, visible_gpus


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        ("0,1", ["0", "1"]),
        ("2,3", ["2", "3"]),
        ("GPU-8932f937-d72c,GPU-11", ["GPU-8932f937-d72c", "GPU-11"]),
        ("MIG-GPU-1/2/0", ["MIG-GPU-1/2/0"]),
        ("", []),
        ("-1", []),
        ("1,-1,0", ["1"]),  # as in CUDA: an invalid entry hides those after it
    ],
)
def test_cuda_visible_devices_means_what_it_means_to_cuda(visible: str, gpus: list[str], tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    assert visible_gpus(visible, tmp_path) == gpus


def test_without_the_variable_the_drivers_files_are_counted(tmp_path: Path) -> None:
    assert visible_gpus(None, tmp_path) == []
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus(None, tmp_path) == ["0", "1"]


def test_a_gpu_is_a_slot_and_its_cores_are_its_share() -> None:
    assert slots_of(["2", "3"], 8) == [Slot(("2",), 1, 4), Slot(("3",), 1, 4)]


def test_several_gpus_to_a_cell_and_several_cells_to_a_gpu() -> None:
    assert slots_of(list("01234567"), 16, gpus_per_cell=8) == [Slot(tuple("01234567"), 8, 2)]
    assert slots_of(["0", "1", "2"], 8, gpus_per_cell=2) == [Slot(("0", "1"), 2, 4)]
    shared = slots_of(["0", "1"], 8, cells_per_gpu=2)
    assert [slot.devices for slot in shared] == [("0",), ("1",), ("0",), ("1",)]
    assert {slot.num_threads for slot in shared} == {2}


def test_without_gpus_a_core_is_a_slot_unless_cells_get_more() -> None:
    assert slots_of([], 4) == [Slot((), 1, 1)] * 4
    assert slots_of([], 8, cpus_per_cell=4) == [Slot((), 1, 4)] * 2
    assert slots_of([], 8, most=2) == [Slot((), 1, 4)] * 2


def test_too_little_for_a_cell_is_refused_by_the_flag_that_asks_for_it() -> None:
    with pytest.raises(SlotError, match=r"^--gpus-per-cell 8: only 2 usable GPUs here \(0, 1\)$"):
        slots_of(["0", "1"], 8, gpus_per_cell=8)
    with pytest.raises(SlotError, match="no usable GPU"):
        slots_of([], 8, gpus_per_cell=2)
    with pytest.raises(SlotError, match=r"^--cpus-per-cell 9: this process may use 8 cores$"):
        slots_of([], 8, cpus_per_cell=9)
