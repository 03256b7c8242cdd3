"""Which pairs share members: k images of one thing make k(k-1)/2 pairs, and no more than k - 1 independent ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

Tie = tuple[int, int, int]
"""The numbers of a pair's two members and of the thing that both show, see `Block.ties`."""


def ties_of(pairs: Sequence[tuple[Hashable, Hashable]]) -> list[Tie]:
    """Ties of pairs of which nobody says what they show: what pairs link, directly or not, counts as one thing.

    Of k members that are linked exactly k - 1 differences are linearly independent: they are the rows of a connected
    graph's incidence matrix, whose rank that is.

    Args:
        pairs: Whatever names the two members of each.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    numbers: dict[Hashable, int] = {}
    edges = [tuple(numbers.setdefault(name, len(numbers)) for name in pair) for pair in pairs]
    if not edges:
        return []
    first, second = np.asarray(edges).T
    graph = coo_array((np.ones(len(edges)), (first, second)), shape=(len(numbers), len(numbers)))
    _, things = connected_components(graph, directed=False)
    return [(int(a), int(b), int(things[a])) for a, b in zip(first, second, strict=True)]
