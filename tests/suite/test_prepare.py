"""Data files are made from image files: the same bytes every time, and every lost file is reported."""

import json
import subprocess
import sys
from pathlib import Path

import malformed
import misplaced
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from suite.data.__main__ import app
from suite.data.beton import partial, read_index
from suite.data.class_folders import escaped
from suite.data.decoding import Storage, Task, store
from suite.data.manifest import Manifest, read_manifest
from suite.data.resize import area_resize
from suite.errors import DataError
from suite.prepare.pipeline import EXACT, prepare

STORAGE = Storage.of(64, 90, 0.5)
ODD_FILES = malformed.files()


def console() -> Console:
    return Console(quiet=True)


def contents(beton: Path) -> list[bytes]:
    """The stored bytes of each sample."""
    index, whole = read_index(beton), beton.read_bytes()
    return [whole[start : start + num] for start, num in zip(index.offsets, index.num_bytes, strict=True)]


def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "suite.data", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `source`, which has every odd file in one class, and its prepared files in `out`."""
    place = tmp_path_factory.mktemp("odd")
    misplaced.odd_source(place / "source")
    prepare("imagefolder", place / "source", place / "out", STORAGE, 1, console(), leave_out_broken=True)
    return place


@pytest.fixture(scope="module")
def manifest(odd: Path) -> Manifest:
    return read_manifest(odd / "out" / "train.beton")


def test_there_are_at_least_a_hundred_malformed_inputs() -> None:
    assert len([case for case in ODD_FILES if case.fate != "stored"]) + len(misplaced.layouts()) >= 100
    assert len({case.name for case in ODD_FILES}) == len(ODD_FILES)


@pytest.mark.parametrize("case", ODD_FILES, ids=lambda case: escaped(case.name)[:40])
def test_a_file_is_stored_converted_listed_or_ignored(case: malformed.Case, manifest: Manifest) -> None:
    name = escaped(f"cat/{case.name}")
    where = {
        "broken": name in manifest.left_out,
        "converted": name in manifest.converted,
        "ignored": name in manifest.ignored,
    }
    assert [fate for fate, is_there in where.items() if is_there] == [case.fate] * (case.fate != "stored")


def test_no_file_is_lost_without_a_word(manifest: Manifest) -> None:
    num_stored = sum(case.fate in {"stored", "converted"} for case in ODD_FILES)
    assert manifest.num_samples == num_stored + 4
    assert manifest.samples_per_class == (num_stored + 2, 2)
    assert len(manifest.left_out) + len(manifest.ignored) == len(ODD_FILES) - num_stored
    assert all(0 < len(reason) < 200 and "\n" not in reason for reason in manifest.left_out.values())


def test_three_workers_write_the_bytes_of_one(odd: Path) -> None:
    prepare("imagefolder", odd / "source", odd / "three", STORAGE, 3, console(), leave_out_broken=True)
    for name in ("train.beton", "train.json", "test.beton", "test.json"):
        assert (odd / "three" / name).read_bytes() == (odd / "out" / name).read_bytes()
    assert run("verify", odd / "three" / "train.beton", odd / "three" / "test.beton").returncode == 0


def test_broken_files_are_all_named_and_stop_the_split_alone(odd: Path) -> None:
    out = odd / "refused"
    result = run("prepare", "imagefolder", "--source", odd / "source", "--out", out, "--max-resolution", "64")
    broken = [case for case in ODD_FILES if case.fate == "broken"]
    lines = result.stderr.splitlines()
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert len(lines) == 12
    assert lines[-1].startswith(f"{len(broken)} broken files, listed in {out / 'train.broken.txt'}")
    assert lines[-1].endswith("add --leave-out-broken")
    listed = (out / "train.broken.txt").read_text(encoding="utf-8").splitlines()
    assert len(listed) == len(broken)
    assert all("\t" in line for line in listed)
    assert not (out / "train.beton").exists()
    assert (out / "test.beton").exists()
    begun = partial(out / "train.beton").stat().st_mtime_ns
    result = run(
        *("prepare", "imagefolder", "--source", odd / "source", "--out", out, "--max-resolution", "64"),
        "--leave-out-broken",
    )
    assert result.returncode == 0, result.stderr
    num = sum(case.fate != "ignored" for case in ODD_FILES) + 4
    assert f"train: resuming after {num} of {num} images" in result.stdout
    assert f"{len(broken)} broken files were left out; train.json names them" in result.stdout
    assert begun
    assert (out / "train.beton").read_bytes() == (odd / "out" / "train.beton").read_bytes()
    assert not (out / "train.broken.txt").exists()


@pytest.mark.parametrize("layout", misplaced.layouts(), ids=lambda layout: layout.name)
def test_a_source_laid_out_wrongly_is_refused_in_one_line(layout: misplaced.Layout, tmp_path: Path) -> None:
    source = misplaced.good_source(tmp_path / "source")
    layout.spoil(source)
    with pytest.raises(DataError, match=layout.says) as refusal:
        prepare(layout.dataset, source, tmp_path / "out", STORAGE, 1, console())
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("out/*.beton"))


def test_raw_pixels_are_those_of_the_file(tmp_path: Path) -> None:
    source = misplaced.good_source(tmp_path / "source")
    prepare("imagefolder", source, tmp_path, Storage.of(None, 90, 0.0), 1, console())
    index = read_index(tmp_path / "train.beton")
    files = sorted((source / "train").glob("*/*.jpg"))
    assert index.labels.tolist() == [0, 0, 1, 1]
    for file, stored in zip(files, contents(tmp_path / "train.beton"), strict=True):
        with Image.open(file) as image:
            assert np.asarray(image).tobytes() == stored


def test_jpegs_that_fit_are_stored_byte_for_byte(tmp_path: Path) -> None:
    source = misplaced.good_source(tmp_path / "source")
    (source / "train" / "dog" / "1.jpg").write_bytes(malformed.encoded("JPEG", size=(65, 30)))
    (source / "train" / "dog" / "2.jpg").write_bytes(malformed.encoded("JPEG") + b"\0")
    prepare("imagefolder", source, tmp_path, Storage.of(64, 90, 1.0), 1, console())
    files = sorted((source / "train").glob("*/*.jpg"))
    same = [a.read_bytes() == b for a, b in zip(files, contents(tmp_path / "train.beton"), strict=True)]
    # The image of 65 pixels is shrunk; bytes after the end of a JPEG are dropped.
    assert same == [True, True, True, False, False]
    index = read_index(tmp_path / "train.beton")
    assert index.is_jpeg.all()
    assert (index.heights[3], index.widths[3]) == (64, 29)


def test_larger_images_are_made_smaller_by_area(tmp_path: Path) -> None:
    pixels = malformed.pixels(100, 333)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    sample = store(Task(str(tmp_path / "x.png"), 0, 7), Storage.of(64, 90, 0.0)).sample
    assert sample is not None
    assert (sample.height, sample.width, sample.label) == (19, 64, 7)
    assert sample.content == area_resize(pixels, 19, 64).tobytes()


def test_the_share_of_jpegs_is_what_was_asked_for() -> None:
    num, share = 20_000, 0.3
    chosen = [Storage.of(400, 90, share).wants_jpeg(number) for number in range(num)]
    assert abs(sum(chosen) - num * share) < 5 * (num * share * (1 - share)) ** 0.5
    assert not any(Storage.of(400, 90, 0.0).wants_jpeg(number) for number in range(1000))
    assert all(Storage.of(400, 90, 1.0).wants_jpeg(number) for number in range(1000))


@pytest.mark.parametrize(("max_resolution", "page_bytes"), [(400, 8 << 20), (1672, 8 << 20), (1673, 16 << 20)])
def test_a_page_holds_the_largest_raw_image(max_resolution: int, page_bytes: int) -> None:
    assert Storage.of(max_resolution, 90, 0.5).page_bytes == page_bytes
    assert 3 * max_resolution**2 <= page_bytes


def test_sixteen_bits_become_eight_by_scaling(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 32767, 32896, 65406, 65407, 65535]], np.uint16)
    (tmp_path / "grey.png").write_bytes(malformed.grey_16(values))
    sample, note = store(Task(str(tmp_path / "grey.png"), 0, 0), EXACT)
    assert sample is not None
    assert list(sample.content[::3]) == [0, 0, 1, 1, 127, 128, 254, 255, 255]
    assert note == "PNG, I;16"


def test_printers_colours_become_the_same_rgb_as_pillows(tmp_path: Path) -> None:
    file = tmp_path / "ink.jpg"
    file.write_bytes(malformed.encoded("JPEG", "CMYK"))
    sample, note = store(Task(str(file), 0, 0), EXACT)
    assert sample is not None
    with Image.open(file) as image:
        assert sample.content == image.convert("RGB").tobytes()
    assert note == "JPEG, CMYK"


def test_an_image_larger_than_a_page_is_broken_only_where_nothing_makes_it_smaller(tmp_path: Path) -> None:
    file = tmp_path / "large.png"
    Image.new("RGB", (1800, 1800)).save(file)
    sample, reason = store(Task(str(file), 0, 0), EXACT)
    assert sample is None
    assert reason is not None
    assert reason.startswith("too large: 1800 x 1800 pixels are 9,720,000 bytes, more than a page's 8,388,608")
    assert store(Task(str(file), 0, 0), STORAGE).sample is not None


def test_imagenets_labels_are_its_own_even_where_classes_are_missing(tmp_path: Path) -> None:
    source = misplaced.good_source(tmp_path / "source", ("n01440764", "n15075141"), ("train", "val"))
    prepare("imagenet", source, tmp_path / "out", STORAGE, 1, console(), partial=True)
    assert read_index(tmp_path / "out" / "val.beton").labels.tolist() == [0, 0, 999, 999]
    manifest = read_manifest(tmp_path / "out" / "val.beton")
    assert (len(manifest.classes), manifest.classes[999]) == (1000, "n15075141")
    assert sum(manifest.samples_per_class) == 4


def test_cifar_is_stored_as_raw_pixels_from_torchvisions_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda _self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: setattr(self, "classes", list("abcdefghij")))
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        (folder / name).write_bytes(pickle.dumps({"data": pixels.reshape(2, 3072), "labels": [3, 0]}))
    prepare("cifar10", tmp_path, tmp_path / "out", EXACT, 1, console())
    assert contents(tmp_path / "out" / "test.beton") == [image.transpose(1, 2, 0).tobytes() for image in pixels]
    assert read_index(tmp_path / "out" / "train.beton").labels.tolist() == [3, 0] * 5
    assert read_manifest(tmp_path / "out" / "train.beton").classes == tuple("abcdefghij")
    assert run("verify", tmp_path / "out" / "train.beton", tmp_path / "out" / "test.beton").returncode == 0
    prepare("cifar10", tmp_path, tmp_path / "out", EXACT, 1, console())  # already exists


@pytest.mark.parametrize("nested", [False, True])
def test_cifar_is_stored_as_raw_pixels_from_class_folders(tmp_path: Path, nested: bool) -> None:
    misplaced.good_source(tmp_path / "cifar100" if nested else tmp_path)
    prepare("cifar100", tmp_path, tmp_path / "out", EXACT, 1, console())
    assert not read_index(tmp_path / "out" / "test.beton").is_jpeg.any()


def test_a_class_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    source = misplaced.good_source(tmp_path / "source")
    for file in (source / "test" / "cat").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match="test/cat: all images of this class are broken"):
        prepare("imagefolder", source, tmp_path / "out", STORAGE, 1, console(), leave_out_broken=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["imagefolder", "--jpeg-share", "1.1"], "Invalid value for '--jpeg-share'"),
        (["imagefolder", "--quality", "0"], "Invalid value for '--quality'"),
        (["imagefolder", "--max-resolution", "-1"], "Invalid value for '--max-resolution'"),
        (["imagefolder", "--workers", "0"], "Invalid value for '--workers'"),
        (["cifar10", "--quality", "90"], "--quality: cifar10 is stored unchanged, raw and at full size"),
        (["cifar100", "--jpeg-share", "0"], "--jpeg-share: cifar100 is stored unchanged"),
        (["imagefolder", "--partial"], "--partial: imagefolder has no fixed list of classes"),
        (["mnist"], "'mnist' is not one of"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], says: str, tmp_path: Path) -> None:
    places = ["--source", str(tmp_path), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["prepare", *arguments, *places], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert says in result.output


def test_out_that_is_no_folder_is_one_line(tmp_path: Path) -> None:
    misplaced.good_source(tmp_path / "source")
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(DataError, match=r"out: (File exists|Not a directory); fix this and run the same command again"):
        prepare("imagefolder", tmp_path / "source", tmp_path / "out", STORAGE, 1, console())


def test_the_suffixes_of_images_are_the_same_for_all_loaders() -> None:
    pass


def test_help_and_refusals_wait_for_neither_torch_nor_ffcv(tmp_path: Path) -> None:
    code = (
        "import sys; from rich.console import Console; from pathlib import Path; import suite.data.__main__\n"
        "from suite.prepare.pipeline import prepare, EXACT\n"
        f"try: prepare('imagenet', Path({str(tmp_path)!r}), Path('out'), EXACT, 1, Console(quiet=True))\n"
        "except Exception as error: print(type(error).__name__, sorted({'torch', 'ffcv', 'timm'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "DataError []"


def test_a_manifest_says_how_a_file_came_about(odd: Path, manifest: Manifest) -> None:
    written = json.loads((odd / "out" / "train.json").read_text(encoding="utf-8"))
    assert written["settings"] == {"max_resolution": 64, "quality": 90, "jpeg_share": 0.5}
    assert {"pillow", "libjpeg-turbo", "proxbench"} <= set(written["written_with"])
    assert (manifest.dataset, manifest.split, manifest.classes) == ("imagefolder", "train", ("cat", "dog"))
    assert written["converted"]["cat/really-gif.JPEG"] == "GIF, P"
    assert written["left_out"]["cat/dangling.jpg"] == "a broken link"
