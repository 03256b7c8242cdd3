"""What a caller of a queue holds: items, their results, and where the time went. The queue's lock guards all of it."""

from __future__ import annotations

import math
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

R = TypeVar("R")


@dataclass
class StageTime:
    """What a stage took.

    Attributes:
        seconds: In all: of several at a time each counts.
        first: When the first began, by `time.monotonic`; infinite where none has.
        last: When the last ended.
    """

    seconds: float = 0.0
    first: float = math.inf
    last: float = -math.inf

    def add(self, began: float, ended: float) -> None:
        """Counts one more."""
        self.merge(StageTime(ended - began, began, ended))

    def merge(self, other: StageTime) -> None:
        """Counts what another one counted."""
        self.seconds += other.seconds
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)


@dataclass
class TicketTimes:
    """Where the time of a caller's items went.

    Attributes:
        queue: None of them was worked on.
        prepare: Of the threads that made them ready, in all.
        engine: Of the runs that some of them were part of.
    """

    queue: StageTime = field(default_factory=StageTime)
    prepare: StageTime = field(default_factory=StageTime)
    engine: StageTime = field(default_factory=StageTime)


@dataclass(eq=False)
class Ticket(Generic[R]):
    """One caller's items; `future` gets their results, in order, or the first error.

    Attributes:
        future: list[R] of as many results as items were given.
        owner: Whose they are.
        times: What was spent on them, complete when the future is done.
    """

    _drop: Callable[[Ticket[R]], None]
    _results: list[Any]
    _deadline: float
    _turn: float  # when the caller came, later by `SHARE` times the seconds that were spent on them
    _items: deque[tuple[int, Any]]  # place and item, not prepared yet
    _missing: int
    _waiting: int  # of its items, those that no engine has taken
    owner: int = 0
    _partial: bool = False
    _ready: deque[ReadyItem] = field(default_factory=deque)
    future: Future[list[R]] = field(default_factory=Future)
    times: TicketTimes = field(default_factory=TicketTimes)
    _busy: int = 0  # of its items, those that are being prepared or in the engine
    _idle_since: float = field(default_factory=time.monotonic)

    def _begin(self, now: float) -> None:
        if not self._busy:
            self.times.queue.add(self._idle_since, now)
        self._busy += 1

    def _finish(self, now: float) -> None:
        self._busy -= 1
        self._idle_since = now

    def drop(self) -> None:
        """The caller went away: what still waits is not worked on. The future then holds a `BatcherStoppedError`."""
        self._drop(self)


@dataclass(frozen=True, eq=False)
class ReadyItem:
    """An item that was prepared, of a place in its ticket, and since when."""

    ticket: Ticket[Any]
    place: int
    prepared: Any
    since: float
