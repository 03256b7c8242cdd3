"""Owners (API keys) have equal parts of what there is, however much each of them asks for."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.serve.batcher import Batcher, QueueFullError
from invariclip.serve.classes import ClassSets
from invariclip.serve.fairness import FairClocks, crowds_out
from invariclip.serve.service import Batching, Service
from invariclip.serve.turns import Turns


@given(costs=st.lists(st.lists(st.floats(0.1, 3), min_size=1, max_size=30), min_size=2, max_size=5))
def test_owners_who_wait_are_never_further_apart_than_one_turn(costs):
    clocks, used = FairClocks(), [0.0] * len(costs)
    left = {owner: list(items) for owner, items in enumerate(costs)}
    for owner in left:
        clocks.enter(owner, range(owner))
    while all(left.values()):
        owner = min(left, key=clocks.of)
        seconds = left[owner].pop()
        clocks.charge(owner, seconds)
        used[owner] += seconds
        assert max(used) - min(used) <= 3


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.1, 2)), max_size=60))
def test_who_comes_anew_owes_nothing_and_has_saved_up_nothing(turns):
    clocks, seen = FairClocks(), set()
    clocks.enter(9, ())
    for owner, seconds in turns:
        clocks.enter(owner, {9})
        assert clocks.of(owner) >= clocks.of(9)
        assert clocks.of(owner) == clocks.of(9) or owner in seen
        seen.add(owner)
        clocks.charge(9, seconds)
        clocks.charge(owner, seconds / 2)
    clocks.enter(5, ())  # nobody waited: all is forgotten
    assert clocks._used == {}


@given(room=st.integers(1, 300), asked=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 64)), max_size=60))
def test_an_owner_alone_leaves_half_of_the_room_and_a_new_one_may_have_what_is_left(room, asked):
    waiting = dict.fromkeys(range(5), 0)
    for owner, more in asked:
        total = sum(waiting.values())
        if total + more > room or crowds_out(waiting[owner], more, total, room):
            continue
        first = not waiting[owner]
        waiting[owner] += more
        assert first or waiting[owner] <= room - total
    assert not crowds_out(0, room, 0, room)


class Gate:
    """An engine that waits at a gate, and keeps what it was given."""

    def __init__(self):
        self.open, self.begun, self.order = threading.Event(), threading.Semaphore(0), []

    def __call__(self, items):
        self.order.append(list(items))
        self.begun.release()
        assert self.open.wait(20)
        return items


def held(max_batch=1, **options):
    """A queue whose engine has begun with an item of owner 0, and where every item takes the same."""
    engine = Gate()
    queue = Batcher(None, engine, max_batch=max_batch, queue=1000, **options)
    queue.expect(0.001)
    queue._measure = lambda count, now: None
    first = queue.submit(["first"])
    assert engine.begun.acquire(timeout=20)
    return queue, engine, first


@settings(max_examples=30, deadline=None)
@given(
    asked=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=14),
    max_batch=st.integers(1, 8),
)  # fmt: skip
def test_owners_are_served_item_by_item_whatever_their_requests(asked, max_batch):
    queue, engine, _ = held(max_batch)
    tickets = [queue.submit([(owner, number)] * count, owner=owner) for number, (owner, count) in enumerate(asked)]
    engine.open.set()
    assert queue.close(20)
    assert all(ticket.future.result(20) for ticket in tickets)
    order = [owner for batch in engine.order[1:] for owner, _ in batch]
    left = {owner: order.count(owner) for owner in order}
    served = dict.fromkeys(left, 0)
    for owner in order:
        served[owner] += 1
        left[owner] -= 1
        waiting = [served[one] for one in left if left[one]]
        assert max(waiting, default=0) - min(waiting, default=0) <= 1
    for owner in left:  # within an owner, requests come in their order but for the turns that they take
        numbers = [number for batch in engine.order[1:] for one, number in batch if one == owner]
        assert numbers[0] == min(numbers)


def test_without_owners_requests_wait_for_those_that_came_before():
    queue, engine, _ = held()
    for _ in range(12):
        queue.submit(["heavy"] * 6)
    queue.submit(["small"])
    engine.open.set()
    assert queue.close(20)
    assert [batch[0] for batch in engine.order].index("small") > 12


@pytest.mark.parametrize("workers", [1, 2])
def test_owners_take_turns_in_preparation_too(workers, until):
    gate, begun, order = threading.Event(), threading.Semaphore(0), []

    def prepare(item):
        order.append(item)
        begun.release()
        assert gate.wait(20)
        return item

    queue = Batcher(prepare, list, max_batch=1, queue=1000, workers=workers)
    queue.expect(0.001)
    for _ in range(12):
        queue.submit(["heavy"] * 6, owner=1)
    for _ in range(workers):
        assert begun.acquire(timeout=20)
    small = queue.submit(["small"], owner=2)
    gate.set()
    small.future.result(20)
    assert order.index("small") <= 2 * workers
    assert queue.close(20)


def test_one_key_of_several_does_not_fill_the_queue():
    engine = Gate()
    queue = Batcher(None, engine, max_batch=1, queue=8, owners=2)
    queue.submit(["first"], owner=1)
    assert engine.begun.acquire(timeout=20)
    queue.submit(["a"] * 3, owner=1)
    queue.submit(["a"], owner=1)
    with pytest.raises(QueueFullError, match=r"4 items of this API key are waiting, and what is left .* no room for 1"):
        queue.submit(["a"], owner=1)
    queue.submit(["b"] * 4, owner=2)
    with pytest.raises(QueueFullError, match="there is room for 8"):
        queue.submit(["b"], owner=2)
    engine.open.set()
    assert queue.close(20)


def test_what_is_ahead_of_a_request_is_no_more_than_its_own_part():
    queue, engine, _ = held(owners=2)
    queue.submit(["heavy"] * 400, owner=1)
    now = time.monotonic()
    queue._pace = 1.0
    queue.submit(["small"], owner=2, deadline=now + 10)  # first, one of the others, itself: 3 s and a margin
    with pytest.raises(QueueFullError, match="may take"):
        queue.submit(["more"] * 9, owner=1, deadline=now + 10)
    engine.open.set()
    queue.close()


def test_turns_are_shared_by_owners(until):
    turns, had = Turns(), []

    def ask(owner):
        with turns.take(1, owner):
            had.append(owner)

    with turns.take(1, 9):
        threads = []
        for owner in (1, 1, 1, 1, 2, 2):
            threads.append(threading.Thread(target=ask, args=(owner,)))
            threads[-1].start()
            until(lambda: len(turns._line._waiting) == len(threads))
        turns._line._clocks.charge = lambda owner, seconds: turns._line._clocks._used.update(
            {owner: turns._line._clocks.of(owner) + 1}
        )
    for thread in threads:
        thread.join(20)
    assert had == [1, 2, 1, 2, 1, 1]
    assert turns._line._holder is None


def test_class_sets_of_one_key_leave_some_for_others(until):
    gate = threading.Event()

    class Waits:
        def with_classes(self, classes, templates):
            gate.wait(20)
            return classes

    sets = ClassSets(Waits(), Turns(), limit=9, pending=4, owners=2)
    for number in range(2):
        sets.ask((f"{number}",), ("{}",), owner=1)
    with pytest.raises(QueueFullError, match="2 class sets of this API key are being embedded"):
        sets.ask(("2",), ("{}",), owner=1)
    other = sets.ask(("3",), ("{}",), owner=2)
    gate.set()
    assert other.future.result(20).model == ("3",)


def test_a_key_of_heavy_requests_does_not_hold_up_another_s_small_ones(model, gated, serving, images, until):
    service = gated(model, batching=Batching(max_batch=1), keys=2)
    service.images.expect(0.001)
    service.images._measure = lambda count, now: None
    order = []
    settle = service.images._settle
    service.images._settle = lambda item, result: (order.append(item.ticket.owner), settle(item, result))
    with serving(service, api_keys=("heavy", "small")) as ask, ThreadPoolExecutor(13) as pool:
        parts = [("images", f"{n}.png", images[n]) for n in range(6)]

        def heavy():
            return ask.form("/v1/classify", parts, {"x-api-key": "heavy"}).status

        many = [pool.submit(heavy) for _ in range(12)]
        assert service.begun.acquire(timeout=20)
        until(lambda: service.images.ready == 71)
        small = pool.submit(ask.classify, images[0], headers={"x-api-key": "small"})
        until(lambda: service.images.ready == 72)
        service.gate.set()
        assert small.result(20).status == 200
        assert [one.result(30) for one in many] == [200] * 12
    assert order.index(2) <= 2


def test_the_service_shares_its_queues_only_between_keys(model):
    for keys in (1, 3):
        service = Service(model, keys=keys)
        assert (service.images._owners, service.texts._owners, service.class_sets._owners) == (keys, keys, keys)
        service.close()
