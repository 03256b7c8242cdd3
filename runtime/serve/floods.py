"""A log that clients cannot fill: of many records that say the same, a few are written."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

KINDS = 256
"""Kinds of records that are told apart; beyond that, the count begins anew."""


class Flood:
    """Lets a few of each kind pass in a while. Safe to share between threads."""

    def __init__(self, most: int = 10, seconds: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        """Has seen none.

        Args:
            most: How many of a kind pass,
            seconds: in how many seconds.
            clock: Tells the seconds.
        """
        self._most, self._seconds, self._clock = most, seconds, clock
        self._lock = threading.Lock()
        self._seen: dict[Hashable, tuple[float, int]] = {}

    def passes(self, kind: Hashable) -> int | None:
        """None where one more of a kind does not pass; otherwise how many before it did not, and were not told yet."""
        now = self._clock()
        with self._lock:
            since, count = self._seen.get(kind, (now, 0))
            left_out = 0
            if now - since >= self._seconds:
                left_out, since, count = max(0, count - self._most), now, 0
            if len(self._seen) >= KINDS and kind not in self._seen:
                self._seen.clear()
            self._seen[kind] = since, count + 1
        return None if count >= self._most else left_out


class FloodFilter(logging.Filter):
    """Lets a few records of each kind pass in a while; the next one then says how many were left out.

    A kind is a logger, a level and a message without its arguments. Errors with a traceback that our own log promises
    to hold always pass.
    """

    def __init__(self, flood: Flood | None = None) -> None:
        super().__init__()
        self._flood = flood or Flood()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is written."""
        if record.exc_info and record.name.startswith("invariclip"):
            return True
        left_out = self._flood.passes((record.name, record.levelno, str(record.msg)[:200]))
        if left_out:
            record.msg, record.args = f"{record.getMessage()} ({left_out:,} more like it were left out)", ()
        return left_out is not None
