"""Accuracy by zero-shot and by class prototypes, per environment, with bootstrap intervals over concepts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from invariclip.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Scores: TypeAlias = "NDArray[np.bool_] | NDArray[np.float64]"

RESAMPLES = 2000
LEVEL = 0.95
_CHUNK = 4096
"""Queries compared with the classes at a time: K classes cost K·8·4096 bytes."""


@dataclass(frozen=True)
class AccuracyInterval:
    """An estimate in percent (or percentage points) and its bootstrap interval at `LEVEL`."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """Rounded to a thousandth of a point."""
        return {"value": round(self.value, 3), "low": round(self.low, 3), "high": round(self.high, 3)}


def zero_shot(
    images: NDArray[np.floating[Any]], labels: NDArray[np.int64], bank: NDArray[np.floating[Any]]
) -> NDArray[np.bool_]:
    """Which images' nearest class embedding, by cosine, is their own (CLIP-ICM, the predictor).

    Args:
        images: [N, d], unit length, projected if there is a projection.
        labels: int64 [N], rows of the bank.
        bank: [K, d], unit length, in the same space.

    Returns:
        bool [N].
    """
    correct = np.empty(len(images), dtype=np.bool_)
    for start in range(0, len(images), _CHUNK):
        part = slice(start, start + _CHUNK)
        correct[part] = np.argmax(images[part] @ bank.T, axis=1) == labels[part]
    return correct


def prototypes(
    support: NDArray[np.floating[Any]],
    support_labels: NDArray[np.int64],
    queries: NDArray[np.floating[Any]],
    labels: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Which queries are nearest, by cosine, to the mean of their own class's support images.

    Args:
        support: [M, d], unit length.
        support_labels: int64 [M].
        queries: [N, d], unit length.
        labels: int64 [N]; a query whose class has no support counts as wrong.

    Returns:
        bool [N].

    Raises:
        InputError: There is no support.
    """
    classes, bank = prototype_bank(support, support_labels)
    place = np.searchsorted(classes, labels)
    known = np.isin(labels, classes)
    return zero_shot(queries, np.where(known, place, -1), bank)


def prototype_bank(
    support: NDArray[np.floating[Any]], support_labels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The means of classes, at unit length.

    Args:
        support: [M, d], unit length.
        support_labels: int64 [M].

    Returns:
        int64 [K], the classes in ascending order, and float64 [K, d].

    Raises:
        InputError: There is no support.
    """
    if not len(support):
        raise InputError("class prototypes need support images, and there are none")
    order = np.argsort(support_labels, kind="stable")
    classes, starts = np.unique(support_labels[order], return_index=True)
    sums = np.add.reduceat(support[order].astype(np.float64), starts, axis=0)
    # Opposite images may cancel to a zero mean; such a class then never wins.
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return classes, np.divide(sums, lengths, out=np.zeros_like(sums), where=lengths > 0)


def unit(vectors: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Rows scaled to length 1."""
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), dtype=np.float64)


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
