"""Class sets that requests bring: embedded once, off the event loop, and kept while they are asked for."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from invariclip.preprocessing.tokenizer import hearing_cuts
from invariclip.serve.batcher import LONGEST_RETRY, MARGIN, BatcherStoppedError, QueueFullError
from invariclip.serve.fairness import crowds_out
from invariclip.text_tower import taking_turns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from invariclip.model import Model
    from invariclip.serve.turns import Turns

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
    left: int  # prompts, at most, that are not embedded yet
    owner: int  # who asked for it first
    future: Future[ClassSet] = field(default_factory=Future)
    askers: int = 0


class Asked:
    """One caller's wait for a class set; `leave` when the answer is there or nobody waits for it any more."""

    def __init__(self, sets: ClassSets, entry: _Entry) -> None:
        self.future = entry.future
        self._sets, self._entry = sets, entry

    def leave(self) -> None:
        """Takes back the question; a set that nobody waits for is embedded no further."""
        self._sets._left(self._entry)


class ClassSets:
    """The least recently asked set goes first. Safe to share between threads.

    Every set is embedded in a thread of its own, by turns with the others and with texts: a small one need not wait for
    a large one. What was embedded of a set that nobody waited for any more is found again in the model's text cache.
    """

    def __init__(self, model: Model, turns: Turns, *, limit: int, pending: int, owners: int = 1) -> None:
        """Starts nothing yet.

        Args:
            model: Whose towers answer.
            turns: Of the text tower.
            limit: Sets that are kept.
            pending: Sets that may be embedded at a time.
            owners: How many owners may ask; of several none has all sets that may be embedded.
        """
        self.limit, self.pending, self._owners = limit, pending, owners
        self.embedded = 0
        self._model, self._turns = model, turns
        self._changed = threading.Lock()
        self._kept: OrderedDict[Key, _Entry] = OrderedDict()
        self._begun: set[_Entry] = set()
        self._threads = 0  # also those whose set nobody waits for any more, until their next turn
        self._open = True

    def ask(
        self, classes: tuple[str, ...], templates: tuple[str, ...], *, deadline: float = math.inf, owner: int = 0
    ) -> Asked:
        """A set that is kept, that is being embedded for somebody else, or that now will be.

        Args:
            classes: Names.
            templates: Prompts.
            deadline: When the answer is worth nothing any more, by `time.monotonic`.
            owner: Who asks: the number of an API key, or 0.

        Raises:
            QueueFullError: Too many are being embedded already, or there is no time for one more.
            BatcherStoppedError: The server stops.
        """
        key = (classes, templates)
        with self._changed:
            entry = self._kept.get(key)
            if entry is None:
                if not self._open:
                    raise BatcherStoppedError("the server is stopping and takes no more work")
                entry = _Entry(key, len(classes) * len(templates), owner)
                self._require_room(entry, deadline)
                entry.future.set_running_or_notify_cancel()
                self._kept[key] = entry
                self._begun.add(entry)
                self._threads += 1
                threading.Thread(target=self._embed, args=(entry,), name="class-set", daemon=True).start()
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
            for entry in list(self._begun):
                self._end(entry, BatcherStoppedError("the server stopped before this was answered; ask again"))

    def _require_room(self, new: _Entry, deadline: float) -> None:
        """Refuses what would not be embedded in time; while no other set is embedded, everything is tried.

        Raises:
            QueueFullError: There is no room or no time.
        """
        if self._threads >= self.pending:
            raise QueueFullError(f"{self._threads} class sets are being embedded; try again in {RETRY} s", RETRY)
        left_of: dict[int, list[int]] = {new.owner: []}
        for entry in self._begun:
            left_of.setdefault(entry.owner, []).append(entry.left)
        own = left_of.pop(new.owner)
        if self._owners > 1 and crowds_out(len(own), 1, self._threads, self.pending):
            raise QueueFullError(
                f"{len(own)} class sets of this API key are being embedded, and what is left is kept for other keys; "
                f"try again in {RETRY} s",
                RETRY,
            )
        # All sets take turns, so no other one is ahead with more prompts than this one has; likewise all owners
        prompts = new.left
        ours = prompts + sum(min(left, prompts) for left in own)
        ahead = sum(min(sum(theirs), ours) for theirs in left_of.values())
        seconds, left = MARGIN * (ours + ahead) * self._turns.pace, deadline - time.monotonic()
        if self._begun and seconds > left:
            retry = min(LONGEST_RETRY, max(1, math.ceil(seconds - left)))
            raise QueueFullError(
                f"{len(self._begun)} class sets are being embedded: {prompts:,} more prompts may take {seconds:.1f} s, "
                f"and this request has {max(0.0, left):.1f} s left; try again in {retry} s",
                retry,
                "too_late",
            )

    def _left(self, entry: _Entry) -> None:
        with self._changed:
            entry.askers -= 1
            if not entry.askers:
                self._end(entry, BatcherStoppedError("nobody waits for these classes any more"))

    def _end(self, entry: _Entry, result: ClassSet | Exception) -> None:
        """Ends the embedding of a set once; the lock is held."""
        if entry.future.done():
            return
        self._begun.discard(entry)
        if isinstance(result, ClassSet):
            entry.future.set_result(result)
            self.embedded += 1
            self._forget()
        else:
            self._kept.pop(entry.key, None)
            entry.future.set_exception(result)

    def _embed(self, entry: _Entry) -> None:
        @contextmanager
        def turn(prompts: int) -> Iterator[None]:
            with self._turns.take(prompts, entry.owner):
                if entry.future.done():
                    raise BatcherStoppedError("nobody waits for these classes any more")
                yield
            entry.left = max(0, entry.left - prompts)

        result: ClassSet | Exception
        try:
            with hearing_cuts() as heard, taking_turns(turn):
                result = ClassSet(self._model.with_classes(*entry.key), tuple(heard.values()))
        except Exception as error:  # callers learn of it
            result = error
        with self._changed:
            self._threads -= 1
            self._end(entry, result)

    def _forget(self) -> None:
        """Drops the sets that were asked for least recently; one that is still being embedded stays."""
        surplus = len(self._kept) - self.limit
        for key in [key for key, entry in self._kept.items() if entry.future.done()][: max(0, surplus)]:
            del self._kept[key]
