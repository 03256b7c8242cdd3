"""Threads that use one engine by turns, each for a short while: owners share it, threads of one go in order."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from invariclip.serve.fairness import FairClocks

if TYPE_CHECKING:
    from collections.abc import Iterator

_RECENT = 0.005  # weight of the latest row in the mean time of a row


class Line:
    """A lock that nobody gets twice while another waits, and of which all owners who wait have equal parts."""

    def __init__(self) -> None:
        """Free at first."""
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, threading.Event]] = []
        self._holder: int | None = None
        self._clocks = FairClocks()

    def enter(self, owner: int) -> None:
        """Waits for a turn of an owner: the number of an API key, or 0."""
        with self._lock:
            active = {each for each, _ in self._waiting}
            if self._holder is not None:
                active.add(self._holder)
            if owner not in active:
                self._clocks.enter(owner, active)
            if self._holder is None:
                self._holder = owner
                return
            mine = threading.Event()
            self._waiting.append((owner, mine))
        mine.wait()

    def leave(self, owner: int, seconds: float) -> None:
        """Ends the turn of an owner, which has taken so long."""
        with self._lock:
            self._clocks.charge(owner, seconds)
            if not self._waiting:
                self._holder = None
                return
            place = min(range(len(self._waiting)), key=lambda one: self._clocks.of(self._waiting[one][0]))
            self._holder, following = self._waiting.pop(place)  # it stays taken, and is handed on
            following.set()


class Turns:
    """The turns of one model's engine in a line, which it may share with the engines of others.

    Attributes:
        pace: Seconds a row, lately; 0 before the first turn.
    """

    def __init__(self, line: Line | None = None) -> None:
        """Has no turn yet; None makes a line of its own."""
        self.pace = 0.0
        self._line = line or Line()

    @contextmanager
    def take(self, rows: int, owner: int = 0) -> Iterator[None]:
        """Waits for a turn, and has it while the block runs.

        Args:
            rows: How many rows the engine is given in it.
            owner: For whom: the number of an API key, or 0.
        """
        self._line.enter(owner)
        began = time.monotonic()
        try:
            yield
            pace, weight = (time.monotonic() - began) / max(1, rows), 1 - (1 - _RECENT) ** rows
            self.pace += (weight if self.pace else 1.0) * (pace - self.pace)
        finally:
            self._line.leave(owner, time.monotonic() - began)
