"""Bodies while they come in: one that stalls is given up, at once where others need the memory that it holds."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from invariclip.serve.limits import RefusedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from invariclip.serve.limits import Held
    from invariclip.serve.metrics import Metrics

PATIENCE = 0.5
"""Seconds without `PROGRESS` more bytes after which a body gives way, where there is no room for others."""
PROGRESS = 1 << 16


class IncomingBody:
    """A body that is coming in.

    Attributes:
        taken: Bytes of it that are held.
        since: When it last made progress.
        gave_way: Whether it was given up for others.
    """

    def __init__(self, bodies: IncomingBodies, deadline: asyncio.Timeout) -> None:
        self._bodies, self._deadline = bodies, deadline
        self.taken = self._progress = 0
        self.since = asyncio.get_running_loop().time()
        self.gave_way = False

    def take(self, count: int) -> None:
        """Counts bytes that have come in.

        Raises:
            RefusedError: There is no room for them.
        """
        if self.gave_way:
            raise self._bodies.no_room_for_this()
        self._bodies.take(self, count)
        self.taken += count
        now = asyncio.get_running_loop().time()
        if self.taken - self._progress >= PROGRESS:
            self._progress, self.since = self.taken, now
        self._deadline.reschedule(now + self._bodies.stall)

    def complete(self) -> None:
        """All of it came in."""
        if self.gave_way:
            raise self._bodies.no_room_for_this()
        self._bodies.leave(self)
        self._deadline.reschedule(None)

    def give_way(self) -> None:
        """Gives its bytes back; whoever waits for more of it is woken by a TimeoutError."""
        self._bodies.leave(self)
        self._bodies.held.give_back(self.taken)
        self.taken, self.gave_way = 0, True
        self._deadline.reschedule(asyncio.get_running_loop().time())


class IncomingBodies:
    """The bodies of a server that are not complete; only the event loop touches them."""

    def __init__(self, held: Held, stall: float, metrics: Metrics) -> None:
        """Begins with none.

        Args:
            held: Counts the bytes of all bodies, complete ones too.
            stall: Seconds to wait for the next bytes of one.
            metrics: Counts those that were given up.
        """
        self.held, self.stall, self._metrics = held, stall, metrics
        self._coming: set[IncomingBody] = set()

    @asynccontextmanager
    async def body(self) -> AsyncIterator[IncomingBody]:
        """One more; if the block raises, its bytes are given back.

        Raises:
            RefusedError: It stalls.
        """
        try:
            async with asyncio.timeout(self.stall) as deadline:
                body = IncomingBody(self, deadline)
                self._coming.add(body)
                try:
                    yield body
                except BaseException:
                    self.held.give_back(body.taken)
                    raise
                finally:
                    self.leave(body)
        except TimeoutError as error:
            if body.gave_way:
                raise self.no_room_for_this() from error
            self._metrics.dropped.labels("stalled").inc()
            raise RefusedError(
                408, f"no more of the body came in within {self.stall:g} s; send it again", reason="stalled"
            ) from error

    def take(self, asking: IncomingBody, count: int) -> None:
        """Counts bytes of a body, if need be in the place of those of a body that stalls.

        Raises:
            RefusedError: There is no room for them.
        """
        while True:
            try:
                self.held.take(count)
                return
            except RefusedError:
                if not self._make_room(asking):
                    raise

    def leave(self, body: IncomingBody) -> None:
        """A body is complete, or is not waited for any more."""
        self._coming.discard(body)

    def no_room_for_this(self) -> RefusedError:
        """What the client of a body hears that gave way."""
        return RefusedError(
            503, "the memory that this body held was needed for others while it did not come in; send it again",
            {"retry-after": "1"}, reason="memory",
        )  # fmt: skip

    def _make_room(self, asking: IncomingBody) -> bool:
        now = asyncio.get_running_loop().time()
        stalled = [one for one in self._coming if one is not asking and one.taken and now - one.since > PATIENCE]
        if not stalled:
            return False
        self._metrics.dropped.labels("room").inc()
        # The one that has held the most for the longest
        max(stalled, key=lambda one: one.taken * (now - one.since)).give_way()
        return True
