"""A process for each candidate that is timed: it is asked, and answers, in single lines of JSON.

Engines in one process would slow each other, and a crash takes only itself. `Worker` starts a process and asks it,
`serve` is the process's own end, and `take_turns` lets several of them run one after the other. A process writes one
line when it is ready, then one for each question; it sleeps while nothing is asked, and ends with its standard input.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from invariclip.errors import InvariclipError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Self

T = TypeVar("T")

LONGEST_ANSWER = 1200.0
"""Seconds after which a process counts as stuck; torch needs minutes to compile a large tower."""
PAUSE = 0.05
"""Seconds before a turn, in which the last candidate's threads go to sleep."""
MOST_REPETITIONS = 200
LONGEST_REASON = 500
"""Characters of an error that a process tells."""


class WorkerError(InvariclipError):
    """A process ended, never started, or gave no answer; `reason` is what it said itself, or else what happened."""

    def __init__(self, name: str, what: str, reason: str = "") -> None:
        super().__init__(f"the process of {name!r} {what}" + (f": {reason}" if reason else ""))
        self.reason = reason or what


@dataclass(frozen=True)
class Turn:
    """One turn of one candidate.

    Attributes:
        times: Seconds of each repetition.
        cpu_s: Processor seconds that the process took for all of them; 0 where it does not tell.
        idle_cpu_s: Processor seconds that it took since its last answer, while it should have slept.
    """

    times: list[float]
    cpu_s: float = 0.0
    idle_cpu_s: float = 0.0


@dataclass(frozen=True)
class Served:
    """What a process does for `Worker`.

    Attributes:
        facts: Its first line.
        run: What a turn is asked for, such as `batch`, to what is timed.
        answers: Further questions by name, each to a function of what is asked for.
    """

    facts: dict[str, Any]
    run: Callable[..., Callable[[], object]]
    answers: Mapping[str, Callable[..., dict[str, Any]]] = field(default_factory=dict)


class Worker:
    """A running process that has answered once; use it as a context, which ends it.

    Attributes:
        name: What errors call it.
        facts: Its first line.
        start_s: Seconds from nothing to the first line.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        longest: float = LONGEST_ANSWER,
        quiet: bool = False,
    ) -> None:
        """Starts it and waits for its first line.

        Args:
            name: What errors call it.
            command: What to run; see `module`.
            environment: Variables beside this process's own.
            longest: Seconds after which an answer counts as missing.
            quiet: Whether what it writes to standard error is dropped.

        Raises:
            WorkerError: It stopped before that.
        """
        self.name, self._longest = name, longest
        began = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # Ctrl-C is for the one who asks, who then ends this
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.facts: dict[str, Any] = self._answer()
        except BaseException:
            self.close()
            raise
        self.start_s = time.perf_counter() - began

    def ask(self, do: str, **question: Any) -> dict[str, Any]:
        """One question, one answer.

        Args:
            do: One of `Served.answers`, or `time`.
            question: What is asked for.

        Raises:
            WorkerError: The process stopped, could not answer, or took too long.
        """
        stdin = self._process.stdin
        if stdin is None:
            raise WorkerError(self.name, "has no pipe")
        with suppress(BrokenPipeError):  # what it said last, if anything, is still to be read
            stdin.write(json.dumps({"do": do, **question}) + "\n")
            stdin.flush()
        return self._answer()

    def turn(self, repetitions: int, **question: Any) -> Turn:
        """Runs so many repetitions of what `Served.run` makes of the question.

        Raises:
            WorkerError: See `ask`.
        """
        return Turn(**self.ask("time", repetitions=repetitions, **question))

    def repetitions(self, seconds: float, *, most: int = MOST_REPETITIONS, **question: Any) -> int:
        """Warms up, unmeasured, and says how many repetitions fill a turn: 2 or more.

        Args:
            seconds: How long a turn should last.
            most: The largest answer.
            question: See `turn`.

        Raises:
            WorkerError: See `ask`.
        """
        self.turn(2, **question)
        once = min(self.turn(2, **question).times)
        return max(2, min(most, round(seconds / once)))

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # what was left in the buffer has no reader any more
                self._process.stdin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        """Hands lines on, then an empty one: a pipe has no read with a time limit on every system."""
        if self._process.stdout is not None:
            with self._process.stdout as stream:
                for line in stream:
                    self._lines.put(line)
        self._lines.put("")

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=self._longest)
        except queue.Empty:
            raise WorkerError(self.name, f"gave no answer in {self._longest:.0f} s") from None
        if not line:
            self._lines.put("")  # for whoever asks again
            code = self._process.wait()
            raise WorkerError(self.name, f"stopped (exit {code})", "killed, perhaps for memory" if code < 0 else "")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(self.name, "stopped", str(answer["error"]))
        return answer


def module(name: str, *arguments: str) -> list[str]:
    """The command of a module that calls `serve`."""
    return [sys.executable, "-P", "-m", name, *arguments]  # -P: nothing is imported from where we are


def rotated(items: Sequence[T], round_: int) -> list[T]:
    """The order of a round: another one begins each time, so that no candidate always follows the same neighbour."""
    first = round_ % len(items) if items else 0
    return [*items[first:], *items[:first]]


def take_turns(
    workers: Sequence[Worker], repetitions: Mapping[str, int], round_: int, **question: Any
) -> tuple[dict[str, Turn], dict[str, str]]:
    """One round: every worker has a turn.

    Args:
        workers: Of different names.
        repetitions: Of each, by name.
        round_: Its number, see `rotated`.
        question: See `Worker.turn`.

    Returns:
        The turns by name, and the reason by name of those that stopped.
    """
    turns: dict[str, Turn] = {}
    stopped: dict[str, str] = {}
    for worker in rotated(workers, round_):
        time.sleep(PAUSE)
        try:
            turns[worker.name] = worker.turn(repetitions[worker.name], **question)
        except WorkerError as error:
            stopped[worker.name] = error.reason
    return turns, stopped


def serve(opened: Callable[[], Served]) -> None:
    """Answers `Worker` until standard input ends: a module's whole work, in a process of its own.

    An error becomes the last answer and ends the process.

    Args:
        opened: Loads what is asked about.
    """
    # What libraries print must not come between the answers: it becomes standard error, and answers have their own pipe
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(answer: dict[str, Any]) -> None:
        pipe.write(json.dumps(answer) + "\n")
        pipe.flush()

    try:
        _answer_all(opened(), tell)
    except BrokenPipeError:  # nobody is left to hear it; exiting in order would try to write what is left once more
        os._exit(1)
    except BaseException as error:
        kind = "" if isinstance(error, InvariclipError) else f"{type(error).__name__}: "
        reason = (kind + " ".join(str(error).split())).rstrip(": ")
        tell({"error": reason[:LONGEST_REASON]})
        sys.exit(1)


def _answer_all(served: Served, tell: Callable[[dict[str, Any]], None]) -> None:
    tell(served.facts)
    slept = time.process_time()
    for line in sys.stdin:
        idle = time.process_time() - slept
        question = json.loads(line)
        do = question.pop("do")
        if do == "time":
            tell({**_timed(served.run, **question), "idle_cpu_s": idle})
        else:
            tell(served.answers[do](**question))
        slept = time.process_time()


def _timed(run: Callable[..., Callable[[], object]], repetitions: int, **question: Any) -> dict[str, Any]:
    """Seconds of each repetition, and the processor seconds of all."""
    work, times = run(**question), []
    cpu = time.process_time()
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return {"times": times, "cpu_s": time.process_time() - cpu}
