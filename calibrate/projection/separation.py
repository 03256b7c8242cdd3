"""How far right answers are from wrong ones: what tells candidates apart that answer equally many questions right.

An environment that is left out can be so easy that several candidates answer everything in it. Their accuracy then says
nothing of one that is met later and differs by more; how clearly they answer does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LEAST = 1e-6
"""The least spread, as a share of the mean: margins may all be one."""


def margins(scores: NDArray[np.floating[Any]], places: NDArray[np.int64]) -> NDArray[np.float64]:
    """By how much the right class's score exceeds the best of all others, float64 [N].

    Args:
        scores: [N, K], K at least 2.
        places: int64 [N], the column of the right class.
    """
    rows = np.arange(len(scores))
    others = np.array(scores, dtype=np.float64)
    own = others[rows, places].copy()
    others[rows, places] = -np.inf
    return np.asarray(own - others.max(axis=1))


def separation(found: NDArray[np.float64]) -> float:
    """How many standard deviations the mean margin lies above zero: of normal margins, Φ(-that) would be wrong.

    It is a ratio, so it does not grow as a projection spreads all embeddings.

    Args:
        found: float64 [N], margins; 0 for none.
    """
    if not len(found):
        return 0.0
    mean, spread = float(np.mean(found)), float(np.std(found))
    return mean / max(spread, _LEAST * abs(mean)) if mean else 0.0
