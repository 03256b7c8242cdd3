"""Shards → moments, one after another, saved on the way; a killed run resumes to the same bits.

Sums are added in the order of the plan, and a state holds whole shards only, so a resumed run adds the very same
numbers in the same order as an uninterrupted one.

Within a shard the two matrix products are the work, and all else must stay small beside them. So rows are prepared a
few at a time while they are in the processor's cache, in reused buffers, and weights go in as square roots, so that a
product is one of a matrix with itself (half the operations).
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from invariclip.calibrate.data.moments import Moments, empty
from invariclip.calibrate.data.pairs import SAME_DISTANCE
from invariclip.calibrate.data.problems import NOT_FINITE, SAME, ZERO, ProblemCounts
from invariclip.calibrate.data.stream.blocks import POINTS
from invariclip.calibrate.data.stream.state import MomentsState, read_state, write_state
from invariclip.console import Progress, silent
from invariclip.errors import InputError, InvariclipError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.calibrate.data.encoders import Encoder
    from invariclip.calibrate.data.moments import Moments
    from invariclip.calibrate.data.stream.blocks import PairSource, RowBlock, RowNames, Shard

_SLICE = 256
"""Rows prepared at a time: 256 × 512 float64 are 1 MB."""
SAVE_EVERY = 20.0
"""Seconds between two writes of the state: what a kill can cost."""


class Sums:
    """The running sums of one shard, part by part.

    Attributes:
        width: D.
        tally: What was left out.
    """

    def __init__(self, width: int, name: str) -> None:
        """Starts empty.

        Args:
            width: D.
            name: The shard's, for messages about rows without a name.
        """
        self.width = width
        self.tally = ProblemCounts()
        self._name = name
        self._running: dict[str, _Running] = {}
        self._buffers = (np.empty((0, width)), np.empty((0, width)))
        self._counted = {"row": 0, "pair": 0}

    def add(self, block: RowBlock) -> None:
        """Takes a block in.

        Raises:
            InputError: Its width is another, its members or ties are not as many, or its weights cannot be used.
        """
        if block.points is not None and block.points is not block.first:
            rows, _ = self._room(len(block.points))
            self._take_points(rows, self._unit(block.points, rows), block.point_names)
        if block.first is not None and block.second is not None:
            self._take_pairs(block, block.first, block.second)

    def moments(self) -> dict[str, Moments]:
        """The sums so far, by part."""
        return {part: running.moments(part) for part, running in sorted(self._running.items())}

    def _take_points(self, rows: NDArray[np.float64], squares: NDArray[np.float64], names: RowNames) -> None:
        good = self._usable("row", squares, names)
        self._counted["row"] += len(rows)
        self._sum(POINTS, rows, good, np.ones(len(rows)), np.ones(len(rows)), None)

    def _take_pairs(self, block: RowBlock, first: NDArray[Any], second: NDArray[Any]) -> None:
        if first.shape != second.shape:
            raise InputError(f"{self._name}: {len(first)} first members of pairs and {len(second)} second ones")
        weights = self._weights(block.weights, len(first))
        if block.ties is not None and block.ties.shape != (len(first), 3):
            raise InputError(f"{self._name}: {len(first)} pairs, and ties of shape {list(block.ties.shape)}")
        rows, deltas = self._room(len(first))
        squares, others, moved = np.empty((3, len(first)))
        for start in range(0, len(first), _SLICE):
            part = slice(start, start + _SLICE)
            squares[part] = self._unit(first[part], rows[part])
            others[part] = self._unit(second[part], deltas[part])
            np.subtract(rows[part], deltas[part], out=deltas[part])
            moved[part] = np.einsum("ij,ij->i", deltas[part], deltas[part])
            if block.weights is not None:
                deltas[part] *= np.sqrt(weights[part])[:, None]
        if block.points is first:
            self._take_points(rows, squares, block.point_names)
        # One number says it of both members: NaN and infinity survive a sum, and a zero a product.
        both = np.where((squares > 0) & (others > 0), squares + others, squares * others)
        good = self._usable("pair", both, block.pair_names)
        same = good & (moved <= SAME_DISTANCE**2)
        self._tell(SAME, "pair", same, block.pair_names)
        self._counted["pair"] += len(first)
        self._sum(block.part, deltas, good & ~same, weights, moved, block.ties)

    def _unit(self, vectors: NDArray[Any], rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Writes rows of unit length, and returns the squares of the lengths that they had."""
        if vectors.ndim != 2 or vectors.shape[1] != self.width:
            raise InputError(f"{self._name}: embeddings of shape {list(vectors.shape)}, not of width {self.width}")
        squares = np.empty(len(vectors))
        with np.errstate(all="ignore"):  # what is not finite, or zero, is found by its square and left out
            for start in range(0, len(vectors), _SLICE):
                part = slice(start, start + _SLICE)
                rows[part] = vectors[part]
                squares[part] = np.einsum("ij,ij->i", rows[part], rows[part])
                rows[part] /= np.sqrt(squares[part])[:, None]
        return squares

    def _usable(self, what: str, squares: NDArray[np.float64], names: RowNames) -> NDArray[np.bool_]:
        """Which rows are embeddings, bool [n]; the others are counted."""
        finite, zero = np.isfinite(squares), squares == 0
        self._tell(NOT_FINITE, what, ~finite, names)
        self._tell(ZERO, what, zero, names)
        return np.asarray(finite & ~zero)

    def _tell(self, reason: str, what: str, bad: NDArray[np.bool_], names: RowNames) -> None:
        if bad.any():
            places = np.flatnonzero(bad)
            known = [
                names[place] if names else f"{self._name}, {what} {self._counted[what] + place}"
                for place in places.tolist()
            ]
            self.tally.add(reason, known)

    def _weights(self, weights: NDArray[np.float64] | None, count: int) -> NDArray[np.float64]:
        if weights is None:
            return np.ones(count)
        if weights.shape != (count,) or not np.isfinite(weights).all() or (weights < 0).any():
            raise InputError(f"{self._name}: the weights of its pairs must be {count} finite numbers of zero or more")
        return weights

    def _room(self, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if len(self._buffers[0]) < count:
            self._buffers = (np.empty((count, self.width)), np.empty((count, self.width)))
        return self._buffers[0][:count], self._buffers[1][:count]

    def _sum(
        self,
        part: str,
        rows: NDArray[np.float64],
        good: NDArray[np.bool_],
        weights: NDArray[np.float64],
        squares: NDArray[np.float64],
        ties: NDArray[np.int64] | None,
    ) -> None:
        if not good.all():
            rows, weights, squares = rows[good], weights[good], squares[good]
            ties = None if ties is None else ties[good]
        if len(rows):
            running = self._running.setdefault(part, _Running(self.width))
            running.add(rows, weights, squares, linear=part == POINTS)
            running.tie(len(rows), ties)


class _Running:
    """Sums of one part, written in place."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.weight = self.weight_squares = self.fourth = 0.0
        self.linear = np.zeros(width)
        self.outer = np.zeros((width, width))
        self._untied = 0
        self._members: set[int] = set()
        self._things: set[int] = set()

    def add(
        self, rows: NDArray[np.float64], weights: NDArray[np.float64], squares: NDArray[np.float64], *, linear: bool
    ) -> None:
        """Takes rows [n, D] in that carry the square roots of their weights, and the squares of their own lengths."""
        self.count += len(rows)
        self.weight += float(weights.sum())
        self.weight_squares += float(weights @ weights)
        self.fourth += float(np.square(weights * squares).sum())
        if linear:
            self.linear += rows.sum(axis=0)
        self.outer += rows.T @ rows

    def tie(self, count: int, ties: NDArray[np.int64] | None) -> None:
        """Takes in which members the rows share; a shard is bounded, and so are its numbers."""
        if ties is None:
            self._untied += count
        else:
            self._members.update(ties[:, :2].ravel().tolist())
            self._things.update(ties[:, 2].tolist())

    def moments(self, part: str) -> Moments:
        """As moments of points or of pairs."""
        nothing = empty(len(self.linear))
        if part == POINTS:
            return replace(
                nothing,
                points=self.count,
                point_weight=self.weight,
                point_weight_squares=self.weight_squares,
                point_fourth=self.fourth,
                point_sum=self.linear,
                point_outer=self.outer,
            )
        return replace(
            nothing,
            pairs=self.count,
            pair_weight=self.weight,
            pair_weight_squares=self.weight_squares,
            pair_fourth=self.fourth,
            pair_independent=self._untied + len(self._members) - len(self._things),
            pair_outer=self.outer,
        )


@dataclass(frozen=True)
class Collected:
    """What one shard gave.

    Attributes:
        shard: Which.
        moments: Its sums, by part.
        tally: What was left out of it.
        lost: Why it could not be read; None if it was.
    """

    shard: Shard
    moments: dict[str, Moments]
    tally: ProblemCounts
    lost: str | None = None


class ShardReader(Protocol):
    """What reads shards: this process, or many."""

    def __call__(
        self, tasks: Sequence[tuple[PairSource, Shard]], width: int, encoder: Encoder | None, /
    ) -> Iterable[Collected]:
        """What every shard gives, in the order of the tasks."""


def collect(
    sources: Sequence[PairSource],
    encoder: Encoder | None = None,
    *,
    state_file: Path | None = None,
    engine: ShardReader | None = None,
    save_every: float = SAVE_EVERY,
    progress: Progress = silent,
) -> MomentsState:
    """Takes every shard of the sources into a state that does not hold it yet.

    Args:
        sources: Where pairs come from.
        encoder: Of images and texts; None where all sources hold embeddings.
        state_file: Where the state is kept; what it holds already is not read again.
        engine: What reads shards; this process by default.
        save_every: Seconds between two writes.
        progress: Progress display.

    Raises:
        InputError: A source cannot be used, the state is of another encoder, a shard changed since it was counted, or
            some shards could not be read: they are named, and all others are kept.
    """
    plan = plan_of(sources)
    width = _width(plan, encoder)
    state = MomentsState(width, encoder_digest(encoder))
    if state_file is not None and state_file.exists():
        before = read_state(state_file)
        state.merge(before)
    _require_unchanged(state, plan)
    todo = [task for task in plan if task[1].digest not in state.done]
    lost: list[Collected] = []
    saved = time.monotonic()
    try:
        for collected in progress((engine or here)(todo, width, encoder), total=len(todo), desc="collecting"):
            if collected.lost is not None:
                lost.append(collected)
                continue
            state.add(collected.shard, collected.moments, collected.tally)
            if state_file is not None and time.monotonic() - saved >= save_every:
                write_state(state_file, state)
                saved = time.monotonic()
    finally:
        # Also after an interruption or an error: it holds whole shards only.
        if state_file is not None and todo:
            write_state(state_file, state)
    if lost:
        named = "; ".join(f"{collected.shard.source}: {collected.lost}" for collected in lost[:3])
        more = f"; and {len(lost) - 3} more" if len(lost) > 3 else ""
        remark = f"; the other {len(state.done)} are kept" if state_file else ""
        raise InputError(f"{len(lost)} of {len(plan)} shards could not be read: {named}{more}{remark}")
    return state


def here(tasks: Iterable[tuple[PairSource, Shard]], width: int, encoder: Encoder | None) -> Iterator[Collected]:
    """Reads shards in this process, one after another."""
    for source, shard in tasks:
        yield read_shard(source, shard, width, encoder)


def read_shard(source: PairSource, shard: Shard, width: int, encoder: Encoder | None) -> Collected:
    """One shard's sums; one that cannot be read is reported as lost and does not count."""
    sums = Sums(width, shard.name)
    tally = ProblemCounts()
    try:
        for block in source.read(shard, encoder, tally):
            sums.add(block)
    except (InvariclipError, OSError) as error:
        return Collected(shard, {}, ProblemCounts(), lost=str(error))
    tally.merge(sums.tally)
    return Collected(shard, sums.moments(), tally)


def plan_of(sources: Sequence[PairSource]) -> list[tuple[PairSource, Shard]]:
    """All shards of all sources, in order.

    Raises:
        InputError: There is none, two sources have one name, or a shard stands in the plan twice.
    """
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"two sources are called {twice!r}; give each a name of its own")
    plan = [(source, shard) for source in sources for shard in source.shards()]
    if not plan:
        raise InputError("the sources hold nothing to read")
    digests: set[str] = set()
    for source, shard in plan:
        if shard.digest in digests:
            raise InputError(f"{source.name}: {shard.name} stands in the plan twice; it would count twice")
        digests.add(shard.digest)
    return plan


def encoder_digest(encoder: Encoder | None) -> str:
    """Names weights and pixels; empty where embeddings are given."""
    if encoder is None:
        return ""
    space = json.dumps([encoder.sha256, encoder.pixels.to_json()], sort_keys=True)
    return hashlib.sha256(space.encode()).hexdigest()


def _width(plan: Sequence[tuple[PairSource, Shard]], encoder: Encoder | None) -> int:
    """D: the encoder's, or that of the embeddings that are given."""
    if encoder is not None:
        return encoder.embed_dim
    for source, shard in plan:
        if source.needs_encoder:
            raise InputError(f"{source.name} holds images or texts; name the model that embeds them")
        if "width" in shard.spec:
            return int(shard.spec["width"])
    raise InputError("no source says how wide its embeddings are")


def _require_unchanged(state: MomentsState, plan: Sequence[tuple[PairSource, Shard]]) -> None:
    """Refuses to count a shard again that was another when it was counted."""
    planned = {shard.digest for _, shard in plan}
    counted = {what for digest, what in state.done.items() if digest not in planned}
    for source, shard in plan:
        if shard.digest not in state.done and (source.name, shard.name) in counted:
            raise InputError(
                f"{source.name}: {shard.name} changed since it was counted; collect into a new file, or put it back"
            )
