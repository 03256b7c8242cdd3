"""The text side of a loaded artifact: tokenizer and graph, opened at the first text and fed no more than they need.

Embeddings of texts that were seen before, found again by their token ids; the least recently used go first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.artifact.folder import checked_graph, checked_path
from invariclip.artifact.manifest import EMBEDDING, TEXT_INPUT
from invariclip.backends import open_backend
from invariclip.backends.batching import run_in_buckets
from invariclip.errors import InputError
from invariclip.preprocessing.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.manifest import Manifest
    from invariclip.backends import Backend
    from invariclip.preprocessing.tokenizer import TextSpec


DEFAULT_TEXT_CACHE = 10_000
"""Rows that are kept. One takes 4 bytes a component and 8 an id: 27 MB in all at width 512 and context 77."""
MAX_TEXT_CACHE = 10_000_000
_TURN: ContextVar[Callable[[int], AbstractContextManager[None]] | None] = ContextVar("turn", default=None)


@contextmanager
def taking_turns(turn: Callable[[int], AbstractContextManager[None]]) -> Iterator[None]:
    """Within it, this thread enters `turn` with the number of texts for every run of a text tower, and leaves it after.

    So threads that share a tower can take turns, and one that embeds many texts can be stopped between two runs.
    """
    token = _TURN.set(turn)
    try:
        yield
    finally:
        _TURN.reset(token)


class TextCache:
    """Rows by token ids, for one embedding space; safe to share between threads.

    A text's embedding depends by rounding alone on the texts that it is embedded with. What is kept is what the first
    batch gave, so an answer may differ from another history's, by no more than the contract's bound between a row alone
    and in a batch (`max_batch_diff`: 1e-5 a component in float32). Without a cache the same holds for the batch that
    a text happens to be in.
    """

    def __init__(self, limit: int = DEFAULT_TEXT_CACHE) -> None:
        """Starts empty.

        Args:
            limit: Rows that are kept at most; 0 keeps none.

        Raises:
            InputError: `limit` is below 0 or above `MAX_TEXT_CACHE`.
        """
        if not 0 <= limit <= MAX_TEXT_CACHE:
            raise InputError(f"text_cache is a number of rows from 0 (none) to {MAX_TEXT_CACHE:,}, not {limit}")
        self.limit = limit
        self.hits = 0
        self.misses = 0
        self._rows: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    def rows(
        self, ids: NDArray[np.int64], embed: Callable[[NDArray[np.int64]], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """Embeddings of texts; only those that are not kept, and each of them once, are embedded.

        Args:
            ids: int64 [N, L], N of 1 or more, rows as `Tokenizer` makes them.
            embed: ids [n, L] to embeddings float32 [n, d]; it runs without the lock.

        Returns:
            float32 [N, d], the caller's own.
        """
        if self.limit == 0:
            return embed(ids)
        keys = [row.tobytes() for row in ids]
        found: dict[bytes, NDArray[np.float32]] = {}
        missing: dict[bytes, int] = {}
        with self._lock:
            for place, key in enumerate(keys):
                if key in self._rows:
                    self._rows.move_to_end(key)
                    found[key] = self._rows[key]
                else:
                    missing.setdefault(key, place)
            self.misses += len(missing)
            self.hits += len(keys) - len(missing)
        if missing:
            fresh = embed(ids[list(missing.values())])
            with self._lock:
                for key, row in zip(missing, fresh, strict=True):
                    # Another thread may have been first; the row is copied, or it would keep its whole batch
                    found[key] = self._rows.setdefault(key, row.copy())
                    self._rows.move_to_end(key)
                while len(self._rows) > self.limit:
                    self._rows.popitem(last=False)
        return np.stack([found[key] for key in keys])

    def describe(self) -> dict[str, int]:
        """Rows kept, how many may be, and texts that were found and not found."""
        with self._lock:
            return {"rows": len(self._rows), "limit": self.limit, "hits": self.hits, "misses": self.misses}


class TextTower:
    """Texts to embeddings. Classifying with baked classes needs none, so nothing is opened before the first text."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        variant: str,
        *,
        backend: str,
        threads: int | None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        """Remembers what to open; the arguments are those of `loading.load`."""
        self._folder, self._manifest, self._variant = folder, manifest, manifest.variants[variant]
        self._backend, self._threads, self._options = backend, threads, options
        self._lock = threading.Lock()
        self._opened: tuple[Tokenizer, Backend] | None = None

    def embed(
        self,
        texts: list[str],
        batch_size: int,
        feeds: Mapping[str, NDArray[Any]],
        cache: TextCache | None = None,
        before: tuple[int, ...] = (),
    ) -> NDArray[np.float32]:
        """Unit-length embeddings, float32 [N, d].

        Args:
            texts: N texts.
            batch_size: Texts per run.
            feeds: Further inputs of the graph, by name.
            cache: What was embedded with the same `feeds` before; None embeds everything.
            before: Ids before every text, see `semantics.context_ids`; the graph must be one that reads them.

        Raises:
            InputError: Something is not a string, or `batch_size` is below 1.
            ArtifactError: A file is missing, changed, or not what the engine can load.
        """
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        tokenizer, backend = self._open()

        def run(ids: NDArray[np.int64]) -> NDArray[np.float32]:
            if self._variant.text_length == "dynamic":
                ids = cut_to_longest(ids, self._manifest.text)
            with nullcontext() if turn is None else turn(len(ids)):
                return np.asarray(run_in_buckets(backend, TEXT_INPUT, ids, (EMBEDDING,), feeds=feeds)[EMBEDDING])

        turn, blocks = _TURN.get(), []
        for start in range(0, len(texts), batch_size):
            ids = tokenizer(texts[start : start + batch_size], prefix=before)
            blocks.append(run(ids) if cache is None else cache.rows(ids, run))
        return np.concatenate(blocks) if blocks else np.empty((0, self._manifest.width), dtype=np.float32)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """See `Tokenizer.lengths`."""
        return self._open()[0].lengths(texts)

    def _open(self) -> tuple[Tokenizer, Backend]:
        with self._lock:
            if self._opened is None:
                tokenizer = checked_path(self._folder, self._manifest.tokenizer)
                with checked_graph(self._folder, self._variant.text, self._manifest) as graph:
                    self._opened = (
                        Tokenizer.from_file(tokenizer, self._manifest.text),
                        open_backend(
                            self._backend,
                            graph,
                            threads=self._threads,
                            compute=self._variant.text_compute,
                            options=self._options,
                        ),
                    )
            return self._opened


def cut_to_longest(ids: NDArray[np.int64], spec: TextSpec) -> NDArray[np.int64]:
    """Ids without the columns that are padding in every text; exact for towers whose text is causal.

    Args:
        ids: int64 [N, L], rows as `Tokenizer` makes them.
        spec: How it makes them. Where a row's end cannot be told from its padding, nothing is cut.

    Returns:
        int64 [N, l], 1 ≤ l ≤ L, every text's end inside.
    """
    if not spec.end_token_ids or spec.pad_side == "left" or (spec.last_token_id, spec.zeroed_token_id) != (None, None):
        return ids
    used = np.flatnonzero((ids != spec.pad_token_id).any(axis=0))
    length = int(used[-1]) + 1 if len(used) else 0
    # Where texts are padded with one of their own end ids, the first of those still belong to the text
    padlike = list(takewhile(lambda token: token == spec.pad_token_id, reversed(spec.end_token_ids)))
    return np.ascontiguousarray(ids[:, : min(max(length + len(padlike), 1), ids.shape[1])])
