"""Whether a machine was too busy for what was timed on it to mean anything, in words that any command can print."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from invariclip.bench.latency.machine import MOST_OTHERS, MOST_STEAL
from invariclip.bench.latency.summary import FEWEST_ROUNDS, WIDEST

if TYPE_CHECKING:
    from collections.abc import Sequence

    from invariclip.bench.latency.candidates import Timing

LOADS = (
    ("steal", MOST_STEAL, "went to other machines of this host (steal time)"),
    ("others", MOST_OTHERS, "went to other programs on this machine"),
)
"""Field of a round, the share above which timings mean little, and what it is in words."""


def mean_load(shares: Sequence[float | None]) -> float | None:
    """The mean over rounds of a share of processor time; None where the system tells none."""
    known = [share for share in shares if share is not None]
    return float(np.mean(known)) if known else None


def busy_machine(timings: Sequence[Timing]) -> str | None:
    """Why the ratios of timings cannot be trusted, in one line; None where nothing speaks against them.

    Three things do: processor time that went to other machines of the host or to other programs, above the bounds of
    `machine`; and rounds that disagree, so that a ratio's interval is wider than `summary.WIDEST` of it.

    Args:
        timings: What `latency.measure` gave; the first of a batch size is the yardstick, whose ratio is 1.
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
