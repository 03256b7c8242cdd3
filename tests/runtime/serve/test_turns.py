"""Turns: one at a time, in the order of asking, handed on also by those who fail."""

import threading

import pytest

from invariclip.serve.turns import Turns


def test_turns_are_had_in_the_order_of_asking(until):
    turns, had = Turns(), []

    def ask(name):
        with turns.take(1):
            had.append(name)

    with turns.take(1):
        threads = []
        for number in range(6):
            threads.append(threading.Thread(target=ask, args=(number,)))
            threads[-1].start()
            until(lambda: len(turns._line._waiting) == len(threads))
        assert had == []
    for thread in threads:
        thread.join(20)
    assert had == [0, 1, 2, 3, 4, 5]
    assert turns.pace > 0


def test_a_turn_that_fails_is_handed_on_and_measures_nothing():
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns.take(4):
        raise ZeroDivisionError
    assert turns.pace == 0
    with turns.take(4):
        pass
    assert turns.pace > 0
