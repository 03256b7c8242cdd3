"""Environments of a shard that tell nothing: none of their images can be used, or all of them have one embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from invariclip.calibrate.data.pairs import SAME_DISTANCE
from invariclip.calibrate.data.stream.tally import ALIKE_HERE, EMPTY_HERE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from invariclip.calibrate.data.stream.tally import ProblemCounts


class Environments:
    """What has been seen of every environment: one row, how many there were, and whether any was another."""

    def __init__(self, names: Iterable[str]) -> None:
        """Starts with nothing seen of the environments that are listed."""
        self._first: dict[str, NDArray[np.float64] | None] = dict.fromkeys(names)
        self._counts = dict.fromkeys(self._first, 0)
        self._differ = dict.fromkeys(self._first, False)

    def add(self, name: str, row: NDArray[np.float64]) -> None:
        """Takes in the embedding of an image, [D], unit length."""
        first = self._first[name]
        if first is None:
            self._first[name] = row.copy()
        elif not self._differ[name]:
            self._differ[name] = bool(np.linalg.norm(row - first) > SAME_DISTANCE)
        self._counts[name] += 1

    def tell(self, tally: ProblemCounts) -> None:
        """Counts the environments that tell nothing."""
        counts = self._counts.items()
        tally.add(EMPTY_HERE, [name for name, count in counts if count == 0])
        tally.add(ALIKE_HERE, [name for name, count in counts if count > 1 and not self._differ[name]])
