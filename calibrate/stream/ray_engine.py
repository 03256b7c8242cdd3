"""Shards on many processes and machines by Ray Data: a shard is redone where its worker dies, and counted once.

A worker hands its shard's sums over as the bytes of a state file. The driver adds them in the order of the plan, as one
process would: the result is the same matrix, whichever workers there were and however many of them died on the way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.calibrate.stream.collect import Collected, read_shard
from invariclip.calibrate.stream.state import State, state_from_bytes, state_to_bytes
from invariclip.calibrate.stream.tally import Tally
from invariclip.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from invariclip.calibrate.embed import Encoder
    from invariclip.calibrate.stream.blocks import Shard, Source


class RayEngine:
    """Reads shards on a Ray cluster: an existing one, or one that is started on this machine for the while."""

    def __init__(
        self,
        make_encoder: Callable[[], Encoder] | None = None,
        *,
        address: str | None = None,
        workers: int | None = None,
    ) -> None:
        """Looks whether Ray is there; nothing is started yet.

        Args:
            make_encoder: Opens the encoder inside a worker: models do not travel. None where embeddings are given.
            address: An existing cluster's, such as `auto` or `ray://head:10001`; None starts a local one.
            workers: Workers at most; None takes one for every CPU of the cluster.

        Raises:
            InputError: `workers` is below 1.
            MissingExtraError: Ray is not installed.
        """
        if workers is not None and workers < 1:
            raise InputError(f"--workers must be 1 or more, not {workers}")
        try:
            import ray.data  # noqa: F401
        except ImportError as error:
            raise MissingExtraError('--engine ray needs Ray: pip install "invariclip[ray]"') from error
        self._make_encoder = make_encoder
        self._address = address
        self._workers = workers

    def __call__(
        self, tasks: Sequence[tuple[Source, Shard]], width: int, encoder: Encoder | None, /
    ) -> Iterator[Collected]:
        """What every shard gives, in the order of the tasks.

        Raises:
            InputError: The cluster cannot be reached, or a shard did not come back.
        """
        import ray
        import ray.data

        if not tasks:
            return
        started = self._connect()
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        places = ray.data.from_items([{"place": place} for place in range(len(tasks))], override_num_blocks=len(tasks))
        most = min(len(tasks), self._workers or max(1, int(ray.cluster_resources().get("CPU", 1))))
        answers = places.map_batches(
            _Worker,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
            fn_constructor_args=(list(tasks), width, encoder is not None, self._make_encoder),
            num_cpus=1,
        )
        awaited = 0
        try:
            for row in answers.iter_rows():
                if row["place"] != awaited:
                    raise InputError(f"shard {tasks[awaited][1].name} did not come back from its worker")
                yield _collected(tasks[awaited][1], row)
                awaited += 1
        finally:
            if started:
                ray.shutdown()
        if awaited != len(tasks):
            raise InputError(f"shard {tasks[awaited][1].name} did not come back from its worker; run it again")

    def _connect(self) -> bool:
        """Joins the cluster; True where it was started here, and so has to be stopped here."""
        import ray

        if ray.is_initialized():
            return False
        try:
            ray.init(address=self._address, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"no Ray cluster at {self._address or 'this machine'}: {error}") from error
        return True


class _Worker:
    """One process: opens the encoder once, then reads shards."""

    def __init__(
        self,
        tasks: list[tuple[Source, Shard]],
        width: int,
        encodes: bool,
        make_encoder: Callable[[], Encoder] | None,
    ) -> None:
        self._tasks, self._width = tasks, width
        self._encoder = make_encoder() if encodes and make_encoder is not None else None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        place = int(batch["place"][0])
        source, shard = self._tasks[place]
        found = read_shard(source, shard, self._width, self._encoder)
        state = State(self._width, "")
        if found.lost is None:
            state.add(shard, found.moments, found.tally)
        content = np.empty(1, dtype=object)
        content[0] = state_to_bytes(state)
        return {"place": np.array([place]), "state": content, "lost": np.array([found.lost or ""])}


def _collected(shard: Shard, row: dict[str, Any]) -> Collected:
    if row["lost"]:
        return Collected(shard, {}, Tally(), lost=str(row["lost"]))
    state = state_from_bytes(row["state"], f"{shard.name}, from its worker")
    moments = {part: found for (_, part, _), found in state.sums.items()}
    return Collected(shard, moments, state.tallies[shard.source])
