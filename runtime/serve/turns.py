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


class Turns:
    """A lock that nobody gets twice while another waits, and of which all owners who wait have equal parts.

    Attributes:
        pace: Seconds a row, lately; 0 before the first turn.
    """

    def __init__(self) -> None:
        """Free at first."""
        self.pace = 0.0
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, threading.Event]] = []
        self._holder: int | None = None
        self._clocks = FairClocks()

    @contextmanager
    def take(self, rows: int, owner: int = 0) -> Iterator[None]:
        """Waits for a turn, and has it while the block runs.

        Args:
            rows: How many rows the engine is given in it.
            owner: For whom: the number of an API key, or 0.
        """
        self._enter(owner)
        began = time.monotonic()
        try:
            yield
            pace, weight = (time.monotonic() - began) / max(1, rows), 1 - (1 - _RECENT) ** rows
            self.pace += (weight if self.pace else 1.0) * (pace - self.pace)
        finally:
            self._leave(owner, time.monotonic() - began)

    def _enter(self, owner: int) -> None:
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

    def _leave(self, owner: int, seconds: float) -> None:
        with self._lock:
            self._clocks.charge(owner, seconds)
            if not self._waiting:
                self._holder = None
                return
            place = min(range(len(self._waiting)), key=lambda one: self._clocks.of(self._waiting[one][0]))
            self._holder, following = self._waiting.pop(place)  # it stays taken, and is handed on
            following.set()
