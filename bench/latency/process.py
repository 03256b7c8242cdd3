"""A candidate in a process of its own, spoken to in lines of JSON; its end of the pipe is `latency_worker`."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from invariclip.errors import InvariclipError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from invariclip.bench.latency.candidates import LatencyCandidate

LONGEST_ANSWER = 1200.0
"""Seconds after which a process counts as stuck; torch needs minutes to compile a large tower."""
PAUSE = 0.05
"""Seconds before a turn, in which the last candidate's threads go to sleep."""


class CandidateError(InvariclipError):
    """A candidate's process stopped, or never started; `reason` is what it said itself."""

    def __init__(self, name: str, what: str, reason: str) -> None:
        super().__init__(f"latency: the process of {name!r} {what}" + (f": {reason}" if reason else ""))
        self.reason = reason or what


@dataclass(frozen=True)
class Turn:
    """One turn of one candidate.

    Attributes:
        times: Seconds of each batch.
        cpu_s: Processor seconds that the candidate took for all of them.
        idle_cpu_s: Processor seconds that it took since its last turn, while it should have slept.
    """

    times: list[float]
    cpu_s: float
    idle_cpu_s: float


class Worker:
    """A running candidate, loaded and past its first answer; use it as a context, which ends it.

    Attributes:
        name: The candidate's.
        start_s: Seconds from nothing to the first answer: interpreter, imports, loading, one batch of one.
        facts: What the process says of itself: `engine`, `load_s`, `first_s`.
    """

    def __init__(self, candidate: LatencyCandidate, threads: int, environment: Mapping[str, str] | None = None) -> None:
        """Starts it and waits for the first answer.

        Args:
            candidate: What to run.
            threads: How many threads it may use.
            environment: Variables beside this process's own.

        Raises:
            CandidateError: It stopped before it answered.
        """
        self.name = candidate.name
        own = {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "invariclip.bench.latency.worker", json.dumps(asdict(candidate)), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **own, **(environment or {})},
        )
        try:
            self.facts: dict[str, Any] = self._answer()
        except BaseException:
            self.close()
            raise
        self.start_s = time.perf_counter() - began

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """One question, one answer; `latency_worker.QUESTIONS` says which there are.

        Raises:
            CandidateError: The process stopped, could not answer, or took too long.
        """
        stdin = self._process.stdin
        if stdin is None:
            raise CandidateError(self.name, "has no pipe", "")
        with suppress(BrokenPipeError):  # what it said last, if anything, is still to be read
            stdin.write(json.dumps(question) + "\n")
            stdin.flush()
        return self._answer()

    def turn(self, batch: int, repetitions: int) -> Turn:
        """Runs `repetitions` batches of `batch` rows.

        Raises:
            CandidateError: See `ask`.
        """
        return Turn(**self.ask({"do": "time", "batch": batch, "repetitions": repetitions}))

    def repetitions(self, batch: int, seconds: float) -> int:
        """Warms a batch size up, unmeasured, and says how many batches fill a turn of `seconds`.

        Raises:
            CandidateError: See `ask`.
        """
        self.turn(batch, 2)
        once = min(self.turn(batch, 2).times)
        return max(2, min(200, round(seconds / once)))

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # what was left in the buffer has no reader any more
                    pipe.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        stdout = self._process.stdout
        if stdout is None or not select.select([stdout], [], [], LONGEST_ANSWER)[0]:
            raise CandidateError(self.name, f"gave no answer in {LONGEST_ANSWER:.0f} s", "")
        line = stdout.readline()
        if not line:
            code = self._process.wait()
            raise CandidateError(
                self.name, f"stopped (exit {code})", "killed, by memory or by hand" if code < 0 else ""
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise CandidateError(self.name, "stopped", str(answer["error"]))
        return answer


def take_turns(
    workers: Sequence[Worker], batch: int, repetitions: Mapping[str, int], round_: int
) -> tuple[dict[str, Turn], dict[str, str]]:
    """One round: every candidate has a turn, beginning with another one each round.

    So no candidate always follows the same neighbour.

    Returns:
        The turns by name, and the reason by name of those that stopped.
    """
    turns: dict[str, Turn] = {}
    stopped: dict[str, str] = {}
    for place in range(len(workers)):
        worker = workers[(round_ + place) % len(workers)]
        time.sleep(PAUSE)
        try:
            turns[worker.name] = worker.turn(batch, repetitions[worker.name])
        except CandidateError as error:
            stopped[worker.name] = error.reason
    return turns, stopped
