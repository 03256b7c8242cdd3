"""Threads beside the event loop: of a caller who went away nothing stays but what a thread is at work on."""

import asyncio
import gc
import threading
import weakref

import pytest

from invariclip.serve.aside import Aside


class Body:
    """Something that can be watched."""


def test_results_and_errors_come_back():
    async def asked():
        aside = Aside()
        assert await asyncio.gather(*(aside(pow, 2, power) for power in range(20))) == [2**p for p in range(20)]
        with pytest.raises(ZeroDivisionError):
            await aside(divmod, 1, 0)
        assert await aside(threading.current_thread) is not threading.current_thread()

    asyncio.run(asked())


def test_callers_who_leave_take_with_them_what_they_brought():
    gate, begun = threading.Event(), threading.Event()

    def work(body):
        begun.set()
        assert gate.wait(20)
        return body is not None

    async def asked():
        aside = Aside(threads=1)
        bodies = [Body() for _ in range(4)]
        seen = [weakref.ref(body) for body in bodies]
        calls = [asyncio.ensure_future(aside(work, body)) for body in bodies]
        while not begun.is_set():
            await asyncio.sleep(0.001)
        for call in calls[:3]:
            call.cancel()
        await asyncio.wait(calls[:3])
        del bodies, call
        calls = calls[3:]
        gc.collect()
        assert [body() is None for body in seen] == [False, True, True, False]  # at work; gone; still asked for
        assert not calls[0].done()
        gate.set()
        assert await calls[0]

    asyncio.run(asked())
