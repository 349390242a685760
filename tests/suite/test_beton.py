"""FFCV's file format without FFCV: FFCV reads our files, we read FFCV's, and incomplete files are detected."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from needs import no_ffcv

from suite.data.beton import BetonWriter, Sample, data_start, partial, read_index
from suite.errors import DataError

PAGE_BYTES = 2 << 20
HEADER, FIELD, METADATA, ALLOCATION = 24, 1041, 24, 24
needs_ffcv = pytest.mark.skipif(no_ffcv() is not None, reason=str(no_ffcv()))


def samples(num: int = 7, side: int = 40) -> list[Sample]:
    """Raw images of several sizes."""
    rng = np.random.default_rng(0)
    sides = rng.integers(1, side, (num, 2)).tolist()
    return [Sample(False, h, w, i % 3, rng.bytes(3 * h * w)) for i, (h, w) in enumerate(sides)]


def write(path: Path, what: list[Sample], capacity: int | None = None) -> Path:
    with BetonWriter(path, capacity or len(what), PAGE_BYTES) as writer:
        for sample in what:
            writer.append(sample)
    return path


@pytest.mark.slow
@needs_ffcv
def test_ffcv_reads_exact_pixels_and_labels(tmp_path: Path) -> None:
    import torch
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.reader import Reader

    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (9, 500, 600, 3), dtype=np.uint8)  # two to a page
    path = write(
        tmp_path / "x.beton", [Sample(False, 500, 600, i - 3, image.tobytes()) for i, image in enumerate(images)]
    )
    assert [*Reader(str(path)).handlers] == ["image", "label"]
    num_threads = torch.get_num_threads()
    for os_cache in (True, False):
        pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
        loader = Loader(str(path), 4, 1, os_cache, OrderOption.SEQUENTIAL, pipelines=pipelines, drop_last=False)
        found = [(batch.copy(), labels.copy()) for batch, labels in loader]
        assert (np.concatenate([batch for batch, _ in found]) == images).all()
        assert np.concatenate([labels for _, labels in found]).ravel().tolist() == list(range(-3, 6))
    torch.set_num_threads(num_threads)


@pytest.mark.filterwarnings("ignore")
@needs_ffcv
def test_ffcvs_own_files_are_read(tmp_path: Path) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    what = samples()
    rows = [(np.frombuffer(each.content, np.uint8).reshape(each.height, each.width, 3), each.label) for each in what]
    path = tmp_path / "theirs.beton"
    writer = DatasetWriter(str(path), {"image": RGBImageField(), "label": IntField()}, PAGE_BYTES, num_workers=1)
    writer.from_indexed_dataset(rows)
    ours, theirs = read_index(write(tmp_path / "ours.beton", what)), read_index(path)
    for name in ("labels", "heights", "widths", "is_jpeg", "offsets", "num_bytes"):
        assert (getattr(ours, name) == getattr(theirs, name)).all(), name
    # The files are equal except for the last page's padding and the pointer to the table after it.
    end = int(ours.offsets[-1] + ours.num_bytes[-1])
    assert (tmp_path / "ours.beton").read_bytes()[16 + 8 : end] == path.read_bytes()[16 + 8 : end]


def test_the_index_says_where_everything_lies(tmp_path: Path) -> None:
    what = [*samples(), Sample(True, 5, 6, 2, b"a JPEG")]
    path = write(tmp_path / "x.beton", what, capacity=20)
    index, whole = read_index(path), path.read_bytes()
    assert len(index) == 8
    for i, sample in enumerate(what):
        start = index.offsets[i]
        assert whole[start : start + index.num_bytes[i]] == sample.content
        row = (index.is_jpeg[i], index.heights[i], index.widths[i], index.labels[i])
        assert row == (sample.is_jpeg, sample.height, sample.width, sample.label)


def test_no_image_lies_on_two_pages(tmp_path: Path) -> None:
    what = [Sample(False, 600, 700, 0, bytes([i]) * 1_260_000) for i in range(3)]
    index = read_index(write(tmp_path / "x.beton", what))
    assert index.offsets.tolist() == [PAGE_BYTES, 2 * PAGE_BYTES, 3 * PAGE_BYTES]


@pytest.mark.parametrize("num_done", [0, 1, 4, 7])
@pytest.mark.parametrize("was_finished", [False, True])
def test_a_writer_goes_on_after_any_sample(tmp_path: Path, num_done: int, was_finished: bool) -> None:
    what = samples()
    undisturbed = write(tmp_path / "undisturbed.beton", what, capacity=9)
    first = BetonWriter(tmp_path / "x.beton", 9, PAGE_BYTES)
    for sample in [*what, what[0], what[0]]:
        first.append(sample)
    rows = first.rows[:num_done].copy()
    if was_finished:
        first.finish()
    else:
        first.abandon()
    with BetonWriter(tmp_path / "x.beton", 9, PAGE_BYTES, rows) as second:
        for sample in what[num_done:]:
            second.append(sample)
    assert (tmp_path / "x.beton").read_bytes() == undisturbed.read_bytes()
    assert not partial(tmp_path / "x.beton").exists()


def test_nothing_has_the_name_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    with pytest.raises(ValueError, match="laid out for 1 samples"):
        write(path, samples(), capacity=1)
    assert not path.exists()
    with pytest.raises(DataError, match="not an FFCV file of version 2, or one that was never finished"):
        read_index(partial(path))


@pytest.mark.parametrize(
    "sample",
    [Sample(False, 1000, 1000, 0, bytes(3_000_000)), Sample(True, 65536, 1, 0, b"x"), Sample(True, 1, 1, 0, b"")],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path: Path, sample: Sample) -> None:
    writer = BetonWriter(tmp_path / "x.beton", 1, PAGE_BYTES)
    with pytest.raises(ValueError, match="does not fit"):
        writer.append(sample)
    writer.abandon()


def test_a_full_file_takes_no_more(tmp_path: Path) -> None:
    writer = BetonWriter(tmp_path / "x.beton", 1, PAGE_BYTES)
    writer.append(samples()[0])
    with pytest.raises(ValueError, match="laid out for 1 samples"):
        writer.append(samples()[0])
    writer.abandon()


def test_rows_that_the_file_does_not_have_are_refused(tmp_path: Path) -> None:
    writer = BetonWriter(tmp_path / "x.beton", 2, PAGE_BYTES)
    writer.append(samples()[0])
    rows = writer.rows.copy()
    writer.abandon()
    partial(tmp_path / "x.beton").write_bytes(b"")
    with pytest.raises(ValueError, match="is too short for the 1 samples"):
        BetonWriter(tmp_path / "x.beton", 2, PAGE_BYTES, rows)


def test_the_data_starts_on_the_first_page_after_the_metadata() -> None:
    start = HEADER + 2 * FIELD
    assert data_start((PAGE_BYTES - start) // METADATA, PAGE_BYTES) == PAGE_BYTES
    assert data_start((PAGE_BYTES - start) // METADATA + 1, PAGE_BYTES) == 2 * PAGE_BYTES


def test_a_file_cut_short_anywhere_is_torn(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.beton", samples()).read_bytes()
    rng = np.random.default_rng(0)
    cuts = [0, 1, 23, 24, 2105, 2106, 2200, PAGE_BYTES, len(whole) - 169, len(whole) - 1]
    for cut in [*cuts, *rng.integers(0, len(whole), 20).tolist()]:
        (tmp_path / "y.beton").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"y\.beton: ") as refusal:
            read_index(tmp_path / "y.beton")
        assert "\n" not in str(refusal.value)


def put(offset: int, kind: str, value: int) -> Callable[[bytearray], None]:
    return lambda content: struct.pack_into(kind, content, offset, value)


FIRST = HEADER + 2 * FIELD


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (put(0, "<H", 1), "not an FFCV file of version 2"),
        (put(4, "<I", 3 << 20), "not an FFCV file of version 2"),
        (put(4, "<I", 0), "not an FFCV file of version 2"),
        (put(2, "<H", 1), r"its fields are \(image\), not an RGB image 'image' and an integer 'label'"),
        (put(2, "<H", 3), r"its fields are \(image, label, "),
        (put(HEADER, "B", 3), r"its fields are \(image, label\)"),
        (put(HEADER + 1, "B", ord("x")), r"its fields are \(xmage, label\)"),
        (put(8, "<Q", 0), "it has no samples"),
        (put(8, "<Q", 2**40), "torn: the metadata of 1,099,511,627,776 samples would end after the file's"),
        (put(8, "<Q", 2**63), "torn: the metadata of"),
        (put(16, "<Q", 2**63), "torn: the table of 7 images would end after"),
        (put(FIRST, "B", 2), r"image 0 is stored in an unknown way \(1 such\)"),
        (put(FIRST + 1, "<H", 0), "image 0 is empty"),
        (put(FIRST + 1, "<H", 9), "image 0 has not 3 bytes per pixel"),
        (put(FIRST + METADATA + 5, "<Q", 17), "image 1 is not in the table of images"),
        (put(-7 * ALLOCATION, "<Q", 5), "image 0 is not in the table of images"),
        (put(-7 * ALLOCATION + 16, "<Q", 2**63), "image 0 lies outside of the data"),
        (put(-7 * ALLOCATION + 16, "<Q", 0), "image 0 is empty"),
    ],
)
def test_a_spoilt_index_is_found_out(tmp_path: Path, spoil: Callable[[bytearray], None], says: str) -> None:
    content = bytearray(write(tmp_path / "x.beton", samples()).read_bytes())
    spoil(content)
    (tmp_path / "x.beton").write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_index(tmp_path / "x.beton")


@pytest.mark.parametrize("other", [b"", b"\x89PNG\r\n\x1a\n" * 9, b"\xff" * 5000, b"\x02\x00" * 3000])
def test_another_kind_of_file_is_found_out(tmp_path: Path, other: bytes) -> None:
    (tmp_path / "x.beton").write_bytes(other)
    with pytest.raises(DataError, match=r"x\.beton: "):
        read_index(tmp_path / "x.beton")


def test_a_file_that_is_not_there_says_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x.beton: No such file or directory; `python -m suite.data prepare` makes"):
        read_index(tmp_path / "x.beton")
    with pytest.raises(DataError, match="Is a directory"):
        read_index(tmp_path)
