"""Accuracies with bootstrap intervals: concepts are drawn again, and both sides of a difference from the same draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from invariclip.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Scores: TypeAlias = "NDArray[np.bool_] | NDArray[np.float64]"
RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class AccuracyInterval:
    """An estimate in percent (or percentage points) and its bootstrap interval at `LEVEL`."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """Rounded to a thousandth of a point."""
        return {"value": round(self.value, 3), "low": round(self.low, 3), "high": round(self.high, 3)}


class Bootstrap:
    """Accuracies per environment and their mean, resampled by concept.

    Images of one concept succeed and fail together across styles, so concepts are what is drawn with replacement;
    the same draws serve every candidate, which makes differences paired.
    """

    def __init__(
        self,
        concepts: NDArray[np.int64],
        environments: NDArray[np.int64],
        *,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> None:
        """Draws the resamples.

        Args:
            concepts: int64 [N], the concept of every scored image.
            environments: int64 [N], its environment.
            resamples: How many.
            seed: Of the draws.

        Raises:
            InputError: There is nothing to score.
        """
        if not len(concepts):
            raise InputError("there is no image to score")
        self.codes, self._environment = np.unique(environments, return_inverse=True)
        names, self._concept = np.unique(concepts, return_inverse=True)
        self._shape = (len(names), len(self.codes))
        rng = np.random.default_rng(seed)
        draws = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
        # Row 0 is the data as they are, so that estimates and intervals come out of one product.
        self._weights = np.concatenate([np.ones((1, len(names))), draws])
        self._counts = self._weights @ self._sum(np.ones(len(concepts)))

    def _sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        total = np.zeros(self._shape)
        np.add.at(total, (self._concept, self._environment), values)
        return total

    def samples(self, correct: Scores) -> NDArray[np.float64]:
        """Percent right, [1 + resamples, environments + 1]: row 0 as observed, the last column the environments' mean.

        Args:
            correct: bool [N], or shares of right answers from 0 to 1.
        """
        right = self._weights @ self._sum(correct.astype(np.float64))
        # A resample may hold no concept of a sparse environment: it then does not enter that environment's interval.
        share = np.divide(100 * right, self._counts, out=np.full_like(right, np.nan), where=self._counts > 0)
        return np.concatenate([share, np.nanmean(share, axis=1, keepdims=True)], axis=1)

    def mean(self, correct: Scores) -> float:
        """Percent right as observed, the mean over environments."""
        return float(self.samples(correct)[0, -1])

    def intervals(self, correct: Scores, baseline: Scores | None = None) -> list[AccuracyInterval]:
        """Accuracy, or its paired difference to `baseline`, per environment (in code order) and, last, their mean."""
        samples = self.samples(correct)
        if baseline is not None:
            samples = samples - self.samples(baseline)
        tail = 100 * (1 - LEVEL) / 2
        low, high = np.nanpercentile(samples[1:], [tail, 100 - tail], axis=0)
        return [AccuracyInterval(float(v), float(a), float(b)) for v, a, b in zip(samples[0], low, high, strict=True)]

    def standard_error(self, correct: Scores, baseline: Scores | None = None) -> float:
        """Standard error, in points, of the mean over environments, or of its paired difference to `baseline`."""
        mean = self.samples(correct)[1:, -1]
        if baseline is not None:
            mean = mean - self.samples(baseline)[1:, -1]
        return float(np.nanstd(mean))
