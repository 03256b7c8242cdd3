"""Outliers of a value moved into the weights that it meets: SmoothQuant (Xiao et al., arXiv 2211.10438, equation 4).

A few channels that are far larger than the others leave few of eight bits to the rest. x W = (x / s)(s W) exactly, with
s_j = peak(x_j)^α / peak(W_j)^(1-α) for channel j: the difficulty goes from the value, which has one scale, to the
weights, which have one for each output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_FLOOR = 1e-5


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
