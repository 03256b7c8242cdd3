"""The access log: a line of JSON for each request, written by a thread, so that a slow disk holds up nobody."""

from __future__ import annotations

import errno
import logging
import os
import queue
import stat
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from invariclip.errors import InputError
from invariclip.serve.floods import Flood

if TYPE_CHECKING:
    from pathlib import Path

    from invariclip.serve.metrics import Metrics
    from invariclip.serve.record import RequestRecord

log = logging.getLogger("invariclip.serve")

LINES = 10_000
"""Lines that may wait for the disk; more are counted and left out."""
PIECE = 4096
"""Bytes to a write, of whole lines: as much as a pipe takes in one go."""
CLOSING = 2.0
"""Seconds that a server which ends waits for lines to be written."""
_STANDARD_ERROR = 2
_AT_ONCE = 256  # lines that are taken from the queue before they are written


@dataclass(frozen=True)
class _Line:
    record: RequestRecord
    more: dict[str, int] = field(default_factory=dict)


def facts_of(record: RequestRecord) -> dict[str, Any]:
    """What the log says of a request. No key and no header is in it but the two ids; lengths are bounded."""
    at = datetime.fromtimestamp(record.at, UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
    return {
        "time": f"{at}Z",
        "request_id": record.request_id,
        "trace_id": record.trace.trace_id,
        "span_id": record.trace.span_id,
        "method": record.method,
        "route": record.route,
        "status": record.status,
        "bytes_in": record.bytes_in,
        "bytes_out": record.bytes_out,
        **record.items,
        "failed": record.failed,
        **{f"{name}_ms": _milliseconds(stage.seconds) for name, stage in record.stages.items()},
        "total_ms": _milliseconds(record.seconds),
        "key": record.key or None,
        "reason": record.reason or None,
        "error": record.error.encode("utf-8", "replace").decode() or None,
    }


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 3)


class AccessLog:
    """Lines in a file or on standard error; `close` ends its thread.

    A file that was moved away (logrotate) is opened anew under its name.
    """

    def __init__(self, path: Path | None, metrics: Metrics, *, lines: int = LINES) -> None:
        """Opens the file, and starts the thread.

        Args:
            path: Of the file, which is added to; None for standard error.
            metrics: Counts the lines that are left out.
            lines: How many may wait to be written.

        Raises:
            InputError: The file cannot be written.
        """
        self._path, self._metrics = path, metrics
        self._file = _STANDARD_ERROR if path is None else _opened(path)
        self._torn = False  # the last line was not written to its end
        self._waiting: queue.Queue[_Line | None] = queue.Queue(lines)
        self._left_out, self._told = 0, 0
        self._closing = threading.Event()
        self._flood = Flood()
        self._thread = threading.Thread(target=self._write_all, name="access-log", daemon=True)
        self._thread.start()

    def write(self, record: RequestRecord) -> None:
        """Hands on the line of a request that is over; never waits."""
        self._hand_on(_Line(record))

    def write_unread(self, record: RequestRecord) -> None:
        """Likewise of a connection that was refused before a request was read: few lines a minute of a reason."""
        left_out = self._flood.passes((record.reason,))
        if left_out is not None:
            self._hand_on(_Line(record, {"left_out": left_out} if left_out else {}))

    def close(self) -> None:
        """Writes what waits, for a short while."""
        self._closing.set()
        with suppress(queue.Full):  # the thread then looks at `_closing` after each piece
            self._waiting.put_nowait(None)
        self._thread.join(CLOSING)
        if self._thread.is_alive() and self._path is not None:  # or this line, too, would wait for standard error
            log.warning("the access log could not be written to its end: %d lines are left out", self._waiting.qsize())

    def _hand_on(self, line: _Line) -> None:
        try:
            self._waiting.put_nowait(line)
        except queue.Full:
            self._left_out += 1
            self._metrics.access_log_dropped.inc()

    def _write_all(self) -> None:
        while (line := self._next()) is not None:
            lines = [line]
            while len(lines) < _AT_ONCE and (more := self._next(wait=False)) is not None:
                lines.append(more)
            self._write([msgspec.json.encode({**facts_of(one.record), **one.more}) + b"\n" for one in lines])
            left_out = self._left_out
            if left_out > self._told:
                self._tell(left_out - self._told, "it is written too slowly")
                self._told = left_out
        if self._path is not None:
            os.close(self._file)

    def _next(self, *, wait: bool = True) -> _Line | None:
        """The next line; None where there is none, and there will be none or it is not waited for."""
        try:
            return self._waiting.get(wait and not self._closing.is_set())
        except queue.Empty:
            return None

    def _write(self, lines: list[bytes]) -> None:
        done = 0
        try:
            self._reopen_if_moved()
            while done < len(lines):
                piece, count = b"\n" if self._torn else b"", 0
                while done + count < len(lines) and (not count or len(piece) + len(lines[done + count]) <= PIECE):
                    piece += lines[done + count]
                    count += 1
                self._write_piece(piece)
                done += count
        except OSError as error:
            self._metrics.access_log_dropped.inc(len(lines) - done)
            self._tell(len(lines) - done, error.strerror or str(error))

    def _write_piece(self, piece: bytes) -> None:
        while piece:
            written = os.write(self._file, piece)
            self._torn = piece[written - 1 : written] != b"\n"
            piece = piece[written:]

    def _reopen_if_moved(self) -> None:
        if self._path is None:
            return
        ours = os.fstat(self._file)
        try:
            there: os.stat_result | None = os.stat(self._path)
        except FileNotFoundError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            new = os.open(self._path, _FLAGS, 0o640)
            os.close(self._file)
            self._file, self._torn = new, False

    def _tell(self, count: int, why: str) -> None:
        log.warning("lines of the access log are left out (%d, %s)", count, why)


_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)


def _opened(path: Path) -> int:
    try:
        file = os.open(path, _FLAGS | getattr(os, "O_NONBLOCK", 0), 0o640)
        if stat.S_ISFIFO(os.fstat(file).st_mode) or not hasattr(os, "O_NONBLOCK"):
            return file  # a pipe that nobody reads must not hold up the thread for ever
        os.set_blocking(file, True)
    except OSError as error:
        why = "no program reads this pipe" if error.errno == errno.ENXIO else error.strerror or str(error)
        raise InputError(
            f"{path}: the access log cannot be written there ({why}); name another file, or - for standard error"
        ) from error
    return file
