"""What sources give: shards, which are read as blocks of rows.

A shard is the unit of accounting: it counts whole or not at all, and by its digest only once. A block is the unit of
memory: the embeddings that are held at a time. `BlockBuilder` cuts points and pairs into blocks, `ties_of` says which
pairs share members, and stamps detect files that changed after the shards were listed.
"""

from __future__ import annotations

import hashlib
import json
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.calibrate.data.encoders import Encoder
    from invariclip.calibrate.data.problems import ProblemCounts

POINTS = "points"
"""The part that Σ is made of; all others are kinds of pairs."""
NATURAL = "natural"
INTERVENTIONS = "interventions"
TEXTS = "texts"
"""Parts of a source: each counts the same, however many pairs it has."""
Tie = tuple[int, int, int]
"""The numbers of a pair's two members and of the thing that both show, see `RowBlock.ties`."""
BLOCK_ROWS = 4096
"""Rows of a block at most."""


class _Pair(NamedTuple):
    first: NDArray[np.float64]
    second: NDArray[np.float64]
    weight: float
    name: str
    tie: Tie | None


class BlockBuilder:
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


def ties_of(pairs: Sequence[tuple[Hashable, Hashable]]) -> list[Tie]:
    """Ties of pairs whose things are not named: members that pairs link, directly or not, count as one thing.

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


def stamp(path: Path) -> list[int]:
    """Size in bytes and time of change in nanoseconds; empty for what is missing or no regular file."""
    try:
        facts = path.stat()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return []
    return [facts.st_size, facts.st_mtime_ns] if stat.S_ISREG(facts.st_mode) else []


def require_file(path: Path) -> list[int]:
    """The stamp of a file that must be there.

    Raises:
        InputError: It is not.
    """
    facts = stamp(path)
    if not facts:
        raise InputError(f"{path}: no such file")
    return facts


def require_encoder(source: str, encoder: Encoder | None, what: str = "images") -> Encoder:
    """The encoder of a source that holds no embeddings.

    Raises:
        InputError: There is none.
    """
    if encoder is None:
        raise InputError(f"{source}: {what} need an encoder; name a checkpoint")
    return encoder


@contextmanager
def unchanged(files: Iterable[tuple[Path, Sequence[int]]]) -> Iterator[None]:
    """Makes sure that files are what was listed, before and after they are read: a shard's digest tells what it holds.

    Args:
        files: Paths and their stamps.

    Raises:
        InputError: A file was changed or replaced.
    """
    listed = [(path, list(file_stamp)) for path, file_stamp in files]
    _require_unchanged(listed, "since the shards were listed")
    opened = [_identity(path) for path, _ in listed]
    yield
    _require_unchanged(listed, "while it was read")
    for (path, _), before in zip(listed, opened, strict=True):
        if _identity(path) != before:
            raise InputError(f"{path}: was replaced while it was read; start again, what is done is kept")


def _require_unchanged(files: Iterable[tuple[Path, list[int]]], when: str) -> None:
    for path, file_stamp in files:
        if stamp(path) != file_stamp:
            raise InputError(f"{path}: has changed {when}; start again, what is done is kept")


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file a name stands for here; a copy of it elsewhere is another one, so it is no part of a stamp."""
    try:
        facts = path.stat()
    except (OSError, ValueError):
        return None
    return facts.st_dev, facts.st_ino


@dataclass(frozen=True)
class Shard:
    """A part of a source that is read in one go.

    Attributes:
        source: Its source's name.
        name: What a person knows it by, such as `photos.tar` or `a.npy[0:65536]`.
        spec: All that reading it needs and all that its content depends on (paths, ranges, sizes and times of files,
            seeds), JSON-ready: what changes a shard changes its digest.
    """

    source: str
    name: str
    spec: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that name the shard."""
        text = json.dumps([self.source, self.spec], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class RowNames(Protocol):
    """Names of rows: a tuple or list, or something that makes them on demand."""

    def __len__(self) -> int:
        """As many as there are rows, or none."""

    def __getitem__(self, place: int, /) -> str:
        """The name of one."""


@dataclass(frozen=True)
class RowBlock:
    """Rows to take into the moments. They need not have unit length; zero and non-finite rows are left out and counted.

    Attributes:
        points: [n, D], of which Σ is made; None for none.
        first: [p, D], the first members of pairs; None for none.
        second: [p, D], the second ones.
        weights: float64 [p], of the pairs; None for one each.
        ties: int64 [p, 3], numbers within the shard of a pair's two members and of the thing that both show: of k
            images of one thing at most k - 1 pairs are independent. None where no two pairs share a member.
        part: What kind of pairs they are, such as `natural`: each kind of a source counts the same, see `MomentsState`.
        point_names: What each point is, for the summary of problems; a number of the row where it is empty.
        pair_names: Likewise for pairs.
    """

    points: NDArray[np.floating[Any]] | None = None
    first: NDArray[np.floating[Any]] | None = None
    second: NDArray[np.floating[Any]] | None = None
    weights: NDArray[np.float64] | None = None
    ties: NDArray[np.int64] | None = None
    part: str = "pairs"
    point_names: RowNames = ()
    pair_names: RowNames = ()


class PairSource(Protocol):
    """Where pairs come from.

    Attributes:
        name: Unique within a plan; stands in summaries and in the moments' parts.
        weight: What its pairs count in all, beside other sources.
        needs_encoder: Whether it holds images or texts, rather than embeddings.
    """

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def weight(self) -> float:
        """What its pairs count in all."""

    @property
    def needs_encoder(self) -> bool:
        """Whether reading it takes an encoder."""

    def shards(self) -> Sequence[Shard]:
        """All of its shards, in an order that does not change; files are looked at, not read.

        Raises:
            InputError: Something that it names is missing or cannot be used.
        """

    def read(self, shard: Shard, encoder: Encoder | None, tally: ProblemCounts) -> Iterator[RowBlock]:
        """The shard's rows, at most `BLOCK_ROWS` a block.

        The same shard gives the same blocks at every reading, whatever was read before it. What cannot be used (a file
        that cannot be decoded) is left out and counted; a shard that cannot be read at all raises.

        Raises:
            InputError: The shard cannot be read.
        """
