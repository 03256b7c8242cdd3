"""Class sets of requests: embedded once however many ask, kept while they are asked for, let go when nobody waits."""

import threading

import numpy as np
import pytest

from invariclip.errors import InputError
from invariclip.serve.batcher import BatcherStoppedError, QueueFullError
from invariclip.serve.classes import ClassSets

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
    sets = ClassSets(slow, limit=4, pending=4)
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
    sets = ClassSets(slow, limit=2, pending=4)
    for name in ("a", "b", "a", "c", "a", "b"):
        sets.ask((name,), TEMPLATES).future.result(20)
    assert [names for (names,) in slow.asked] == ["a", "b", "c", "b"]
    until(lambda: sets.kept == 2)
    assert sets.embedded == 4
    sets.close()


def test_a_set_that_nobody_waits_for_is_not_embedded(slow):
    sets = ClassSets(slow, limit=4, pending=2)
    first = sets.ask(("a",), TEMPLATES)
    assert slow.begun.acquire(timeout=20)
    gone, shared, stays = (sets.ask((name,), TEMPLATES) for name in ("b", "c", "c"))
    with pytest.raises(QueueFullError, match="2 class sets are waiting"):
        sets.ask(("d",), TEMPLATES)
    first.leave()  # begun already: it is kept for the next one
    gone.leave()
    shared.leave()
    with pytest.raises(BatcherStoppedError):
        gone.future.result(0)
    slow.gate.set()
    assert stays.future.result(20).model.classes == ("c",)
    assert first.future.result(20).model.classes == ("a",)
    assert slow.asked == [("a",), ("c",)]
    sets.close()


def test_errors_are_told_and_not_kept(unsure_model):
    sets = ClassSets(unsure_model, limit=4, pending=4)
    for _ in range(2):
        with pytest.raises(InputError, match="trained beside the prompts"):
            sets.ask(("a",), ("a drawing of a {}",)).future.result(20)
    assert sets.kept == 0
    assert sets.ask(("a",), TEMPLATES).future.result(20).model.classes == ("a",)
    sets.close()


def test_cut_prompts_are_told_to_whoever_asks(model, unsure_model):
    long = "word " * 30
    for one in (model, unsure_model):  # learned templates leave a name less room
        sets = ClassSets(one, limit=4, pending=4)
        assert sets.ask(("short",), TEMPLATES).future.result(20).warnings == ()
        for _ in range(2):
            told = sets.ask((long, "short"), TEMPLATES).future.result(20).warnings
            assert told
            assert all("cut to context_length 16" in line for line in told)
        sets.close()


def test_closing_tells_who_waits(slow):
    sets = ClassSets(slow, limit=4, pending=4)
    sets.ask(("a",), TEMPLATES)
    assert slow.begun.acquire(timeout=20)
    waiting = sets.ask(("b",), TEMPLATES)
    sets.close()
    slow.gate.set()
    with pytest.raises(BatcherStoppedError, match="ask again"):
        waiting.future.result(0)
    with pytest.raises(BatcherStoppedError, match="no more work"):
        sets.ask(("c",), TEMPLATES)
