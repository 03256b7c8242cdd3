"""A few threads for what would hold up the event loop: large bodies taken apart, large answers written."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 2


class Aside:
    """Calls functions in threads; for one event loop.

    No more calls are handed over than there are threads. Of a caller who stops waiting, nothing stays in memory but
    what a thread is at work on: an executor's own queue would keep the arguments.
    """

    def __init__(self, threads: int = THREADS) -> None:
        """Starts no thread yet.

        Args:
            threads: How many calls run at a time.
        """
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="aside")
        self._free = asyncio.Semaphore(threads)

    async def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What the function gives or raises."""
        loop = asyncio.get_running_loop()

        def done(_: object) -> None:
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(self._free.release)

        await self._free.acquire()
        try:
            future = self._pool.submit(function, *args, **kwargs)
        except BaseException:
            self._free.release()
            raise
        future.add_done_callback(done)
        return await asyncio.wrap_future(future)
