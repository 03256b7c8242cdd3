"""Two processes that answer the same frame, in turns."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from invariclip.bench.latency.process import PAUSE, CandidateError
from invariclip.bench.latency.summary import percentiles, ratio, spread

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from invariclip.console import Progress


@dataclass(frozen=True)
class CppTiming:
    """One question, answered by Python and by C++; times in milliseconds.

    Attributes:
        name: The question.
        python_ms: Median over every time.
        cpp_ms: The same.
        python_best_ms: The shortest time of all, which a busy machine disturbs least.
        cpp_best_ms: The same.
        python_spread: The slowest round's median over the fastest's, less one.
        cpp_spread: The same.
        faster: Python's median over C++'s of the same round; the median over rounds.
        low: Lower end of its 95 % interval.
        high: Upper end.
        equal: Whether both first answers were the same bytes.
    """

    name: str
    python_ms: float
    cpp_ms: float
    python_best_ms: float
    cpp_best_ms: float
    python_spread: float
    cpp_spread: float
    faster: float
    low: float
    high: float
    equal: bool


class _Asked:
    """A process that was started and has answered once."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self._name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if self._line() != "ready":
            raise CandidateError(name, "did not start", "")

    def times(self, count: int) -> list[float]:
        """Milliseconds of `count` answers."""
        if self._process.stdin is None:
            raise CandidateError(self._name, "has no pipe", "")
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        return [float(word) for word in self._line().split()]

    def _line(self) -> str:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise CandidateError(self._name, f"stopped (exit {self._process.wait()})", "")
        return line.strip()

    def __enter__(self) -> _Asked:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def compare(
    name: str, ask: Path, words: Sequence[str], folder: Path, *, rounds: int, seconds: float, progress: Progress
) -> CppTiming:
    """Times one question.

    Args:
        name: What the table calls it.
        ask: The C++ program.
        words: Frame, columns and rows; then what follows OUT, see `worker`.
        folder: For the first answers.
        rounds: Turns that each gets; each begins every other one.
        seconds: How long a turn should last.
        progress: Wraps the rounds.

    Raises:
        CandidateError: A process stopped.
    """
    outs = {key: folder / f"{key}.answer" for key in ("python", "cpp")}
    commands = {
        "python": [sys.executable, "-m", "invariclip.bench.cpp.worker"],
        "cpp": [str(ask)],
    }
    with ExitStack() as stack:
        asked = {
            key: stack.enter_context(_Asked(f"{key}, {name}", [*command, *words[:3], str(outs[key]), *words[3:]]))
            for key, command in commands.items()
        }
        counts = {}
        for key, one in asked.items():
            one.times(2)
            counts[key] = max(2, min(500, round(1e3 * seconds / min(one.times(3)))))
        turns: dict[str, list[list[float]]] = {key: [] for key in asked}
        for round_ in progress(range(rounds), total=rounds, desc=name):
            for key in list(asked) if round_ % 2 else list(asked)[::-1]:
                time.sleep(PAUSE)
                turns[key].append(asked[key].times(counts[key]))
    faster = ratio(turns["python"], turns["cpp"])
    slowest = {key: spread(taken) for key, taken in turns.items()}
    best = {key: min(map(min, taken)) for key, taken in turns.items()}
    return CppTiming(
        name, percentiles(turns["python"])["p50"], percentiles(turns["cpp"])["p50"], best["python"], best["cpp"],
        slowest["python"], slowest["cpp"], faster.value, faster.low, faster.high,
        outs["python"].read_bytes() == outs["cpp"].read_bytes(),
    )  # fmt: skip
