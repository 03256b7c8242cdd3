"""What flows through a calibration of any size: sources are cut into shards, and a shard is read as blocks of rows.

A shard is the unit of accounting: it is counted whole or not at all, and by its digest never twice. A block is the
unit of memory: as many embeddings as are held at a time.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from invariclip.calibrate.data.encoder import Encoder
    from invariclip.calibrate.data.stream.tally import ProblemCounts

BLOCK_ROWS = 4096
"""Rows of a block at most."""


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
    """Names of rows: a tuple or list, or something that makes them when they are asked for."""

    def __len__(self) -> int:
        """As many as there are rows, or none."""

    def __getitem__(self, place: int, /) -> str:
        """The name of one."""


@dataclass(frozen=True)
class RowBlock:
    """Rows to take into the moments. They need not have unit length; what is not finite or zero is left out and told.

    Attributes:
        points: [n, D], of which Σ is made; None for none.
        first: [p, D], the first members of pairs; None for none.
        second: [p, D], the second ones.
        weights: float64 [p], of the pairs; None for one each.
        ties: int64 [p, 3], numbers within the shard of a pair's two members and of the thing that both show: of k
            images of one thing at most k - 1 pairs are independent. None where no two pairs share a member.
        part: What kind of pairs they are, such as `natural`: each kind of a source counts the same, see `State`.
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
        that cannot be decoded) is left out and told to the tally; a shard that cannot be read at all raises.

        Raises:
            InputError: The shard cannot be read.
        """
