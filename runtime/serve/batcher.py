"""One queue for many callers: items are prepared in threads, and answered in batches by one engine thread.

A batch starts when the engine is free. What waited meanwhile goes together: a busy engine gets larger batches by
itself, and an idle one answers a single item at once.

Callers take turns. A caller who has used u seconds of the threads and the engine stands where one stands that came
`SHARE` · u seconds later: whoever brings many or heavy items is overtaken by those who bring few. They are overtaken no
longer when what is left of their time is just enough for what is left of their items. Callers of one light item each
are answered in the order in which they came.

Where callers have owners (API keys), these take turns first, and all owners who wait have equal parts of the threads
and the engine, however many callers or items each of them brings: see `fairness`.
"""

from __future__ import annotations

import heapq
import math
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from invariclip.backends.batching import largest_bucket, plan
from invariclip.errors import InvariclipError
from invariclip.serve.fairness import FairClocks, crowds_out
from invariclip.serve.tickets import ReadyItem, Ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")
P = TypeVar("P")
R = TypeVar("R")

LONGEST_RETRY = 60
"""Seconds that a refused caller is told to wait, at most."""
SHARE = 8.0
"""Seconds that a caller falls back in the queue for each second that was spent on them."""
MARGIN = 1.25
"""How many times longer than estimated a caller's wait may turn out."""
_RECENT = 0.03  # weight of the latest item in the mean time of an item


class QueueFullError(InvariclipError):
    """There is no room, or no time, for more.

    Attributes:
        retry_after: In how many seconds there may be.
        reason: `queue_full`, `too_late` (it would not be answered in time) or `deadline` (its time is over).
    """

    def __init__(self, message: str, retry_after: int, reason: str = "queue_full") -> None:
        super().__init__(message)
        self.retry_after, self.reason = retry_after, reason


class BatcherStoppedError(InvariclipError):
    """The queue takes no more work, or was closed before this was answered."""

    reason = "stopping"


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


class Batcher(Generic[T, P, R]):
    """Items in, results out. Safe to share between threads; `close` ends its own."""

    def __init__(
        self,
        prepare: Callable[[T], P] | None,
        run: Callable[[list[P]], Sequence[R]],
        *,
        max_batch: int,
        queue: int,
        workers: int = 1,
        max_wait: float = 0.0,
        owners: int = 1,
        watcher: Watcher = quiet,
        name: str = "items",
    ) -> None:
        """Starts the threads.

        Args:
            prepare: Makes an item ready, in one of `workers` threads; what it raises fails the item's caller alone.
                None where items are ready as they come.
            run: Answers prepared items, a result each, in the engine thread alone; what it raises fails the batch.
            max_batch: Items to a batch; the greatest power of two in it is used, see `batching.plan`.
            queue: Items that may wait, in preparation or ready.
            workers: Threads that prepare.
            max_wait: Seconds that a ready item may wait for a batch to fill while the engine is free.
            owners: How many owners there may be; of several none fills the queue alone.
            watcher: Is told of every item and batch.
            name: What the items are called in messages.

        Raises:
            InputError: `max_batch` is below 1.
        """
        self.max_batch = largest_bucket(max_batch)
        self.queue, self.max_wait, self.name = queue, max_wait, name
        self._prepare, self._run, self._watcher, self._workers = prepare, run, watcher, workers
        self._owners, self._clocks = owners, FairClocks()
        lock = threading.Lock()
        self._changed, self._asked = threading.Condition(lock), threading.Condition(lock)  # for the engine; for workers
        self._waiting = self._ready = self._running = 0  # items that no engine has taken; prepared ones; in the engine
        self._open = True
        self._pace = 0.0  # seconds from one answered item to the next while some wait, lately
        self._since = 0.0  # since when the next answer is waited for
        # In the order in which they came; with items to prepare; all
        self._unprepared: dict[Ticket[R], None] = {}
        self._tickets: dict[Ticket[R], None] = {}
        # Daemons: an engine or a decoder that hangs must not keep the process from ending
        self._thread = threading.Thread(target=self._work, name=f"engine-{name}", daemon=True)
        self._thread.start()
        if prepare is not None:
            for number in range(workers):
                threading.Thread(target=self._prepare_all, name=f"prepare-{name}-{number}", daemon=True).start()

    @property
    def waiting(self) -> int:
        """Items that no engine has taken yet."""
        return self._waiting

    @property
    def ready(self) -> int:
        """Those of them that are prepared."""
        return self._ready

    def expect(self, pace: float) -> None:
        """What an item will take, in seconds, until that is measured."""
        with self._changed:
            self._pace = self._pace or pace

    def submit(
        self, items: Sequence[T], *, deadline: float = math.inf, partial: bool = False, owner: int = 0
    ) -> Ticket[R]:
        """Takes a caller's items into the queue, all or none.

        Args:
            items: Any number of them.
            deadline: When the answer is worth nothing any more, by `time.monotonic`.
            partial: Whether an item that cannot be prepared has its `InvariclipError` as its result, instead of failing
                all of them.
            owner: Whose items they are.

        Raises:
            QueueFullError: They have no room, or would not be answered in time.
            BatcherStoppedError: The queue was closed.
        """
        count, now = len(items), time.monotonic()
        with self._changed:
            if not self._open:
                raise BatcherStoppedError("the server is stopping and takes no more work")
            if self._waiting + count > self.queue:
                retry = _retry(self._waiting * self._pace)
                raise QueueFullError(
                    f"{self._waiting} {self.name} are waiting, and there is room for {self.queue}: no room for {count} "
                    f"more; try again in {retry} s",
                    retry,
                )
            self._require_share(count, owner)
            if not any(other.owner == owner for other in self._tickets):
                self._clocks.enter(owner, {other.owner for other in self._tickets})
            self._require_time(count, now, deadline, owner)
            ticket: Ticket[R] = Ticket(
                self.drop, [None] * count, deadline, now, deque(enumerate(items)), count, count, owner, partial
            )
            ticket.future.set_running_or_notify_cancel()  # from here on, only this class ends it
            if not count:
                ticket.future.set_result([])
                return ticket
            if not self._waiting and not self._running:
                self._since = now
            self._waiting += count
            self._tickets[ticket] = None
            if self._prepare is None:
                ticket._ready.extend(ReadyItem(ticket, place, item, now) for place, item in enumerate(items))
                ticket._items.clear()
                self._ready += count
                self._changed.notify_all()
            else:
                self._unprepared[ticket] = None
                self._asked.notify(count)
        return ticket

    def drop(self, ticket: Ticket[R]) -> None:
        """See `Ticket.drop`."""
        with self._changed:
            self._end(ticket, BatcherStoppedError("dropped before it was answered; ask again"))
            self._changed.notify_all()

    def close(self, seconds: float = 0.0) -> bool:
        """Takes no more work, and answers what waits for so long; fails the rest. Whether everything was answered."""
        with self._changed:
            self._open = False
            self._notify_all()
        self._thread.join(seconds)
        with self._changed:
            left = list(self._tickets)
            for ticket in left:
                self._end(ticket, BatcherStoppedError("the server stopped before this was answered; ask again"))
            self._notify_all()
        return not left

    def _require_share(self, count: int, owner: int) -> None:
        """Refuses what would leave no room for other owners.

        Raises:
            QueueFullError: It would.
        """
        own = sum(other._waiting for other in self._tickets if other.owner == owner)
        if self._owners > 1 and crowds_out(own, count, self._waiting, self.queue):
            retry = _retry(own * self._pace)
            raise QueueFullError(
                f"{own} {self.name} of this API key are waiting, and what is left of the queue is kept for other keys: "
                f"no room for {count} more; try again in {retry} s",
                retry,
            )

    def _require_time(self, count: int, now: float, deadline: float, owner: int) -> None:
        """Refuses what would not be answered in time; an idle queue takes everything, or it could never learn better.

        Raises:
            QueueFullError: There is no time for it.
        """
        left, busy = (deadline - now) / MARGIN, self._waiting + self._running
        if not busy or (busy + count) * self._pace <= left:
            return
        # Of a caller who has fallen back, only those items are before the new ones that are served until that turn
        own = count * self._pace + sum(
            min(other._waiting * self._pace, max(0.0, now - other._turn) / SHARE + self._pace)
            for other in self._tickets
            if other._waiting and other.owner == owner
        )
        seconds = self._running * self._pace + own + self._before(owner, own)
        if seconds > left:
            retry = _retry(MARGIN * (seconds - left))
            raise QueueFullError(
                f"{self._waiting} {self.name} are waiting: {count} more may take {MARGIN * seconds:.1f} s, and this "
                f"request has {max(0.0, deadline - now):.1f} s left; try again in {retry} s",
                retry,
                "too_late",
            )

    def _before(self, owner: int, own: float) -> float:
        """Seconds that other owners will have while one has so many: as many, and what they have had less before."""
        waiting: dict[int, int] = {}
        for other in self._tickets:
            if other.owner != owner:
                waiting[other.owner] = waiting.get(other.owner, 0) + other._waiting
        mine = self._clocks.of(owner)
        return sum(
            min(items * self._pace, own + max(0.0, mine - self._clocks.of(other)) + self._pace)
            for other, items in waiting.items()
        )

    def _place(self, ticket: Ticket[Any]) -> float:
        """The smaller, the earlier it is a caller's turn among those of an owner."""
        return min(ticket._turn, ticket._deadline - MARGIN * ticket._waiting * self._pace)

    def _prepare_all(self) -> None:
        while (one := self._next_unprepared()) is not None:
            self._make_ready(*one)
            del one  # or a body would stay as long as there is no next

    def _next_unprepared(self) -> tuple[Ticket[R], int, T] | None:
        with self._changed:
            while True:
                if not self._unprepared:
                    if not self._open and not self._tickets:
                        return None
                    self._asked.wait()
                    continue
                ticket = min(self._unprepared, key=lambda one: (self._clocks.of(one.owner), self._place(one)))
                if time.monotonic() >= ticket._deadline:
                    self._end(ticket, self._late())
                    continue
                place, item = ticket._items.popleft()
                ticket._begin(time.monotonic())
                if not ticket._items:
                    del self._unprepared[ticket]
                return ticket, place, item

    def _make_ready(self, ticket: Ticket[R], place: int, item: T) -> None:
        began = time.monotonic()
        error: Exception | None = None
        try:
            prepared = self._prepare(item)  # type: ignore[misc]
        except Exception as raised:  # whatever it is, it is its caller's
            error = raised
        now = time.monotonic()
        with self._changed:
            ticket._turn += SHARE * (now - began) / self._workers
            self._clocks.charge(ticket.owner, (now - began) / self._workers)
            ticket.times.prepare.add(began, now)
            ticket._finish(now)
            if error is not None:
                self._fail(ReadyItem(ticket, place, None, now), error)
            elif not ticket.future.done():
                ticket._ready.append(ReadyItem(ticket, place, prepared, now))
                self._ready += 1
            self._changed.notify_all()
        if error is None:
            self._watcher.prepared(now - began)

    def _work(self) -> None:
        while batch := self._next():
            began = time.monotonic()
            for item in batch:
                self._watcher.waited(began - item.since)
            error: Exception | None = None
            try:
                results = self._run([item.prepared for item in batch])
                if len(results) != len(batch):
                    raise RuntimeError(f"{len(batch)} {self.name} were answered with {len(results)} results")
            except Exception as raised:  # callers learn of it; the thread goes on
                error = raised
            now = time.monotonic()
            with self._changed:
                self._running = 0
                self._spend(batch, began, now)
                if error is None:
                    self._measure(len(batch), now)
                    for item, result in zip(batch, results, strict=True):
                        self._settle(item, result)
                else:
                    for item in batch:
                        self._end(item.ticket, error)
                self._since = now
            if error is None:
                self._watcher.ran(len(batch), now - began)
            del batch, error

    def _spend(self, batch: list[ReadyItem], began: float, now: float) -> None:
        for ticket in {item.ticket for item in batch}:
            ticket.times.engine.add(began, now)
        for item in batch:
            item.ticket._finish(now)

    def _measure(self, count: int, now: float) -> None:
        pace = (now - self._since) / count
        weight = 1 - (1 - _RECENT) ** count if self._pace else 1.0
        self._pace += weight * (pace - self._pace)

    def _next(self) -> list[ReadyItem]:
        """The next batch; empty when there will be none."""
        with self._changed:
            while True:
                if not self._ready:
                    if not self._open and not self._tickets:
                        return []
                    self._changed.wait()
                    continue
                if self.max_wait and self._open and self._ready < self.max_batch:
                    first = min(ticket._ready[0].since for ticket in self._tickets if ticket._ready)
                    late = first + self.max_wait - time.monotonic()
                    if late > 0:
                        self._changed.wait(late)
                        continue
                if batch := self._taken():
                    return batch

    def _taken(self) -> list[ReadyItem]:
        """Ready items, whose turn it is; none where it is too late for all of them. The lock is held."""
        self._drop_late()
        if not self._ready:
            return []
        # Only as many as one run of the engine takes: the rest then goes with what comes in meanwhile
        count, _ = plan(min(self._ready, self.max_batch))[0]
        turns: dict[int, list[tuple[float, int, Ticket[R]]]] = {}
        for number, ticket in enumerate(self._tickets):
            if ticket._ready:
                heapq.heappush(turns.setdefault(ticket.owner, []), (self._place(ticket), number, ticket))
        batch, now = list[ReadyItem](), time.monotonic()
        while len(batch) < count:
            owner = min(turns, key=lambda one: (self._clocks.of(one), turns[one][0]))
            _, number, ticket = turns[owner][0]
            batch.append(ticket._ready.popleft())
            ticket._waiting -= 1
            ticket._begin(now)
            ticket._turn += SHARE * self._pace
            self._clocks.charge(owner, self._pace)
            if ticket._ready:
                heapq.heapreplace(turns[owner], (self._place(ticket), number, ticket))
            else:
                heapq.heappop(turns[owner])
            if not turns[owner]:
                del turns[owner]
        self._waiting -= count
        self._ready -= count
        self._running = count
        return batch

    def _drop_late(self) -> None:
        """Ends whom the engine could not answer in time; the last of them stays, as it may turn out to be faster."""
        now = time.monotonic()
        soon = now + self._pace * min(self._ready, self.max_batch)
        ready = [ticket for ticket in self._tickets if ticket._ready]
        left = len(ready)
        for ticket in ready:
            if now >= ticket._deadline or (soon > ticket._deadline and left > 1):
                self._end(ticket, self._late())
                left -= 1

    def _late(self) -> QueueFullError:
        retry = _retry(self._waiting * self._pace)
        return QueueFullError(
            f"the time for this request ran out while {self._waiting} {self.name} were waiting; try again in {retry} s",
            retry,
            "deadline",
        )

    def _settle(self, item: ReadyItem, result: R | InvariclipError) -> None:
        ticket = item.ticket
        if ticket.future.done():
            return
        ticket._results[item.place] = result
        ticket._missing -= 1
        if not ticket._missing:
            self._end(ticket)

    def _fail(self, item: ReadyItem, error: Exception) -> None:
        """An item could not be prepared; the lock is held."""
        ticket = item.ticket
        if not ticket._partial or not isinstance(error, InvariclipError):
            self._end(ticket, error)
        elif not ticket.future.done():
            ticket._waiting -= 1
            self._waiting -= 1
            self._settle(item, error)

    def _end(self, ticket: Ticket[Any], error: Exception | None = None) -> None:
        """Ends a ticket once, and lets go of what it brought; the lock is held."""
        if ticket.future.done():
            return
        if not ticket._busy:
            ticket.times.queue.add(ticket._idle_since, time.monotonic())
        self._waiting -= ticket._waiting
        self._ready -= len(ticket._ready)
        ticket._waiting = 0
        ticket._items.clear()
        ticket._ready.clear()
        self._tickets.pop(ticket, None)
        self._unprepared.pop(ticket, None)
        if error is None:
            ticket.future.set_result(ticket._results)
        else:
            ticket.future.set_exception(error)
        if not self._open:
            self._notify_all()

    def _notify_all(self) -> None:
        self._changed.notify_all()
        self._asked.notify_all()


def _retry(seconds: float) -> int:
    return min(LONGEST_RETRY, max(1, math.ceil(seconds)))
