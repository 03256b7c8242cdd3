"""Whose turn it is among owners (API keys): that of the one who has used the least while others waited."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class FairClocks:
    """Seconds that owners have used, as fair queueing counts them; the least goes first. Its user holds a lock.

    An owner who begins to wait stands where the one stands who has used the least of those who wait or are served
    already: what others used before it came is not held against them, nor is its own silence saved up. As many owners
    are remembered as have asked since nobody waited.
    """

    def __init__(self) -> None:
        """Nobody has used anything."""
        self._used: dict[int, float] = {}

    def enter(self, owner: int, active: Iterable[int]) -> None:
        """An owner begins to wait.

        Args:
            owner: Who nothing is waiting or worked on for.
            active: All owners for whom something is.
        """
        level = min(map(self.of, active), default=None)
        if level is None:
            self._used.clear()
        else:
            self._used[owner] = max(self.of(owner), level)

    def charge(self, owner: int, seconds: float) -> None:
        """So much was spent on an owner."""
        self._used[owner] = self.of(owner) + seconds

    def of(self, owner: int) -> float:
        """What counts as used by an owner, in seconds."""
        return self._used.get(owner, 0.0)


def crowds_out(own: int, more: int, waiting: int, room: int) -> bool:
    """Whether an owner may not have more items in a queue, as what is left of the room is kept for other owners.

    Whoever has none in it may fill what is left; otherwise an owner has no more than is left, so that one alone fills
    half of it.

    Args:
        own: Items of the owner that wait.
        more: Items that it brings now.
        waiting: Items of all owners that wait.
        room: Items that may wait.
    """
    return own > 0 and own + more > room - waiting
