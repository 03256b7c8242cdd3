"""Class sets that requests bring: embedded once, off the event loop, and kept while they are asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from invariclip.preprocessing.tokenizer import hearing_cuts
from invariclip.serve.batcher import BatcherStoppedError, QueueFullError

if TYPE_CHECKING:
    from invariclip.model import Model

Key: TypeAlias = "tuple[tuple[str, ...], tuple[str, ...]]"
RETRY = 5
"""Seconds that a caller is told to wait when too many sets are being embedded."""


class ClassSet(NamedTuple):
    """A model that answers with other classes, and what was said of their prompts.

    Attributes:
        model: See `Model.with_classes`.
        warnings: Of prompts that were cut, a line each.
    """

    model: Model
    warnings: tuple[str, ...]


@dataclass(eq=False)
class _Entry:
    key: Key
    future: Future[ClassSet] = field(default_factory=Future)
    askers: int = 0
    begun: bool = False


class Asked:
    """One caller's wait for a class set; `leave` when the answer is there or nobody waits for it any more."""

    def __init__(self, sets: ClassSets, entry: _Entry) -> None:
        self.future = entry.future
        self._sets, self._entry = sets, entry

    def leave(self) -> None:
        """Takes back the question; a set that nobody waits for and that was not begun is not embedded."""
        self._sets._left(self._entry)


class ClassSets:
    """The least recently asked set goes first. Safe to share between threads; one thread of its own embeds."""

    def __init__(self, model: Model, *, limit: int, pending: int) -> None:
        """Starts the thread.

        Args:
            model: Whose towers answer.
            limit: Sets that are kept.
            pending: Sets that may wait to be embedded.
        """
        self.limit, self.pending = limit, pending
        self.embedded = 0
        self._model = model
        self._changed = threading.Condition()
        self._kept: OrderedDict[Key, _Entry] = OrderedDict()
        self._queue: deque[_Entry] = deque()
        self._open = True
        threading.Thread(target=self._work, name="class-sets", daemon=True).start()

    def ask(self, classes: tuple[str, ...], templates: tuple[str, ...]) -> Asked:
        """A set that is kept, that is being embedded for somebody else, or that now will be.

        Raises:
            QueueFullError: Too many wait already.
            StoppedError: The server stops.
        """
        key = (classes, templates)
        with self._changed:
            entry = self._kept.get(key)
            if entry is None:
                if not self._open:
                    raise BatcherStoppedError("the server is stopping and takes no more work")
                if len(self._queue) >= self.pending:
                    raise QueueFullError(
                        f"{len(self._queue)} class sets are waiting to be embedded; try again in {RETRY} s", RETRY
                    )
                entry = _Entry(key)
                entry.future.set_running_or_notify_cancel()
                self._kept[key] = entry
                self._queue.append(entry)
                self._changed.notify()
            self._kept.move_to_end(key)
            entry.askers += 1
            return Asked(self, entry)

    @property
    def kept(self) -> int:
        """Sets that are kept now."""
        return len(self._kept)

    def close(self) -> None:
        """Embeds no more sets."""
        with self._changed:
            self._open = False
            left, self._queue = list(self._queue), deque()
            self._changed.notify()
        for entry in left:
            entry.future.set_exception(BatcherStoppedError("the server stopped before this was answered; ask again"))

    def _left(self, entry: _Entry) -> None:
        with self._changed:
            entry.askers -= 1
            if entry.askers or entry.begun or entry not in self._queue:
                return
            self._queue.remove(entry)
            self._kept.pop(entry.key, None)
        entry.future.set_exception(BatcherStoppedError("nobody waits for these classes any more"))

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and self._open:
                    self._changed.wait()
                if not self._open:
                    return
                entry = self._queue.popleft()
                entry.begun = True
            try:
                with hearing_cuts() as heard:
                    model = self._model.with_classes(*entry.key)
            except Exception as error:  # callers learn of it; the thread goes on
                with self._changed:
                    self._kept.pop(entry.key, None)
                entry.future.set_exception(error)
                continue
            with self._changed:
                self.embedded += 1
                self._forget()
            entry.future.set_result(ClassSet(model, tuple(heard.values())))

    def _forget(self) -> None:
        """Drops the sets that were asked for least recently; one that is still being embedded stays."""
        surplus = len(self._kept) - self.limit
        for key in [key for key, entry in self._kept.items() if entry.future.done()][: max(0, surplus)]:
            del self._kept[key]
