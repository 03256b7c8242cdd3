"""The text side of a loaded artifact: tokenizer and graph, opened at the first text and fed no more than they need."""

from __future__ import annotations

import threading
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.artifact import checked_meanwhile, checked_path
from invariclip.backends import open_backend
from invariclip.batching import run_in_buckets
from invariclip.errors import InputError
from invariclip.manifest import EMBEDDING, TEXT_INPUT
from invariclip.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.backends import Backend
    from invariclip.manifest import Manifest
    from invariclip.text_cache import TextCache
    from invariclip.tokenizer import TextSpec


class TextTower:
    """Texts to embeddings. Classifying with baked classes needs none, so nothing is opened before the first text."""

    def __init__(self, folder: Path, manifest: Manifest, variant: str, *, backend: str, threads: int | None) -> None:
        """Remembers what to open; the arguments are those of `loading.load`."""
        self._folder, self._manifest, self._variant = folder, manifest, manifest.variants[variant]
        self._backend, self._threads = backend, threads
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
            return np.asarray(run_in_buckets(backend, TEXT_INPUT, ids, (EMBEDDING,), feeds=feeds)[EMBEDDING])

        blocks = []
        for start in range(0, len(texts), batch_size):
            ids = tokenizer(texts[start : start + batch_size], prefix=before)
            blocks.append(run(ids) if cache is None else cache.rows(ids, run))
        return np.concatenate(blocks) if blocks else np.empty((0, self._manifest.width), dtype=np.float32)

    def _open(self) -> tuple[Tokenizer, Backend]:
        with self._lock:
            if self._opened is None:
                tokenizer = checked_path(self._folder, self._manifest.tokenizer)
                with checked_meanwhile(self._folder, self._variant.text) as graph:
                    self._opened = (
                        Tokenizer.from_file(tokenizer, self._manifest.text),
                        open_backend(self._backend, graph, threads=self._threads, compute=self._variant.text_compute),
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
