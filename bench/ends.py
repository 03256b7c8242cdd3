"""What the end of a graph costs in place: a tower runs, then the end alone, on what the tower left in the caches.

Two whole graphs in two processes differ by a few percent for no other reason than where their weights lie in memory,
which no number of rounds averages away. An end of a percent is told apart only beside one and the same tower.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.backends.threads import available_threads
from invariclip.bench.candidates import Candidate
from invariclip.bench.process import Worker
from invariclip.bench.summary import Interval, median_of_rounds
from invariclip.console import silent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from invariclip.bench.engines import Opened
    from invariclip.console import Progress

EMBEDDING_INPUT = "x"
_WARM = 2


@dataclass(frozen=True)
class EndCost:
    """What one end takes at one batch size.

    Attributes:
        name: The end's.
        batch: Rows.
        tower_ms: Median of the tower before it.
        end_ms: Median of the end alone.
        over: Tower and this end, over tower and the first end; 1.01 is one percent more. The median over processes.
    """

    name: str
    batch: int
    tower_ms: float
    end_ms: float
    over: Interval


def time_ends(opened: Opened, question: Mapping[str, Any]) -> dict[str, Any]:
    """In the worker: the tower, then one end on its embedding; ends take turns.

    Args:
        opened: The tower; it answers embeddings.
        question: `ends` (name to file), `backend`, `threads`, `batch`, `repetitions`.

    Returns:
        `tower` and `end`: seconds of each repetition, by end.
    """
    from invariclip.backends import open_backend

    engines = {
        name: open_backend(question["backend"], Path(file), threads=question["threads"])
        for name, file in question["ends"].items()
    }
    batch, names = opened.make(question["batch"]), list(engines)
    taken: dict[str, dict[str, list[float]]] = {part: {name: [] for name in names} for part in ("tower", "end")}
    for repetition in range(question["repetitions"] + _WARM):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            embedding = np.asarray(opened.run(batch))
            between = time.perf_counter()
            engines[name].run({EMBEDDING_INPUT: embedding})
            end = time.perf_counter()
            if repetition >= _WARM:
                taken["tower"][name].append(between - start)
                taken["end"][name].append(end - between)
    return taken


def measure_ends(
    tower: Path,
    ends: Mapping[str, Path],
    backend: str,
    *,
    batches: Sequence[int],
    processes: int,
    repetitions: Mapping[int, int],
    threads: int | None = None,
    progress: Progress = silent,
) -> list[EndCost]:
    """Times ends behind a tower, in several processes one after the other.

    Args:
        tower: A graph of uint8 pixels to `embedding`.
        ends: Graphs of `EMBEDDING_INPUT` to answers; the first is what the others are compared with.
        backend: Of all.
        batches: Rows.
        processes: How many; each has its weights elsewhere.
        repetitions: Of every end in every process, by batch.
        threads: None takes what this process may use.
        progress: Wraps the processes.

    Raises:
        CandidateError: A process stopped.
    """
    count = threads or available_threads()
    question = {"do": "ends", "ends": {name: str(path) for name, path in ends.items()}, "backend": backend}
    answers: dict[int, list[dict[str, Any]]] = {batch: [] for batch in batches}
    for _ in progress(range(processes), total=processes, desc=f"{backend}, ends in place"):
        with Worker(Candidate("tower", "graph", str(tower), backend=backend), count) as worker:
            for batch in batches:
                asked = {**question, "threads": count, "batch": batch, "repetitions": repetitions[batch]}
                answers[batch].append(worker.ask(asked))
    return [cost for batch in batches for cost in costs(answers[batch], batch)]


def costs(answers: Sequence[Mapping[str, Any]], batch: int) -> list[EndCost]:
    """What several processes' times say of every end.

    Args:
        answers: Of `time_ends`, one a process.
        batch: Rows.
    """
    names = list(answers[0]["end"])
    found = []
    for name in names:
        shares = []
        for answer in answers:
            # The same tower for both: its own drift is no part of an end
            bare = np.median(np.concatenate([answer["tower"][one] for one in names]))
            mine, first = (np.median(answer["end"][one]) for one in (name, names[0]))
            shares.append((bare + mine) / (bare + first))
        tower, end = (np.median(np.concatenate([one[part][name] for one in answers])) for part in ("tower", "end"))
        found.append(EndCost(name, batch, float(tower) * 1e3, float(end) * 1e3, median_of_rounds(shares)))
    return found
