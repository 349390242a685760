"""`verify` finds data files that differ from their manifests, and invalid manifests."""

from pathlib import Path

import malformed
import misplaced
import pytest
from rich.console import Console
from typer.testing import CliRunner

from suite.data.__main__ import app
from suite.data.decoding import Storage
from suite.data.manifest import manifest_path, read_manifest, write_manifest
from suite.prepare.pipeline import prepare


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """train.beton, with 4 images in 2 classes, and the other files."""
    source = misplaced.good_source(tmp_path / "source", splits=("train", "val", "test"))
    (source / "test" / "cat" / "2.jpg").write_bytes(malformed.encoded("JPEG"))
    prepare("imagefolder", source, tmp_path, Storage.of(400, 90, 0.5), 1, Console(quiet=True))
    return tmp_path / "train.beton"


def verified(*files: Path) -> tuple[int, list[str]]:
    """(exit status, faults)."""
    result = CliRunner().invoke(app, ["verify", *map(str, files)])
    return result.exit_code, [line for line in result.stderr.splitlines() if line.strip()]


def test_what_prepare_wrote_is_verified(prepared: Path) -> None:
    assert verified(*(prepared.with_name(f"{name}.beton") for name in ("train", "val", "test"))) == (0, [])


def test_verify_finds_a_flipped_bit_anywhere(prepared: Path) -> None:
    whole = prepared.read_bytes()
    for position in (3000, len(whole) - 300, len(whole) - 1, 2110):
        spoilt = bytearray(whole)
        spoilt[position] ^= 4
        prepared.write_bytes(spoilt)
        status, faults = verified(prepared)
        assert status == 1
        assert "its content has changed: sha256 " in faults[0]


def test_verify_finds_a_file_cut_short(prepared: Path) -> None:
    whole = prepared.read_bytes()
    prepared.write_bytes(whole[:-1])
    status, faults = verified(prepared)
    assert status == 1
    assert [fault.partition(": ")[2] for fault in faults] == [
        f"{len(whole) - 1:,} bytes, its manifest says {len(whole):,}",
        f"torn: the table of 4 images would end after the file's {len(whole) - 1:,} bytes",
    ]


def test_verify_finds_swapped_files(prepared: Path) -> None:
    test = prepared.with_name("test.beton")
    prepared.write_bytes(test.read_bytes())
    status, faults = verified(prepared, test)
    assert status == 1
    assert len(faults) == 3
    assert "5 samples, its manifest says 4" in faults[1]
    assert "3 samples of class cat, its manifest says 2 (1 classes differ)" in faults[2]


def test_verify_finds_a_manifest_of_another_file(prepared: Path) -> None:
    manifest_path(prepared).write_bytes(manifest_path(prepared.with_name("val.beton")).read_bytes())
    status, faults = verified(prepared)
    assert status == 1
    assert "its manifest is for the split val" in faults[0]
    assert ("bytes, its manifest says" in faults[1]) or ("its content has changed" in faults[1])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"classes": ("cat",)}, "labels from 0 to 1, but its manifest has 1 classes"),
        ({"classes": ("cat", "cow", "dog")}, "its manifest counts 2 classes and names 3"),
        ({"samples_per_class": (1, 3)}, "2 samples of class cat, its manifest says 1 (2 classes differ)"),
        ({"num_samples": 5}, "4 samples, its manifest says 5"),
        ({"sha256": "0" * 64}, "its manifest says " + "0" * 64),
        ({"num_bytes": 17}, "its manifest says 17"),
    ],
)
def test_verify_finds_a_wrong_manifest(prepared: Path, change: dict[str, object], says: str) -> None:
    write_manifest(prepared, read_manifest(prepared).model_copy(update=change))
    status, faults = verified(prepared)
    assert status == 1
    assert [fault for fault in faults if says in fault]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "train.json: not there; it came with train.beton"),
        (b"{", "train.json: not a manifest: the file: Invalid JSON"),
        (b"{}", "train.json: not a manifest: dataset: Field required"),
        (b"\xff\xfe", "train.json: not a manifest: "),
    ],
)
def test_verify_finds_a_manifest_that_is_none(prepared: Path, content: bytes | None, says: str) -> None:
    manifest_path(prepared).unlink()
    if content is not None:
        manifest_path(prepared).write_bytes(content)
    status, faults = verified(prepared)
    assert (status, len(faults)) == (1, 1)
    assert says in faults[0]


def test_verify_names_a_file_that_is_not_there_and_looks_at_the_others(prepared: Path) -> None:
    prepared.unlink()
    status, faults = verified(prepared, prepared.with_name("val.beton"))
    assert (status, len(faults)) == (1, 1)
    assert "train.beton: No such file or directory" in faults[0]
