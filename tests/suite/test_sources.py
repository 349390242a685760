"""Data sets have the right content, wherever their files are."""

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from suite.data.datasets import is_known, load
from suite.data.decoding import read_rgb
from suite.data.source import Files, Pixels, hold_out
from suite.errors import DataError


def test_digits_are_scikit_learns(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    source = load("digits", tmp_path)
    assert isinstance(source.train, Pixels)
    assert isinstance(source.test, Pixels)
    assert (len(source.train.labels), len(source.test.labels)) == (1438, 359)
    bunch = load_digits()
    theirs = sorted(
        (int(label), *image.astype(int).ravel().tolist())
        for image, label in zip(bunch.images, bunch.target, strict=True)
    )
    parts = [(part.images, part.labels) for part in (source.train, source.test)]
    ours = sorted(
        (int(label), *(image.flatten().int() // 15).tolist())
        for images, labels in parts
        for image, label in zip(images, labels, strict=True)
    )
    assert ours == theirs


def test_fashion_mnist_is_read_from_idx_files(tmp_path: Path) -> None:
    place = tmp_path / "fashion-mnist"
    place.mkdir()
    rng = np.random.default_rng(0)
    for part, num in (("train", 6), ("t10k", 3)):
        images = rng.integers(0, 256, (num, 28, 28), dtype=np.uint8)
        labels = np.arange(num, dtype=np.uint8)
        (place / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes()))
        (place / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    source = load("fashion-mnist", tmp_path)
    assert isinstance(source.test, Pixels)
    assert source.test.images.shape == (3, 1, 28, 28)
    assert source.test.labels.tolist() == [0, 1, 2]
    assert (source.test.images[:, 0].numpy() == images).all()


def test_cifar10_is_read_from_class_folders(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for number, name in enumerate(("cat", "airplane")):
            folder = tmp_path / "cifar10" / part / name
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (10 * number,) * 3).save(folder / "0.png")
    source = load("cifar10", tmp_path)
    assert isinstance(source.train, Pixels)
    assert source.classes == ("airplane", "cat")
    assert source.train.labels.tolist() == [0, 1]
    assert source.train.images[:, 0, 0, 0].tolist() == [10, 0]


def test_cifar_is_read_from_torchvisions_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda _self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: setattr(self, "classes", list("abcdefghij")))
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for number, name in enumerate(names):
        batch = {"data": np.full((2, 3072), number, dtype=np.uint8), "labels": [number, 0]}
        (folder / name).write_bytes(pickle.dumps(batch))
    source = load("cifar10", tmp_path)
    assert isinstance(source.train, Pixels)
    assert source.train.images.shape == (10, 3, 32, 32)
    assert source.train.labels.tolist() == [0, 0, 1, 0, 2, 0, 3, 0, 4, 0]


def _folder(root: Path, part: str, classes: tuple[str, ...], num: int = 2) -> None:
    for name in classes:
        (root / part / name).mkdir(parents=True)
        for index in range(num):
            Image.new("RGB", (16, 16)).save(root / part / name / f"{index}.jpg")
        (root / part / name / "notes.txt").write_text("not an image", encoding="utf-8")


def test_an_image_folder_lists_its_images_by_class(tmp_path: Path) -> None:
    _folder(tmp_path / "flowers", "train", ("rose", "lily"))
    _folder(tmp_path / "flowers", "test", ("rose", "lily"), num=1)
    source = load("folder/flowers", tmp_path)
    assert isinstance(source.train, Files)
    assert source.classes == ("lily", "rose")
    assert source.train.labels.tolist() == [0, 0, 1, 1]
    assert [Path(path).parent.name for path in source.train.paths] == ["lily", "lily", "rose", "rose"]


def test_different_classes_in_train_and_test_are_refused(tmp_path: Path) -> None:
    _folder(tmp_path / "flowers", "train", ("rose", "lily"))
    _folder(tmp_path / "flowers", "test", ("rose", "tulip"))
    with pytest.raises(DataError, match="train and test have different classes, 2: lily, tulip"):
        load("folder/flowers", tmp_path)


def test_a_missing_folder_says_what_was_expected_where(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"folder/nothing is expected as .*nothing/{train,test}/CLASS/\*.jpg"):
        load("folder/nothing", tmp_path)


def test_names_are_known_before_files_are_looked_for() -> None:
    assert is_known("cifar100")
    assert is_known("imagenet")
    assert is_known("folder/anything")
    assert not is_known("folder/")
    assert not is_known("mnist")


def test_the_held_out_share_is_fixed_and_disjoint() -> None:
    labels = torch.arange(1000) % 7
    kept, held_out = hold_out(labels, 0.1)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(1000))
    assert len(held_out) == 100
    assert torch.equal(hold_out(labels, 0.1)[1], held_out)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 1 / 3, 0.9])
def test_each_class_gives_its_share_to_validation_by_largest_remainder(fraction: float) -> None:
    counts = torch.tensor([100, 37, 0, 15, 15, 220])
    labels = torch.arange(6).repeat_interleave(counts)[torch.randperm(387, generator=torch.Generator().manual_seed(0))]
    _, held_out = hold_out(labels, fraction)
    assert len(held_out) == round(387 * fraction)
    shares = labels[held_out].bincount(minlength=6)
    assert ((shares - counts * fraction).abs() < 1).all()
    assert shares[3] >= shares[4]  # equal remainders: the lower label first


def test_the_last_image_of_a_class_is_never_held_out() -> None:
    labels = torch.tensor([0, 1, 1, 2, *[3] * 20])
    kept, held_out = hold_out(labels, 0.9)
    assert set(labels[kept].tolist()) == {0, 1, 2, 3}
    assert labels[held_out].bincount(minlength=4).tolist() == [0, 1, 0, 19]  # 20 of 22 requested
    assert len(hold_out(torch.arange(10), 0.5)[1]) == 0


def test_a_folder_with_one_class_is_refused(tmp_path: Path) -> None:
    for part in ("train", "test"):
        _folder(tmp_path / "flowers", part, ("rose",))
    with pytest.raises(DataError, match=r"flowers/train: only one class, rose: there is nothing to classify$"):
        load("folder/flowers", tmp_path)


def _tiny_imagenet(place: Path) -> None:
    for name in ("n01", "n02"):
        (place / "train" / name / "images").mkdir(parents=True)
        (place / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG 0 0 1 1", encoding="utf-8")
        for number in range(2):
            Image.new("RGB", (64, 64)).save(place / "train" / name / "images" / f"{name}_{number}.JPEG")
    for part in ("val", "test"):
        (place / part / "images").mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (64, 64)).save(place / part / "images" / f"{part}_{number}.JPEG")
    lines = "".join(f"val_{number}.JPEG\t{name}\t0\t0\t9\t9\n" for number, name in enumerate(("n02", "n01", "n02")))
    (place / "val" / "val_annotations.txt").write_text(lines, encoding="utf-8")


def test_tiny_imagenet_is_read_as_unpacked(tmp_path: Path) -> None:
    _tiny_imagenet(tmp_path / "tiny imagenet")
    source = load("folder/tiny imagenet", tmp_path)
    assert isinstance(source.train, Files)
    assert isinstance(source.test, Files)
    assert (source.classes, source.train.labels.tolist()) == (("n01", "n02"), [0, 0, 1, 1])
    names = [Path(path).name for path in source.test.paths]
    assert list(zip(names, source.test.labels.tolist(), strict=True)) == [
        ("val_0.JPEG", 1),
        ("val_1.JPEG", 0),
        ("val_2.JPEG", 1),
    ]
    assert all(Path(path).is_file() for path in (*source.train.paths, *source.test.paths))
    assert source.validation is None
    assert load("folder/tiny imagenet", tmp_path, with_test=False).test is None


def test_an_annotation_of_tiny_imagenet_without_its_image_is_told(tmp_path: Path) -> None:
    _tiny_imagenet(tmp_path / "tiny")
    (tmp_path / "tiny" / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(
        DataError, match=r"val_annotations.txt: val_1.JPEG has no image, or no class of train/ \(1 such"
    ):
        load("folder/tiny", tmp_path)


def test_what_operating_systems_leave_behind_is_neither_class_nor_image(tmp_path: Path) -> None:
    for part in ("train", "test"):
        _folder(tmp_path / "flowers", part, ("rose", "lily"))
        for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
            (tmp_path / "flowers" / part / name).mkdir()
        for name in (".DS_Store", "._x.jpg"):
            (tmp_path / "flowers" / part / name).write_bytes(b"?")
        for name in (".DS_Store", "Thumbs.db", "._0.jpg"):
            (tmp_path / "flowers" / part / "rose" / name).write_bytes(b"?")
    source = load("folder/flowers", tmp_path)
    assert isinstance(source.train, Files)
    assert source.classes == ("lily", "rose")
    assert [Path(path).name for path in source.train.paths] == ["0.jpg", "1.jpg"] * 2


def test_images_as_people_have_them_are_read(tmp_path: Path) -> None:
    """Upper-case suffixes, links, WebP, BMP, a palette with transparency, and an EXIF orientation, which is ignored."""
    place = tmp_path / "photos"
    red = Image.new("RGB", (16, 8), (200, 30, 40))
    turned = Image.Exif()
    turned[0x0112] = 6  # rotated by 90 degrees
    palette = red.convert("P")
    for part in ("train", "test"):
        for name in ("a", "b"):
            (place / part / name).mkdir(parents=True)
        folder = place / part / "a"
        red.save(folder / "0.JPG")
        red.save(folder / "1.jpeg", exif=turned)
        red.save(folder / "2.webp", lossless=True)
        red.save(folder / "3.BMP")
        palette.save(folder / "4.png", transparency=0)
        (folder / "5.png").symlink_to(folder / "4.png")
        red.save(place / part / "b" / "0.png")
    source = load("folder/photos", tmp_path)
    assert isinstance(source.train, Files)
    assert len(source.train.paths) == 7
    for path in source.train.paths:
        pixels = read_rgb(path)
        assert pixels.shape == (8, 16, 3), path
        assert abs(pixels.reshape(-1, 3).mean(0) - (200, 30, 40)).max() < 60, path  # web palettes have steps of 51


def test_images_of_several_sizes_are_no_small_data_set(tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        for part in ("train", "test"):
            folder = tmp_path / "cifar10" / part / name
            folder.mkdir(parents=True)
            Image.new("RGB", (32 + number, 32)).save(folder / "0.png")
    with pytest.raises(DataError, match=r"dog/0\.png: images of one size are expected, found 32 x 32 and 33 x 32"):
        load("cifar10", tmp_path)
