"""Shards → moments, one after another, kept on disk on the way: a run that is killed goes on from where it was.

Sums are added in the order of the plan and a state holds whole shards alone. So a run that was killed any number of
times adds the very same numbers in the very same order as one that was not, and ends with the same bits.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from invariclip.calibrate.data.stream.state import MomentsState, read_state, write_state
from invariclip.calibrate.data.stream.sums import Sums
from invariclip.calibrate.data.stream.tally import ProblemCounts
from invariclip.console import Progress, silent
from invariclip.errors import InputError, InvariclipError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from invariclip.calibrate.data.encoder import Encoder
    from invariclip.calibrate.data.stream.blocks import PairSource, Shard
    from invariclip.calibrate.data.moments import Moments

SAVE_EVERY = 20.0
"""Seconds between two writes of the state: what a kill can cost."""


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
        for found in progress((engine or here)(todo, width, encoder), total=len(todo), desc="collecting"):
            if found.lost is not None:
                lost.append(found)
                continue
            state.add(found.shard, found.moments, found.tally)
            if state_file is not None and time.monotonic() - saved >= save_every:
                write_state(state_file, state)
                saved = time.monotonic()
    finally:
        # Also when stopped by hand, or by an error: whole shards alone are in it.
        if state_file is not None and todo:
            write_state(state_file, state)
    if lost:
        named = "; ".join(f"{found.shard.source}: {found.lost}" for found in lost[:3])
        more = f"; and {len(lost) - 3} more" if len(lost) > 3 else ""
        kept = f"; the other {len(state.done)} are kept" if state_file else ""
        raise InputError(f"{len(lost)} of {len(plan)} shards could not be read: {named}{more}{kept}")
    return state


def here(tasks: Iterable[tuple[PairSource, Shard]], width: int, encoder: Encoder | None) -> Iterator[Collected]:
    """Reads shards in this process, one after another."""
    for source, shard in tasks:
        yield read_shard(source, shard, width, encoder)


def read_shard(source: PairSource, shard: Shard, width: int, encoder: Encoder | None) -> Collected:
    """One shard's sums; one that cannot be read is told as lost, and nothing of it counts."""
    sums = Sums(width, shard.name)
    told = ProblemCounts()
    try:
        for block in source.read(shard, encoder, told):
            sums.add(block)
    except (InvariclipError, OSError) as error:
        return Collected(shard, {}, ProblemCounts(), lost=str(error))
    told.merge(sums.tally)
    return Collected(shard, sums.moments(), told)


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
    seen: set[str] = set()
    for source, shard in plan:
        if shard.digest in seen:
            raise InputError(f"{source.name}: {shard.name} stands in the plan twice; it would count twice")
        seen.add(shard.digest)
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
