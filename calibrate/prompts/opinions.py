"""What learned templates answer about images, on the host in float64: the same as the artifact's head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from invariclip.uncertainty import Fused, fuse, opinions

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CHUNK = 1 << 22
"""Cosines at a time."""


def fused_answers(
    vectors: NDArray[np.float64],
    bank: NDArray[np.float64],
    logit_scale: float,
    scale: NDArray[np.float64],
    bias: NDArray[np.float64],
    background: NDArray[np.float64],
) -> Fused:
    """All templates' opinions, fused.

    Args:
        vectors: float64 [N, d], unit length.
        bank: float64 [M + 1, K, d].
        logit_scale: τ.
        scale: a, [M + 1].
        bias: c, [M + 1].
        background: r, [M + 1].

    Returns:
        Belief and base rate [N, K], uncertainty [N].
    """
    step = max(_CHUNK // (bank.shape[0] * bank.shape[1]), 1)
    parts = []
    for start in range(0, len(vectors), step):
        cosines = np.einsum("nd,mkd->nmk", vectors[start : start + step], bank, optimize=True)
        parts.append(fuse(*opinions(cosines, logit_scale, scale, bias, background)))
    if not parts:
        return Fused(np.empty((0, bank.shape[1])), np.empty(0), np.empty((0, bank.shape[1])))
    return Fused(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("belief", "uncertainty", "base_rate"))
    )
