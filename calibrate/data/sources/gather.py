"""Rows and pairs as they come, cut into blocks of bounded size."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from invariclip.calibrate.data.stream.blocks import BLOCK_ROWS, RowBlock

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from invariclip.calibrate.data.sources.ties import Tie

NATURAL = "natural"
INTERVENTIONS = "interventions"
TEXTS = "texts"
"""Parts of a source: each counts the same, however many pairs it has."""


class _Pair(NamedTuple):
    first: NDArray[np.float64]
    second: NDArray[np.float64]
    weight: float
    name: str
    tie: Tie | None


class Gather:
    """Collects points and pairs, and gives them as blocks of at most `BLOCK_ROWS`."""

    def __init__(self) -> None:
        self._points: list[tuple[NDArray[np.float64], str]] = []
        self._pairs: dict[str, list[_Pair]] = {}

    def point(self, row: NDArray[np.float64], name: str) -> None:
        """Adds a point, [D]."""
        self._points.append((row, name))

    def pair(
        self,
        part: str,
        first: NDArray[np.float64],
        second: NDArray[np.float64],
        weight: float,
        name: str,
        tie: Tie | None = None,
    ) -> None:
        """Adds a pair, [D] each, to a part, all of whose pairs have a tie or none."""
        self._pairs.setdefault(part, []).append(_Pair(first, second, weight, name, tie))

    def full(self) -> Iterator[RowBlock]:
        """The blocks that are full; call it after every few rows, so that no more than they are held."""
        while len(self._points) >= BLOCK_ROWS:
            yield _of_points(self._points[:BLOCK_ROWS])
            del self._points[:BLOCK_ROWS]
        for part, pairs in self._pairs.items():
            while len(pairs) >= BLOCK_ROWS:
                yield _of_pairs(part, pairs[:BLOCK_ROWS])
                del pairs[:BLOCK_ROWS]

    def rest(self) -> Iterator[RowBlock]:
        """All that is left, part by part."""
        yield from self.full()
        if self._points:
            yield _of_points(self._points)
        yield from (_of_pairs(part, pairs) for part, pairs in self._pairs.items() if pairs)


def _of_points(points: Sequence[tuple[NDArray[np.float64], str]]) -> RowBlock:
    return RowBlock(points=np.stack([row for row, _ in points]), point_names=[name for _, name in points])


def _of_pairs(part: str, pairs: Sequence[_Pair]) -> RowBlock:
    ties = [pair.tie for pair in pairs if pair.tie is not None]
    return RowBlock(
        first=np.stack([pair.first for pair in pairs]),
        second=np.stack([pair.second for pair in pairs]),
        weights=np.asarray([pair.weight for pair in pairs]),
        ties=np.asarray(ties, dtype=np.int64) if ties else None,
        part=part,
        pair_names=[pair.name for pair in pairs],
    )
