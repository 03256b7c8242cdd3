"""A build shows that it lives, and can be stopped: steps heard on one thread, shown on another."""

import threading

import pytest

from invariclip.console import silent
from invariclip.export.tensorrt.builder import Steps, watched


def test_every_step_is_shown_and_the_answer_comes_back():
    steps, shown = Steps(), []

    def work():
        assert threading.current_thread() is not threading.main_thread()
        steps.started("timing")
        assert all(steps.stepped("timing") for _ in range(5))
        return "engine"

    def progress(items, *, total=None, desc=""):
        assert desc == "building x"
        for item in items:
            shown.append(item)
            yield item

    assert watched(work, steps, progress, "building x") == "engine"
    assert shown == ["timing"] * 5
    assert steps.phases == ["timing"]


def test_what_goes_wrong_in_the_build_is_raised_here():
    def work():
        raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        watched(work, Steps(), silent, "")


def test_an_interruption_stops_the_builder_at_its_next_step():
    steps, went_on = Steps(), []
    reached = threading.Event()

    def work():
        while steps.stepped("timing"):
            went_on.append(1)
            reached.set()
        return

    def progress(items, **_):
        reached.wait()
        raise KeyboardInterrupt
        yield from items

    with pytest.raises(KeyboardInterrupt):
        watched(work, steps, progress, "")
    assert went_on
    assert not any(thread.name == "tensorrt-build" for thread in threading.enumerate())
