"""Latency as ratios in one run: one process per candidate, taking turns; and whether the machine was too busy for them.

Timing two engines inside one process is unfair, because spinning thread pools of one slow the other; timing them one
after the other is unfair too, because machines drift. So every candidate lives in its own process, is warmed up, and
then they take turns in short bursts for several rounds; a ratio compares bursts of the same round.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from invariclip.bench.latency.machine import MOST_OTHERS, MOST_STEAL, Ticks
from invariclip.bench.latency.worker import LatencyCandidate, LatencyWorker
from invariclip.console import silent
from invariclip.errors import InputError
from invariclip.measure.statistics import FEWEST_ROUNDS, WIDEST, mean_load, percentiles, ratio
from invariclip.measure.worker import WorkerError, take_turns
from invariclip.threads import available_threads

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from invariclip.console import Progress

LOADS = (
    ("steal", MOST_STEAL, "went to other machines of this host (steal time)"),
    ("others", MOST_OTHERS, "went to other programs on this machine"),
)
"""Field of a round, the share above which timings mean little, and what it is in words."""


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
        rounds: In how many rounds; 0 where that was not kept.
        steal: Share of processor time, mean over rounds, that went to other machines of the host; None if not known.
        others: The same of other programs; see `busy_machine` for what follows from both.
    """

    name: str
    batch: int
    median_ms: float
    p95_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    repetitions: int
    rounds: int = 0
    steal: float | None = None
    others: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain fields."""
        return asdict(self)


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
        WorkerError: A candidate's process stopped.
    """
    names = [candidate.name for candidate in candidates]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise InputError(f"a candidate is called {repeated!r} twice; give each a name of its own")
    rows: list[Timing] = []
    with ExitStack() as stack:
        workers = [stack.enter_context(LatencyWorker(c, threads or available_threads())) for c in candidates]
        for batch in batches:
            repetitions = {worker.name: worker.repetitions(seconds_per_turn, batch=batch) for worker in workers}
            turns: dict[str, list[list[float]]] = {worker.name: [] for worker in workers}
            used: list[dict[str, float | None]] = []
            for round_ in progress(range(rounds), total=rounds, desc=f"timing batch {batch}"):
                before = Ticks.now()
                taken, stopped = take_turns(workers, repetitions, round_, batch=batch)
                used.append(Ticks.now().since(before, sum(turn.cpu_s for turn in taken.values())))
                for name, reason in stopped.items():
                    raise WorkerError(name, "stopped", reason)
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


def busy_machine(timings: Sequence[Timing]) -> str | None:
    """Why the ratios of timings cannot be trusted, in one line; None where nothing speaks against them.

    Three things do: processor time that went to other machines of the host or to other programs, above the bounds of
    `machine`; and rounds that disagree, so that a ratio's interval is wider than `statistics.WIDEST` of it.

    Args:
        timings: What `measure` gave; the first of a batch size is the yardstick, whose ratio is 1.
    """
    reasons = []
    for batch in dict.fromkeys(timing.batch for timing in timings):
        rows = [timing for timing in timings if timing.batch == batch]
        for field, most, words in LOADS:
            share = max((known for row in rows if (known := getattr(row, field)) is not None), default=0.0)
            if share > most:
                reasons.append(f"{share:.0%} of processor time {words} at batch {batch}, above {most:.0%}")
        wide = [row.name for row in rows if (row.ratio_high - row.ratio_low) > WIDEST * row.ratio]
        if wide:
            reasons.append(f"rounds disagree by more than {WIDEST:.0%} at batch {batch} about {', '.join(wide)}")
        if any(0 < row.rounds < FEWEST_ROUNDS for row in rows):
            reasons.append(f"fewer than {FEWEST_ROUNDS} rounds at batch {batch} tell nothing of the noise")
    if not reasons:
        return None
    return (
        f"timed on a busy machine: {'; '.join(reasons)}: the ratios cannot be trusted; run again when it is quiet, "
        "or with more rounds"
    )
