"""One archive for reviewers: everything behind the tables, the report, and the command that rebuilds the tables.

    digits/
      README.txt                      contents, and the commands that rebuild the tables
      report.html, tables.md, tables.json; tuning.md if the grid tunes
      versions.txt                    of the packages that computed these files
      runs/digits/                    plan.json, launches.jsonl, looks.jsonl, tuning, and for each cell and trial:
        <cell id>/                    cell.yaml, result.json, predictions.npz, journal.jsonl, and for each attempt
                                      attempt.yaml, provenance.json, end.json

Several roots become runs-1, runs-2 and so on. Checkpoints, logs and code copies are not included. The same runs give
the same bytes.
"""

import io
import lzma
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

OF_A_GRID = ("plan.json", "launches.jsonl", "looks.jsonl", "tuning.json", "choices.yaml")
OF_A_CELL = (
    "cell.yaml",
    "attempts/*/attempt.yaml",
    "attempts/*/provenance.json",
    "attempts/*/end.json",
    "journal.jsonl",
    "result.json",
    "predictions.npz",
    "cancelled",
)


def write(path: Path, grid: str, roots: Mapping[str, Path], made: Mapping[str, str]) -> None:
    """Writes the .tar.xz archive `path` of a grid: its files in `roots` (by their names in the archive) and `made`."""
    files = {f"{grid}/{name}": text.encode() for name, text in made.items()}
    for root, place in roots.items():
        files |= {f"{grid}/{root}/{grid}/{name}": file.read_bytes() for name, file in _files(place / grid)}
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(content.getvalue(), preset=7))  # cells repeat each other: a third smaller than gzip


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for name in OF_A_GRID:
        if (folder / name).is_file():
            yield name, folder / name
    for cell in sorted(folder.glob("*/cell.yaml")):
        for pattern in OF_A_CELL:
            for file in sorted(cell.parent.glob(pattern)):
                yield str(file.relative_to(folder)), file


def named(roots: Sequence[Path], grid: str) -> dict[str, Path]:
    """The roots that hold the grid, by their names in the archive."""
    own = [root for root in roots if (root / grid).is_dir()]
    return {"runs" if len(own) == 1 else f"runs-{number}": root for number, root in enumerate(own, start=1)}


def readme(grid: str, roots: Iterable[str], version: str, *, is_tuned: bool) -> str:
    """Text of README.txt: the archive's contents and how to check them."""
    options = " ".join(f"--root {root}" for root in roots)
    tuning = ""
    if is_tuned:
        tuning = f"    python -m analysis tuning {grid} {options} > again.md\n    cmp again.md tuning.md\n"
    return (
        f"The grid {grid}: its runs, without checkpoints, and what proxbench {version} made of them.\n\n"
        "To rebuild the tables and compare them, in this folder, with proxbench installed:\n\n"
        f"    python -m analysis tables {grid} {options} --details --output again.md\n"
        f"    python -m analysis tables {grid} {options} --format json --output again.json\n"
        "    cmp again.md tables.md\n"
        f"    cmp again.json tables.json\n{tuning}\n"
        "Runs are laid out as proxbench writes them. plan.json and launches.jsonl say what was declared, a cell's\n"
        "cell.yaml says what was trained, result.json and predictions.npz what came out, attempts/ where and how.\n"
    )
