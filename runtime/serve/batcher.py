"""One queue for many callers: items are prepared in threads, and answered in batches by one engine thread.

A batch starts when the engine is free. What waited meanwhile goes together: a busy engine gets larger batches by
itself, and an idle one answers a single item at once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from invariclip.backends.batching import largest_bucket, plan
from invariclip.errors import InvariclipError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")
P = TypeVar("P")
R = TypeVar("R")

LONGEST_RETRY = 60
"""Seconds that a refused caller is told to wait, at most."""
_RECENT = 0.1  # weight of the latest batch in the mean time of an item


class QueueFullError(InvariclipError):
    """There is no room for more; `retry_after` says in how many seconds there may be."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BatcherStoppedError(InvariclipError):
    """The queue takes no more work, or was closed before this was answered."""


class Watcher(Protocol):
    """Is told what happens, from several threads; `quiet` is the one that does not care."""

    def prepared(self, seconds: float) -> None:
        """An item was made ready."""

    def waited(self, seconds: float) -> None:
        """A ready item was taken by the engine."""

    def ran(self, rows: int, seconds: float) -> None:
        """The engine answered a batch."""


class _Quiet:
    def prepared(self, seconds: float) -> None:
        pass

    def waited(self, seconds: float) -> None:
        pass

    def ran(self, rows: int, seconds: float) -> None:
        pass


quiet: Watcher = _Quiet()


@dataclass(eq=False)
class Ticket(Generic[R]):
    """One caller's items; `future` gets their results, in order, or the first error.

    Attributes:
        future: list[R] of as many results as items were given.
    """

    _drop: Callable[[Ticket[R]], None]
    _results: list[Any]
    _waiting: int  # of its items, those that the queue still counts
    _missing: int
    future: Future[list[R]] = field(default_factory=Future)

    def drop(self) -> None:
        """The caller went away: what still waits is not worked on. The future then holds a `BatcherStoppedError`."""
        self._drop(self)


@dataclass(frozen=True, eq=False)
class _Ready(Generic[P, R]):
    ticket: Ticket[R]
    place: int
    prepared: P
    since: float


class Batcher(Generic[T, P, R]):
    """Items in, results out. Safe to share between threads; `close` ends its own."""

    def __init__(
        self,
        prepare: Callable[[T], P],
        run: Callable[[list[P]], Sequence[R]],
        *,
        max_batch: int,
        queue: int,
        workers: int = 1,
        max_wait: float = 0.0,
        watcher: Watcher = quiet,
        name: str = "items",
    ) -> None:
        """Starts the threads.

        Args:
            prepare: Makes an item ready, in one of `workers` threads; what it raises fails the item's caller alone.
            run: Answers prepared items, a result each, in the engine thread alone; what it raises fails the batch.
            max_batch: Items to a batch; the greatest power of two in it is used, see `batching.plan`.
            queue: Items that may wait, in preparation or ready.
            workers: Threads that prepare.
            max_wait: Seconds that a ready item may wait for a batch to fill while the engine is free.
            watcher: Is told of every item and batch.
            name: What the items are called in messages.

        Raises:
            InputError: `max_batch` is below 1.
        """
        self.max_batch = largest_bucket(max_batch)
        self.queue, self.max_wait, self.name = queue, max_wait, name
        self._prepare, self._run, self._watcher = prepare, run, watcher
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._ready: deque[_Ready[P, R]] = deque()
        self._waiting = 0
        self._open = True
        self._pace = 0.0  # seconds an item, lately
        self._tickets: set[Ticket[R]] = set()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=f"prepare-{name}")
        # A daemon: an engine that hangs must not keep the process from ending
        self._thread = threading.Thread(target=self._work, name=f"engine-{name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Items that no engine has taken yet."""
        return self._waiting

    def submit(self, items: Sequence[T]) -> Ticket[R]:
        """Takes a caller's items into the queue, all or none.

        Raises:
            QueueFullError: They have no room.
            StoppedError: The queue was closed.
        """
        count = len(items)
        with self._lock:
            if not self._open:
                raise BatcherStoppedError("the server is stopping and takes no more work")
            if self._waiting + count > self.queue:
                raise QueueFullError(
                    f"{self._waiting} {self.name} are waiting, and there is room for {self.queue}: no room for {count} "
                    f"more; try again in {self._retry()} s",
                    self._retry(),
                )
            ticket: Ticket[R] = Ticket(self.drop, [None] * count, count, count)
            ticket.future.set_running_or_notify_cancel()  # from here on, only this class ends it
            self._waiting += count
            if count:
                self._tickets.add(ticket)
            else:
                ticket.future.set_result([])
        try:
            for place, item in enumerate(items):
                self._pool.submit(self._make_ready, ticket, place, item)
        except RuntimeError:  # closed meanwhile
            self.drop(ticket)
        return ticket

    def drop(self, ticket: Ticket[R]) -> None:
        """See `Ticket.drop`."""
        with self._changed:
            self._end(ticket, error=BatcherStoppedError("dropped before it was answered; ask again"))
            self._changed.notify_all()

    def close(self, seconds: float = 0.0) -> bool:
        """Takes no more work, and answers what waits for so long; fails the rest. Whether everything was answered."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        self._thread.join(seconds)
        with self._lock:
            left = list(self._tickets)
            for ticket in left:
                self._end(ticket, error=BatcherStoppedError("the server stopped before this was answered; ask again"))
            self._changed.notify_all()
        self._pool.shutdown(wait=False, cancel_futures=True)
        return not left

    def _retry(self) -> int:
        return min(LONGEST_RETRY, max(1, ceil(self._waiting * self._pace)))

    def _make_ready(self, ticket: Ticket[R], place: int, item: T) -> None:
        if ticket.future.done():
            return
        began = time.monotonic()
        try:
            prepared = self._prepare(item)
        except Exception as error:  # whatever it is, it is its caller's
            with self._changed:
                self._end(ticket, error=error)
                self._changed.notify_all()
            return
        now = time.monotonic()
        self._watcher.prepared(now - began)
        with self._changed:
            if not ticket.future.done():
                self._ready.append(_Ready(ticket, place, prepared, now))
                self._changed.notify_all()

    def _work(self) -> None:
        while batch := self._next():
            began = time.monotonic()
            for item in batch:
                self._watcher.waited(began - item.since)
            try:
                results = self._run([item.prepared for item in batch])
                if len(results) != len(batch):
                    raise RuntimeError(f"{len(batch)} {self.name} were answered with {len(results)} results")
            except Exception as error:  # callers learn of it; the thread goes on
                with self._lock:
                    for item in batch:
                        self._end(item.ticket, error=error)
                continue
            seconds = time.monotonic() - began
            self._watcher.ran(len(batch), seconds)
            with self._lock:
                self._pace += _RECENT * (seconds / len(batch) - self._pace)
                for item, result in zip(batch, results, strict=True):
                    self._settle(item, result)

    def _next(self) -> list[_Ready[P, R]]:
        """The next batch; empty when there will be none."""
        with self._changed:
            while True:
                while self._ready and self._ready[0].ticket.future.done():
                    self._ready.popleft()
                if not self._ready:
                    if not self._open and not self._tickets:
                        return []
                    self._changed.wait()
                    continue
                late = self._ready[0].since + self.max_wait - time.monotonic()
                if late > 0 and self._open and len(self._ready) < self.max_batch:
                    self._changed.wait(late)
                    continue
                return self._taken()

    def _taken(self) -> list[_Ready[P, R]]:
        live = [item for item in self._ready if not item.ticket.future.done()]
        # Only as many as one run of the engine takes: the rest then goes with what comes in meanwhile
        count, _ = plan(min(len(live), self.max_batch))[0]
        batch, self._ready = live[:count], deque(live[count:])
        self._waiting -= count
        for item in batch:
            item.ticket._waiting -= 1
        return batch

    def _settle(self, item: _Ready[P, R], result: R) -> None:
        ticket = item.ticket
        if ticket.future.done():
            return
        ticket._results[item.place] = result
        ticket._missing -= 1
        if not ticket._missing:
            self._end(ticket)

    def _end(self, ticket: Ticket[R], error: Exception | None = None) -> None:
        """Ends a ticket once; the lock is held."""
        if ticket.future.done():
            return
        self._waiting -= ticket._waiting
        ticket._waiting = 0
        self._tickets.discard(ticket)
        if error is None:
            ticket.future.set_result(ticket._results)
        else:
            ticket.future.set_exception(error)
        if not self._open:
            self._changed.notify_all()
