"""The range that a value's 256 levels cover: from its smallest to its largest number, or less where that errs less.

A few numbers far out make every level wider. Cutting them off costs those few and is finer for all the others; the
least mean squared error says how far to go (Banner et al., arXiv 1810.05723, section 2; searched here on a sample
instead of fitting a density).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEVELS = 255
SAMPLE = 1 << 18
"""Numbers of each value that are kept."""
_SHARES = np.linspace(1.0, 0.3, 36)
_TURNS = 3


class StreamSample:
    """Some rows of a stream of unknown length, spread evenly over it: never more than `SAMPLE` numbers."""

    def __init__(self) -> None:
        self._kept: list[NDArray[np.float32]] = []
        self._step = 1
        self._seen = 0

    def add(self, rows: NDArray[np.float32]) -> None:
        """Takes rows [n, K] in."""
        places = np.arange(-self._seen % self._step, len(rows), self._step)
        self._seen += len(rows)
        self._kept += [row.copy() for row in rows[places]]
        while len(self._kept) > max(1, SAMPLE // max(1, rows.shape[1])):
            self._kept = self._kept[::2]
            self._step *= 2

    @property
    def rows(self) -> NDArray[np.float32]:
        """float32 [k, K], what was kept."""
        return np.stack(self._kept)


def clipped(numbers: NDArray[np.float32], low: float, high: float) -> tuple[float, float]:
    """The range whose rounding errs least on these numbers, in the mean square.

    Args:
        numbers: A sample, of any shape.
        low: The smallest number that was seen at all, at most 0.
        high: The largest, at least 0.

    Returns:
        A range inside the given one; each end is moved in turn, the other being held.
    """
    flat = np.asarray(numbers, dtype=np.float32).ravel()
    ends = [low, high]
    best = _error(flat, low, high)
    for _ in range(_TURNS):
        before = best
        for end, whole in enumerate((low, high)):
            for share in _SHARES:
                tried = [whole * float(share) if place == end else ends[place] for place in (0, 1)]
                error = _error(flat, *tried)
                if error < best:
                    best, ends = error, tried
        if best == before:
            break
    return ends[0], ends[1]


def step(low: float, high: float) -> tuple[float, int]:
    """What one level is worth and which level is zero: zero is a level of its own, as padding and ReLU need."""
    scale = max((high - low) / LEVELS, 1e-12)
    return scale, int(np.clip(np.rint(-low / scale), 0, LEVELS))


def _error(numbers: NDArray[np.float32], low: float, high: float) -> float:
    scale, zero = step(low, high)
    levels = np.clip(np.rint(numbers / np.float32(scale)) + zero, 0, LEVELS)
    return float(np.square((levels - zero) * np.float32(scale) - numbers).mean())
