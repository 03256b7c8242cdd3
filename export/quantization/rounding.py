"""Weights to eight bits: to the nearest, or so that what flows through them changes least.

The second is GPTQ (Frantar et al., arXiv 2210.17323, algorithm 1): the columns are rounded one after the other, and
each one's error is made up for by those that are not rounded yet, weighed by the second moments of the layer's input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEVELS = 127
"""Symmetric: -127 to 127, so that a weight and its negative round alike."""
_DAMPING = 0.01
"""Share of the mean diagonal that is added to it, as in the paper (section 3.3)."""
_BLOCK = 128


def scales_of(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 [N], what one level of each output channel is worth: its largest |weight| is level 127.

    Args:
        weights: float32 [K, N].
    """
    peaks = np.abs(weights).max(axis=0)
    return np.where(peaks > 0, peaks / LEVELS, 1).astype(np.float32)


def nearest(weights: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 [K, N] and float32 [N]: each weight at its nearest level."""
    scales = scales_of(weights)
    return _levels(weights, scales), scales


def sharing(moments: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 [K, K]: row k says how the error of input channel k is shared out among those after it.

    The upper Cholesky factor of the inverse of the damped moments (the paper's section 3.3, step 3); all products that
    read one value have it in common.

    Args:
        moments: float32 [K, K], Σ x xᵀ of the inputs, on any scale.
    """
    spread = moments.astype(np.float64)
    average = float(np.diag(spread).mean())
    spread[np.diag_indices(len(spread))] += _DAMPING * average if average > 0 else 1.0
    # chol(A⁻¹)ᵀ without the inverse: reversing rows and columns turns a lower factor of A into an upper one
    lower = np.linalg.cholesky(spread[::-1, ::-1])
    return np.asarray(np.linalg.inv(lower)[::-1, ::-1], dtype=np.float32)


def compensated(
    weights: NDArray[np.float32], shares: NDArray[np.float32]
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 [K, N] and float32 [N]: rounded so that E|xW - xŴ|² over the inputs x is small.

    Args:
        weights: float32 [K, N].
        shares: float32 [K, K], from `sharing`.
    """
    scales, size = scales_of(weights), len(weights)
    left = weights.astype(np.float32)
    chosen = np.empty(weights.shape, dtype=np.int8)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        errors = np.empty((stop - start, weights.shape[1]), dtype=np.float32)
        for place in range(start, stop):
            chosen[place] = _levels(left[place], scales)
            errors[place - start] = (left[place] - chosen[place] * scales) / shares[place, place]
            left[place + 1 : stop] -= np.outer(shares[place, place + 1 : stop], errors[place - start])
        left[stop:] -= shares[start:stop, stop:].T @ errors
    return chosen, scales


def _levels(weights: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.int8]:
    return np.asarray(np.clip(np.rint(weights / scales), -LEVELS, LEVELS), dtype=np.int8)
