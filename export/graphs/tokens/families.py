"""Families of schedules: where a tower merges is fixed, how many tokens are left at the end is the parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from invariclip.export.graphs.tokens.schedule import Schedule, TowerShape


@dataclass(frozen=True)
class MergeSchedules:
    """Merging after the same blocks.

    Attributes:
        name: In words.
        at: Where it merges, as shares of the tower's depth, from 0 (the first block) to below 1; () is every block.
        curve: `geometric` leaves the same share of the patches at every merge, `linear` takes the same number (ToMe's
            constant r).
    """

    name: str
    at: tuple[float, ...]
    curve: Literal["geometric", "linear"] = "geometric"

    def places(self, shape: TowerShape) -> tuple[int, ...]:
        """The blocks after whose attention it merges."""
        if not self.at:
            return tuple(range(shape.blocks - 1))
        return tuple(sorted({min(int(share * shape.blocks), shape.blocks - 2) for share in self.at}))

    def members(self, shape: TowerShape) -> Iterator[Schedule]:
        """Its schedules, each once, from the one that leaves most tokens at the end."""
        before = None
        for left in range(shape.tokens - 1, shape.prefix, -1):
            schedule = self.schedule(shape, left)
            if schedule != before:
                yield schedule
            before = schedule

    def schedule(self, shape: TowerShape, left: int) -> Schedule:
        """The one that leaves `left` tokens at the end, or as few as its merges can.

        Numbers are even where they can be: see `Merge` on odd ones.

        Args:
            shape: The tower.
            left: Tokens, those of `shape.prefix` and one more at least.
        """
        patches, places = shape.tokens - shape.prefix, self.places(shape)
        tokens, schedule = shape.tokens, []
        for block in range(shape.blocks - 1):
            if block in places:
                share = (places.index(block) + 1) / len(places)
                wanted = left - shape.prefix
                if self.curve == "geometric":
                    aim = patches * (wanted / patches) ** share
                else:
                    aim = patches + (wanted - patches) * share
                wanted_now = max(shape.fewest(tokens), shape.prefix + round(aim))
                tokens = min(tokens, wanted_now + wanted_now % 2)
            schedule.append(tokens)
        return tuple(schedule)


FAMILIES = (
    MergeSchedules("after every block", (), "linear"),
    MergeSchedules("after the first block", (0.0,)),
    MergeSchedules("after the first and the third block", (0.0, 0.17)),
    MergeSchedules("three times in the first half", (0.0, 0.17, 0.34)),
    MergeSchedules("after every third of the depth", (0.0, 0.34, 0.67)),
    MergeSchedules("from a third of the depth on", (0.34, 0.5, 0.67, 0.84)),
)
"""From the one that changes answers least to those with fewer merges, whose graphs cost less."""
