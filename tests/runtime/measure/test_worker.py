"""A process that is asked in lines of JSON: what it answers, how it dies, and whose turn it is."""

import os
import subprocess
import sys

import pytest

from invariclip.measure.worker import Turn, Worker, WorkerError, rotated, take_turns

CODE = """
import os, sys, time
from invariclip.errors import InputError
from invariclip.measure.worker import Served, serve

def refuse(why):
    raise InputError(why)

def opened():
    os.write(1, b"noise\\n")
    if sys.argv[1:] == ["broken"]:
        refuse("it cannot\\nbe opened")
    return Served({"ready": True}, lambda wait: lambda: time.sleep(wait), {
        "echo": lambda **said: said, "refuse": refuse, "stuck": lambda: time.sleep(60), "leave": lambda: os._exit(3),
    })

serve(opened)
"""


def started(*words, **options):
    return Worker("one", [sys.executable, "-c", CODE, *words], **options)


def test_it_answers_and_what_it_prints_is_no_answer():
    with started() as worker:
        assert worker.facts == {"ready": True}
        assert worker.start_s > 0
        assert worker.ask("echo", text="ö\n", number=0.1) == {"text": "ö\n", "number": 0.1}


def test_a_turn_repeats_what_was_asked_for():
    with started() as worker:
        turn = worker.turn(3, wait=0.01)
        assert len(turn.times) == 3
        assert min(turn.times) >= 0.01
        assert turn.cpu_s < 0.01
        assert worker.repetitions(0.05, wait=0.01) in (2, 3, 4, 5)
        assert worker.repetitions(1, most=7, wait=0.001) == 7
        assert worker.repetitions(1e-9, wait=0.001) == 2


def test_an_environment_is_added_to_its_own():
    code = CODE.replace('{"ready": True}', "{name: os.environ.get(name) for name in ('MINE', 'PATH')}")
    with Worker("one", [sys.executable, "-c", code], environment={"MINE": "1"}) as worker:
        assert worker.facts == {"MINE": "1", "PATH": os.environ["PATH"]}


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ({"do": "refuse", "why": "not like this"}, "not like this"),
        ({"do": "dance"}, "KeyError: 'dance'"),
        ({"do": "leave"}, "stopped (exit 3)"),
        ({"do": "stuck"}, "gave no answer in 1 s"),
    ],
)
def test_one_that_stops_is_named_with_its_reason(question, reason):
    with started(quiet=True) as worker:
        worker._longest = 1
        with pytest.raises(WorkerError, match="the process of 'one' ") as error:
            worker.ask(**question)
        assert error.value.reason == reason


def test_one_that_is_gone_says_so_every_time():
    with started() as worker:
        os.kill(worker._process.pid, 9)
        for _ in range(2):
            with pytest.raises(WorkerError, match=r"'one' stopped \(exit -9\): killed, perhaps for memory"):
                worker.turn(1, wait=0)


def test_one_that_cannot_be_opened_says_why_in_one_line():
    with pytest.raises(WorkerError, match=r"'one' stopped: it cannot be opened$"):
        started("broken")


def test_it_ends_with_the_one_who_asked():
    with started() as worker:
        worker._process.stdin.close()
        assert worker._process.wait(timeout=60) == 0


def test_neither_end_needs_a_heavy_library():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx', 'onnxruntime', 'PIL', 'click'), None));"
        "import invariclip.measure.worker, invariclip.measure.statistics"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_one_begins_each_round():
    orders = ["".join(rotated("abc", round_)) for round_ in range(4)]
    assert orders == ["abc", "bca", "cab", "abc"]
    assert rotated([], 1) == []


class Fixed:
    """A candidate that notes when it was asked; it stops at its `last` turn."""

    def __init__(self, name, order, last=99):
        self.name, self._order, self._last = name, order, last

    def turn(self, repetitions, batch):
        self._order.append(self.name)
        if self._order.count(self.name) > self._last:
            raise WorkerError(self.name, "stopped", "tired")
        return Turn([0.1] * repetitions, 0.0, 0.0)


def test_the_order_turns_and_one_that_stops_stops_alone():
    order = []
    workers = [Fixed("a", order), Fixed("b", order, last=1), Fixed("c", order)]
    repetitions = {"a": 1, "b": 2, "c": 3}
    turns, stopped = take_turns(workers, repetitions, 0, batch=1)
    assert (order, stopped) == (["a", "b", "c"], {})
    assert {name: len(turn.times) for name, turn in turns.items()} == repetitions
    turns, stopped = take_turns(workers, repetitions, 1, batch=1)
    assert order[3:] == ["b", "c", "a"]
    assert stopped == {"b": "tired"}
    assert set(turns) == {"a", "c"}
