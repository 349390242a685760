"""Hugging Face data sets give the same images and labels as class folders, by index, without network access."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import suite.data.arrow as module
from suite.data.augmentation import Centre
from suite.data.datasets import is_known, load
from suite.data.readers.image_folder import FolderReader, Workers
from suite.data.source import Files
from suite.errors import DataError
from suite.recipe.settings import Data, require_fitting

datasets = pytest.importorskip("datasets", reason="no Hugging Face datasets: pip install 'proxbench[huggingface]'")
NAMES = ["ant", "bee", "cat"]


def _picture(number: int) -> Image.Image:
    generator = torch.Generator().manual_seed(number)
    shape = (20 + number, 24, 3)
    return Image.fromarray(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).numpy())


def _saved(place: Path, splits: dict[str, int], labels: list[int] | None = None, **more: Any) -> None:  # noqa: ANN401
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES), **more})
    parts = {}
    for split, num in splits.items():
        rows = {"image": [_picture(n) for n in range(num)], "label": labels or [n % 3 for n in range(num)]}
        rows |= {column: [0] * num for column in more}
        parts[split] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(place))


@pytest.fixture(autouse=True)
def _nothing_is_remembered() -> None:
    module._loaded.cache_clear()
    module._rows.cache_clear()


def test_rows_are_the_images_that_were_saved(tmp_path: Path) -> None:
    _saved(tmp_path / "tiny", {"train": 7, "test": 3, "validation": 2})
    source = load("hf/tiny", tmp_path)
    assert source.classes == tuple(NAMES)
    assert isinstance(source.train, Files)
    assert source.test is not None
    assert source.validation is not None
    assert source.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert [len(part.labels) for part in (source.test, source.validation)] == [3, 2]
    part = source.train.subset(torch.tensor([5, 2]))
    cpu = torch.device("cpu")
    ((images, labels),) = FolderReader(part, Workers(0, cpu), cpu).read([torch.tensor([0, 1])], Centre(1.0), 24)
    assert labels.tolist() == [2, 2]
    folder = tmp_path / "png"
    folder.mkdir()
    for number in (5, 2):
        _picture(number).save(folder / f"{number}.png")
    files = Files((str(folder / "5.png"), str(folder / "2.png")), part.labels)
    ((expected, _),) = FolderReader(files, Workers(0, cpu), cpu).read([torch.tensor([0, 1])], Centre(1.0), 24)
    assert torch.equal(images, expected)


@pytest.mark.slow
def test_worker_processes_read_rows(tmp_path: Path) -> None:
    _saved(tmp_path / "tiny", {"train": 6, "test": 1})
    part, cpu = load("hf/tiny", tmp_path).train, torch.device("cpu")
    assert isinstance(part, Files)
    here, there = (
        torch.cat([x for x, _ in FolderReader(part, Workers(num, cpu), cpu).read([torch.arange(6)], Centre(1.0), 16)])
        for num in (0, 2)
    )
    assert torch.equal(here, there)


def test_the_checksum_tells_data_sets_apart(tmp_path: Path) -> None:
    _saved(tmp_path / "one", {"train": 4, "test": 1})
    _saved(tmp_path / "same", {"train": 4, "test": 1})
    _saved(tmp_path / "other", {"train": 5, "test": 1})
    sums = [load(f"hf/{name}", tmp_path).checksum for name in ("one", "one", "other")]
    assert sums[0] == sums[1] != sums[2]
    assert load("hf/one", tmp_path, with_test=False).test is None


@pytest.mark.parametrize(
    ("splits", "labels", "more", "message"),
    [
        ({"train": 3}, None, {}, "has the splits train and lacks test"),
        ({"train": 2, "test": 2}, [0, -1], {}, "images without labels (1 of 2)"),
        (
            {"train": 2, "test": 1},
            None,
            {"second": "image"},
            "one column of images and one of classes are expected, found image: Image, label: ClassLabel, second:",
        ),
    ],
)
def test_what_is_no_classification_is_told(
    tmp_path: Path, splits: dict[str, int], labels: list[int] | None, more: dict[str, str], message: str
) -> None:
    if more:
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES), "second": datasets.Image()}
        )
        rows = {"image": [_picture(0)], "label": [0], "second": [_picture(1)]}
        parts = {split: datasets.Dataset.from_dict(rows, features=features) for split in splits}
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "x"))
    else:
        _saved(tmp_path / "x", splits, labels)
    with pytest.raises(DataError, match=re.escape(message)):
        load("hf/x", tmp_path)


def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"hf/x: .*x has no dataset_dict.json, .*save_to_disk\("):
        load("hf/x", tmp_path)


def test_rows_have_their_own_sizes_as_files_have() -> None:
    assert is_known("hf/tiny")
    assert not is_known("hf/")
    require_fitting(Data(image_size=64, crop="random_resized"), "hf/tiny", ("resnet18",))
