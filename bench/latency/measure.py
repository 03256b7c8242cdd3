"""Latency as ratios in one run: one process per candidate, taking turns, medians and spread.

Timing two engines inside one process is unfair, because spinning thread pools of one slow the other; timing them one
after the other is unfair too, because machines drift. So every candidate lives in its own process, is warmed up, and
then they take turns in short bursts for several rounds; a ratio compares bursts of the same round.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from invariclip.bench.latency.candidates import LatencyCandidate, Timing
from invariclip.bench.latency.machine import Ticks
from invariclip.bench.latency.noise import mean_load
from invariclip.bench.latency.process import CandidateError, Worker, take_turns
from invariclip.bench.latency.summary import percentiles, ratio
from invariclip.console import silent
from invariclip.errors import InputError
from invariclip.threads import available_threads

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from invariclip.console import Progress


def measure(
    candidates: Sequence[LatencyCandidate],
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
        InputError: Two candidates have the same name.
        CandidateError: A candidate's process stopped.
    """
    names = [candidate.name for candidate in candidates]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise InputError(f"a candidate is called {repeated!r} twice; give each a name of its own")
    rows: list[Timing] = []
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(c, threads or available_threads())) for c in candidates]
        for batch in batches:
            repetitions = {worker.name: worker.repetitions(batch, seconds_per_turn) for worker in workers}
            turns: dict[str, list[list[float]]] = {worker.name: [] for worker in workers}
            used: list[dict[str, float | None]] = []
            for round_ in progress(range(rounds), total=rounds, desc=f"timing batch {batch}"):
                before = Ticks.now()
                taken, stopped = take_turns(workers, batch, repetitions, round_)
                used.append(Ticks.now().since(before, sum(turn.cpu_s for turn in taken.values())))
                for name, reason in stopped.items():
                    raise CandidateError(name, "stopped", reason)
                for name, turn in taken.items():
                    turns[name].append(turn.times)
            steal, others = (mean_load([one[name] for one in used]) for name in ("steal", "others"))
            for worker in workers:
                timing = _timing(worker.name, batch, turns[candidates[0].name], turns[worker.name], seed)
                rows.append(replace(timing, steal=steal, others=others))
    return rows


def _timing(name: str, batch: int, first: list[list[float]], turns: list[list[float]], seed: int) -> Timing:
    times, faster = percentiles(turns), ratio(first, turns, seed)
    return Timing(
        name,
        batch,
        times["p50"] * 1e3,
        times["p95"] * 1e3,
        faster.value,
        faster.low,
        faster.high,
        sum(map(len, turns)),
        len(turns),
    )


def artifact_candidate(name: str, folder: Path) -> LatencyCandidate:
    """An exported artifact as a candidate."""
    return LatencyCandidate(name, "artifact", str(folder))
