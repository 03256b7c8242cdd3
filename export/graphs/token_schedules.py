"""How many tokens are left after each block, what a tower costs with so many, and the families of schedules to try."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


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


Schedule: TypeAlias = tuple[int, ...]
"""Tokens left after each block but the last, the class token among them. The last answers for the class token alone."""

MERGE_FLOPS = 2e8
"""What one merge costs beside its arithmetic, in operations of its tower: some twenty small operators. Fitted to
ViT-B/16 in OpenVINO's bfloat16, with 3, 4 and 11 merges: 1.6e8 an image in batches of 8, 4.4e8 at batch 1 (where
another 23 % of the whole tower's time is the reading of its weights, which fewer tokens do not save)."""


@dataclass(frozen=True)
class TowerShape:
    """What an image tower's cost follows from.

    Attributes:
        blocks: Transformer blocks.
        tokens: Tokens before the first block, those of `prefix` among them.
        prefix: Tokens at the front that are never merged: the class token, and registers.
        width: Components of a token, E.
        inner: Components of all heads' queries together.
        key_weights: Weights that every token goes through for attention, whether its answer is wanted or not: of keys
            and values.
        query_weights: Weights that a token goes through whose answer is wanted: of query and output.
        mlp: Weights of the MLP.
        stem: Multiplications before the first block.
    """

    blocks: int
    tokens: int
    prefix: int
    width: int
    inner: int
    key_weights: int
    query_weights: int
    mlp: int
    stem: int

    @property
    def all(self) -> Schedule:
        """The schedule that merges nothing."""
        return (self.tokens,) * (self.blocks - 1)

    def fewest(self, before: int) -> int:
        """How few tokens one merge can leave of `before`: every second patch token can go, rounded up."""
        patches = before - self.prefix
        return self.prefix + (patches // 2 if patches > 1 else patches)

    def require(self, schedule: Sequence[int]) -> Schedule:
        """The schedule, if a tower of this shape can have it.

        Raises:
            InputError: It cannot.
        """
        if len(schedule) != self.blocks - 1:
            raise InputError(
                f"a schedule of tokens has a number for every block but the last: {self.blocks - 1}, "
                f"not {len(schedule)}"
            )
        before = self.tokens
        for place, after in enumerate(schedule):
            least = self.fewest(before)
            if not least <= after <= before:
                raise InputError(
                    f"block {place + 1} of {self.blocks} gets {before} tokens and can leave {least} to {before} of "
                    f"them, not {after}"
                )
            before = after
        return tuple(int(after) for after in schedule)

    def merges(self, schedule: Schedule) -> int:
        """How many blocks merge."""
        return sum(before != after for before, after in zip((self.tokens, *schedule[:-1]), schedule, strict=True))

    def flops(self, schedule: Schedule, *, merge: float = MERGE_FLOPS) -> float:
        """What an image costs: twice its multiplications, and an extra for each merge.

        Args:
            schedule: One that `require` lets pass.
            merge: Operations that one merge is worth beside its arithmetic.
        """
        products, before = float(self.stem), self.tokens
        for after in schedule:
            products += (
                before * (self.key_weights + self.query_weights) + 2 * before * before * self.inner + after * self.mlp
            )
            if after != before:
                products += before * before * self.width + before * after * self.width + merge / 2
            before = after
        return 2 * (products + before * self.key_weights + 2 * before * self.inner + self.query_weights + self.mlp)

    def saving(self, schedule: Schedule, *, merge: float = MERGE_FLOPS) -> float:
        """Share of the whole tower's cost that a schedule saves; below zero where merging costs more than it saves."""
        return 1 - self.flops(schedule, merge=merge) / self.flops(self.all)


def written(schedule: Sequence[int]) -> str:
    """A schedule in words for plans and reports: `197 ×2, 99 ×9`."""
    runs: list[list[int]] = []
    for tokens in schedule:
        if runs and runs[-1][0] == tokens:
            runs[-1][1] += 1
        else:
            runs.append([tokens, 1])
    return ", ".join(f"{tokens} ×{count}" for tokens, count in runs)
