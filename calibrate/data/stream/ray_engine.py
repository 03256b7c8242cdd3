"""Shards on many processes and machines by Ray Data: a shard is redone where its worker dies, and counted once.

A worker hands its shard's sums over as the bytes of a state file. The driver adds them in the order of the plan, as one
process would: the result is the same matrix, whichever workers there were and however many of them died on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from invariclip.calibrate.data.stream.collect import Collected, read_shard
from invariclip.calibrate.data.stream.state import MomentsState, state_from_bytes, state_to_bytes
from invariclip.calibrate.data.stream.tally import ProblemCounts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from invariclip.calibrate.data.encoder import Encoder
    from invariclip.calibrate.data.stream.blocks import PairSource, Shard
    from invariclip.calibrate.data.stream.cluster import Cluster


@dataclass(frozen=True)
class RayEngine:
    """Reads shards on a Ray cluster; an `Engine` of `collect`.

    Attributes:
        cluster: Where the workers are.
        make_encoder: Opens the encoder inside a worker: models do not travel. None where embeddings are given.
    """

    cluster: Cluster
    make_encoder: Callable[[], Encoder] | None = None

    def __call__(
        self, tasks: Sequence[tuple[PairSource, Shard]], width: int, encoder: Encoder | None, /
    ) -> Iterator[Collected]:
        """What every shard gives, in the order of the tasks.

        Raises:
            InputError: The cluster cannot be reached, or a shard did not come back.
        """
        make = self.make_encoder if encoder is not None else None
        answers = self.cluster.over([_Task(*task) for task in tasks], _Reader, (width, make))
        for (_, shard), (lost, content) in zip(tasks, answers, strict=True):
            if lost is not None:
                yield Collected(shard, {}, ProblemCounts(), lost=lost)
                continue
            state = state_from_bytes(content, f"{shard.name}, from its worker")
            moments = {part: found for (_, part, _), found in state.sums.items()}
            yield Collected(shard, moments, state.tallies[shard.source])


@dataclass(frozen=True)
class _Task:
    source: PairSource
    shard: Shard

    def __str__(self) -> str:
        return f"shard {self.shard.name} of {self.source.name}"


class _Reader:
    """One worker: opens the encoder once, then reads shards."""

    def __init__(self, width: int, make_encoder: Callable[[], Encoder] | None) -> None:
        self._width = width
        self._encoder = make_encoder() if make_encoder is not None else None

    def __call__(self, task: _Task) -> tuple[str | None, bytes]:
        """Why a shard could not be read, or None; and its sums as a state's bytes."""
        found = read_shard(task.source, task.shard, self._width, self._encoder)
        state = MomentsState(self._width, "")
        if found.lost is None:
            state.add(task.shard, found.moments, found.tally)
        return found.lost, state_to_bytes(state)
