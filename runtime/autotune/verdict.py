"""Which of several timed candidates to take: the fastest, unless chance or next to nothing sets it apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.measure.statistics import interval
from invariclip.profile import Measurement, ProfileChoice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.autotune.candidates import TuneCandidate

MARGIN = 1.02
"""A gain that is not surely above this is none: machines drift by more from hour to hour."""


@dataclass(frozen=True)
class MeasuredCandidate:
    """A candidate at a batch size."""

    candidate: TuneCandidate
    batch: int

    @property
    def name(self) -> str:
        """How reports call it."""
        return f"{self.candidate.name}, batch {self.batch}"

    @property
    def preference(self) -> tuple[Any, ...]:
        """Smaller is better where speed says nothing."""
        return (*self.candidate.preference, self.batch)


@dataclass(frozen=True)
class Timed:
    """An entry's turns, paired round by round with those of the safe default.

    Attributes:
        entry: What ran.
        seconds: Median time of a batch in each round, float64 [rounds].
        ratios: Speed over the safe default's in the same round, float64 [rounds]: images per second, divided.
        stage: In which they were timed.
    """

    entry: MeasuredCandidate
    seconds: NDArray[np.float64]
    ratios: NDArray[np.float64]
    stage: int

    @property
    def ratio(self) -> float:
        """Median over rounds."""
        return float(np.median(self.ratios))

    def measurement(self) -> Measurement:
        """What a profile says of it."""
        low_ms, median_ms, high_ms = (float(value) for value in np.percentile(self.seconds * 1e3, [25, 50, 75]))
        low, high = interval(self.ratios)
        candidate, batch = self.entry.candidate, self.entry.batch
        return Measurement(
            ProfileChoice(candidate.variant, candidate.backend, candidate.threads, batch),
            candidate.claimed, self.stage,
            len(self.seconds), median_ms, low_ms, high_ms, batch / (median_ms / 1e3), self.ratio, low, high,
        )  # fmt: skip


def survivors(timed: Sequence[Timed], most: int) -> list[Timed]:
    """Who goes on to the next stage: the faster half, rounded up, and whoever is simpler and not surely slower.

    Args:
        timed: Of one stage, in any number of heats.
        most: Candidates that may go on.

    Returns:
        At least one if there is one, fastest first.
    """
    order = sorted(timed, key=lambda one: -one.ratio)
    half = -(-len(order) // 2)
    kept = order[:half] + [one for one in order[half:] if _may_be_taken(one, order[0])]
    allowed = list(dict.fromkeys(one.entry.candidate for one in kept))[: max(1, most)]
    return [one for one in kept if one.entry.candidate in allowed]


def _may_be_taken(one: Timed, fastest: Timed) -> bool:
    rounds = min(len(one.ratios), len(fastest.ratios))
    low, _ = interval(fastest.ratios[:rounds] / one.ratios[:rounds])
    return one.entry.preference < fastest.entry.preference and low <= MARGIN


def decide(finalists: Sequence[Timed]) -> tuple[Timed, str]:
    """The one to take, and why in words.

    The fastest is held against each other one round by round. Where the 95 % interval of its gain reaches below
    `MARGIN`, chance may have set them apart: then the one that is closer to the checkpoint is taken, then the one of
    fewer threads, of the default engine, of float32, of the smaller batch.

    Args:
        finalists: Timed in the same rounds, at least one.
    """
    fastest = max(finalists, key=lambda one: one.ratio)
    gains = {one.entry: interval(fastest.ratios / one.ratios) for one in finalists}
    tied = [one for one in finalists if one is fastest or gains[one.entry][0] <= MARGIN]
    taken = min(tied, key=lambda one: one.entry.preference)
    low, high = interval(taken.ratios)
    speed = f"{taken.ratio:.2f} × the safe default ({low:.2f} to {high:.2f})"
    if taken is not fastest:
        low, high = gains[taken.entry]
        return taken, (
            f"{speed}; {fastest.entry.name} was {float(np.median(fastest.ratios / taken.ratios)):.2f} × as fast "
            f"({low:.2f} to {high:.2f}): not surely a gain, and it is less close or less simple"
        )
    if len(tied) > 1:
        return taken, f"{speed}; within noise of {len(tied) - 1} other(s), and the closest and simplest of them"
    return taken, f"{speed}; the fastest"
