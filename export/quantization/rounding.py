"""Weights to eight bits: to the nearest level, or by GPTQ; and SmoothQuant, which moves outliers of a value into them.

GPTQ (Frantar et al., arXiv 2210.17323, algorithm 1): the columns are rounded one after the other, and each one's error
is made up for by those that are not rounded yet, weighed by the second moments of the layer's input.

SmoothQuant (Xiao et al., arXiv 2211.10438, equation 4): a few channels that are far larger than the others leave few of
eight bits to the rest. x W = (x / s)(s W) exactly, with s_j = peak(x_j)^α / peak(W_j)^(1-α) for channel j: the
difficulty goes from the value, which has one scale, to the weights, which have one for each output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

WEIGHT_LEVELS = 127
"""Symmetric: -127 to 127, so that a weight and its negative round alike."""
_DAMPING = 0.01
"""Share of the mean diagonal that is added to it, as in the paper (section 3.3)."""
_BLOCK = 128
_FLOOR = 1e-5


def scales_of(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 [N], what one level of each output channel is worth: its largest |weight| is level 127.

    Args:
        weights: float32 [K, N].
    """
    peaks = np.abs(weights).max(axis=0)
    return np.where(peaks > 0, peaks / WEIGHT_LEVELS, 1).astype(np.float32)


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
    return np.asarray(np.clip(np.rint(weights / scales), -WEIGHT_LEVELS, WEIGHT_LEVELS), dtype=np.int8)


def factors(peaks: NDArray[np.float32], weights: Sequence[NDArray[np.float32]], alpha: float) -> NDArray[np.float32]:
    """float32 [K], s: what each channel of the value is divided by.

    Args:
        peaks: float32 [K], the largest |number| of each channel.
        weights: Every matrix [K, N] that the value is multiplied with.
        alpha: 0 leaves the difficulty to the value, 1 gives all of it to the weights.
    """
    met = np.max([np.abs(one).max(axis=1) for one in weights], axis=0)
    s = np.maximum(peaks, _FLOOR) ** alpha / np.maximum(met, _FLOOR) ** (1 - alpha)
    # only ratios between channels matter; a mean of one keeps numbers in the range that they had
    return np.asarray(s / np.exp(np.mean(np.log(s))), dtype=np.float32)
