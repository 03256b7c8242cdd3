"""Ray: a cluster, existing or started for the run, whose workers answer items in order; and shards read on it.

A shard is read again where its worker dies, and counted once. A worker returns its shard's sums as the bytes of a state
file, and the driver adds them in the order of the plan, as one process would: the result is the same matrix, however
many workers there were and however many of them died.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from invariclip.calibrate.data.problems import ProblemCounts
from invariclip.calibrate.data.stream.collect import Collected, read_shard
from invariclip.calibrate.data.stream.state import MomentsState, state_from_bytes, state_to_bytes
from invariclip.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from invariclip.calibrate.data.encoders import Encoder
    from invariclip.calibrate.data.stream.blocks import PairSource, Shard

T = TypeVar("T")


@dataclass(frozen=True)
class RayEngine:
    """Reads shards on a Ray cluster; a `ShardReader` of `collect`.

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
            moments = {part: collected for (_, part, _), collected in state.sums.items()}
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
        collected = read_shard(task.source, task.shard, self._width, self._encoder)
        state = MomentsState(self._width, "")
        if collected.lost is None:
            state.add(task.shard, collected.moments, collected.tally)
        return collected.lost, state_to_bytes(state)


@dataclass(frozen=True)
class Cluster:
    """Where workers run.

    Attributes:
        address: An existing cluster's, such as `auto` or `ray://head:10001`; None starts a local one.
        workers: Workers at most; None takes one for every CPU of the cluster.
    """

    address: str | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        """Looks whether Ray is there; nothing is started yet.

        Raises:
            InputError: `workers` is below 1.
            MissingExtraError: Ray is not installed.
        """
        if self.workers is not None and self.workers < 1:
            raise InputError(f"--workers must be 1 or more, not {self.workers}")
        try:
            import ray.data  # noqa: F401
        except ImportError as error:
            raise MissingExtraError('--engine ray needs Ray: pip install "invariclip[ray]"') from error

    def over(
        self, items: Sequence[T], make: Callable[..., Callable[[T], Any]], arguments: Sequence[Any]
    ) -> Iterator[Any]:
        """What a worker answers to each item, in the order of the items.

        A worker that dies is restarted, and its unanswered items are asked again.

        Args:
            items: They travel to the workers, once.
            make: Called once in every worker with `arguments`; what it returns is called with every item.
            arguments: Of `make`.

        Raises:
            InputError: The cluster cannot be reached, or an item was not answered.
        """
        import ray
        import ray.data

        if not items:
            return
        started = self._connect()
        try:
            context = ray.data.DataContext.get_current()
            context.execution_options.preserve_order = True
            context.enable_progress_bars = False
            places = ray.data.from_items([{"place": k} for k in range(len(items))], override_num_blocks=len(items))
            resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            most = min(len(items), self.workers or max(1, int(resources.get("CPU", 1))))
            answers = places.map_batches(
                _Worker,
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
                fn_constructor_args=(list(items), make, tuple(arguments)),
                num_cpus=1,
            )
            awaited = 0
            for row in answers.iter_rows():
                if row["place"] != awaited:
                    break
                yield row["answer"]
                awaited += 1
            if awaited != len(items):
                raise InputError(f"{items[awaited]} did not come back from its worker; run it again")
        finally:
            if started:
                ray.shutdown()

    def _connect(self) -> bool:
        """Joins the cluster; True where it was started here, and so has to be stopped here."""
        import ray

        if ray.is_initialized():
            return False
        try:
            ray.init(
                # "local": without an address Ray would join a cluster that it finds here
                address=self.address or "local", log_to_driver=False, include_dashboard=False,
                logging_level=logging.ERROR,
            )  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"no Ray cluster at {self.address or 'this machine'}: {error}") from error
        return True


class _Worker:
    """One process of the cluster."""

    def __init__(self, items: list[Any], make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
        self._items, self._call = items, make(*arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        place = int(batch["place"][0])
        answer = np.empty(1, dtype=object)
        answer[0] = self._call(self._items[place])
        return {"place": np.array([place]), "answer": answer}
