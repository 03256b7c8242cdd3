"""The queue: everybody gets their own results, in batches as large as the engine's being busy makes them."""

import gc
import threading
import time
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.errors import InputError
from invariclip.serve.batcher import Batcher, BatcherStoppedError, QueueFullError


class Engine:
    """Doubles numbers; keeps what it was given, and waits at the gate."""

    def __init__(self, open_=True):
        self.gate, self.batches, self.begun = threading.Event(), [], threading.Semaphore(0)
        if open_:
            self.gate.set()

    def __call__(self, items):
        self.batches.append(list(items))
        self.begun.release()
        assert self.gate.wait(20)
        return [2 * item for item in items]


def positive(item):
    if item < 0:
        raise InputError(f"{item} is below 0")
    return item


def batcher(engine, **options):
    return Batcher(positive, engine, **{"max_batch": 4, "queue": 100, **options})


@settings(max_examples=40, deadline=None)
@given(
    asked=st.lists(st.lists(st.integers(-9, 20), max_size=9), max_size=12), max_batch=st.integers(1, 9),
    workers=st.integers(1, 3),
)  # fmt: skip
def test_items_that_fail_have_their_errors_in_their_places_where_the_caller_allows_it(asked, max_batch, workers):
    queue = batcher(Engine(), max_batch=max_batch, workers=workers, queue=1000)
    tickets = [queue.submit(items, partial=True) for items in asked]
    for items, ticket in zip(asked, tickets, strict=True):
        told = ticket.future.result(20)
        assert [one if isinstance(one, int) else str(one) for one in told] == [
            2 * item if item >= 0 else f"{item} is below 0" for item in items
        ]
    assert queue.close(20)
    assert (queue.waiting, queue.ready) == (0, 0)


def test_what_nobody_foresaw_fails_all_items_also_where_some_may_fail():
    queue = Batcher(lambda item: 1 // item, Engine(), max_batch=4, queue=9)
    with pytest.raises(ZeroDivisionError):
        queue.submit([1, 0, 1], partial=True).future.result(20)
    assert queue.submit([1]).future.result(20) == [2]
    assert queue.close(20)
    assert queue.waiting == 0


@settings(max_examples=40, deadline=None)
@given(
    asked=st.lists(st.lists(st.integers(-3, 50), max_size=9), max_size=12),
    max_batch=st.integers(1, 9), workers=st.integers(1, 3),
)  # fmt: skip
def test_everybody_gets_their_own_results_in_order(asked, max_batch, workers):
    engine = Engine()
    queue = batcher(engine, max_batch=max_batch, workers=workers, queue=1000)
    tickets = [queue.submit(items) for items in asked]
    for items, ticket in zip(asked, tickets, strict=True):
        if min(items, default=0) < 0:
            with pytest.raises(InputError, match="below 0"):
                ticket.future.result(20)
        else:
            assert ticket.future.result(20) == [2 * item for item in items]
    assert queue.close(20)
    assert queue.waiting == 0
    assert all(1 <= len(batch) <= max_batch for batch in engine.batches)


def test_what_waits_while_the_engine_works_goes_together(until):
    engine = Engine(open_=False)
    queue = batcher(engine, max_batch=8)
    first = queue.submit([1])
    assert engine.begun.acquire(timeout=20)
    others = [queue.submit([number]) for number in range(2, 13)]
    until(lambda: queue.ready == 11)
    engine.gate.set()
    assert first.future.result(20) == [2]
    assert [other.future.result(20) for other in others] == [[2 * number] for number in range(2, 13)]
    # 11 wait: 8 at once; of the 3 that are left a run of 4 is filled up, see batching.plan
    assert [len(batch) for batch in engine.batches] == [1, 8, 3]
    queue.close()


def test_an_idle_engine_answers_one_at_once_unless_told_to_wait(until):
    engine = Engine()
    patient = batcher(engine, max_wait=30.0, max_batch=2)
    one = patient.submit([1])
    until(lambda: patient.ready)
    assert not engine.batches  # it waits for company, half a minute if need be
    other = patient.submit([5])
    assert one.future.result(20) == [2]
    assert other.future.result(20) == [10]
    assert engine.batches == [[1, 5]]
    late = patient.submit([7])
    assert patient.close(20)  # nobody is to come any more
    assert late.future.result(0) == [14]
    at_once = batcher(engine)
    assert at_once.submit([3]).future.result(20) == [6]
    at_once.close()


def test_a_full_queue_takes_all_of_a_request_or_nothing():
    engine = Engine(open_=False)
    queue = batcher(engine, queue=5)
    running = queue.submit([0])
    assert engine.begun.acquire(timeout=20)
    assert queue.waiting == 0
    taken = queue.submit([1, 2, 3])
    with pytest.raises(QueueFullError, match="room for 5: no room for 3 more") as refused:
        queue.submit([4, 5, 6])
    assert refused.value.retry_after >= 1
    last = queue.submit([4, 5])
    assert queue.waiting == 5
    engine.gate.set()
    assert [t.future.result(20) for t in (running, taken, last)] == [[0], [2, 4, 6], [8, 10]]
    assert queue.waiting == 0
    queue.close()


def test_dropped_work_is_not_done(until):
    engine = Engine(open_=False)
    queue = batcher(engine, max_batch=2)
    running = queue.submit([1])
    assert engine.begun.acquire(timeout=20)
    gone, stays = queue.submit([10, 11, 12]), queue.submit([20])
    until(lambda: queue.ready == 4)
    gone.drop()
    assert queue.waiting == 1
    with pytest.raises(BatcherStoppedError):
        gone.future.result(0)
    engine.gate.set()
    assert running.future.result(20) == [2]
    assert stays.future.result(20) == [40]
    assert engine.batches == [[1], [20]]
    stays.drop()  # too late to matter
    assert stays.future.result(0) == [40]
    queue.close()


def test_a_failing_batch_is_told_and_the_next_one_runs():
    def run(items):
        if 13 in items:
            raise ZeroDivisionError("thirteen")
        return items[:-1] if 7 in items else items

    queue = batcher(run, max_batch=1)
    bad, short, good = queue.submit([13]), queue.submit([7]), queue.submit([1])
    with pytest.raises(ZeroDivisionError):
        bad.future.result(20)
    with pytest.raises(RuntimeError, match="1 items were answered with 0"):
        short.future.result(20)
    assert good.future.result(20) == [1]
    queue.close()


def test_closing_answers_what_waits_or_says_that_it_does_not():
    engine = Engine(open_=False)
    queue = batcher(engine, max_batch=1)
    first, second = queue.submit([1]), queue.submit([2])
    assert engine.begun.acquire(timeout=20)
    assert not queue.close(0)
    for ticket in (first, second):
        with pytest.raises(BatcherStoppedError, match="ask again"):
            ticket.future.result(0)
    with pytest.raises(BatcherStoppedError, match="no more work"):
        queue.submit([3])
    assert queue.waiting == 0
    engine.gate.set()
    queue._thread.join(20)
    assert not queue._thread.is_alive()


def test_a_request_of_many_items_is_overtaken_by_one_of_few(until):
    engine = Engine(open_=False)
    queue = batcher(engine, max_batch=2)
    queue.expect(1.0)  # seconds an item
    running = queue.submit([1])
    assert engine.begun.acquire(timeout=20)
    many, few = queue.submit(list(range(10, 18))), queue.submit([20, 21])
    until(lambda: queue.ready == 10)
    engine.gate.set()
    assert few.future.result(20) == [40, 42]
    assert many.future.result(20) == [2 * number for number in range(10, 18)]
    assert running.future.result(20) == [2]
    assert [sorted(batch) for batch in engine.batches[1:3]] == [[10, 20], [11, 21]]
    queue.close()


def test_whoever_waits_longest_is_not_overtaken_for_ever(until):
    """A caller's turn is later by what was spent on them, not by what others bring."""
    engine = Engine(open_=False)
    queue = batcher(engine, max_batch=1)
    queue.expect(1e-6)
    running, many = queue.submit([1]), queue.submit([10, 11, 12])
    assert engine.begun.acquire(timeout=20)
    time.sleep(0.01)  # far more than those three take
    others = [queue.submit([number]) for number in range(20, 25)]
    until(lambda: queue.ready == 8)
    engine.gate.set()
    assert all(ticket.future.result(20) for ticket in (running, many, *others))
    assert [batch[0] for batch in engine.batches[1:4]] == [10, 11, 12]
    queue.close()


def test_whoever_has_just_enough_time_left_is_not_overtaken(until):
    engine = Engine(open_=False)
    queue = batcher(engine, max_batch=1)
    queue.expect(1.0)
    running, now = queue.submit([1]), time.monotonic()
    assert engine.begun.acquire(timeout=20)
    many = queue.submit([10, 11, 12], deadline=now + 60)
    few = queue.submit([20], deadline=now + 60)
    many._deadline = now + 1.25 * 2  # as if it had waited: time for two items
    until(lambda: queue.ready == 4)
    queue._measure = lambda *_: None  # a second an item stays what is expected
    queue._drop_late = lambda: None
    engine.gate.set()
    assert few.future.result(20) == [40]
    assert many.future.result(20) == [20, 22, 24]
    assert running.future.result(20) == [2]
    assert engine.batches == [[1], [10], [11], [20], [12]]
    queue.close()


def test_heavy_items_of_one_caller_do_not_hold_up_the_preparing_of_others(until):
    gate, prepared = threading.Event(), []

    def prepare(item):
        if item >= 10:
            assert gate.wait(20)
            time.sleep(0.002)
        prepared.append(item)
        return item

    queue = Batcher(prepare, Engine(), max_batch=4, queue=100)
    heavy = queue.submit(list(range(10, 20)))
    light = queue.submit([1])
    gate.set()
    assert light.future.result(20) == [2]
    assert heavy.future.result(20) == [2 * number for number in range(10, 20)]
    assert prepared[:3] == [10, 1, 11]
    queue.close()


def test_what_would_not_be_answered_in_time_is_refused_at_once():
    engine = Engine(open_=False)
    queue = batcher(engine, max_batch=1)
    queue.expect(1.0)
    # An idle queue takes everything, or a pace that was measured wrong would never be measured again
    running = queue.submit([1], deadline=time.monotonic() + 0.5)
    assert engine.begun.acquire(timeout=20)
    others = [queue.submit([number], deadline=time.monotonic() + 60) for number in (2, 3)]
    with pytest.raises(
        QueueFullError, match=r"2 items are waiting: 2 more may take 6\.\d s, and this request has"
    ) as no:
        queue.submit([4, 5], deadline=time.monotonic() + 5)
    assert no.value.retry_after in (1, 2)
    assert queue.waiting == 2
    later = queue.submit([4, 5], deadline=time.monotonic() + 60)
    without = queue.submit([6])
    for ticket in (running, *others):
        ticket.drop()
    engine.gate.set()
    assert later.future.result(20) == [8, 10]
    assert without.future.result(20) == [12]
    queue.close()


def test_a_large_request_that_was_overtaken_is_not_counted_in_full():
    """Else one caller's many heavy items would have everybody refused whom they do not delay."""
    engine = Engine(open_=False)
    queue = batcher(engine, max_batch=1)
    queue.expect(1.0)
    many = queue.submit(list(range(50)))
    assert engine.begun.acquire(timeout=20)
    assert queue.submit([1], deadline=time.monotonic() + 10)
    many.drop()
    engine.gate.set()
    queue.close()


def test_what_is_too_late_is_not_run(until):
    engine = Engine(open_=False)
    queue = batcher(engine, max_batch=1)
    running = queue.submit([1])
    assert engine.begun.acquire(timeout=20)
    deadline = time.monotonic() + 0.01
    late, in_time = queue.submit([2], deadline=deadline), queue.submit([3])
    until(lambda: time.monotonic() > deadline)
    engine.gate.set()
    assert in_time.future.result(20) == [6]
    assert running.future.result(20) == [2]
    with pytest.raises(QueueFullError, match=r"the time for this request ran out while \d items were waiting"):
        late.future.result(0)
    assert engine.batches == [[1], [3]]
    queue.close()


def test_what_a_caller_brought_is_let_go_when_they_leave(until):
    class Encoded:
        pass

    gate, begun = threading.Event(), threading.Event()

    def prepare(item):
        begun.set()
        assert gate.wait(20)
        return item

    queue = Batcher(prepare, lambda items: items, max_batch=4, queue=100)
    items = [Encoded() for _ in range(5)]
    seen = [weakref.ref(item) for item in items]
    ticket = queue.submit(items)
    assert begun.wait(20)
    ticket.drop()
    del ticket, items
    gc.collect()
    assert [item() is None for item in seen] == [False, True, True, True, True]  # one is being prepared
    gate.set()
    until(lambda: seen[0]() is None)
    assert queue.waiting == 0
    queue.close()


def test_items_that_need_no_preparation_are_ready_as_they_come():
    engine = Engine()
    queue = Batcher(None, engine, max_batch=4, queue=10)
    assert queue.submit([1, 2]).future.result(20) == [2, 4]
    assert queue.submit([]).future.result(0) == []
    assert queue.close(20)


@settings(max_examples=40, deadline=None)
@given(
    asked=st.lists(
        st.tuples(st.lists(st.integers(-1, 9), max_size=6), st.sampled_from([0.0, 0.001, 60.0]), st.booleans()),
        max_size=15,
    ),
    max_batch=st.integers(1, 5), workers=st.integers(1, 3), pace=st.sampled_from([1e-9, 1e-3, 10.0]),
)  # fmt: skip
def test_whatever_is_refused_late_or_dropped_nothing_is_lost_or_left(asked, max_batch, workers, pace):
    queue = batcher(Engine(), max_batch=max_batch, workers=workers, queue=20)
    queue.expect(pace)
    tickets = []
    for items, seconds, leaves in asked:
        try:
            ticket = queue.submit(items, deadline=time.monotonic() + seconds)
        except QueueFullError:
            continue
        tickets.append((items, ticket))
        if leaves:
            ticket.drop()
    for items, ticket in tickets:
        try:
            assert ticket.future.result(20) == [2 * item for item in items]
        except (InputError, QueueFullError, BatcherStoppedError):
            assert items
    assert queue.close(20)
    assert (queue.waiting, queue.ready, queue._unprepared, queue._tickets) == (0, 0, {}, {})
