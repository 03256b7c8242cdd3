"""Slots shared by threads: one engine, a bounded number of contexts, each call has one to itself.

A set of shapes that comes for the second time gets a fixed slot; one that came once does not, because texts come in
many lengths and a context is not small.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from invariclip.backends.tensorrt.slot import Shapes, Slot

DEFAULT_SLOTS = 12
"""Contexts at most. Seven batch sizes of images fit with room for calls at the same time."""
_REMEMBERED = 1024


class Pool:
    """Idle slots by what they answer; those that were used last stay longest."""

    def __init__(self, make: Callable[[bool], Slot], limit: int = DEFAULT_SLOTS) -> None:
        """Makes nothing yet.

        Args:
            make: Makes a slot, fixed if True.
            limit: Slots at most, at least 1.
        """
        self._make, self._limit = make, max(1, limit)
        self._lock = threading.Condition()
        self._fixed: OrderedDict[Shapes, list[Slot]] = OrderedDict()
        self._free: list[Slot] = []
        self._seen: OrderedDict[Shapes, int] = OrderedDict()
        self._made = 0

    @contextmanager
    def slot(self, shapes: Shapes) -> Iterator[Slot]:
        """A slot for these shapes; waits where all are busy. One that failed is not used again.

        Args:
            shapes: See `slot.shapes_of`.
        """
        with self._lock:
            fixed = self._is_familiar(shapes)
            slot = self._take(shapes, fixed=fixed)
        if slot is None:
            try:
                slot = self._make(fixed)
            except BaseException:
                self._gone()
                raise
        try:
            yield slot
        except BaseException:
            self._gone()
            slot.close()
            raise
        with self._lock:
            if fixed:
                self._fixed.setdefault(shapes, []).append(slot)
                self._fixed.move_to_end(shapes)
            else:
                self._free.append(slot)
            self._lock.notify()

    def close(self) -> None:
        """Closes what is idle."""
        with self._lock:
            idle = [*self._free, *(slot for slots in self._fixed.values() for slot in slots)]
            self._free, self._fixed = [], OrderedDict()
            self._made -= len(idle)
            self._lock.notify_all()
        for slot in idle:
            slot.close()

    def _is_familiar(self, shapes: Shapes) -> bool:
        count = self._seen.pop(shapes, 0)
        self._seen[shapes] = count + 1
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return count > 0

    def _take(self, shapes: Shapes, *, fixed: bool) -> Slot | None:
        """An idle slot; None where a new one may be made, and then it is counted already."""
        while True:
            idle = self._fixed.get(shapes) if fixed else self._free
            if idle:
                return idle.pop()
            if self._made < self._limit or self._evict():
                self._made += 1
                return None
            self._lock.wait()

    def _evict(self) -> bool:
        """Closes the idle slot that was used longest ago; False where none is idle."""
        shapes = next((shapes for shapes, slots in self._fixed.items() if slots), None)
        victim = self._fixed[shapes].pop(0) if shapes is not None else self._free.pop() if self._free else None
        if victim is None:
            return False
        if shapes is not None and not self._fixed[shapes]:
            del self._fixed[shapes]
        victim.close()
        self._made -= 1
        return True

    def _gone(self) -> None:
        with self._lock:
            self._made -= 1
            self._lock.notify()
