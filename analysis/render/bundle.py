"""One archive for reviewers: everything that the tables are made of, the report, and the command that makes them again.

    digits/
      README.txt                      what is here, and the commands that rebuild the tables
      report.html, tables.md, tables.json, comparisons as they were
      versions.txt                    of what computed them
      runs/digits/                    plan.json, launches.jsonl, looks.jsonl, and of each cell:
        <cell id>/                    cell.yaml, result.json, predictions.npz, journal.jsonl, and of each attempt
                                      attempt.yaml, provenance.json, end.json

Checkpoints, logs and code copies stay where they are. The same runs give the same bytes.
"""

import gzip
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

OF_A_GRID = ("plan.json", "launches.jsonl", "looks.jsonl")
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


def write(path: Path, grid: str, grid_dirs: list[Path], made: dict[str, str]) -> int:
    """Writes the archive PATH (.tar.gz) of a grid from its folders, with the texts of `made` by name.

    Returns:
        How many files are in it.
    """
    files = {f"{grid}/{name}": text.encode() for name, text in made.items()}
    for folder in reversed(grid_dirs):  # of a cell that is in several, the first one's
        files |= {f"{grid}/runs/{grid}/{name}": file.read_bytes() for name, file in _files(folder)}
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
        packed.write(content.getvalue())
    return len(files)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for name in OF_A_GRID:
        if (folder / name).is_file():
            yield name, folder / name
    for cell in sorted(folder.glob("*/cell.yaml")):
        for pattern in OF_A_CELL:
            for file in sorted(cell.parent.glob(pattern)):
                yield str(file.relative_to(folder)), file


def readme(grid: str, version: str) -> str:
    """What is in the archive and how to check it."""
    return (
        f"The grid {grid}: its runs, without checkpoints, and what was made of them by proxbench {version}.\n\n"
        "Rebuild the tables and compare them, in this folder, with proxbench installed:\n\n"
        f"    python -m analysis tables {grid} --root runs --details --output again.md\n"
        f"    python -m analysis tables {grid} --root runs --format json --output again.json\n"
        "    cmp again.md tables.md\n"
        "    cmp again.json tables.json\n\n"
        "runs/ is laid out as proxbench writes it: plan.json and launches.jsonl say what was declared, a cell's\n"
        "cell.yaml what was trained, result.json and predictions.npz what came out, attempts/ where and how.\n"
    )
