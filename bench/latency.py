"""Latency as ratios in one run: one process per candidate, taking turns, medians and spread.

Timing two engines inside one process is unfair, because spinning thread pools of one slow the other; timing them one
after the other is unfair too, because machines drift. So every candidate lives in its own process, is warmed up, and
then they take turns in short bursts for several rounds; a ratio compares bursts of the same round.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from invariclip.backends.threads import available_threads
from invariclip.bench.machine import Ticks
from invariclip.bench.noise import mean_load
from invariclip.bench.process import CandidateError, Worker, take_turns
from invariclip.bench.summary import percentiles, ratio
from invariclip.console import silent
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from invariclip.console import Progress


@dataclass(frozen=True)
class Candidate:
    """One way to run a tower, or to multiply matrices.

    Attributes:
        name: How the table calls it.
        kind: One of `engines.KINDS`: `pytorch` (the original checkpoint's image tower), `artifact` (an artifact's, as
            `load` serves it), `graph` (an ONNX file of either tower in one of our backends),
            `whole` (the same of an image tower, asked for its classes too), `onnxruntime`, `openvino`
            (a file in an engine as its documentation says, without us) or `peak` (large matrix products).
        model: open_clip model for `pytorch`, artifact folder for `artifact`, file for the others, empty for `peak`.
        checkpoint: Weights file for `pytorch`, or None.
        backend: Engine of `graph` and `artifact`.
        ids: Ids per text that a text `graph` is fed; None feeds pictures.
        compute: What the arithmetic is: `float32`, `bfloat16`, for `peak` also `int8`. Artifacts know it themselves.
        variant: The variant of `artifact`.
        compiled: `pytorch` through torch.compile.
        tokenizer: Of `pytorch`, where its model needs one that is not its own.
    """

    name: str
    kind: str
    model: str
    checkpoint: str | None = None
    backend: str = "onnxruntime"
    ids: int | None = None
    compute: str = "float32"
    variant: str = "float32"
    compiled: bool = False
    tokenizer: str | None = None


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
        others: The same of other programs; see `noise.busy_machine` for what follows from both.
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


def artifact_candidate(name: str, folder: Path) -> Candidate:
    """An exported artifact as a candidate."""
    return Candidate(name, "artifact", str(folder))
