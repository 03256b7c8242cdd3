"""The invariance gap: how far interventions and environments move embeddings, beside how far apart they are anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CHUNK = 8192


def invariance_gap(first: NDArray[np.floating[Any]], second: NDArray[np.floating[Any]]) -> float:
    """How far interventions move embeddings, as a share of how far apart two images are anyway.

    Mean (1 - cos) of pairs, divided by the mean (1 - cos) of the first members with one another: 0 is invariance, 1 is
    that a changed image is as far away as another image. Without the division a projection that pushes all
    embeddings together would look invariant.

    Args:
        first: [P, d], unit length.
        second: [P, d], unit length.

    Raises:
        InputError: There are fewer than two pairs, or all first members are one.
    """
    if len(first) < 2:
        raise InputError(f"the invariance gap needs two pairs or more, and there are {len(first)}")
    total, count = apart(first, np.arange(len(first)))
    if total <= 0:
        raise InputError("all images have one embedding: there is no distance to measure the gap by")
    return float(np.mean(moved(first, second))) / (total / count)


def moved(first: NDArray[np.floating[Any]], second: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """1 - cos of the two members of every pair, float64 [P].

    Args:
        first: [P, d], unit length.
        second: [P, d], unit length.
    """
    distances = np.empty(len(first))
    for start in range(0, len(first), _CHUNK):
        part = slice(start, start + _CHUNK)
        distances[part] = 1 - np.einsum("nd,nd->n", first[part], second[part])
    return distances


def apart(vectors: NDArray[np.floating[Any]], groups: NDArray[np.int64]) -> tuple[float, float]:
    """1 - cos over all ordered pairs of rows of different groups: their sum, and how many they are, by sums alone.

    Args:
        vectors: [N, d], unit length.
        groups: int64 [N]; every row one of its own for all pairs of different rows, classes for pairs of two classes.
    """
    names, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    sums = np.zeros((len(names), vectors.shape[1]))
    np.add.at(sums, codes, vectors)
    count = float(len(vectors) ** 2 - (sizes**2).sum())
    return count - float((sums.sum(axis=0) ** 2).sum() - (sums**2).sum()), count
