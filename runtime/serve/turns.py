"""Threads that use one engine by turns: in the order in which they ask, and each for a short while."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_RECENT = 0.005  # weight of the latest row in the mean time of a row


class Turns:
    """A lock that nobody gets twice while another waits.

    Attributes:
        pace: Seconds a row, lately; 0 before the first turn.
    """

    def __init__(self) -> None:
        """Free at first."""
        self.pace = 0.0
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._taken = False

    @contextmanager
    def take(self, rows: int) -> Iterator[None]:
        """Waits for a turn, and has it while the block runs.

        Args:
            rows: How many rows the engine is given in it.
        """
        self._enter()
        began = time.monotonic()
        try:
            yield
            pace, weight = (time.monotonic() - began) / max(1, rows), 1 - (1 - _RECENT) ** rows
            self.pace += (weight if self.pace else 1.0) * (pace - self.pace)
        finally:
            self._leave()

    def _enter(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Event()
            self._waiting.append(mine)
        mine.wait()

    def _leave(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()  # it stays taken, and is handed on
            else:
                self._taken = False
