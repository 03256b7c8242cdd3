"""Class sets of requests: embedded once however many ask, kept while they are asked for, let go when nobody waits."""

import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from invariclip.errors import InputError
from invariclip.serve.batcher import BatcherStoppedError, QueueFullError
from invariclip.serve.classes import ClassSets
from invariclip.serve.turns import Turns
from invariclip.view import TEXTS_AT_ONCE

TEMPLATES = ("a photo of a {}.",)


class Slow:
    """A model whose classes are embedded when the gate is open."""

    def __init__(self, model):
        self.model, self.gate, self.begun, self.asked = model, threading.Event(), threading.Semaphore(0), []

    def with_classes(self, classes, templates):
        self.asked.append(classes)
        self.begun.release()
        assert self.gate.wait(20)
        return self.model.with_classes(classes, templates)


@pytest.fixture
def slow(model):
    return Slow(model)


def test_the_same_set_asked_at_once_is_embedded_once(slow, model, images):
    sets = ClassSets(slow, Turns(), limit=4, pending=4)
    asked = [sets.ask(("sun", "moon"), TEMPLATES) for _ in range(6)]
    slow.gate.set()
    made = [one.future.result(20) for one in asked]
    assert slow.asked == [("sun", "moon")]
    assert all(one is made[0] for one in made)
    np.testing.assert_array_equal(
        made[0].model.probabilities(images), model.with_classes(["sun", "moon"]).probabilities(images)
    )
    for one in asked:
        one.leave()
    assert sets.ask(("sun", "moon"), TEMPLATES).future.result(0) is made[0]
    other = sets.ask(("sun", "moon"), ("a sketch of a {}.",)).future.result(20)
    assert other is not made[0]
    assert other.model.templates == ("a sketch of a {}.",)
    sets.close()


def test_the_set_asked_for_least_recently_goes_first(slow, until):
    slow.gate.set()
    sets = ClassSets(slow, Turns(), limit=2, pending=4)
    for name in ("a", "b", "a", "c", "a", "b"):
        sets.ask((name,), TEMPLATES).future.result(20)
    assert [names for (names,) in slow.asked] == ["a", "b", "c", "b"]
    until(lambda: sets.kept == 2)
    assert sets.embedded == 4
    sets.close()


class Watched(Turns):
    """Turns that are counted, and begin when the gate is open."""

    def __init__(self):
        super().__init__()
        self.gate, self.begun, self.rows = threading.Event(), threading.Semaphore(0), []

    @contextmanager
    def take(self, rows, owner=0):
        with super().take(rows, owner):
            self.rows.append(rows)
            self.begun.release()
            assert self.gate.wait(20)
            yield


def names(count, what):
    return tuple(f"{what} {number}" for number in range(count))


def test_a_small_set_does_not_wait_for_a_large_one(model, images, until):
    turns = Watched()
    sets = ClassSets(model, turns, limit=4, pending=4)
    large = sets.ask(names(5 * TEXTS_AT_ONCE, "large"), TEMPLATES)
    assert turns.begun.acquire(timeout=20)
    small = sets.ask(names(3, "small"), TEMPLATES)
    until(lambda: len(turns._line._waiting) == 1)
    turns.gate.set()
    assert small.future.result(20).model.classes == names(3, "small")
    made = large.future.result(20).model
    assert turns.rows == [TEXTS_AT_ONCE, 3, *4 * [TEXTS_AT_ONCE]]
    np.testing.assert_allclose(
        made.probabilities(images), model.with_classes(made.classes, TEMPLATES).probabilities(images), atol=1e-6
    )
    assert turns.pace > 0
    sets.close()


def test_a_set_that_nobody_waits_for_is_embedded_no_further(model, until):
    turns = Watched()
    sets = ClassSets(model, turns, limit=4, pending=2)
    gone = sets.ask(names(3 * TEXTS_AT_ONCE, "gone"), TEMPLATES)
    assert turns.begun.acquire(timeout=20)
    left, stays = (sets.ask(names(2, "shared"), TEMPLATES) for _ in range(2))
    with pytest.raises(QueueFullError, match="2 class sets are being embedded; try again in 5 s"):
        sets.ask(("d",), TEMPLATES)
    gone.leave()
    left.leave()
    with pytest.raises(BatcherStoppedError, match="nobody waits"):
        gone.future.result(0)
    with pytest.raises(QueueFullError):  # its thread is still at its turn
        sets.ask(("d",), TEMPLATES)
    turns.gate.set()
    assert stays.future.result(20).model.classes == names(2, "shared")
    until(lambda: sets._threads == 0)
    assert turns.rows == [TEXTS_AT_ONCE, 2]
    stays.leave()
    assert sets.kept == 1
    sets.close()


def test_a_set_that_would_not_be_embedded_in_time_is_refused_at_once(slow):
    turns = Turns()
    turns.pace = 1.0  # seconds a prompt
    sets = ClassSets(slow, turns, limit=4, pending=4)
    alone = sets.ask(names(1000, "large"), TEMPLATES, deadline=time.monotonic() + 5)  # nothing else: it is tried
    with pytest.raises(
        QueueFullError, match=r"6 more prompts may take 15\.0 s, and this request has .* left"
    ) as refused:
        sets.ask(names(6, "more"), TEMPLATES, deadline=time.monotonic() + 10)
    assert refused.value.retry_after in (5, 6)
    small = sets.ask(names(3, "few"), TEMPLATES, deadline=time.monotonic() + 10)
    slow.gate.set()
    assert alone.future.result(20)
    assert small.future.result(20)
    sets.close()


def test_errors_are_told_and_not_kept(unsure_model):
    sets = ClassSets(unsure_model, Turns(), limit=4, pending=4)
    for _ in range(2):
        with pytest.raises(InputError, match="trained beside the prompts"):
            sets.ask(("a",), ("a drawing of a {}",)).future.result(20)
    assert sets.kept == 0
    assert sets.ask(("a",), TEMPLATES).future.result(20).model.classes == ("a",)
    sets.close()


def test_cut_prompts_are_told_to_whoever_asks(model, unsure_model):
    long = "word " * 30
    for one in (model, unsure_model):  # learned templates leave a name less room
        sets = ClassSets(one, Turns(), limit=4, pending=4)
        assert sets.ask(("short",), TEMPLATES).future.result(20).warnings == ()
        for _ in range(2):
            told = sets.ask((long, "short"), TEMPLATES).future.result(20).warnings
            assert told
            assert all("cut to context_length 16" in line for line in told)
        sets.close()


def test_closing_tells_who_waits(slow):
    sets = ClassSets(slow, Turns(), limit=4, pending=4)
    sets.ask(("a",), TEMPLATES)
    assert slow.begun.acquire(timeout=20)
    waiting = sets.ask(("b",), TEMPLATES)
    sets.close()
    slow.gate.set()
    with pytest.raises(BatcherStoppedError, match="ask again"):
        waiting.future.result(0)
    with pytest.raises(BatcherStoppedError, match="no more work"):
        sets.ask(("c",), TEMPLATES)
