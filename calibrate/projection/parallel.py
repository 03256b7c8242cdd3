"""Independent eigenproblems side by side: one BLAS thread each, as many at once as there are processors.

LAPACK's eigensolver gains little from a second thread and loses much where the processors are busy: its threads wait
for each other in spinning loops (1280 dimensions, two threads, other programs running: 4 s; one thread: 0.7 s).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeVar

from threadpoolctl import threadpool_limits

from invariclip.threads import available_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

S = TypeVar("S")
T = TypeVar("T")

_MATRICES = 20
"""D×D matrices that one eigenproblem, with its moments and scores, holds at most."""
_BYTES = 2 << 30
"""Of all workers together; a width beyond it leaves one worker with every BLAS thread."""
_NARROW = 2048
"""Up to this width one BLAS thread solves an eigenproblem nearly as fast as several."""


def few_blas_threads(width: int) -> AbstractContextManager[object]:
    """One BLAS thread while eigenproblems of a width are solved one after the other, if more would gain little.

    Args:
        width: D.
    """
    return threadpool_limits(1, user_api="blas") if width <= _NARROW else nullcontext()


def workers_for(width: int, count: int) -> int:
    """How many eigenproblems of a width run at once, at least one.

    Args:
        width: D.
        count: How many there are.
    """
    return max(1, min(available_threads(), count, _BYTES // (_MATRICES * 8 * width**2)))


def side_by_side(work: Callable[[S], T], items: Sequence[S], width: int) -> Iterator[T]:
    """What `work` makes of every item, in order; BLAS threads are shared out over the workers meanwhile.

    Args:
        work: Called from several threads at once.
        items: What to do.
        width: D of the eigenproblems, which bounds how many are held at once.
    """
    workers = workers_for(width, len(items))
    with (
        threadpool_limits(max(1, available_threads() // workers), user_api="blas"),
        ThreadPoolExecutor(workers) as pool,
    ):
        yield from pool.map(work, items)
