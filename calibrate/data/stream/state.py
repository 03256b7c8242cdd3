"""The state of a calibration from sources: sums by source and kind of pair, the shards in them, and problems.

Its file is `moments.safetensors`: states of different shards can be merged, one can be subtracted from another, and a
run continues from it. A shard is in it whole or not at all, by its digest, so none is counted twice.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import invariclip
from invariclip.calibrate.data.moments import Moments, empty
from invariclip.calibrate.data.problems import EXAMPLES, ProblemCounts
from invariclip.calibrate.data.stream.blocks import POINTS
from invariclip.errors import InputError
from invariclip.files import write_atomically
from invariclip.records import Record

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from invariclip.calibrate.data.stream.blocks import Shard


@dataclass(frozen=True)
class LeftOutFacts:
    """How often something was left out, and what, for example."""

    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class StateFacts:
    """What a state's file says beside its matrices; see `MomentsState`.

    Attributes:
        invariclip: The version that wrote it.
        numpy: Likewise.
        width: D.
        encoder: Digest of weights and pixels.
        sums: Source, part, group and the numbers of `Moments`; the matrices of entry k are called `k.NAME`.
        done: Digest → source and name.
        left_out: Source → reason → what was left out.
    """

    invariclip: str
    numpy: str
    width: int
    encoder: str
    sums: tuple[dict[str, int | float | str], ...]
    done: dict[str, tuple[str, str]]
    left_out: dict[str, dict[str, LeftOutFacts]]


STATE_FILE = Record(
    "invariclip.state", "moments", "`invariclip calibrate --sources`", 3, 8 << 30, InputError, StateFacts
)
_MAX_WIDTH = 1 << 15
"""A matrix of it fills such a file."""
GROUPS = 16
"""Pairs are kept in as many sums, by shard, so that a bootstrap over groups can tell how sure the projection is."""
_PAIR_NUMBERS = ("pairs", "pair_weight", "pair_weight_squares", "pair_fourth", "pair_independent")
_COUNTS = ("points", "pairs", "pair_independent")
_MATRICES = ("point_sum", "point_outer", "pair_outer")


@dataclass
class MomentsState:
    """Sums, and what they are of.

    Attributes:
        width: D.
        encoder: Digest of weights and pixels of the encoder; empty where embeddings were given.
        sums: Source, part and group → moments. `POINTS` are in group 0 alone.
        done: Digest → source and name of every shard that is counted.
        tallies: Source → what was left out of it.
    """

    width: int
    encoder: str
    sums: dict[tuple[str, str, int], Moments] = field(default_factory=dict)
    done: dict[str, tuple[str, str]] = field(default_factory=dict)
    tallies: dict[str, ProblemCounts] = field(default_factory=dict)

    def add(self, shard: Shard, moments: Mapping[str, Moments], tally: ProblemCounts) -> None:
        """Counts a shard.

        Args:
            shard: Which.
            moments: Its sums, by part.
            tally: What was left out of it.

        Raises:
            InputError: It is counted already, or its width is another.
        """
        if shard.digest in self.done:
            raise InputError(f"{shard.source}: {shard.name} is counted already")
        group = int(shard.digest, 16) % GROUPS
        for part, part_moments in moments.items():
            self._put((shard.source, part, 0 if part == POINTS else group), part_moments)
        self.tallies.setdefault(shard.source, ProblemCounts()).merge(tally)
        self.done[shard.digest] = (shard.source, shard.name)

    def merge(self, other: MomentsState) -> None:
        """Adds the sums of another state.

        Raises:
            InputError: A shard is in both, or they are of different encoders or widths.
        """
        self._require_kin(other)
        twice = self.done.keys() & other.done.keys()
        if twice:
            source, name = self.done[min(twice)]
            raise InputError(f"{source}: {name} is in both, with {len(twice) - 1} more shards; it would count twice")
        for key, part_moments in other.sums.items():
            self._put(key, part_moments)
        for source, tally in other.tallies.items():
            self.tallies.setdefault(source, ProblemCounts()).merge(tally)
        self.done.update(other.done)

    def subtract(self, other: MomentsState) -> None:
        """Takes the sums of another state out again; what was left out of its shards is forgotten as well.

        Raises:
            InputError: It has a shard that is not counted here, or they are of different encoders or widths.
        """
        self._require_kin(other)
        strange = other.done.keys() - self.done.keys()
        if strange:
            source, name = other.done[min(strange)]
            raise InputError(
                f"{source}: {name} is not counted here, with {len(strange) - 1} more; it cannot be taken out"
            )
        for key, part_moments in other.sums.items():
            self.sums[key] = self.sums[key] - part_moments
            if not self.sums[key].points and not self.sums[key].pairs:
                del self.sums[key]
        for source, tally in other.tallies.items():
            self.tallies[source].subtract(tally)
        for digest in other.done:
            del self.done[digest]

    def combined(self, weights: Mapping[str, float] | None = None) -> Moments:
        """Everything together: of every source each kind of pairs counts its weight, however many pairs there are.

        Args:
            weights: Source → weight, also of its points; 1 where none is named.
        """
        total = empty(self.width)
        for _, moments, weight in self._weighed(weights):
            total = total + moments.scaled(weight)
        return total

    def groups(self, weights: Mapping[str, float] | None = None) -> list[Moments]:
        """`combined`, apart: all points, then the pairs of every group of shards. See `diagnostics.confidence`."""
        total: dict[int, Moments] = {}
        for (_, part, group), moments, weight in self._weighed(weights):
            place = -1 if part == POINTS else group
            total[place] = total.get(place, empty(self.width)) + moments.scaled(weight)
        return [total[place] for place in sorted(total)]

    def _weighed(self, weights: Mapping[str, float] | None) -> Iterator[tuple[tuple[str, str, int], Moments, float]]:
        """All sums in a fixed order, with what they are multiplied by."""
        by_source = weights or {}
        strange = by_source.keys() - set(self.sources())
        if strange:
            name = min(strange)
            if name in self.tallies:
                lines = "; ".join(self.tallies[name].lines()) or "it is empty"
                raise InputError(f"source {name!r}: nothing in it could be used ({lines})")
            raise InputError(f"no source is called {name!r}; available: {', '.join(self.sources()) or 'none'}")
        whole: dict[tuple[str, str], Moments] = {}
        for (source, part, _), moments in sorted(self.sums.items()):
            # Of a part whose pairs share members the groups together say how many are independent, not each by itself.
            numbers = replace(empty(0), **{name: getattr(moments, name) for name in _PAIR_NUMBERS})
            whole[source, part] = whole.get((source, part), empty(0)) + numbers
        for key, moments in sorted(self.sums.items()):
            weight, pairs = by_source.get(key[0], 1.0), whole[key[:2]]
            if key[1] != POINTS:
                weight = weight / pairs.pair_weight if pairs.pair_weight > 0 else 0.0
            yield key, moments.crowded(pairs.crowding), weight

    def sources(self) -> list[str]:
        """Names of the sources that something is counted of."""
        return sorted({source for source, _, _ in self.sums})

    def counts(self) -> dict[str, dict[str, int]]:
        """Source → part → how many points or pairs."""
        by_source: dict[str, dict[str, int]] = {}
        for (source, part, _), moments in sorted(self.sums.items()):
            counts = by_source.setdefault(source, {})
            counts[part] = counts.get(part, 0) + moments.points + moments.pairs
        return by_source

    def _put(self, key: tuple[str, str, int], moments: Moments) -> None:
        if moments.width != self.width:
            raise InputError(f"{key[0]}: embeddings of width {moments.width}, where others have {self.width}")
        before = self.sums.get(key)
        self.sums[key] = moments if before is None else before + moments

    def _require_kin(self, other: MomentsState) -> None:
        if (self.width, self.encoder) != (other.width, other.encoder):
            raise InputError(
                f"moments of encoder {other.encoder[:12] or 'unknown'} and width {other.width} do not go with those of "
                f"{self.encoder[:12] or 'unknown'} and width {self.width}"
            )


def write_state(path: str | os.PathLike[str], state: MomentsState) -> None:
    """Writes a state atomically."""
    write_atomically(Path(path), state_to_bytes(state))


def state_to_bytes(state: MomentsState) -> bytes:
    """The content of a state's file: safetensors."""
    tensors, entries = {}, []
    for place, ((source, part, group), moments) in enumerate(state.sums.items()):
        plain = {each.name: getattr(moments, each.name) for each in fields(moments)}
        # Points have no pairs and pairs no points: half of the matrices are zero, and a file need not hold those.
        matrices = [name for name in _MATRICES if plain[name].any()]
        tensors.update({f"{place}.{name}": np.ascontiguousarray(plain[name]) for name in matrices})
        numbers = {name: value for name, value in plain.items() if name not in _MATRICES}
        entries.append({"source": source, "part": part, "group": group, **numbers})
    facts = {
        "invariclip": invariclip.__version__,
        "numpy": np.__version__,
        "width": state.width,
        "encoder": state.encoder,
        "sums": entries,
        "done": {digest: list(what) for digest, what in state.done.items()},
        "left_out": {source: tally.to_json() for source, tally in state.tallies.items()},
    }
    return STATE_FILE.to_bytes(tensors, facts)


def read_state(path: str | os.PathLike[str]) -> MomentsState:
    """Reads what `write_state` wrote.

    Raises:
        InputError: The file is missing, too large, damaged, or of another schema.
    """
    tensors, facts = STATE_FILE.read(path)
    return _checked(facts, tensors, os.fspath(path))


def state_from_bytes(content: bytes, where: str) -> MomentsState:
    """Reads what `state_to_bytes` made; `where` is what errors call it.

    Raises:
        InputError: Damaged, or of another schema.
    """
    tensors, facts = STATE_FILE.from_bytes(content, where)
    return _checked(facts, tensors, where)


def _checked(facts: StateFacts, held: dict[str, Any], where: str) -> MomentsState:
    try:
        return _state(facts, held)
    except (KeyError, ValueError, TypeError) as error:
        STATE_FILE.refuse(where, error)


def _state(facts: StateFacts, held: dict[str, Any]) -> MomentsState:
    if not 1 <= facts.width <= _MAX_WIDTH:
        raise ValueError(f"its width is {facts.width}, not from 1 to {_MAX_WIDTH}")
    state = MomentsState(facts.width, facts.encoder)
    for place, entry in enumerate(facts.sums):
        numbers: dict[str, Any] = dict(entry)
        key = (numbers.pop("source"), numbers.pop("part"), numbers.pop("group"))
        if [*map(type, key)] != [str, str, int] or key in state.sums:
            raise ValueError(f"its sums {key!s:.100} are of another type, or stand twice")
        for name, value in numbers.items():
            kinds = (int,) if name in _COUNTS else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value < np.inf:
                raise ValueError(f"its {name} of {key[0]} is {value!r:.50}, not a number of zero or more")
        state.sums[key] = Moments(**numbers, **_matrices(place, facts.width, held, key[0]))
    strange = held.keys() - {f"{place}.{name}" for place in range(len(facts.sums)) for name in _MATRICES}
    if strange:
        raise ValueError(f"it holds a matrix that belongs to no sums: {min(strange)!r:.100}")
    state.done = dict(facts.done)
    for source, reasons in facts.left_out.items():
        state.tallies[source] = ProblemCounts()
        for reason, what in reasons.items():
            if what.count < 1 or len(what.examples) > EXAMPLES:
                raise ValueError(f"its count of what was left out of {source!r:.100} is impossible")
            state.tallies[source].add(reason, what.examples, what.count)
    return state


def _matrices(place: int, width: int, held: dict[str, Any], source: str) -> dict[str, Any]:
    """The matrices of an entry; one that the file leaves out is zero, and takes no memory."""
    matrices = {}
    for name in _MATRICES:
        shape = (width,) if name == "point_sum" else (width, width)
        matrices[name] = matrix = held.get(f"{place}.{name}", np.broadcast_to(np.zeros(()), shape))
        if matrix.shape != shape or matrix.dtype != np.float64:
            raise ValueError(f"its {name} of {source} is not {list(shape)} of float64 values")
        if f"{place}.{name}" in held and not np.isfinite(matrix).all():
            raise ValueError(f"its {name} of {source} has values that are not finite")
    return matrices
