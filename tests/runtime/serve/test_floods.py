"""A log that clients cannot fill, and that still says how much was left out."""

import logging
import re

from hypothesis import given
from hypothesis import strategies as st

from invariclip.serve.floods import KINDS, Flood, FloodFilter


def record(message, *arguments, name="uvicorn.error", error=None):
    return logging.LogRecord(name, logging.WARNING, __file__, 1, message, arguments, error)


@given(steps=st.lists(st.floats(0, 30), max_size=80), most=st.integers(1, 4))
def test_few_of_a_kind_are_written_and_all_are_counted(steps, most):
    now = 0.0
    flood = FloodFilter(Flood(most, 60.0, clock=lambda: now))
    written, told, times = 0, 0, []
    for step in steps:
        now += step
        one = record("bad %d", 7)
        if flood.filter(one):
            written += 1
            times.append(now)
            if found := re.fullmatch(r"bad 7(?: \(([\d,]+) more like it were left out\))?", one.getMessage()):
                told += int(found[1] or 0)
    for place, begun in enumerate(times):  # no minute holds more than two windows' share
        assert sum(begun <= one < begun + 60 for one in times[place:]) <= 2 * most
    pending = max(0, sum(flood._flood._seen[key][1] for key in flood._flood._seen) - most)
    assert written + told + pending == len(steps)


def test_kinds_are_told_apart_in_bounded_memory():
    flood = FloodFilter(Flood(1))
    assert flood.filter(record("a"))
    assert not flood.filter(record("a"))
    assert flood.filter(record("b"))
    assert flood.filter(record("a", name="asyncio"))
    for number in range(3 * KINDS):
        flood.filter(record(f"kind {number}"))
    assert len(flood._flood._seen) <= KINDS


def test_errors_that_a_client_was_given_a_number_of_are_all_written():
    flood = FloodFilter(Flood(1))
    error = (ValueError, ValueError("x"), None)
    assert all(flood.filter(record("error %s", "12", name="invariclip.serve", error=error)) for _ in range(5))
