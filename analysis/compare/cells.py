"""The cells behind each entry of a table, as figures need them: by seed, and their ids for the curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from analysis.compare.comparison import Block, Key, Row, rows_by_block
from analysis.compare.groups import Group
from analysis.compare.verdicts import Member
from analysis.runs import frame as cells


@dataclass(frozen=True)
class Cells:
    """One quantizer on one model: what it measured, and the ids of its cells.

    Curves of `averaged` may be averaged: done, of one recipe, one per seed. `single` are the others'.
    """

    group: Group = field(default_factory=Group)
    averaged: tuple[str, ...] = ()
    single: tuple[str, ...] = ()

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Cells":
        """The cells of these rows of a frame with columns cells.SCHEMA and `status`."""
        group = Group.of(rows)
        averaged = tuple(row["cell_id"] for row in rows if row["state"] == "done" and group.conflict is None)
        return cls(group, averaged, tuple(row["cell_id"] for row in rows if row["cell_id"] not in averaged))


def cells_by_block(frame: pd.DataFrame) -> dict[Key, dict[Member, Cells]]:
    """The cells that `analysis.comparison` takes for each entry, by block, quantizer and model."""
    rows = frame.assign(status=cells.status_of(frame)).to_dict("records")
    found: dict[Key, dict[Member, Cells]] = {}
    for key, own in rows_by_block(rows).items():  # type: ignore[arg-type]  # pandas says Hashable, not str
        members: dict[Member, list[Row]] = {}
        for row in own:
            members.setdefault((row["quantizer"], row["model"]), []).append(row)
        found[key] = {member: Cells.of(rows) for member, rows in members.items()}
    return found


def pairs_of(members: Mapping[Member, Cells], reference: str, member: Member) -> dict[int, float]:
    """Reference minus quantizer, a fraction, by the seeds that both have measured: what an entry's difference is of."""
    ours, theirs = (members.get(own, Cells()).group.usable for own in ((reference, member[1]), member))
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def key_of(block: Block) -> Key:
    """What cells_by_block has the block under."""
    return (block.grid, block.dataset, block.task, block.init)
