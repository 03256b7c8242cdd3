"""What turns say: percentiles, ratios with intervals, and whether rounds agree enough for a conclusion.

Turns are lists of times, one list a round. A ratio compares turns of the same round, because machines drift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

WIDEST = 0.20
"""A ratio whose 95 % interval is wider than this share of it decides nothing."""
FEWEST_ROUNDS = 3
"""Of fewer rounds no interval can be told."""
_DRAWS = 2000


@dataclass(frozen=True)
class MeasuredInterval:
    """A figure and its 95 % interval.

    Attributes:
        value: The figure.
        low: Lower end.
        high: Upper end.
        rounds: How many rounds it is the median of.
    """

    value: float
    low: float
    high: float
    rounds: int

    @property
    def width(self) -> float:
        """The interval's width as a share of the figure."""
        return (self.high - self.low) / self.value

    @property
    def decides(self) -> bool:
        """Whether there were enough rounds and they agree."""
        return self.rounds >= FEWEST_ROUNDS and self.width <= WIDEST

    def to_json(self) -> dict[str, Any]:
        """The fields, and what follows from them."""
        return {"value": self.value, "low": self.low, "high": self.high, "rounds": self.rounds, "decides": self.decides}


def interval(rounds: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median of float64 [rounds], rounds being what is drawn."""
    draws = np.random.default_rng(seed).integers(0, len(rounds), (_DRAWS, len(rounds)))
    low, high = np.percentile(np.median(rounds[draws], axis=1), [2.5, 97.5])
    return float(low), float(high)


def median_of_rounds(values: ArrayLike, seed: int = 0) -> MeasuredInterval:
    """The median over rounds with its `interval`.

    Args:
        values: [rounds], one or more figures above zero.
        seed: Of the draws.

    Raises:
        InputError: There is none, or one is not a number above zero.
    """
    rounds = np.asarray(values, dtype=np.float64)
    if rounds.ndim != 1 or not rounds.size or not (np.isfinite(rounds) & (rounds > 0)).all():
        raise InputError(f"{rounds.size} rounds of shape {list(rounds.shape)} are no list of figures above zero")
    return MeasuredInterval(float(np.median(rounds)), *interval(rounds, seed), len(rounds))


def ratio(first: Sequence[Sequence[float]], other: Sequence[Sequence[float]], seed: int = 0) -> MeasuredInterval:
    """How many times as fast `other` is as `first`: medians of the same round compared, the median over rounds.

    Args:
        first: Times of the yardstick, a list per round.
        other: Times of the candidate, as many rounds.
        seed: Of the bootstrap.

    Raises:
        InputError: They are not of the same rounds, or one of them is empty.
    """
    if len(first) != len(other):
        raise InputError(f"{len(first)} rounds cannot be compared with {len(other)}; both need the same ones")
    return median_of_rounds(round_medians(first) / round_medians(other), seed)


def round_medians(turns: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """The median time of each round, [rounds].

    Raises:
        InputError: A round has no time.
    """
    if any(not len(turn) for turn in turns):
        raise InputError("a round without a single time has no median")
    return np.array([np.median(turn) for turn in turns], dtype=np.float64)


def percentiles(turns: Sequence[Sequence[float]]) -> dict[str, float]:
    """`p50`, `p95` and `p99` over every time of every round, in the times' own unit.

    Raises:
        InputError: There is no time at all.
    """
    if not any(len(turn) for turn in turns):
        raise InputError("no time was measured, so there is no percentile")
    times = np.concatenate([np.asarray(turn, dtype=np.float64) for turn in turns])
    return {f"p{share}": float(np.percentile(times, share)) for share in (50, 95, 99)}


def spread(turns: Sequence[Sequence[float]]) -> float:
    """How far rounds are apart: the slowest round's median over the fastest's, less one; 0 where all are alike."""
    medians = round_medians(turns)
    return float(medians.max() / medians.min() - 1)


def mean_load(shares: Sequence[float | None]) -> float | None:
    """The mean over rounds of a share of processor time; None where the system tells none."""
    known = [share for share in shares if share is not None]
    return float(np.mean(known)) if known else None
