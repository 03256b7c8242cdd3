"""Latency as ratios in one run: one process per candidate, taking turns, medians and spread.

Timing two engines inside one process is unfair, because spinning thread pools of one slow the other; timing them one
after the other is unfair too, because machines drift. So every candidate lives in its own process, is warmed up, and
then they take turns in short bursts for several rounds; a ratio compares bursts of the same round.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.backends.threads import available_threads
from invariclip.console import silent
from invariclip.errors import InvariclipError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from invariclip.console import Progress


@dataclass(frozen=True)
class Candidate:
    """One way to run a tower.

    Attributes:
        name: How the table calls it.
        kind: `pytorch` (the original checkpoint's image tower, eager float32), `artifact` (its image graph) or `graph`
            (an ONNX file of either tower).
        model: open_clip model for `pytorch`, artifact folder for `artifact`, file for `graph`.
        checkpoint: Weights file for `pytorch`, or None.
        backend: Engine of `graph`.
        ids: Ids per text that a text `graph` is fed; None feeds pictures.
    """

    name: str
    kind: str
    model: str
    checkpoint: str | None = None
    backend: str = "onnxruntime"
    ids: int | None = None


@dataclass(frozen=True)
class Timing:
    """What was measured of one candidate at one batch size; times in milliseconds per batch.

    Attributes:
        median_ms: Over all repetitions.
        p95_ms: 95th percentile.
        ratio: Median over rounds of (first candidate's median / this one's): above 1 is faster than the first.
        ratio_low: Lower end of the 95 % bootstrap interval of that median over rounds.
        ratio_high: Upper end.
        repetitions: How many batches were timed.
    """

    name: str
    batch: int
    median_ms: float
    p95_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    repetitions: int

    def to_json(self) -> dict[str, Any]:
        """Plain fields."""
        return asdict(self)


class _Worker:
    """A candidate in its own process, spoken to in lines of JSON."""

    def __init__(self, candidate: Candidate, threads: int) -> None:
        self.name = candidate.name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "invariclip.bench.latency_worker", json.dumps(asdict(candidate)), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ask({"batch": 1, "repetitions": 1})  # loaded and answering

    def ask(self, question: dict[str, int]) -> list[float]:
        """Runs `repetitions` batches and returns their times in seconds.

        Raises:
            InvariclipError: The process died; its own message is on standard error.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise InvariclipError(f"latency: no pipe to {self.name}")
        try:
            stdin.write(json.dumps(question) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise InvariclipError(f"latency: the process of {self.name!r} stopped (exit {self._process.wait()})")
        times: list[float] = json.loads(line)
        return times

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def measure(
    candidates: Sequence[Candidate],
    *,
    batches: Sequence[int] = (1, 8),
    rounds: int = 7,
    seconds_per_turn: float = 0.4,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Timing]:
    """Times towers, uint8 pixels or ids in, unit embeddings out; the first candidate is the yardstick.

    Args:
        candidates: At least one.
        batches: Batch sizes.
        rounds: Turns that every candidate gets at every batch size.
        seconds_per_turn: How long a turn should last; at least two batches are timed anyway.
        threads: Threads for each; None takes what this process may use.
        seed: Of the bootstrap.
        progress: Wraps the rounds.

    Returns:
        One row per candidate and batch size.

    Raises:
        InvariclipError: A candidate's process stopped.
    """
    rows: list[Timing] = []
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(c, threads or available_threads())) for c in candidates]
        for batch in batches:
            repetitions = [_warm_up(worker, batch, seconds_per_turn) for worker in workers]
            turns: list[list[list[float]]] = [[] for _ in workers]
            for round_ in progress(range(rounds), total=rounds, desc=f"timing batch {batch}"):
                # The order turns round by round, so that no candidate always follows the same neighbour.
                for index in [(round_ + k) % len(workers) for k in range(len(workers))]:
                    time.sleep(0.05)  # the previous one's threads go to sleep
                    turns[index].append(workers[index].ask({"batch": batch, "repetitions": repetitions[index]}))
            medians = np.array([[statistics.median(turn) for turn in worker] for worker in turns])
            for index, worker in enumerate(workers):
                rows.append(_summary(worker.name, batch, turns[index], medians[0] / medians[index], seed))
    return rows


def _warm_up(worker: _Worker, batch: int, seconds: float) -> int:
    """Two batches unmeasured; then as many repetitions as fill a turn."""
    worker.ask({"batch": batch, "repetitions": 2})
    once = min(worker.ask({"batch": batch, "repetitions": 2}))
    return max(2, min(200, round(seconds / once)))


def _summary(name: str, batch: int, turns: list[list[float]], ratios: np.ndarray[Any, Any], seed: int) -> Timing:
    times = np.concatenate([np.asarray(turn) for turn in turns]) * 1e3
    draws = np.random.default_rng(seed).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
    median, p95 = np.percentile(times, [50, 95])
    return Timing(name, batch, float(median), float(p95), float(np.median(ratios)), float(low), float(high), len(times))


def artifact_candidate(name: str, folder: Path) -> Candidate:
    """An exported artifact as a candidate."""
    return Candidate(name, "artifact", str(folder))
